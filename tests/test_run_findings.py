"""Findings about all layers of a run, from tables whose right diagnosis is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.table.columns import DTYPES

Row = dict[str, object]


def layer(name: str, top: float, stderr: float = 0.02, **more: object) -> list[Row]:
    row = {"parameter": name, "metric": "cosine", "kind": "population", "n_examples": 256,
           "n_eff": 200.0, "stderr": stderr, "m": 8, "n": 6}  # fmt: skip
    values = {"optimal": top, "shampoo-squared": top - 0.2}
    return [row | {"approximation": of, "value": x} | more for of, x in values.items()]


def diagnose(rows: Sequence[Row], step: bool = False) -> dict[str, kp.Finding]:
    """The findings about the run, by subject."""
    columns = [name for name in DTYPES if step or name != "step"]
    found = [one for one in kp.diagnose(pd.DataFrame(rows, columns=columns)) if not one.parameter]
    assert len(found) == len({one.subject for one in found})
    return {one.subject: one for one in found}


def losses(values: Sequence[float]) -> list[Row]:
    return [{"metric": "train_loss", "step": 10 * k, "value": x} for k, x in enumerate(values)]


# ---------------------------------------------------------------- the worst layers


def test_the_worst_layers_are_ranked_by_their_cosine() -> None:
    tops = {"fc1": 0.95, "fc2": 0.62, "conv1": 0.71, "conv2": 0.85, "conv3": 0.8}
    rows = [row for name, top in tops.items() for row in layer(name, top)]
    one = diagnose(rows)["worst approximated layers"]
    assert (one.level, one.code) == ("notice", Code.FORM_FITS_WORST)
    assert one.remedy == Remedy.GO_BEYOND
    assert one.evidence == {"fc2": 0.62, "conv1": 0.71, "conv3": 0.8}
    assert len(one.details["ranked"]) == 4
    assert one.details["helps"] == {"fc2": [], "conv1": [], "conv3": []}


def test_what_would_help_the_worst_layers() -> None:
    rows = layer("a", 0.8, 0.002) + layer("b", 0.7, 0.002)
    extra = layer("b", 0.78, 0.002)[0] | {"approximation": "eigen-corrected"}
    one = diagnose([*rows, extra])["worst approximated layers"]
    assert one.details["helps"] == {"b": [Code.EIGENVALUES], "a": []}


def test_it_is_good_where_all_are_clearly_good() -> None:
    rows = layer("fc1", 0.97, 0.002) + layer("fc2", 0.94, 0.002)
    one = diagnose(rows)["worst approximated layers"]
    assert (one.level, one.code) == ("good", Code.FORM_FITS)
    assert one.evidence == {"fc2": 0.94, "fc1": 0.97}
    assert one.details["count"] == 2
    unsure = diagnose(layer("fc1", 0.97, 0.002) + layer("fc2", 0.94, 0.03))
    assert unsure["worst approximated layers"].level == "notice"


def test_what_cannot_be_judged_is_not_ranked() -> None:
    rows = layer("a", 0.8) + layer("b", 0.7)
    vector = layer("v", 0.1, m=1)
    few = layer("few", 0.2, n_eff=12.0)
    sampled = layer("plug-in", 0.3, math.nan, kind="plugin")
    one = diagnose([*rows, *vector, *few, *sampled])["worst approximated layers"]
    assert list(one.evidence) == ["b", "a"]
    assert "worst approximated layers" not in diagnose(layer("a", 0.8))
    exact = [row | {"target": "trajectory"} for row in sampled]
    assert diagnose(rows + exact)["worst approximated layers"].evidence["plug-in"] == 0.3


def test_a_poor_rule_alone_is_no_bad_fit_of_the_form() -> None:
    """The optimum is at least as good as each rule: those prove a good fit, never a bad one."""

    def alone(name: str, value: float) -> Row:
        return layer(name, value, 0.002)[0] | {"approximation": "kfac"}

    found = diagnose([alone("a", 0.5), alone("b", 0.98)])
    assert "worst approximated layers" not in found
    one = found["optimum not measured"]
    assert one.evidence == {"a": 0.5}
    assert one.details["ranked"][0][1] == "kfac"
    assert one.remedy == Remedy.MEASURE_OPTIMAL
    good = diagnose([alone("a", 0.97), alone("b", 0.98)])
    assert good["worst approximated layers"].level == "good"
    both = diagnose([alone("a", 0.5), *layer("b", 0.6, 0.002)])
    assert list(both["worst approximated layers"].evidence) == ["b"]
    assert list(both["optimum not measured"].evidence) == ["a"]


def test_only_the_last_step_counts() -> None:
    rows = layer("a", 0.5, step=0) + layer("b", 0.5, step=0)
    rows += layer("a", 0.98, 0.001, step=9) + layer("b", 0.99, 0.001, step=9)
    assert diagnose(rows, step=True)["worst approximated layers"].level == "good"


# ---------------------------------------------------------------- copies, embeddings


def test_copies_are_told_once() -> None:
    rows = layer("a", 0.8) + layer("b", 0.7)
    rows += [
        {"parameter": name, "metric": metric, "kind": "population", "value": 1.0,
         "copies": count, "n_examples": 256}
        for name, count in (("a", 3), ("b", 7)) for metric in ("norm",)
    ]  # fmt: skip
    one = diagnose(rows)["repeated examples"]
    assert (one.level, one.code) == ("notice", Code.REPEATED_EXAMPLES)
    assert one.evidence == {"copies": 7}
    assert one.details == {"layers": ["a", "b"], "examples": 256, "differ": True}
    assert one.remedy == Remedy.MEASURE_ONCE
    assert "repeated examples" not in diagnose(layer("a", 0.8))


def test_copies_of_real_draws_are_seen() -> None:
    torch.manual_seed(0)
    d, a = torch.randn(256, 5), torch.randn(256, 4)
    d[1], a[1] = d[0], a[0]
    twice = kp.compare(kp.GradientSamples.from_factors(d, a), ["optimal", "shampoo-squared"])
    found = {one.code: one for one in kp.diagnose(twice)}
    assert found[Code.REPEATED_EXAMPLES].evidence == {"copies": 1}
    assert found[Code.REPEATED_EXAMPLES].details["layers"] == ["samples"]


def test_an_embedding_is_told_what_to_do_without_kfac() -> None:
    torch.manual_seed(0)
    tokens, d = torch.randint(0, 9, (64, 3)), torch.randn(64, 3, 4)
    samples = kp.GradientSamples.from_embedding(tokens, d, 9)
    scores = kp.compare({"wte": samples}, ["optimal", "shampoo-squared", "kfac"])
    one = {found.code: found for found in kp.diagnose(scores)}[Code.KFAC_UNDEFINED]
    assert one.details["layers"] == ["wte"]
    assert one.remedy == Remedy.JUDGE_OTHER_RULES
    without = kp.compare({"wte": samples}, ["optimal", "shampoo-squared"])
    assert Code.KFAC_UNDEFINED not in {found.code for found in kp.diagnose(without)}


# ---------------------------------------------------------------- no sampling error


def test_batch_gradients_are_judged_as_the_matrix_that_they_are() -> None:
    """Eight batches are few draws, but they are H, and the table and the findings say the same."""
    torch.manual_seed(0)
    single = kp.GradientSamples.from_factors(torch.randn(64, 5), torch.randn(64, 4))
    batches = kp.batch_gradients(single, 8, batches=8)
    scores = kp.compare(batches, ["optimal", "shampoo-squared", "shampoo"])
    assert scores.table["reason"].eq("not-independent").any()
    found = kp.diagnose(scores)
    assert Code.TOO_FEW_SAMPLES not in {one.code for one in found}
    one = {finding.subject: finding for finding in found}["distance to the optimum"]
    assert one.level in ("good", "notice")
    values = scores.table[(scores.table["metric"] == "cosine") & scores.table["value"].notna()]
    values = values.set_index("approximation")["value"]
    assert one.evidence["gap"] == values["optimal"] - values["shampoo-squared"]
    assert one.evidence["stderr"] == 0
    alone = kp.diagnose(kp.compare(batches, ["optimal"], estimates="population"))
    assert (alone.findings[0].code, alone.findings[0].remedy) == (
        Code.UNDEFINED, Remedy.ADD_PLUGIN,
    )  # fmt: skip


# ---------------------------------------------------------------- bad tables


@pytest.mark.parametrize(
    ("values", "evidence"),
    [
        ([2.3, 1.0, math.nan, math.nan], {"since": 20}),
        ([2.3, math.inf], {"since": 10}),
        ([math.nan], {"since": 0}),
        ([2.3, 50.0], {"first": 2.3, "last": 50}),
        ([math.nan, 2.0, 1.0], None),
        ([-4.0, -2.0, 1.0], None),  # of a loss that may be negative no ratio says anything
        ([0.0, 0.5], None),
    ],
)
def test_a_run_that_diverged(values: Sequence[float], evidence: dict[str, float] | None) -> None:
    found = diagnose([*layer("a", 0.8, step=0), *losses(values)], step=True)
    assert ("divergence" in found) == (evidence is not None)
    if evidence is not None:
        assert found["divergence"].level == "warning"
        assert found["divergence"].evidence == evidence


@pytest.mark.parametrize("step", [False, True])
def test_an_empty_table_says_that_it_is(step: bool) -> None:
    found = diagnose([], step=step)
    assert set(found) == {"nothing to judge"}
    assert found["nothing to judge"].remedy == Remedy.MEASURE_COSINE


def test_a_table_of_losses_alone() -> None:
    found = diagnose(losses([2.3, math.nan]), step=True)
    assert set(found) == {"divergence", "nothing to judge"}
