"""Specs: names with options, their checks, labels and aliases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronecker_probe as kp
from kronecker_probe.approximations import ALIASES, options_of
from kronecker_probe.errors import InvalidInputError, UnknownNameError, UnsupportedError
from kronecker_probe.operators.base import Operator
from tests.cases import assert_close, dense, factors_case
from tests.tolerances import ENTRIES

CASE = factors_case("", 30, 4, 3)
REQUIRED = {"divergence": {"q": 0.5}}


@pytest.mark.parametrize(
    ("spec", "options", "label"),
    [
        ("kfac", {}, "kfac"),
        ("divergence:q=0", {}, "divergence:q=0"),
        ("divergence:q=1/2", {}, "divergence:q=0.5"),
        ("divergence:q=0.50", {}, "divergence:q=0.5"),
        ("divergence", {"q": 2}, "divergence:q=2"),
        ("divergence", {"q": np.float32(1.5)}, "divergence:q=1.5"),
        ("kl", {}, "divergence:q=0"),
        ("kl:block_size=8", {}, "divergence:q=0,block_size=8"),
        ("optimal:rank=1", {}, "optimal"),
        ("optimal", {"rank": 2}, "optimal:rank=2"),
        ("optimal", {"rank": np.int64(2), "block_size": None}, "optimal:rank=2"),
        ("optimal:block_size=128,rank=2", {}, "optimal:rank=2,block_size=128"),
        (" optimal : rank = 2 , block_size = 128 ", {}, "optimal:rank=2,block_size=128"),
        ("shampoo-squared:block_size=128", {}, "shampoo-squared:block_size=128"),
        ("kfac:block_size=1e2", {}, "kfac:block_size=100"),
        ("kfac", {"block_size": 3.0}, "kfac:block_size=3"),
    ],
)
def test_labels(spec: str, options: dict[str, object], label: str) -> None:
    found = kp.resolve(spec, **options)
    assert found.label == label
    assert kp.resolve(label) == found


@pytest.mark.parametrize("name", list(kp.APPROXIMATIONS))
def test_spec_and_keywords_are_the_same_operator(name: str) -> None:
    options = REQUIRED.get(name, {}) | {"block_size": 2}
    H = CASE.operator()
    label = kp.resolve(name, **options).label
    by_spec, by_keywords = kp.approximate(H, label), kp.approximate(H, name, **options)
    # sums may round differently with where their arrays lie in memory
    assert_close(dense(by_spec), dense(by_keywords), ENTRIES)
    assert by_spec.shape == (4, 3)


def test_every_approximation_is_an_operator_and_defaults_need_no_options() -> None:
    H = CASE.operator()
    for name in kp.APPROXIMATIONS:
        assert isinstance(kp.approximate(H, name, **REQUIRED.get(name, {})), Operator)
    assert set(kp.DEFAULT_APPROXIMATIONS) < set(kp.APPROXIMATIONS)
    assert not set(kp.DEFAULT_APPROXIMATIONS) & set(REQUIRED)
    for alias in ALIASES:
        assert alias not in kp.APPROXIMATIONS
        assert kp.resolve(alias).name in kp.APPROXIMATIONS


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("divergance:q=0", r"'divergance'.*Did you mean 'divergence'"),
        ("optimal:ranks=2", r"option of 'optimal' 'ranks'.*Did you mean 'rank'.*block_size, rank"),
        ("kfac:q=0", r"option of 'kfac' 'q'.*Known: block_size"),
        ("kfac:blocksize=2", r"'blocksize'.*Did you mean 'block_size'"),
        ("tkfca", r"Did you mean 'tkfac'"),
    ],
)
def test_unknown_names_suggest_the_nearest(spec: str, words: str) -> None:
    with pytest.raises(UnknownNameError, match=words):
        kp.resolve(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("divergence", r"divergence needs q; give a number from 0 to 2"),
        ("divergence:q=3", r"divergence got q='3'; give a number from 0 to 2: 0 \(KL\)"),
        ("divergence:q=", r"has 'q=' in place of an option; write divergence:option=value"),
        ("divergence:q", r"'q' in place of an option"),
        ("divergence:", r"'' in place of an option"),
        ("divergence:q=1/0", r"q='1/0'"),
        ("optimal:rank=0", r"optimal got rank='0'.*>= 1"),
        ("optimal:rank=1.5", r"rank='1.5'"),
        ("optimal:rank=two", r"rank='two'"),
        ("optimal:rank=2,rank=3", r"gives 'rank' twice"),
        ("kl:q=1", r"'kl:q=1' has q=0 and was given q='1' as well"),
        ("kfac:block_size=-4", r"block_size='-4'.*integer >= 1"),
        ("kfac:block_size=inf", r"block_size='inf'"),
    ],
)
def test_bad_specs_name_the_option_the_value_and_the_remedy(spec: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        kp.resolve(spec)


def test_an_option_in_both_places_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match=r"'optimal:rank=2' has rank=2 and was given rank=3"
    ):
        kp.approximate(CASE.operator(), "optimal:rank=2", rank=3)
    with pytest.raises(UnknownNameError, match=r"'ranks'.*Did you mean 'rank'"):
        kp.approximate(CASE.operator(), "optimal", ranks=3)


@pytest.mark.parametrize("wrong", [3, None, b"kfac", ("kfac",)])
def test_names_that_are_no_text_are_refused(wrong: object) -> None:
    with pytest.raises(UnknownNameError, match="Known: "):
        kp.approximate(CASE.operator(), wrong)  # type: ignore[arg-type]


@given(st.text(alphabet="kfacoptimalrank:=,q12/. -", max_size=24))
def test_any_text_resolves_to_a_stable_label_or_is_refused(text: str) -> None:
    try:
        spec = kp.resolve(text)
    except InvalidInputError:
        return
    assert kp.resolve(spec.label) == spec


def test_options_are_declared_once_each() -> None:
    for name in kp.APPROXIMATIONS:
        names = [option.name for option in options_of(name)]
        assert len(set(names)) == len(names)
        assert names[-1] == "block_size"


def test_compare_takes_specs_and_labels_its_rows() -> None:
    specs = ["kl", "divergence:q=0", "optimal:rank=2", "shampoo-squared:block_size=2", "tkfac"]
    scores = kp.compare(CASE.samples(), specs)
    shown = list(dict.fromkeys(scores.table["approximation"].dropna()))
    assert shown == [
        "divergence:q=0", "optimal:rank=2", "shampoo-squared:block_size=2", "tkfac",
    ]  # fmt: skip
    H = CASE.operator()
    for label in shown:
        expected = kp.cosine_similarity(H, kp.approximate(H, label))
        rows = scores.table[scores.table["approximation"] == label]
        value = rows.loc[(rows["metric"] == "cosine") & (rows["kind"] == "plugin"), "value"]
        assert value.item() == pytest.approx(expected, rel=1e-9)


def test_compare_shows_the_six_by_default_and_says_why_one_is_absent() -> None:
    shown = kp.compare(CASE.samples()).table["approximation"].dropna()
    assert tuple(dict.fromkeys(shown)) == kp.DEFAULT_APPROXIMATIONS
    few = kp.GradientSamples.from_matrices(torch.randn(1, 3, 3, dtype=torch.float64))
    rows = kp.compare(few, ["kl", "tkfac"]).table
    cosines = rows[(rows["metric"] == "cosine") & (rows["kind"] == "plugin")]
    notes = cosines.set_index("approximation")["note"]
    assert "q=0" in notes["divergence:q=0"]
    assert "TKFAC" in notes["tkfac"]


def test_unsupported_samples_are_named() -> None:
    matrices = kp.GradientSamples.from_matrices(torch.randn(4, 3, 3, dtype=torch.float64))
    for name in ("kfac-reduce", "tkfac", "ekfac"):
        with pytest.raises(UnsupportedError, match="from_factors"):
            kp.approximate(kp.SecondMoment(matrices), name)
