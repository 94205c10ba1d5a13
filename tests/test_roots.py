"""Eigenbases and powers of PSD matrices against 50-digit arithmetic, closed forms and numpy."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.linalg.roots import psd_power

mpmath.mp.dps = 50


def eps(dtype):
    return torch.finfo(dtype).eps


def tolerance(dtype, n, condition=1.0):
    """A stable solver moves eigenvalues by c n eps lambda_max; a power sees kappa times that."""
    return 30 * n * eps(dtype) * condition


def exact_power(A, p, epsilon):
    """(A + epsilon I)^p in 50 digits, of the very entries that the library gets."""
    n = A.shape[0]
    values, vectors = mpmath.eigsy(mpmath.matrix(A.double().tolist()))
    powers = mpmath.diag([(value + mpmath.mpf(epsilon)) ** mpmath.mpf(p) for value in values])
    result = vectors * powers * vectors.T
    return np.array([[float(result[i, j]) for j in range(n)] for i in range(n)])


def relative(found, expected):
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def random_psd(seed, n, condition, dtype=torch.float64, scale=1.0):
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = scale * np.geomspace(1.0, 1.0 / condition, n)
    A = torch.tensor((Q * values) @ Q.T).to(dtype)
    return (A + A.T) / 2


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 5),
    exponent_of_scale=st.integers(-12, 12),
    p=st.sampled_from([-2.0, -1.0, -0.5, -0.25, -1 / 3, 0.0, 0.25, 0.5, 1.0, 2.0]),
    relative_epsilon=st.sampled_from([0.0, 1e-6, 1e-1, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_power_is_exact_to_the_dtype(seed, n, exponent_of_scale, p, relative_epsilon, dtype):
    scale, condition = 10.0**exponent_of_scale, 100.0
    A = random_psd(seed, n, condition, dtype, scale)
    epsilon = relative_epsilon * scale
    expected = exact_power(A, p, epsilon)
    found = psd_power(A, p, epsilon)
    assert found.dtype == dtype
    assert relative(found, expected) < tolerance(dtype, n, (1 + abs(p)) * condition)


@pytest.mark.parametrize("p", [-1.0, -0.5, -0.25, 0.5])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-2, 5.0])
def test_rank_one_plus_damping_has_a_closed_form(p, epsilon):
    n = 150
    v = np.random.default_rng(0).standard_normal(n)
    projector = np.outer(v, v) / (v @ v)
    along, across = (v @ v + epsilon) ** p, epsilon**p
    expected = across * (np.eye(n) - projector) + along * projector
    found = psd_power(torch.tensor(np.outer(v, v)), p, epsilon)
    condition = (v @ v + epsilon) / epsilon
    assert relative(found, expected) < tolerance(torch.float64, n, condition)


@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_negative_power_of_a_singular_matrix_is_that_of_its_pseudo_inverse(rank):
    factor = np.random.default_rng(rank).standard_normal((9, rank))
    A = factor @ factor.T
    expected = np.linalg.pinv(A, hermitian=True)
    bound = tolerance(torch.float64, 9, np.linalg.cond(factor) ** 2) if rank else 0.0
    half = psd_power(torch.tensor(A), -0.5)
    for found in (psd_power(torch.tensor(A), -1.0), half @ half):
        assert np.linalg.norm(found.numpy() - expected) <= bound * np.linalg.norm(expected)


def test_negative_eigenvalues_are_set_to_zero_before_damping():
    A = torch.diag(torch.tensor([-1e-9, 1.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(
        psd_power(A, 0.5).diagonal(), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    )
    torch.testing.assert_close(
        psd_power(A, -0.5, 1e-4).diagonal(),
        torch.tensor([1e-4, 1.0001, 4.0001], dtype=torch.float64).pow(-0.5),
    )


def test_batches_are_treated_matrix_by_matrix():
    stack = torch.stack([random_psd(seed, 6, 50.0) for seed in range(6)]).reshape(2, 3, 6, 6)
    found = psd_power(stack, -0.25, 1e-3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], psd_power(stack[i, j], -0.25, 1e-3))


def test_float32_agrees_with_float64():
    A = random_psd(3, 64, 30.0)
    found = psd_power(A.float(), -0.5)
    assert relative(found, psd_power(A, -0.5)) < tolerance(torch.float32, 64, 30.0)


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 20),
    rank=st.integers(0, 20),
    exponent_of_scale=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_eigenbasis_is_descending_orthonormal_and_diagonalizes(
    seed, n, rank, exponent_of_scale, dtype
):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((n, rank)) * 10.0**exponent_of_scale
    A = torch.tensor(factor @ factor.T).to(dtype)
    values, vectors = eigh_descending(A)
    assert values.dtype == vectors.dtype == dtype
    assert (values.diff() <= 0).all()
    expected = np.linalg.eigvalsh(A.double().numpy())[::-1]
    size = max(abs(expected).max(), 1e-300)
    assert abs(values.double().numpy() - expected).max() / size < tolerance(dtype, n)
    gram = vectors.double().T @ vectors.double()
    assert (gram - torch.eye(n, dtype=torch.float64)).abs().max() < tolerance(dtype, n)
    rebuilt = (vectors.double() * values.double()) @ vectors.double().T
    assert (rebuilt - A.double()).norm() / size < tolerance(dtype, n)


def test_only_the_symmetric_part_counts():
    A = random_psd(0, 5, 10.0)
    skew = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    skew = skew - skew.T
    torch.testing.assert_close(psd_power(A + skew, -0.5), psd_power(A, -0.5))


def failing_eigh(monkeypatch, dtypes, outcome):
    """Makes the solver fail on matrices of the given dtypes; counts its calls."""
    solve, calls = torch.linalg.eigh, []

    def eigh(A):
        calls.append(A.dtype)
        if A.dtype not in dtypes:
            return solve(A)
        if outcome == "raises":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return torch.full(A.shape[:-1], torch.nan, dtype=A.dtype), torch.full_like(A, torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


@pytest.mark.parametrize("outcome", ["raises", "not finite"])
def test_a_failed_solve_is_retried_in_float64(monkeypatch, outcome):
    A = random_psd(1, 8, 10.0, torch.float32)
    expected = psd_power(A.double(), -0.25)
    calls = failing_eigh(monkeypatch, [torch.float32], outcome)
    found = psd_power(A, -0.25)
    assert calls == [torch.float32, torch.float64]
    assert found.dtype == torch.float32
    assert relative(found, expected) < tolerance(torch.float32, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outcome", ["raises", "not finite"])
def test_a_failure_in_float64_too_is_a_clear_error(monkeypatch, dtype, outcome):
    failing_eigh(monkeypatch, [torch.float32, torch.float64], outcome)
    with pytest.raises(InvalidInputError, match=r"eigensolver failed.*\[3, 3\].*float64"):
        eigh_descending(torch.eye(3, dtype=dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad):
    A = torch.eye(4)
    A[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"\[4, 4\].*NaN or an infinity"):
        psd_power(A, -0.25)


def test_bad_arguments_are_refused():
    with pytest.raises(UnsupportedError, match="bfloat16"):
        eigh_descending(torch.eye(2, dtype=torch.bfloat16))
    with pytest.raises(InvalidInputError, match=r"square.*\[2, 3\]"):
        eigh_descending(torch.zeros(2, 3))
    with pytest.raises(InvalidInputError, match=r"epsilon.*-1"):
        psd_power(torch.eye(2), 0.5, -1.0)
    with pytest.raises(NonFiniteError, match=r"power -2 .*overflows torch.float32"):
        psd_power(1e-25 * torch.eye(2), -2.0)
