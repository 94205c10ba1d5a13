"""Trace ratio, extreme eigenvalues of the error, and its split into basis and eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UndefinedMetricWarning
from kronecker_probe.operators.structures.block import BlockOperator
from kronecker_probe.quality.metrics import spectral
from tests import oracle
from tests.cases import (
    Case,
    factors_case,
    matrices_case,
    rank_deficient,
)
from tests.grid import Checks, on_every_case
from tests.oracle import Array
from tests.tolerances import INEQUALITY, SCALAR, ZERO_ERROR

METRICS = (kp.trace_ratio, kp.largest_error_eigenvalue, kp.off_diagonal_mass)
# Eigenvalues from Lanczos: the tolerance that ARPACK is given, with room for the residual's factor.
LANCZOS = 1e-7


def psd(size: int, seed: int) -> Array:
    X = np.random.default_rng(seed).standard_normal((size, size))
    return X @ X.T + np.eye(size)


def kronecker_exact(m: int, n: int) -> Case:
    """Draws whose second moment is a Kronecker product."""
    left, right = oracle.matrix_power(psd(m, 1), 0.5), oracle.matrix_power(psd(n, 2), 0.5)
    pairs = [(u, v) for u in left for v in right]
    return Case(
        "exact",
        output_grads=np.array([u for u, _ in pairs]),
        inputs=np.array([v for _, v in pairs]),
        given_weights=np.ones(len(pairs)),
    )


# ---------------------------------------------------------------- against dense matrices


@on_every_case()
def test_every_approximation(case: Case) -> None:
    H = case.operator()
    corrected = kp.split_error(H, kp.approximate(H, "eigen-corrected"))
    assert corrected.eigenvalues <= ZERO_ERROR
    with Checks() as check:
        for name in case.approximations:
            P = kp.approximate(H, name)
            check(name, trace_ratio_and_extreme_eigenvalues, case, name, H, P)
            check(name, split_equals_the_rotated_matrix, case, name, H, P)
            if name in ("shampoo", "shampoo-squared"):
                check(name, basis_error_is_that_of_the_corrected_spectrum, H, P, corrected.basis)


def basis_error_is_that_of_the_corrected_spectrum(H: kp.SecondMoment, P: Any, basis: float) -> None:
    """Eigenvalue correction removes one part of Shampoo's error and leaves the other."""
    split = kp.split_error(H, P)
    if not split.degenerate:
        assert split.basis == pytest.approx(basis, abs=ZERO_ERROR)


def trace_ratio_and_extreme_eigenvalues(case: Case, name: str, H: kp.SecondMoment, P: Any) -> None:
    dense, size = case.dense(name), np.trace(case.H)
    assert kp.trace_ratio(H, P) == pytest.approx(np.trace(dense) / size, rel=SCALAR)
    values = np.linalg.eigvalsh(case.H - dense)
    found = kp.error_spectrum(H, P)
    assert found.highest == pytest.approx(values[-1], abs=SCALAR * size)
    assert found.lowest == pytest.approx(values[0], abs=SCALAR * size)
    assert found.target == pytest.approx(np.linalg.norm(case.H, 2), rel=SCALAR)
    expected = np.linalg.norm(case.H - dense, 2)
    assert kp.largest_error_eigenvalue(H, P) == pytest.approx(expected, abs=SCALAR * size)
    relative = kp.largest_error_eigenvalue(H, P, relative=True)
    assert relative == pytest.approx(expected / np.linalg.norm(case.H, 2), abs=10 * SCALAR)


