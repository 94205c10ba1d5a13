"""The trace-power family: its named members, stationarity, minimality, and where it has none."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize

import kronecker_probe as kp
from tests import approximation_oracle as more
from tests import oracle
from tests import reference_fixture as fixture
from tests.cases import Case, as_numpy, assert_close, dense, factors_case, matrices_case
from tests.grid import Checks, on_every_route
from tests.oracle import Array
from tests.tolerances import ENTRIES, PRINTED, ROOT_ENTRIES, SCALAR

# The iteration stops at a relative change of 1e-11, and converges at a rate of .9 at worst here.
FITTED = 1e-9
# A finite difference or a generic minimizer of a smooth function.
MINIMIZED = 1e-5

QS = (0.0, 0.25, 0.5, 1.0, 1.5)

FULL = (
    factors_case("T1", 40, 4, 3),
    factors_case("T1-weighted", 30, 3, 5, given_weights=np.linspace(0.1, 2, 30)),
    factors_case("T3", 20, 4, 3, positions=3),
    factors_case("C3-T1", 25, 4, 3, columns=3, positions=1),
    factors_case("C2-T2", 20, 3, 4, columns=2, positions=2),
    matrices_case("matrices", 12, 4, 3),
    matrices_case("m1", 12, 1, 4),
    matrices_case("n1", 12, 4, 1),
)


def fit(case: Case, q: float, route: str = "auto") -> kp.KroneckerOperator:
    P = kp.approximate(case.operator(route), "divergence", q=q)
    assert isinstance(P, kp.KroneckerOperator)
    return P


def map_sides(case: Case, left: Array, right: Array) -> Case:
    """G -> left G right^T."""
    if case.matrices is not None:
        return case.with_(matrices=left @ case.matrices @ right.T)
    assert case.output_grads is not None
    assert case.inputs is not None
    return case.with_(output_grads=case.output_grads @ left.T, inputs=case.inputs @ right.T)


# ---------------------------------------------------------------- named members


@on_every_route(FULL)
def test_q2_is_optimal_and_q1_is_shampoo_squared(case: Case, route: str) -> None:
    H = case.operator(route)
    assert_close(dense(kp.approximate(H, "divergence", q=2)), case.dense("optimal"), ROOT_ENTRIES)
    assert_close(
        dense(kp.approximate(H, "divergence", q=1)), case.dense("shampoo-squared"), ENTRIES
    )


@pytest.mark.parametrize("route", ["parameter", "dense", "auto"])
def test_kl_of_the_fixture(route: str) -> None:
    samples = kp.GradientSamples.from_matrices(torch.tensor(fixture.SAMPLES))
    H = kp.SecondMoment(samples, route=route)
    P = kp.approximate(H, "kl")
    assert P.trace() == pytest.approx(7.04977, abs=6e-6)
    assert kp.cosine_similarity(H, P) == pytest.approx(0.838731, abs=PRINTED)
    left = as_numpy(P.left) / float(P.left.trace())
    expected = [[0.513593, 0.119599], [0.119599, 0.486407]]
    np.testing.assert_allclose(left, expected, atol=PRINTED)


# ---------------------------------------------------------------- stationarity


@on_every_route(FULL)
def test_every_member(case: Case, route: str) -> None:
    with Checks() as check:
        for q in QS:
            P = fit(case, q, route)
            check(f"q = {q}", is_stationary_and_equals_the_plain_iteration, case, q, P)
            check(f"q = {q}", scale_is_split_in_one_way_and_convergence_is_reported, P)


def is_stationary_and_equals_the_plain_iteration(
    case: Case, q: float, P: kp.KroneckerOperator
) -> None:
    assert_close(dense(P), more.alternate(case.H, case.shape, q), FITTED)
    left, right = as_numpy(P.left), as_numpy(P.right)
    # split P = L kron R in any way: both equations hold
    L, R = P.scale * left, right
    rearranged = oracle.rearrange(case.H, case.shape)
    on_left = (rearranged @ oracle.matrix_power(R, q - 1).reshape(-1)).reshape(L.shape)
    on_right = (rearranged.T @ oracle.matrix_power(L, q - 1).reshape(-1)).reshape(R.shape)
    assert_close(on_left / more.trace_power(R, q), L, FITTED)
    assert_close(on_right / more.trace_power(L, q), R, FITTED)


def scale_is_split_in_one_way_and_convergence_is_reported(P: kp.KroneckerOperator) -> None:
    assert float(P.left.trace()) == pytest.approx(1, rel=SCALAR)
    assert float(P.right.trace()) == pytest.approx(1, rel=SCALAR)
    assert P.trace() == pytest.approx(P.scale, rel=SCALAR)
    assert set(P.info) == {"rounds", "residual"}
    assert 1 <= P.info["rounds"] <= 1000
    assert 0 <= P.info["residual"] <= 1e-11


@pytest.mark.parametrize("q", [0.1, 0.5, 1.5, 1.9])
def test_rate_of_convergence_is_that_of_the_contraction(q: float) -> None:
    """Even at N = 1, where the draws themselves contract nothing: (q - 1)^2 a round."""
    case = matrices_case("one", 1, 4, 4)
    P = fit(case, q)
    assert P.info["residual"] <= 1e-11
    slowest = math.log(1e-11) / math.log((q - 1) ** 2)
    assert P.info["rounds"] <= 1.5 * slowest + 5


@pytest.mark.parametrize("q", [0.1, 0.5, 1.5])
def test_of_a_single_matrix_in_closed_form(q: float) -> None:
    """With G = U diag(s) V^T both equations are diagonal: l and r go as s^{2 / (2 - q)}."""
    case = matrices_case("one", 1, 4, 3)
    u, s, vt = np.linalg.svd(case.G[0, 0], full_matrices=False)
    values = s ** (2 / (2 - q))
    P = fit(case, q)
    assert_close(as_numpy(P.left), (u * values) @ u.T / values.sum(), FITTED)
    assert_close(as_numpy(P.right), (vt.T * values) @ vt / values.sum(), FITTED)
    # Tr P^q = <P^{q-1}, H>
    power = oracle.matrix_power(dense(P), q - 1)
    assert np.trace(power @ case.H) == pytest.approx(more.trace_power(dense(P), q), rel=FITTED)


# ---------------------------------------------------------------- minimality


@pytest.mark.parametrize("q", [*QS, 2.0])
def test_no_product_nearby_has_a_smaller_divergence(q: float, rng: np.random.Generator) -> None:
    case = factors_case("T2", 30, 4, 3, positions=2)
    P = fit(case, q)
    left, right = P.scale * as_numpy(P.left), as_numpy(P.right)
    least = more.trace_power_divergence(case.H, np.kron(left, right), q)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            moved = []
            for factor in (left, right):
                X = np.eye(len(factor)) + size * rng.standard_normal(factor.shape)
                moved.append(X @ factor @ X.T)
            other = more.trace_power_divergence(case.H, np.kron(*moved), q)
            assert other >= least - SCALAR * abs(least)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("case", [FULL[0], FULL[2], FULL[5]], ids=str)
def test_a_generic_minimizer_finds_the_same_product(case: Case, q: float) -> None:
    m, n = case.shape
    rows, columns = np.tril_indices(m), np.tril_indices(n)

    def product(x: Array) -> Array:
        left, right = np.zeros((m, m)), np.zeros((n, n))
        left[rows], right[columns] = x[: len(rows[0])], x[len(rows[0]) :]
        return np.kron(left @ left.T, right @ right.T)

    def objective(x: Array) -> float:
        return more.trace_power_divergence(H, product(x), q)

    H = case.H / np.trace(case.H)
    start = np.concatenate([np.eye(m)[rows], np.eye(n)[columns] * (m * n) ** -0.5])
    found = minimize(objective, start, method="BFGS", options={"gtol": 1e-8, "maxiter": 2000})
    P = dense(fit(case, q)) / np.trace(case.H)
    assert more.trace_power_divergence(H, P, q) <= objective(found.x) + SCALAR
    assert_close(P, product(found.x), 10 * MINIMIZED)


def test_frobenius_optimum_is_least_at_q_2_only() -> None:
    """Each member wins by its own divergence, so the family is not one operator."""
    case = factors_case("", 30, 4, 3)
    fits = {q: dense(fit(case, q)) for q in (*QS, 2.0)}
    for q in fits:
        values = {p: more.trace_power_divergence(case.H, P, q) for p, P in fits.items()}
        assert min(values, key=values.__getitem__) == q


# ---------------------------------------------------------------- theorems


@pytest.mark.parametrize("q", [*QS, 2.0])
@pytest.mark.parametrize("factored", [True, False])
def test_exact_when_h_is_a_kronecker_product(q: float, factored: bool) -> None:
    rng = np.random.default_rng(3)
    outputs, inputs = rng.standard_normal((4, 4)), rng.standard_normal((3, 3))
    d, a = np.repeat(outputs, 3, axis=0), np.tile(inputs, (4, 1))
    case = Case("exact", output_grads=d, inputs=a)
    if not factored:
        case = Case("exact", matrices=case.G[:, 0])
    assert_close(dense(fit(case, q)), case.H, ROOT_ENTRIES if q == 2 else FITTED)


@pytest.mark.parametrize("q", QS)
def test_transposition_swaps_the_factors(q: float) -> None:
    case = matrices_case("", 12, 4, 3)
    swapped = case.with_(matrices=case.matrices.swapaxes(1, 2))  # type: ignore[union-attr]
    P, T = fit(case, q), fit(swapped, q)
    assert_close(as_numpy(T.left), as_numpy(P.right), FITTED)
    assert T.scale == pytest.approx(P.scale, rel=FITTED)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("case", [FULL[0], FULL[2], FULL[5]], ids=str)
def test_rotations_and_scale_pass_through(case: Case, q: float) -> None:
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in case.shape)
    both = np.kron(1e3 * left, right)
    turned = fit(map_sides(case, 1e3 * left, right), q)
    assert_close(dense(turned), both @ dense(fit(case, q)) @ both.T, FITTED)


@pytest.mark.parametrize("q", [*QS, 2.0])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_scales(q: float, scale: float) -> None:
    case = FULL[0]
    P, Q = fit(case, q), fit(map_sides(case, scale * np.eye(4), np.eye(3)), q)
    assert Q.scale == pytest.approx(scale**2 * P.scale, rel=FITTED)
    assert_close(as_numpy(Q.left), as_numpy(P.left), FITTED)


@pytest.mark.parametrize("case", [FULL[0], FULL[2], FULL[5]], ids=str)
def test_kl_passes_any_linear_map_through(case: Case) -> None:
    rng = np.random.default_rng(5)
    left, right = (rng.standard_normal((k, k)) for k in case.shape)
    both = np.kron(left, right)
    expected = both @ dense(fit(case, 0)) @ both.T
    assert_close(dense(fit(map_sides(case, left, right), 0)), expected, FITTED)


@pytest.mark.parametrize("q", QS)
def test_singular_factors_count_by_their_rank(q: float) -> None:
    """Output gradients of a softmax sum to zero: the fit is that of the subspace, embedded."""
    rng = np.random.default_rng(6)
    basis = np.linalg.qr(rng.standard_normal((5, 5)) - 0.0)[0][:, :4]
    inside = factors_case("", 40, 4, 3)
    outside = map_sides(inside, basis, np.eye(3))
    both = np.kron(basis, np.eye(3))
    expected = both @ dense(fit(inside, q)) @ both.T
    for route in outside.routes:
        assert_close(dense(fit(outside, q, route)), expected, FITTED)


@pytest.mark.parametrize("q", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_layer_keeps_its_null_direction(q: float, dtype: torch.dtype) -> None:
    """The trace of KL on a rank C - 1 layer with exactly Kronecker H is Tr H, not (C-1)/C of it."""
    rng = np.random.default_rng(7)
    outputs = rng.standard_normal((6, 4)).astype(np.float32)
    outputs -= outputs.mean(axis=1, keepdims=True)  # rounding leaves 1e-8 along the null direction
    inputs = rng.standard_normal((5, 3)).astype(np.float32)
    d = torch.tensor(np.repeat(outputs, 5, axis=0)).to(dtype)
    a = torch.tensor(np.tile(inputs, (6, 1))).to(dtype)
    H = kp.SecondMoment(kp.GradientSamples.from_factors(d, a))
    P = kp.approximate(H, "divergence", q=q)
    assert P.trace() == pytest.approx(H.trace(), rel=1e-6)
    assert kp.relative_error(H, P) < 1e-5


def test_float32_noise_of_a_fitted_softmax_is_not_a_direction() -> None:
    """p - 1 of a probability near one keeps few digits, and the null direction gets the rest."""
    rng = np.random.default_rng(10)
    logits = rng.standard_normal((300, 6))
    logits[np.arange(300), rng.integers(0, 6, 300)] += 12
    a = torch.tensor(rng.standard_normal((300, 3)))
    traces = {}
    for dtype in (torch.float32, torch.float64):
        p = torch.softmax(torch.tensor(logits).to(dtype), dim=1)
        d = p - torch.nn.functional.one_hot(p.argmax(dim=1), 6)
        H = kp.SecondMoment(kp.GradientSamples.from_factors(d, a.to(dtype)))
        null = torch.linalg.eigvalsh(H.left_factor.matrix)[0] / H.trace()
        assert (float(null) > 1e-13) == (dtype == torch.float32)  # else this tests nothing
        P = kp.approximate(H, "kl")
        traces[dtype] = P.trace() / H.trace(), kp.cosine_similarity(H, P)
    # the noise itself is about 1e-4 of the draws
    np.testing.assert_allclose(traces[torch.float32], traces[torch.float64], rtol=1e-2)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.5])
def test_wide_layers_in_sample_space_agree_with_parameter_space(q: float) -> None:
    """More inputs than draws: sample space works in the range of R, N dimensions."""
    case = factors_case("wide", 12, 4, 40)
    expected = dense(fit(case, q, "parameter"))
    assert_close(dense(fit(case, q, "sample")), expected, FITTED)


def test_iterates_stay_in_sample_space() -> None:
    from kronecker_probe.operators.factors.factor import SampleFactor

    P = fit(factors_case("wide", 12, 30, 40), 0.5, "sample")
    assert isinstance(P.left_factor, SampleFactor)
    assert isinstance(P.right_factor, SampleFactor)


# ---------------------------------------------------------------- properties


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    m, n, n_examples = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 10))
    positions, columns = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = draw(st.integers(1, min(m, n)))
    d = rng.standard_normal((n_examples, columns, positions, rank)) @ rng.standard_normal((rank, m))
    a = rng.standard_normal((n_examples, positions, rank)) @ rng.standard_normal((rank, n))
    weights = draw(st.none() | st.just(rng.uniform(0, 2, n_examples)))
    return Case("any", output_grads=d, inputs=a, given_weights=weights)


@given(any_case(), st.sampled_from([0.3, 0.5, 1.0, 1.5]))
def test_exists_for_any_draws_and_all_routes_agree(case: Case, q: float) -> None:
    assume(np.any(case.H))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = {route: fit(case, q, route) for route in case.routes}
    reference = dense(fits["auto"])
    for P in fits.values():
        assert P.info["residual"] <= 1e-11
        assert_close(dense(P), reference, 1e-7)
