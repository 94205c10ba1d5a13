"""Quality numbers: values, agreement of all routes, relations between them, and undefined ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UndefinedMetricWarning
from tests import oracle
from tests import reference_fixture as fixture
from tests.cases import APPROXIMATIONS, Case, factors_case, matrices_case
from tests.grid import Checks, on_every_case
from tests.tolerances import PRINTED, SCALAR, ZERO_ERROR

METRICS = (kp.cosine_similarity, kp.relative_error, kp.best_scale, kp.best_scale_error)
ORACLES = {
    kp.cosine_similarity: oracle.cosine,
    kp.relative_error: oracle.relative_error,
    kp.best_scale: oracle.best_scale,
    kp.best_scale_error: oracle.best_scale_error,
}


# ---------------------------------------------------------------- the reference fixture


def _fixture(kind: str) -> kp.GradientSamples:
    """The same four samples, as matrices, or as sums over rows or over columns."""
    G = torch.tensor(fixture.SAMPLES)
    if kind == "matrices":
        return kp.GradientSamples.from_matrices(G)
    if kind == "rows":  # T = 2: G = sum_t e_t (row t)^T
        return kp.GradientSamples.from_factors(torch.eye(2).double().expand(4, 2, 2), G)
    # T = 3: G = sum_t (column t) e_t^T
    return kp.GradientSamples.from_factors(G.mT, torch.eye(3).double().expand(4, 3, 3))


@pytest.fixture(
    params=[
        (kind, route)
        for kind in ("matrices", "rows", "columns")
        for route in ("auto", "parameter", "dense")
    ],
    ids="-".join,
)
def H(request: pytest.FixtureRequest) -> kp.SecondMoment:
    kind, route = request.param
    return kp.SecondMoment(_fixture(kind), route=route)


def test_fixture_target(H: kp.SecondMoment) -> None:
    assert H.norm() ** 2 == pytest.approx(fixture.SQUARED_NORM, rel=SCALAR)
    assert H.trace() == pytest.approx(fixture.TRACE, rel=SCALAR)
    spectrum = H.kronecker_spectrum(4).tolist()
    assert spectrum == pytest.approx(fixture.SPECTRUM, abs=PRINTED)


@pytest.mark.parametrize("name", sorted(fixture.COSINE))
def test_fixture_cosines(H: kp.SecondMoment, name: str) -> None:
    value = kp.cosine_similarity(H, kp.approximate(H, name))
    assert value == pytest.approx(fixture.COSINE[name], abs=PRINTED)


@pytest.mark.parametrize("name", sorted(fixture.RELATIVE_ERROR))
def test_fixture_relative_errors(H: kp.SecondMoment, name: str) -> None:
    value = kp.relative_error(H, kp.approximate(H, name))
    assert value == pytest.approx(fixture.RELATIVE_ERROR[name], abs=PRINTED)


def test_fixture_best_scale(H: kp.SecondMoment) -> None:
    value = kp.best_scale(H, kp.approximate(H, "shampoo-squared"))
    assert value == pytest.approx(fixture.BEST_SCALE_OF_SHAMPOO_SQUARED, abs=PRINTED)


# ---------------------------------------------------------------- every route, every approximation


@on_every_case()
def test_every_metric_of_every_approximation(case: Case) -> None:
    targets = [case.operator(route) for route in case.routes]
    with Checks() as check:
        for name in case.approximations:
            fits = [(H, kp.approximate(H, name)) for H in targets]
            check(name, agree_with_the_oracle_and_each_other, case, name, fits)
            check(name, best_scale, case, name, *fits[0])
            check(name, relations_between_the_metrics, *fits[0])


def agree_with_the_oracle_and_each_other(case: Case, name: str, fits: list[Any]) -> None:
    """On every route."""
    expected = case.dense(name)
    rows = []
    for H, P in fits:
        rows.append(
            (
                H.norm() / oracle.norm(case.H),
                P.norm() / oracle.norm(expected),
                kp.cosine_similarity(H, P),
                kp.relative_error(H, P) ** 2,
                kp.best_scale_error(H, P) ** 2,
            )
        )
    values = np.array(rows)
    cosine = oracle.cosine(case.H, expected)
    error = oracle.relative_error(case.H, expected) ** 2
    truth = np.array([1, 1, cosine, error, oracle.best_scale_error(case.H, expected) ** 2])
    # an approximation much larger than H has a squared error far above one
    size = np.array([1, 1, 1, max(1.0, error), 1])
    assert np.all(np.abs(values - truth) <= SCALAR * size), (values - truth) / size
    assert np.all(np.ptp(values, axis=0) <= SCALAR * size)


def best_scale(case: Case, name: str, H: kp.SecondMoment, P: Any) -> None:
    value = kp.best_scale(H, P)
    assert value == pytest.approx(oracle.best_scale(case.H, case.dense(name)), rel=10 * SCALAR)


def relations_between_the_metrics(H: kp.SecondMoment, P: Any) -> None:
    """|H - P|^2 = |H - cP|^2 + (c - 1)^2 |P|^2 at the best c, and cos = c |P| / |H|."""
    cosine, scale = kp.cosine_similarity(H, P), kp.best_scale(H, P)
    error, best = kp.relative_error(H, P), kp.best_scale_error(H, P)
    assert best**2 == pytest.approx(1 - cosine**2, abs=SCALAR)
    total = best**2 + ((scale - 1) / scale * cosine) ** 2
    assert error**2 == pytest.approx(total, rel=10 * SCALAR, abs=10 * SCALAR)
    assert best <= error + ZERO_ERROR
    assert -SCALAR <= cosine <= 1 + SCALAR


def test_relative_error_at_the_best_scale_is_the_best_scale_error() -> None:
    case = factors_case("", 8, 4, 3, positions=2)
    H = case.operator()
    P = kp.approximate(H, "shampoo")
    scaled = kp.KroneckerOperator(P.left, P.right, P.scale * kp.best_scale(H, P))
    assert kp.relative_error(H, scaled) == pytest.approx(kp.best_scale_error(H, P), abs=SCALAR)
    assert kp.best_scale(H, scaled) == pytest.approx(1, abs=SCALAR)
    assert kp.cosine_similarity(H, scaled) == pytest.approx(kp.cosine_similarity(H, P), abs=SCALAR)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_python_floats_between_any_two_operators(
    metric: Callable[..., float], rng: np.random.Generator
) -> None:
    first, second = factors_case("", 7, 3, 4), matrices_case("", 6, 3, 4)
    H, K = first.operator(), second.operator()
    pairs = [
        (H, K, first.H, second.H),
        (K, H, second.H, first.H),
        (H, kp.approximate(K, "diagonal"), first.H, second.dense("diagonal")),
        (
            kp.approximate(H, "shampoo-squared"),
            kp.approximate(K, "eigen-corrected"),
            first.dense("shampoo-squared"),
            second.dense("eigen-corrected"),
        ),
        (kp.approximate(K, "diagonal"), H, second.dense("diagonal"), first.H),
    ]
    for P, Q, dense_P, dense_Q in pairs:
        value = metric(P, Q)
        assert type(value) is float
        assert value == pytest.approx(ORACLES[metric](dense_P, dense_Q), abs=10 * SCALAR)


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_an_operator_equals_itself(route: str) -> None:
    H = factors_case("", 7, 3, 4).operator(route)
    assert kp.cosine_similarity(H, H) == pytest.approx(1, abs=SCALAR)
    assert kp.best_scale(H, H) == pytest.approx(1, abs=SCALAR)
    assert kp.relative_error(H, H) <= ZERO_ERROR
    assert kp.best_scale_error(H, H) <= ZERO_ERROR


# ---------------------------------------------------------------- undefined numbers and bad input

ZERO = kp.DiagonalOperator(torch.zeros(3, 2, dtype=torch.float64))
ONE = kp.DiagonalOperator(torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
@pytest.mark.parametrize("name", ["optimal", "shampoo-squared", "eigen-corrected", "diagonal"])
@pytest.mark.parametrize("metric", METRICS)
def test_quality_of_a_zero_target_is_nan_with_a_warning(
    metric: Callable[..., float], name: str, route: str
) -> None:
    samples = kp.GradientSamples.from_factors(torch.zeros(4, 3), torch.ones(4, 2))
    H = kp.SecondMoment(samples, route=route)
    P = kp.approximate(H, name)
    with pytest.warns(UndefinedMetricWarning, match="H = 0"):
        value = metric(H, P)
    assert type(value) is float
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("metric", "H", "P"),
    [
        (kp.cosine_similarity, ZERO, ONE),
        (kp.cosine_similarity, ONE, ZERO),
        (kp.relative_error, ZERO, ONE),
        (kp.best_scale, ONE, ZERO),  # any scale is as good
        (kp.best_scale_error, ZERO, ONE),
    ],
)
def test_a_number_is_undefined_where_it_divides_by_zero(
    metric: Callable[..., float], H: kp.DiagonalOperator, P: kp.DiagonalOperator
) -> None:
    with pytest.warns(UndefinedMetricWarning, match="H = 0" if H is ZERO else "P = 0"):
        assert math.isnan(metric(H, P))


def test_a_zero_approximation_misses_everything() -> None:
    assert kp.relative_error(ONE, ZERO) == 1.0


@pytest.mark.parametrize("metric", METRICS)
def test_a_non_finite_operator_has_no_score(metric: Callable[..., float]) -> None:
    """As of a diverged optimizer; above all it is no perfect approximation."""
    values = torch.full((3, 2), float("nan"), dtype=torch.float64)
    with pytest.warns(UndefinedMetricWarning, match=r"(?i)finite|nan"):
        assert math.isnan(metric(ONE, kp.DiagonalOperator(values)))


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
@pytest.mark.parametrize("scale", [1e-60, 1e60])
@pytest.mark.filterwarnings("ignore::kronecker_probe.errors.UndefinedMetricWarning")
def test_a_score_beyond_float64_is_right_or_nan(scale: float, route: str) -> None:
    case = factors_case("", 7, 4, 3)
    assert case.output_grads is not None
    H = case.with_(output_grads=scale * case.output_grads).operator(route)
    exact = case.operator(route)

    def is_right_or_nan(metric: Callable[..., float], name: str) -> None:
        value, truth = (metric(one, kp.approximate(one, name)) for one in (H, exact))
        assert math.isnan(value) or value == pytest.approx(truth, abs=SCALAR)

    with Checks() as check:
        for name in APPROXIMATIONS:
            for metric in METRICS:
                check(f"{metric.__name__} of {name}", is_right_or_nan, metric, name)


@pytest.mark.parametrize("metric", METRICS)
def test_mismatched_shapes_are_refused(metric: Callable[..., float]) -> None:
    other = kp.DiagonalOperator(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"(?s)3.*2"):
        metric(ONE, other)