@pytest.mark.parametrize(
    "case",
    [
        factors_case("T1", 30, 12, 9),
        factors_case("C3", 12, 12, 9, columns=3, positions=1),
        factors_case("T3", 20, 10, 8, positions=3),
        matrices_case("matrices", 15, 9, 11),
        rank_deficient(30, 12, 9, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["optimal", "shampoo", "eigen-corrected", "diagonal"])
def test_lanczos_finds_both_ends(case: Case, name: str) -> None:
    H = case.operator()
    P = kp.approximate(H, name)
    assert math.prod(case.shape) > spectral.DENSE_SIZE  # or Lanczos does not run
    found = kp.error_spectrum(H, P)
    values = np.linalg.eigvalsh(case.H - case.dense(name))
    scale = np.abs(values).max()
    assert found.residual <= LANCZOS
    assert found.highest == pytest.approx(values[-1], abs=LANCZOS * scale)
    assert found.lowest == pytest.approx(values[0], abs=LANCZOS * scale)
    assert found.target == pytest.approx(np.linalg.norm(case.H, 2), rel=LANCZOS)


def split_equals_the_rotated_matrix(case: Case, name: str, H: kp.SecondMoment, P: Any) -> None:
    """|offdiag(Q^T H Q)| and |diag(Q^T H Q) - D| with P = Q D Q^T, formed."""
    found = kp.split_error(H, P)
    size = oracle.norm(case.H)
    Q, D = eigenvectors(P)
    rotated = Q.T @ case.H @ Q
    on_diagonal = np.diag(rotated)
    basis = math.sqrt(max(0.0, size**2 - float(on_diagonal @ on_diagonal))) / size
    assert found.basis == pytest.approx(basis, abs=ZERO_ERROR)
    if Q.shape[0] == Q.shape[1]:
        off = oracle.norm(rotated - np.diag(on_diagonal)) / size
        assert found.basis == pytest.approx(off, abs=ZERO_ERROR)
    expected = float(np.linalg.norm(on_diagonal - D)) / size
    assert found.eigenvalues == pytest.approx(expected, abs=ZERO_ERROR, rel=1e-8)
    # the parts are orthogonal: they make up the relative error
    error = oracle.relative_error(case.H, case.dense(name))
    assert found.total == pytest.approx(error, abs=ZERO_ERROR, rel=1e-8)
    assert kp.off_diagonal_mass(H, P) == found.basis


def eigenvectors(
    P: kp.KroneckerOperator | kp.EigenOperator | kp.DiagonalOperator,
) -> tuple[Array, Array]:
    """The eigenvectors that P holds, as columns [mn, k], and its eigenvalues."""
    if isinstance(P, kp.DiagonalOperator):
        return np.eye(P.values.numel()), P.values.numpy().reshape(-1)
    if isinstance(P, kp.EigenOperator):
        Q = np.kron(P.left_basis.numpy(), P.right_basis.numpy())
        return Q, P.eigenvalues.numpy().reshape(-1)
    left, right = P.left_factor.eigen(), P.right_factor.eigen()
    values = P.scale * np.outer(left.values.numpy(), right.values.numpy())
    return np.kron(left.basis.vectors.numpy(), right.basis.vectors.numpy()), values.reshape(-1)


# ---------------------------------------------------------------- theorems


@pytest.mark.parametrize("name", ["optimal", "shampoo-squared", "eigen-corrected"])
@pytest.mark.parametrize("shape", [(4, 3), (9, 8)], ids=["dense", "lanczos"])
def test_a_kronecker_target_has_no_error(name: str, shape: tuple[int, int]) -> None:
    H = kronecker_exact(*shape).operator()
    P = kp.approximate(H, name)
    assert kp.trace_ratio(H, P) == pytest.approx(1, rel=SCALAR)
    assert kp.largest_error_eigenvalue(H, P, relative=True) <= ZERO_ERROR
    split = kp.split_error(H, P)
    assert split.basis <= ZERO_ERROR
    assert split.eigenvalues <= ZERO_ERROR
    assert not split.degenerate


@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-6, 1e6),
    name=st.sampled_from(["shampoo-squared", "optimal", "kfac"]),
)
def test_rotations_and_scale_change_nothing(seed: int, scale: float, name: str) -> None:
    """G -> U G V^T turns every eigenvector and keeps every eigenvalue."""
    case = factors_case("", 12, 4, 3, seed=seed)
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (4, 3))
    assert case.output_grads is not None
    assert case.inputs is not None
    turned = case.with_(output_grads=case.output_grads @ U * scale, inputs=case.inputs @ V)
    found = []
    for one in (case, turned):
        H = one.operator()
        P = kp.approximate(H, name)
        split = kp.split_error(H, P)
        found.append(
            [
                kp.trace_ratio(H, P),
                kp.largest_error_eigenvalue(H, P, relative=True),
                split.basis,
                split.eigenvalues,
            ]
        )
    assert found[1] == pytest.approx(found[0], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["shampoo-squared", "eigen-corrected", "diagonal"])
def test_float32_data_give_the_numbers_of_their_rounded_values(name: str) -> None:
    case = factors_case("", 20, 5, 4).cast(torch.float32)
    H = case.operator()
    P = kp.approximate(H, name)
    exact = case.with_(dtype=torch.float64).operator()
    truth = kp.approximate(exact, name)
    for metric in METRICS:
        assert metric(H, P) == pytest.approx(metric(exact, truth), rel=1e-9, abs=1e-9)


