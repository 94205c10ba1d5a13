"""Inverse roots by three routes against scipy in float64, closed forms and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronecker_probe.errors import InvalidInputError, UnknownNameError, UnsupportedError
from kronecker_probe.linalg.damping import Damping, eigenvalue_bound, largest_eigenvalue
from kronecker_probe.linalg.inverse_roots import (
    inverse_root_eigh,
    inverse_root_minimax,
    inverse_root_newton,
)
from kronecker_probe.linalg.minimax import minimax_polynomial, minimax_schedule
from kronecker_probe.linalg.newton import flush, integer_power
from kronecker_probe.linalg.residuals import root_residual

ROUTES = [inverse_root_eigh, inverse_root_newton, inverse_root_minimax]
BY_PRODUCTS = [inverse_root_newton, inverse_root_minimax]
NONE = Damping(0.0)

every_route = pytest.mark.parametrize("route", ROUTES)


def eps(dtype):
    return torch.finfo(dtype).eps


def tolerance(dtype, n, condition=1.0):
    """A stable solver moves eigenvalues by c sqrt(n) eps lambda_max; the smallest decide."""
    return 10 * math.sqrt(n) * eps(dtype) * condition


def random_psd(seed, n, condition, dtype=torch.float64, scale=1.0, rank=None):
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = scale * np.geomspace(1.0, 1.0 / condition, n)
    values[n if rank is None else rank :] = 0.0
    A = torch.tensor((Q * values) @ Q.T).to(dtype)
    return (A + A.T) / 2


def reference(A, p, epsilon=0.0):
    dense = A.double().numpy() + epsilon * np.eye(A.shape[-1])
    return scipy.linalg.fractional_matrix_power(dense, -1 / p).real


def relative(found, expected):
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def dense_residual(A, X, p, epsilon=0.0):
    A, X = A.double().numpy(), X.double().numpy()
    power = np.linalg.matrix_power
    n = len(A)
    product = power(X, p // 2) @ (A + epsilon * np.eye(n)) @ power(X, p - p // 2)
    return np.linalg.norm(product - np.eye(n)) / math.sqrt(n)


@every_route
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [
        (torch.float32, 1e2),
        (torch.float32, 1e4),
        (torch.float64, 1e4),
        (torch.float64, 1e7),
        (torch.float64, 1e10),
    ],
)
def test_roots_are_those_of_scipy(route, p, dtype, condition):
    A = random_psd(p, 40, condition, dtype, scale=3e-5)
    found = route(A, p, NONE)
    assert found.ok
    assert found.values.dtype == dtype
    assert relative(found.values, reference(A, p)) < tolerance(dtype, 40, condition)
    assert relative(found.values, found.values.T) < 10 * eps(dtype)


@pytest.mark.parametrize("p", [1.5, math.pi, 12.5])
def test_eigendecomposition_takes_any_real_root(p):
    A = random_psd(3, 30, 1e4)
    found = inverse_root_eigh(A, p, NONE)
    assert found.ok
    assert relative(found.values, reference(A, p)) < tolerance(torch.float64, 30, 1e4)
    wrong = root_residual(lambda Z: A @ Z, 1.01 * found.values, p)
    assert float(wrong) == pytest.approx(1.01**p - 1, rel=0.5)


@every_route
def test_only_matrices_that_fail_in_float32_are_solved_again_in_float64(route):
    easy, hard = (random_psd(1, 48, condition, torch.float32) for condition in (1e2, 1e7))
    stack = torch.stack([easy, hard])
    found, wide = route(stack, 1, NONE), route(stack.double(), 1, NONE)
    assert found.ok.all()
    assert found.retried.tolist() == [False, True]
    assert not wide.retried.any()
    assert relative(found.values[1], wide.values[1]) < tolerance(torch.float32, 48)
    once = route(stack, 1, NONE, tolerance=math.inf)
    assert not once.retried.any()
    assert once.residual[0] < 1e-3
    assert once.residual[1] > 0.05


@every_route
@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_residual_is_the_one_of_the_returned_root(route, p, condition):
    small = random_psd(p, 12, condition, torch.float32)
    found = route(small, p, Damping(1e-7), tolerance=math.inf)
    true = dense_residual(small, found.values, p, 1e-7)
    assert float(found.residual) == pytest.approx(true, rel=1e-6)
    large = random_psd(p, 96, condition, torch.float32)
    found = route(large, p, Damping(1e-7), tolerance=math.inf)
    true = dense_residual(large, found.values, p, 1e-7)
    assert true / 2 < float(found.residual) < 2 * true  # estimated from 16 vectors


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [5, 200])
def test_residual_of_a_root_that_is_wrong_in_a_known_way(p, n):
    values = torch.logspace(0, -6, n, dtype=torch.float64)
    X = values.pow(-1 / p)
    off = X * 1.1
    found = float(root_residual(lambda Z: values[:, None] * Z, off.diag(), p))
    assert found == pytest.approx(1.1**p - 1, rel=1e-9 if n <= 16 else 0.1)
    # one direction in the middle of the spectrum, and the smallest: both count alike
    for index in (n // 2, n - 1):
        off = X.clone()
        off[index] *= 1.5
        found = float(root_residual(lambda Z: values[:, None] * Z, off.diag(), p))
        true = (1.5**p - 1) / math.sqrt(n)
        assert found == pytest.approx(true, rel=1e-9 if n <= 16 else 0.6)


@every_route
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_leaves_the_others_alone(route, bad):
    stack = torch.stack([random_psd(s, 20, 100.0, torch.float32) for s in range(6)])
    stack = stack.reshape(2, 3, 20, 20)
    good = route(stack, 4, Damping(1e-3, "largest"))
    spoiled = stack.clone()
    spoiled[1, 0, 3, 4] = bad
    found = route(spoiled, 4, Damping(1e-3, "largest"))
    expected = torch.ones(2, 3, dtype=torch.bool)
    expected[1, 0] = False
    assert torch.equal(found.ok, expected)
    assert found.values[1, 0].isnan().all()
    assert found.residual[1, 0] == math.inf
    torch.testing.assert_close(found.values[expected], good.values[expected])


@pytest.mark.parametrize("outcome", ["raises", "not finite"])
def test_a_solver_that_fails_on_one_matrix_is_retried_on_that_one(monkeypatch, outcome):
    stack = torch.stack([random_psd(s, 10, 50.0, torch.float32) for s in range(3)])
    expected = [reference(A, 4) for A in stack]
    solve, marked, seen = torch.linalg.eigh, float(stack[1, 0, 0]), []

    def eigh(A):
        hit = (A[:, 0, 0] == marked) & torch.tensor(A.dtype == torch.float32)
        seen.append((A.dtype, len(A)))
        if hit.any() and outcome == "raises":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        values, vectors = solve(A)
        values[hit] = np.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    found = inverse_root_eigh(stack, 4, NONE)
    assert found.ok.all()
    assert seen[-1] == (torch.float64, 1)
    for X, truth in zip(found.values, expected, strict=True):
        assert relative(X, truth) < tolerance(torch.float32, 10, 50.0)


@pytest.mark.parametrize("p", [2, 4])
def test_rounding_below_zero_is_floored_before_a_small_epsilon(p):
    A = random_psd(0, 40, 10.0, torch.float32, rank=15)
    values, vectors = np.linalg.eigh(A.double().numpy())
    assert values[0] < -1e-9  # by rounding; without the floor there is no root
    floored = (vectors * (np.maximum(values, 0) + 1e-10) ** (-1 / p)) @ vectors.T
    found = inverse_root_eigh(A, p, Damping(1e-10))
    assert found.ok
    # relative to epsilon = 1e-10 the float64 solver is good to 1e-5
    assert relative(found.values, floored) < 1e-4
    for route in BY_PRODUCTS:
        assert not route(A, p, Damping(1e-10)).ok


@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_rank_deficient_matrices_with_damping(route, dtype, p):
    v = torch.tensor(np.random.default_rng(0).standard_normal(60), dtype=dtype)
    A = torch.outer(v, v)
    epsilon = 1e-3 * float(v @ v)
    along = v.double().numpy() / np.linalg.norm(v.double().numpy())
    projector = np.outer(along, along)
    size = float(v.double() @ v.double()) + epsilon
    expected = epsilon ** (-1 / p) * (np.eye(60) - projector) + size ** (-1 / p) * projector
    found = route(A, p, Damping(epsilon))
    assert found.ok
    assert relative(found.values, expected) < tolerance(dtype, 60, 1e3)


@every_route
@pytest.mark.parametrize("p", [1, 2, 4])
def test_zero_matrices(route, p):
    A = torch.zeros(3, 7, 7)
    found = route(A, p, Damping(1e-6))
    assert found.ok.all()
    torch.testing.assert_close(found.values[1], 1e-6 ** (-1 / p) * torch.eye(7))
    for damping in (NONE, Damping(1e-3, "largest"), Damping(1e-3, "mean")):
        assert not route(A, p, damping).ok.any()


@every_route
@pytest.mark.parametrize("value", [1e-25, 1e-4, 1.0, 3e8, 1e30])
def test_matrices_of_one_entry(route, value):
    found = route(torch.tensor([[[value]]]), 4, NONE)
    assert found.ok.all()
    assert float(found.values) == pytest.approx(value**-0.25, rel=tolerance(torch.float32, 1))


@every_route
def test_no_matrices_at_all(route):
    found = route(torch.zeros(0, 5, 5), 2)
    assert found.values.shape == (0, 5, 5)
    assert found.ok.shape == (0,)


@every_route
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 24),
    p=st.integers(1, 6),
    exponent=st.integers(-15, 15),
    unit=st.sampled_from(["largest", "mean"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_roots_follow_scales_and_rotations(route, seed, n, p, exponent, unit, dtype):
    A, damping, condition = random_psd(seed, n, 50.0, dtype), Damping(1e-2, unit), 50.0
    plain = route(A, p, damping).values
    scaled = route(10.0**exponent * A, p, damping).values
    bound = tolerance(dtype, n, 2 * condition)
    assert relative(scaled, 10.0 ** (-exponent / p) * plain) < bound
    Q = np.linalg.qr(np.random.default_rng(seed + 1).standard_normal((n, n)))[0]
    Q = torch.tensor(Q, dtype=dtype)
    turned = route(Q @ A @ Q.T, p, Damping(1e-2)).values
    assert relative(turned, Q @ route(A, p, Damping(1e-2)).values @ Q.T) < bound
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = route(A[order][:, order], p, Damping(1e-2)).values
    assert relative(permuted, route(A, p, Damping(1e-2)).values[order][:, order]) < bound


@every_route
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_matrices_are_widened(route, dtype):
    A = random_psd(2, 32, 10.0).to(dtype)
    found = route(A, 4, Damping(0.05))
    assert found.ok
    assert found.values.dtype == torch.float32
    expected = reference((A.double() + A.double().T) / 2, 4, 0.05)
    assert relative(found.values, expected) < tolerance(torch.float32, 32, 100.0)


@every_route
def test_a_callers_reduced_precision_does_not_reach_the_roots(route):
    A = random_psd(2, 64, 1e3, torch.float32)
    expected = route(A, 4, NONE).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(route(A, 4, NONE).values, expected)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_minimax_takes_at_most_half_of_newtons_iterations(p):
    A = random_psd(0, 32, 1e6)
    newton, minimax = (route(A, p, Damping(1e-6)).iterations for route in BY_PRODUCTS)
    assert 0 < int(minimax) <= int(newton) / 1.5
    assert inverse_root_newton(A, p, NONE, max_iterations=3).iterations == 3
    assert not inverse_root_newton(A, p, NONE, max_iterations=3).ok


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("lower", "upper"), [(1e-8, 1.0), (1e-3, 1.7), (0.3, 2.0), (0.99, 1.01)])
def test_polynomial_is_the_best_quadratic(p, lower, upper):
    found, error = minimax_polynomial(p, lower, upper)
    m = np.geomspace(lower, upper, 20001)

    def worst(coefficients):
        return np.abs(m ** (1 / p) * np.polyval(coefficients[::-1], m) - 1).max()

    assert worst(found) == pytest.approx(error, rel=1e-4)
    # the theorem of Chebyshev: four extrema of one size with alternating signs
    values = m ** (1 / p) * np.polyval(found[::-1], m) - 1
    extreme = np.sign(values[np.abs(values) > 0.999 * error])
    assert 1 + np.count_nonzero(np.diff(extreme)) == 4


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("lower", [2.0**-50, 2.0**-23, 2.0**-4, 1.0])
def test_schedule_brings_the_whole_interval_to_one(p, lower):
    m = np.geomspace(lower, 1.0, 4001)
    x = np.ones_like(m)
    start = m.copy()
    for a, b, c in minimax_schedule(p, lower, eps(torch.float64)):
        T = a + b * m + c * m * m
        x, m = x * T, m * T**p
    assert np.abs(x * start ** (1 / p) - 1).max() < 1e-12


def test_flushed_entries_have_no_subnormal_products():
    for dtype in (torch.float32, torch.float64):
        M = flush(torch.logspace(-300, 0, 901, dtype=torch.float64).to(dtype))
        kept = M[M != 0]
        assert len(kept)
        assert (torch.outer(kept, kept) >= torch.finfo(dtype).tiny * (1 - 1e-6)).all()
        assert kept.min() < eps(dtype) ** 2


@given(seed=st.integers(0, 2**31), p=st.integers(1, 20))
def test_integer_power(seed, p):
    T = np.random.default_rng(seed).standard_normal((4, 4)) / 2
    expected = np.linalg.matrix_power(T, p)
    assert relative(integer_power(torch.tensor(T), p), expected) < 1e-10 * p


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 60),
    condition=st.sampled_from([1.0, 10.0, 1e6]),
    exponent=st.integers(-30, 30),
)
def test_largest_eigenvalue_and_its_bound(seed, n, condition, exponent):
    A = random_psd(seed, n, condition, torch.float32, scale=10.0**exponent)
    true = float(np.linalg.eigvalsh(A.double().numpy())[-1])
    slack = tolerance(torch.float32, n)
    assert 0.95 * true < float(largest_eigenvalue(A)) < true * (1 + slack)
    assert true * (1 - slack) < float(eigenvalue_bound(A)) < true * (n**0.125 + slack)


def test_damping_units():
    A = torch.diag(torch.tensor([6.0, 2.0, 1.0])).expand(2, 3, 3)
    for damping, epsilon in (
        (Damping(0.1), 0.1), (Damping(0.1, "mean"), 0.3), (Damping(0.1, "largest"), 0.6),
    ):  # fmt: skip
        torch.testing.assert_close(damping.of(A), torch.full((2,), epsilon))
        for route in ROUTES:
            found = route(A, 2, damping)
            torch.testing.assert_close(found.epsilon, torch.full((2,), epsilon))
            expected = (A[0].diagonal() + epsilon).rsqrt().diag()
            torch.testing.assert_close(found.values[0], expected)


def test_bad_arguments_are_refused():
    A = torch.eye(3)
    for epsilon in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidInputError, match="epsilon"):
            Damping(epsilon)
    with pytest.raises(UnknownNameError, match="largest"):
        Damping(0.1, "largets")  # type: ignore[arg-type]
    for p in (0.5, -2.0, math.inf, math.nan):
        with pytest.raises(InvalidInputError, match="p of an inverse root"):
            inverse_root_eigh(A, p)
    for route in BY_PRODUCTS:
        for p in (0, 2.5, True):
            with pytest.raises(InvalidInputError, match=r"positive integer.*inverse_root_eigh"):
                route(A, p)
    with pytest.raises(InvalidInputError, match="max_iterations"):
        inverse_root_newton(A, 2, max_iterations=0)
    for route in ROUTES:
        for wrong in (torch.zeros(2, 3), torch.zeros(3), torch.zeros(0, 0)):
            with pytest.raises(InvalidInputError, match="square"):
                route(wrong, 2)
        with pytest.raises(UnsupportedError, match="int64"):
            route(torch.eye(3, dtype=torch.int64), 2)
        with pytest.raises(InvalidInputError, match="tolerance"):
            route(A, 2, tolerance=0.0)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_newton_stops_per_matrix_long_before_its_cap(p):
    easy, hard = random_psd(0, 96, 3.0, torch.float32), random_psd(1, 96, 1e4, torch.float32)
    indefinite = random_psd(2, 96, 3.0, torch.float32) - 0.5 * torch.eye(96)
    found = inverse_root_newton(torch.stack([easy, hard, indefinite]), p, NONE)
    assert found.ok.tolist() == [True, True, False]
    first, second, third = found.iterations.tolist()
    assert first < second < 20
    assert third < 40
