"""Polar factors against scipy in float64, closed forms and Muon's scalar polynomial."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.linalg.polar import newton_schulz, polar


def tolerance(dtype, size, condition=1.0):
    """The polar factor moves by 2 / (s_i + s_j) times what the matrix does."""
    return 10 * size * torch.finfo(dtype).eps * condition


def gaussian(seed, *shape, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def with_singular_values(seed, m, n, values, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (m, n))
    return torch.tensor((U[:, : len(values)] * values) @ V[:, : len(values)].T).to(dtype)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_polar_factor_is_that_of_scipy_whatever_the_scale(seed, m, n, exponent, dtype):
    values = np.geomspace(1.0, 1e-2, min(m, n))
    G = with_singular_values(seed, m, n, values, dtype)
    expected = scipy.linalg.polar(G.double().numpy())[0]
    found = polar(10.0**exponent * G).double().numpy()
    assert np.abs(found - expected).max() < tolerance(dtype, max(m, n), 1e2)
    gram = found @ found.T if m <= n else found.T @ found
    assert np.abs(gram - np.eye(len(gram))).max() < tolerance(dtype, max(m, n))


def test_polar_factor_is_shampoo_without_averaging():
    G = with_singular_values(0, 9, 6, np.array([3.0, 1.0, 0.2]))  # rank 3: pseudo-inverse powers
    values, U = np.linalg.eigh((G @ G.T).numpy())
    left = (U * np.where(values > 1e-10, np.maximum(values, 1e-10) ** -0.25, 0)) @ U.T
    values, V = np.linalg.eigh((G.T @ G).numpy())
    right = (V * np.where(values > 1e-10, np.maximum(values, 1e-10) ** -0.25, 0)) @ V.T
    assert np.abs(polar(G).numpy() - left @ G.numpy() @ right).max() < 1e-10


def test_rank_deficient_zero_and_other_special_matrices():
    assert torch.equal(polar(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    u, v = gaussian(0, 5), gaussian(1, 7)
    expected = torch.outer(u / u.norm(), v / v.norm())
    torch.testing.assert_close(polar(torch.outer(u, v)), expected)
    assert polar(torch.tensor([[-3.0]])).tolist() == [[-1.0]]
    assert polar(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    G = with_singular_values(0, 6, 6, np.array([1.0, 0.5, 1e-3]))
    assert torch.linalg.matrix_rank(polar(G)) == 3
    assert torch.linalg.matrix_rank(polar(G, rtol=1e-2)) == 2
    assert polar(gaussian(0, 4, 4).bfloat16()).dtype == torch.float32


def test_batches_with_a_matrix_that_is_not_finite():
    G = gaussian(0, 2, 3, 5, 4, dtype=torch.float32)
    good = polar(G)
    G[1, 2, 0, 0] = math.nan
    found = polar(G)
    assert found[1, 2].isnan().all()
    torch.testing.assert_close(found[0], good[0])
    torch.testing.assert_close(found[1, :2], good[1, :2])


@pytest.mark.parametrize("outcome", ["float32", "both"])
def test_a_failing_solver_is_retried_in_float64(monkeypatch, outcome):
    G = gaussian(0, 3, 5, 4, dtype=torch.float32)
    expected, solve, marked = polar(G), torch.linalg.svd, float(G[1, 0, 0])

    def svd(matrix, full_matrices):
        if (matrix[:, 0, 0] == marked).any() and (
            matrix.dtype == torch.float32 or outcome == "both"
        ):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solve(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    found = polar(G)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    if outcome == "float32":
        torch.testing.assert_close(found[1], expected[1])
    else:
        assert found[1].isnan().all()


def muon_scalar(s, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8)])
def test_newton_schulz_applies_muons_polynomial_to_the_singular_values(shape):
    values = np.geomspace(1.0, 1e-3, 8)
    G = with_singular_values(0, *shape, values)
    U, s, Vh = np.linalg.svd(G.numpy(), full_matrices=False)
    expected = (U * muon_scalar(s / np.linalg.norm(s))) @ Vh
    found = newton_schulz(G, dtype=torch.float32)
    assert found.dtype == torch.float32
    # five steps magnify the rounding of a null direction by at most 3.4445^5 = 485
    assert np.abs(found.numpy() - expected).max() < 500 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8)])
def test_newton_schulz_in_bfloat16_keeps_two_digits_of_a_well_conditioned_matrix(shape):
    G = with_singular_values(0, *shape, np.linspace(1.0, 0.5, min(shape)))
    found, expected = newton_schulz(G), newton_schulz(G, dtype=torch.float32)
    assert found.dtype == torch.bfloat16
    # five rounded steps whose slopes stay below 2 from these singular values on
    assert (found.float() - expected).norm() < 16 * torch.finfo(
        torch.bfloat16
    ).eps * expected.norm()


def test_newton_schulz_is_not_the_polar_factor():
    G = gaussian(0, 64, 64)
    values = torch.linalg.svdvals(newton_schulz(G, dtype=torch.float32))
    assert values.min() < 0.7
    assert 1.1 < values.max() < 1.3
    more = torch.linalg.svdvals(newton_schulz(G, steps=30, dtype=torch.float32))
    assert (more - 1).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_of_batches_scales_zeros_and_tall_matrices(dtype):
    G = gaussian(0, 2, 3, 6, 10, dtype=torch.float32)
    found = newton_schulz(G, dtype=dtype)
    for exponent in (-100, 100):
        assert torch.equal(newton_schulz(2.0**exponent * G, dtype=dtype), found)
    loose = 16 * torch.finfo(dtype).eps * found.float().norm()
    assert (newton_schulz(G.mT, dtype=dtype).mT - found).float().norm() < loose
    assert (newton_schulz(G[1, 2], dtype=dtype) - found[1, 2]).float().norm() < loose
    assert not newton_schulz(torch.zeros(2, 3, 4), dtype=dtype).any()


def test_a_callers_autocast_does_not_reach_polar_factors():
    G = gaussian(0, 16, 16, dtype=torch.float32)
    expected = polar(G), newton_schulz(G, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(polar(G), expected[0])
        assert torch.equal(newton_schulz(G, dtype=torch.float32), expected[1])


def test_bad_arguments_are_refused():
    for function in (polar, newton_schulz):
        with pytest.raises(InvalidInputError, match="matrices"):
            function(torch.zeros(3))
        with pytest.raises(UnsupportedError, match="int64"):
            function(torch.zeros(3, 3, dtype=torch.int64))
    for rtol in (-1.0, 1.0, math.nan):
        with pytest.raises(InvalidInputError, match="rtol"):
            polar(torch.eye(2), rtol=rtol)
    with pytest.raises(InvalidInputError, match="steps"):
        newton_schulz(torch.eye(2), steps=0)
    with pytest.raises(UnsupportedError, match="float16"):
        newton_schulz(torch.eye(2), dtype=torch.float16)