def test_the_largest_eigenvalue_bounds_the_frobenius_error() -> None:
    case = factors_case("", 30, 12, 9)
    H = case.operator()
    for name in case.approximations:
        P = kp.approximate(H, name)
        largest = kp.largest_error_eigenvalue(H, P)
        error = kp.relative_error(H, P) * H.norm()
        assert error / math.sqrt(108) - INEQUALITY <= largest <= error + INEQUALITY


# ---------------------------------------------------------------- degenerate bases


def test_equal_eigenvalues_are_reported() -> None:
    """White noise in a random basis: any basis is an eigenbasis of P, and H is in none."""
    H = factors_case("", 30, 4, 3).operator()
    P = kp.KroneckerOperator(torch.eye(4).double(), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    assert kp.split_error(H, P).degenerate
    distinct = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
    assert not kp.split_error(H, kp.KroneckerOperator(distinct, P.right)).degenerate


def test_blocks_are_judged_one_by_one() -> None:
    """Equal eigenvalues of two blocks turn nothing: each keeps its own coordinates."""
    H = factors_case("", 30, 4, 3).operator()
    right = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    left = torch.diag(torch.tensor([2.0, 1.0]).double())
    distinct = kp.KroneckerOperator(left, right)
    twice = BlockOperator([[distinct], [distinct]])
    assert not kp.split_error(H, twice).degenerate
    flat = kp.KroneckerOperator(torch.eye(2).double(), right)
    assert kp.split_error(H, BlockOperator([[distinct], [flat]])).degenerate


def test_null_directions_of_both_are_not_degenerate() -> None:
    """A null space of L that H does not see may be turned at will."""
    case = rank_deficient(9, 6, 5, 2)
    H = case.operator("dense")
    P = kp.approximate(H, "shampoo-squared")
    assert not kp.split_error(H, P).degenerate


def test_what_a_singular_basis_leaves_out_is_basis_error() -> None:
    H = kp.DiagonalOperator(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    first = torch.eye(2, dtype=torch.float64)[:, :1]
    P = kp.EigenOperator(first, torch.eye(2).double(), torch.tensor([[2.0, 0.0]]))
    split = kp.split_error(H, P)
    assert split.basis == pytest.approx(4 / 5)
    assert split.eigenvalues == pytest.approx(1 / 5)


# ---------------------------------------------------------------- undefined numbers, bad input

ZERO = kp.DiagonalOperator(torch.zeros(3, 2, dtype=torch.float64))
ONE = kp.DiagonalOperator(torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("metric", METRICS)
def test_a_zero_target_has_no_score(metric: Callable[..., float]) -> None:
    with pytest.warns(UndefinedMetricWarning, match="H = 0"):
        assert math.isnan(metric(ZERO, ONE))


@pytest.mark.parametrize("metric", [kp.error_spectrum, kp.split_error])
def test_a_zero_target_has_no_result(metric: Callable[..., object]) -> None:
    with pytest.warns(UndefinedMetricWarning, match="H = 0"):
        found = metric(ZERO, ONE)
    assert all(math.isnan(v) for v in vars(found).values() if isinstance(v, float))


def test_a_zero_approximation_misses_everything() -> None:
    assert kp.trace_ratio(ONE, ZERO) == 0.0
    assert kp.largest_error_eigenvalue(ONE, ZERO, relative=True) == pytest.approx(1)
    split = kp.split_error(ONE, ZERO)
    assert (split.basis, split.eigenvalues) == pytest.approx((0, 1))


def test_equal_large_operators_have_error_zero() -> None:
    P = kp.DiagonalOperator(torch.ones(9, 9, dtype=torch.float64))
    assert kp.largest_error_eigenvalue(P, P) == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_a_non_finite_approximation_has_no_score(metric: Callable[..., float]) -> None:
    values = torch.full((3, 2), float("nan"), dtype=torch.float64)
    with pytest.warns(UndefinedMetricWarning, match="not finite"):
        assert math.isnan(metric(ONE, kp.DiagonalOperator(values)))


@pytest.mark.parametrize("metric", METRICS)
def test_bad_pairs_are_refused(metric: Callable[..., float]) -> None:
    other = kp.DiagonalOperator(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"3 x 2.*2 x 3"):
        metric(ONE, other)
    with pytest.raises(InvalidInputError, match="DenseOperator"):
        metric(ONE, torch.eye(6))


def test_an_indefinite_approximation_has_no_split() -> None:
    P = kp.DenseOperator(torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -1])), (3, 2))
    with pytest.raises(InvalidInputError, match="not PSD"):
        kp.off_diagonal_mass(ONE, P)
