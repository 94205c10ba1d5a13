"""The metrics by name: their values are those of the functions, and bad specs are refused."""

from __future__ import annotations

import math

import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.operators import spectral_form
from kronecker_probe.operators.base import Operator
from kronecker_probe.quality.metrics.catalog import ESTIMABLE, METRICS, resolve_metric
from kronecker_probe.table.metric_info import metric_info
from tests.cases import factors_case


@pytest.fixture
def H() -> kp.SecondMoment:
    return factors_case("", 20, 4, 3).operator()


@pytest.fixture
def P(H: kp.SecondMoment) -> Operator:
    return kp.approximate(H, "shampoo-squared")


def test_rows_are_the_values_of_the_functions(H: kp.SecondMoment, P: Operator) -> None:
    direction = kp.direction_agreement(H, P, powers=0.25, damping=0.01).table.iloc[0]
    truth = {
        "cosine": kp.cosine_similarity(H, P),
        "relative_error": kp.relative_error(H, P),
        "best_scale_error": kp.best_scale_error(H, P),
        "best_scale": kp.best_scale(H, P),
        "trace_ratio": kp.trace_ratio(H, P),
        "largest_error_eigenvalue": kp.largest_error_eigenvalue(H, P, relative=True),
        "off_diagonal_mass": kp.off_diagonal_mass(H, P),
        "eigenvalue_error": kp.split_error(H, P).eigenvalues,
        "kl_divergence:damping=0.01": kp.kl_divergence(H, P, damping=0.01).value,
        "stein_divergence:damping=0.001": kp.stein_divergence(H, P).value,
        "direction_cosine:power=0.25,damping=0.01,gradients=16": direction["cosine"],
        "direction_length_ratio:power=0.25,damping=0.01,gradients=16": direction["length_ratio"],
    }
    specs = (
        *ESTIMABLE,
        "trace_ratio",
        "largest_error_eigenvalue",
        "off_diagonal_mass",
        "eigenvalue_error",
        "kl_divergence:damping=1e-2",
        "stein_divergence",
        "direction:damping=0.01,power=1/4",
    )
    assert {spec.partition(":")[0] for spec in specs} == set(METRICS)
    found = [row for spec in specs for row in resolve_metric(spec).rows(H, P)]
    assert {row["metric"]: row["value"] for row in found} == pytest.approx(truth)
    assert all(row["note"] is None for row in found)
    stderrs = {row["metric"].partition(":")[0]: row["stderr"] for row in found}
    assert stderrs["direction_cosine"] == pytest.approx(direction["cosine_stderr"])
    assert stderrs["kl_divergence"] == 0.0  # exact
    assert stderrs["trace_ratio"] is None


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_canonical_name_means_itself(name: str) -> None:
    chosen = resolve_metric(name)
    assert resolve_metric(chosen.name) == chosen
    assert all(f"{option.name}=" in chosen.name for option in METRICS[name].options)
    for column in chosen.columns:
        assert metric_info(column).label.startswith(metric_info(column.partition(":")[0]).label)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_zero_target_is_a_note(name: str) -> None:
    H = kp.SecondMoment(kp.GradientSamples.from_factors(torch.zeros(3, 4), torch.ones(3, 2)))
    rows = resolve_metric(name).rows(H, kp.approximate(H, "shampoo-squared"))
    assert [row["metric"].partition(":")[0] for row in rows] == list(METRICS[name].gives)
    for row in rows:
        assert math.isnan(row["value"])
        assert "H = 0" in row["note"]


@pytest.mark.parametrize("name", ["kl_divergence", "direction", "eigenvalue_error"])
def test_what_has_no_exact_roots_is_a_note(
    name: str, H: kp.SecondMoment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectral_form, "EXACT_SIZE", 4)
    rows = resolve_metric(name).rows(H, kp.DenseOperator(torch.eye(12), (4, 3)))
    assert all(math.isnan(row["value"]) and "no exact" in row["note"] for row in rows)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_scaled_is_true_of_what_depends_on_the_scale(
    name: str, H: kp.SecondMoment, P: kp.KroneckerOperator
) -> None:
    metric = resolve_metric(name)
    other = kp.KroneckerOperator(P.left, P.right, 50 * P.scale)
    values = [[row["value"] for row in metric.rows(H, one)] for one in (P, other)]
    assert (values[0] != pytest.approx(values[1], rel=1e-6)) == metric.metric.scaled


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'kl_divergence'"):
        resolve_metric("kl_divergnce")
    with pytest.raises(UnknownNameError, match="'damping'"):
        resolve_metric("kl_divergence:dampng=1")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("trace_ratio:damping=1", "no options"),
        ("kl_divergence:damping", "in place of an option"),
        (
            "kl_divergence:damping=small",
            "kl_divergence got damping='small'; give a positive number",
        ),
        ("kl_divergence:damping=0", "positive"),
        ("kl_divergence:damping=-1", "positive"),
        ("kl_divergence:damping=inf", "number, for example damping=0.001"),
        ("direction:power=0", "power"),
        ("direction:power=2", "power"),
        ("direction:power=1/0", "power"),
        ("direction:gradients=0", "gradients"),
        ("direction:gradients=2.5", "gradients"),
        ("direction:", "option"),
    ],
)
def test_bad_options_are_refused(spec: str, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        resolve_metric(spec)
