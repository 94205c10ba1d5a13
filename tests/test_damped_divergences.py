"""Damped KL and Stein divergences against dense log-determinants, their theorems and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UndefinedMetricWarning, UnsupportedError
from kronecker_probe.operators import spectral_form
from kronecker_probe.quality.metrics import divergences
from tests.cases import CASES, Case, factors_case, matrices_case
from tests.grid import Checks, on_every_case
from tests.oracle import Array
from tests.test_spectral_metrics import kronecker_exact

every = pytest.mark.parametrize("metric", [kp.kl_divergence, kp.stein_divergence])
# Log-determinants of matrices of condition number up to 1e6 here, relative to the sum of the terms.
LOG_DET = 1e-9


def kl(A: Array, B: Array) -> float:
    trace = np.trace(np.linalg.solve(B, A))
    return float(trace - len(A) - np.linalg.slogdet(A)[1] + np.linalg.slogdet(B)[1]) / 2


def stein(A: Array, B: Array) -> float:
    mean = np.linalg.slogdet((A + B) / 2)[1]
    return float(mean - (np.linalg.slogdet(A)[1] + np.linalg.slogdet(B)[1]) / 2)


def damped(matrix: Array, d: float) -> Array:
    return matrix + d * np.eye(len(matrix))


@on_every_case()
def test_divergences_equal_dense_determinants(case: Case) -> None:
    H = case.operator()
    with Checks() as check:
        for name in case.approximations:
            P = kp.approximate(H, name)
            for rho in (1e-4, 1.0):
                check(f"{name} at {rho}", equal_dense_determinants, case, name, H, P, rho)


def equal_dense_determinants(case: Case, name: str, H: kp.SecondMoment, P: Any, rho: float) -> None:
    dense = case.dense(name)
    d = rho * np.trace(case.H) / len(case.H)
    A, B = damped(case.H, d), damped(dense, d)
    for metric, truth in ((kp.kl_divergence, kl(A, B)), (kp.stein_divergence, stein(A, B))):
        found = metric(H, P, damping=rho)
        assert found.stderr == 0.0
        assert found.damping == pytest.approx(d)
        size = max(1.0, truth) * len(A)
        assert found.value == pytest.approx(truth, abs=LOG_DET * size)
        absolute = metric(H, P, damping=d, relative=False)
        assert absolute.value == pytest.approx(found.value, rel=1e-9, abs=LOG_DET * size)


def test_the_log_determinant_itself_equals_logm() -> None:
    """An oracle of another kind for one case: tr log by scipy.linalg.logm."""
    case = factors_case("", 6, 4, 3)
    d = 1e-2 * np.trace(case.H) / 12
    A, B = damped(case.H, d), damped(case.dense("kfac"), d)
    log = np.trace(scipy.linalg.logm(B).real) - np.trace(scipy.linalg.logm(A).real)
    truth = (np.trace(np.linalg.solve(B, A)) - 12 + log) / 2
    H = case.operator()
    found = kp.kl_divergence(H, kp.approximate(H, "kfac"), damping=1e-2)
    assert found.value == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if str(c) in {"matrices", "T1-N-lt-m", "T3", "C3-T1", "T1-larger"}],
    ids=str,
)
def test_second_moments_may_stand_on_either_side(case: Case) -> None:
    """KL of P from H: the second moment as the reference, whose eigenvectors are draws."""
    H = case.operator()
    P = kp.approximate(H, "shampoo-squared")
    d = 1e-2 * H.trace() / len(case.H)
    A, B = damped(case.H, d), damped(case.dense("shampoo-squared"), d)
    assert kp.kl_divergence(P, H, damping=d, relative=False).value == pytest.approx(
        kl(B, A), rel=1e-7
    )
    assert kp.stein_divergence(P, H, damping=d, relative=False).value == pytest.approx(
        stein(A, B), rel=1e-7
    )


# ---------------------------------------------------------------- theorems


@every
@pytest.mark.parametrize("name", ["optimal", "shampoo-squared", "eigen-corrected"])
def test_a_kronecker_target_has_no_divergence(
    metric: Callable[..., kp.Divergence], name: str
) -> None:
    H = kronecker_exact(4, 3).operator()
    assert abs(float(metric(H, kp.approximate(H, name)))) <= 1e-9


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["shampoo-squared", "kfac", "eigen-corrected"]),
    rho=st.floats(1e-3, 10),
)
def test_positive_rotation_invariant_and_ordered(seed: int, name: str, rho: float) -> None:
    case = factors_case("", 9, 4, 3, seed=seed)
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (4, 3))
    assert case.output_grads is not None
    assert case.inputs is not None
    turned = case.with_(output_grads=case.output_grads @ U, inputs=7 * case.inputs @ V)
    values = []
    for one in (case, turned):
        H = one.operator()
        P = kp.approximate(H, name)
        values.append(
            [float(m(H, P, damping=rho)) for m in (kp.kl_divergence, kp.stein_divergence)]
        )
    assert values[1] == pytest.approx(values[0], rel=1e-6, abs=1e-8)
    assert min(values[0]) > 0
    # JS-like: log det((A + B) / 2) - log det(A B) / 2 <= (KL(A, B) + KL(B, A)) / 2
    H = case.operator()
    P, d = kp.approximate(H, name), rho * H.trace() / 12
    other = kp.kl_divergence(P, H, damping=d, relative=False).value
    assert values[0][1] <= (values[0][0] + other) / 2 + 1e-9


@every
def test_divergences_vanish_with_growing_damping(metric: Callable[..., kp.Divergence]) -> None:
    H = factors_case("", 9, 4, 3).operator()
    P = kp.approximate(H, "shampoo")
    values = [float(metric(H, P, damping=rho)) for rho in (1e-3, 1e-1, 1e1, 1e3)]
    assert values == sorted(values, reverse=True)
    # both are quadratic in the relative difference: KL tends to |H - P|^2 / (4 d^2)
    d = 1e3 * H.trace() / 12
    limit = (kp.relative_error(H, P) * H.norm() / d) ** 2 / (4 if metric is kp.kl_divergence else 8)
    assert values[-1] == pytest.approx(limit, rel=1e-2)


@every
def test_float32_data_give_the_numbers_of_their_rounded_values(
    metric: Callable[..., kp.Divergence],
) -> None:
    case = factors_case("", 9, 5, 4).cast(torch.float32)
    found = []
    for one in (case, case.with_(dtype=torch.float64)):
        H = one.operator()
        found.append(float(metric(H, kp.approximate(H, "shampoo-squared"))))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# ---------------------------------------------------------------- beyond exact eigenvalues


@every
@pytest.mark.parametrize(
    "case", [factors_case("T1", 60, 9, 7), matrices_case("matrices", 30, 8, 7)], ids=str
)
def test_the_stochastic_value_agrees_within_its_error(
    metric: Callable[..., kp.Divergence], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    H = case.operator()
    P = kp.approximate(H, "shampoo-squared")
    exact = metric(H, P, damping=0.1)
    monkeypatch.setattr(spectral_form, "EXACT_SIZE", 4)
    monkeypatch.setattr(divergences, "EXACT_SIZE", 4)
    fresh = case.operator()
    found = metric(fresh, P, damping=0.1)
    assert found.stderr > 0
    assert abs(found.value - exact.value) <= 4 * found.stderr
    assert found.stderr < 0.2 * exact.value


def test_draws_too_large_to_hold_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    case = factors_case("", 10, 9, 7)
    H = case.operator()
    P = kp.approximate(H, "kfac")
    exact = kp.stein_divergence(H, P, damping=0.1).value
    monkeypatch.setattr(divergences, "HELD_ELEMENTS", 10)
    assert kp.stein_divergence(H, P, damping=0.1).value == pytest.approx(exact, rel=1e-9)  # dense


def test_a_large_unstructured_approximation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = factors_case("", 8, 4, 3)
    P = kp.DenseOperator(torch.tensor(case.H), (4, 3))
    monkeypatch.setattr(spectral_form, "EXACT_SIZE", 4)
    with pytest.raises(UnsupportedError, match="DenseOperator on 4 x 3"):
        kp.kl_divergence(case.operator(), P)


# ---------------------------------------------------------------- undefined numbers, bad input

ZERO = kp.DiagonalOperator(torch.zeros(3, 2, dtype=torch.float64))
ONE = kp.DiagonalOperator(torch.ones(3, 2, dtype=torch.float64))


@every
def test_zero_operators(metric: Callable[..., kp.Divergence]) -> None:
    with pytest.warns(UndefinedMetricWarning, match="H = 0"):
        assert math.isnan(metric(ZERO, ONE).value)
    A, B = damped(np.eye(6), 0.5), damped(np.zeros((6, 6)), 0.5)  # P = 0 is I d: far, not undefined
    truth = kl(A, B) if metric is kp.kl_divergence else stein(A, B)
    assert metric(ONE, ZERO, damping=0.5).value == pytest.approx(truth, rel=1e-12)


@every
@pytest.mark.parametrize("damping", [0, 0.0, -1e-3, math.nan, math.inf, "small", True, None])
def test_a_bad_damping_is_refused(metric: Callable[..., kp.Divergence], damping: object) -> None:
    with pytest.raises(InvalidInputError, match="damping"):
        metric(ONE, ONE, damping=damping)


@every
def test_bad_pairs_are_refused(metric: Callable[..., kp.Divergence]) -> None:
    with pytest.raises(InvalidInputError, match=r"3 x 2.*2 x 3"):
        metric(ONE, kp.DiagonalOperator(torch.ones(2, 3)))
    indefinite = kp.DenseOperator(torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -1])), (3, 2))
    with pytest.raises(InvalidInputError, match="not PSD"):
        metric(ONE, indefinite)
