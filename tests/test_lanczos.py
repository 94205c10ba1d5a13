"""Functions of a PSD matrix times a vector, against dense eigendecompositions and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronecker_probe.linalg.lanczos import damped_powers, quadratic_log
from tests.cases import as_numpy
from tests.oracle import Array

TOLERANCE = 1e-8  # the default at which the solves stop
POWERS = (0.25, 0.5, 1.0)


def psd(size: int, rank: int, spread: float, seed: int) -> Array:
    """Of the given rank, its eigenvalues log-spaced over ``spread``."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((size, size)))[0][:, :rank]
    return (vectors * np.geomspace(1, 1 / spread, rank)) @ vectors.T


def solve(A: Array, b: Array, d: float, **options: float) -> tuple[list[Array], float, int]:
    matrix = torch.tensor(A)
    found = damped_powers(lambda x: matrix @ x, torch.tensor(b), d, POWERS, **options)
    return [as_numpy(x) for x in found.values], found.error, found.rounds


@pytest.mark.parametrize("rank", [1, 7, 40, 60])
@pytest.mark.parametrize("d", [1e-4, 1e-1, 10.0])
def test_damped_powers_equal_scipy(rank: int, d: float) -> None:
    A = psd(60, rank, 1e3, rank)
    b = np.random.default_rng(1).standard_normal(60)
    found, error, rounds = solve(A, b, d)
    assert error <= TOLERANCE
    assert rounds <= rank + 2  # the Krylov space of a rank-r matrix has r + 1 dimensions
    for p, x in zip(POWERS, found, strict=True):
        truth = scipy.linalg.fractional_matrix_power(A + d * np.eye(60), -p) @ b
        assert np.linalg.norm(x - truth) <= 2 * TOLERANCE * np.linalg.norm(truth)


@given(seed=st.integers(0, 10**6), rounds=st.integers(1, 25), log_d=st.floats(-4, 1))
def test_the_bound_holds_before_convergence(seed: int, rounds: int, log_d: float) -> None:
    A, b = psd(40, 40, 1e4, seed), np.random.default_rng(seed).standard_normal(40)
    d = 10.0**log_d
    found, bound, used = solve(A, b, d, max_rounds=rounds)
    assert used <= rounds
    values, vectors = np.linalg.eigh(A)
    for p, x in zip(POWERS, found, strict=True):
        truth = vectors @ ((values.clip(0) + d) ** -p * (vectors.T @ b))
        error = np.linalg.norm(x - truth) / np.linalg.norm(x)
        assert error <= bound * (1 + 1e-6) + 1e-11


def test_the_bound_is_not_vacuous() -> None:
    A, b = psd(200, 200, 1e3, 0), np.random.default_rng(0).standard_normal(200)
    found, bound, _ = solve(A, b, 1e-2, max_rounds=20)
    truth = np.linalg.solve(A + 1e-2 * np.eye(200), b)
    error = np.linalg.norm(found[2] - truth) / np.linalg.norm(truth)
    assert 1e-6 < error < bound < 1e3 * error


def test_zero_vector_and_zero_matrix() -> None:
    A, b = np.zeros((5, 5)), np.arange(1.0, 6.0)
    assert all(np.all(x == 0) for x in solve(A, 0 * b, 0.1)[0])
    for p, x in zip(POWERS, solve(A, b, 0.1)[0], strict=True):
        assert x == pytest.approx(0.1**-p * b, rel=1e-14)


@pytest.mark.parametrize("rank", [3, 30, 80])
def test_quadratic_log_equals_logm(rank: int) -> None:
    A = 50 * psd(80, rank, 1e3, 3)
    matrix, b = torch.tensor(A), np.random.default_rng(2).standard_normal(80)
    truth = b @ scipy.linalg.logm(np.eye(80) + A).real @ b
    assert quadratic_log(lambda x: matrix @ x, torch.tensor(b)) == pytest.approx(truth, rel=1e-6)
    assert quadratic_log(lambda x: matrix @ x, torch.zeros(80).double()) == 0.0
