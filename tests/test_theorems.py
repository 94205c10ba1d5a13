"""Theorems about H = E[g g^T] that hold for every data set, asked of the public API."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kronecker_probe as kp
from tests import oracle
from tests import reference_fixture as fixture
from tests.cases import (
    KRONECKER,
    Case,
    as_numpy,
    assert_close,
    dense,
    factors_case,
    matrices_case,
)
from tests.grid import Checks, on_every_route
from tests.oracle import Array
from tests.tolerances import ENTRIES, INEQUALITY, PRINTED, ROOT_ENTRIES, SCALAR, ZERO_ERROR


def _psd(size: int, seed: int) -> Array:
    X = np.random.default_rng(seed).standard_normal((size, size))
    return X @ X.T + np.eye(size)


def _orthogonal(size: int, seed: int) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def _kronecker(left: Array, right: Array) -> kp.KroneckerOperator:
    return kp.KroneckerOperator(torch.tensor(left), torch.tensor(right))


def _trace(operator: kp.KroneckerOperator) -> float:
    return float(operator.trace())


# ---------------------------------------------------------------- on every route


@on_every_route()
def test_all_theorems(case: Case, route: str) -> None:
    H = case.operator(route)
    with Checks() as check:
        for one in (
            no_kronecker_product_beats_the_optimum,
            cosine_of_the_optimum_is_its_share_of_the_spectrum,
            eigen_corrected_is_the_best_diagonal_of_its_basis,
            diagonal_is_the_best_diagonal,
            trace_scale_matches_all_traces,
            squared_shampoo_is_the_unscaled_square,
            shampoo_dominates_the_target,
        ):
            check(route, one, case, H)


# ---------------------------------------------------------------- Kronecker-exact targets


def kronecker_exact(left: Array, right: Array) -> Case:
    """Samples (row i of left^1/2) (row j of right^1/2)^T, weight 1: H is left kron right."""
    root_left, root_right = oracle.matrix_power(left, 0.5), oracle.matrix_power(right, 0.5)
    pairs = [(u, v) for u in root_left for v in root_right]
    return Case(
        "exact",
        output_grads=np.array([u for u, _ in pairs]),
        inputs=np.array([v for _, v in pairs]),
        given_weights=np.ones(len(pairs)),
    )


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_kronecker_exact_target_is_found_exactly(route: str) -> None:
    left, right = _psd(4, 1), _psd(3, 2)
    case = kronecker_exact(left, right)
    H = case.operator(route)
    truth = np.kron(left, right)
    assert_close(dense(H), truth, ENTRIES)
    for name in ("optimal", "shampoo-squared", "eigen-corrected"):
        P = kp.approximate(H, name)
        assert_close(dense(P), truth, ROOT_ENTRIES if name == "optimal" else ENTRIES)
        assert kp.relative_error(H, P) <= ZERO_ERROR
        assert kp.best_scale_error(H, P) <= ZERO_ERROR
        assert kp.cosine_similarity(H, P) == pytest.approx(1, abs=SCALAR)
        assert kp.best_scale(H, P) == pytest.approx(1, abs=SCALAR)
    spectrum = as_numpy(H.kronecker_spectrum())
    assert_close(spectrum[0], H.norm(), SCALAR)
    assert_close(spectrum[1:], np.zeros(len(spectrum) - 1), ZERO_ERROR, scale=H.norm())


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_unscaled_square_is_off_by_the_trace(route: str) -> None:
    H = kronecker_exact(_psd(4, 1), _psd(3, 2)).operator(route)
    P = kp.approximate(H, "shampoo-squared")
    unscaled = kp.KroneckerOperator(P.left, P.right, P.scale * H.trace())
    assert kp.best_scale(H, unscaled) * H.trace() == pytest.approx(1, abs=SCALAR)
    root = kp.approximate(H, "shampoo")
    assert_close(dense(root.power(2)), dense(unscaled), ENTRIES)


def test_kfac_is_exact_for_independent_factors() -> None:
    """All pairs of d and a, so that d and a are independent in the sample."""
    rng = np.random.default_rng(3)
    d, a = rng.standard_normal((6, 4)), rng.standard_normal((5, 3))
    case = Case("product", output_grads=np.repeat(d, 5, axis=0), inputs=np.tile(a, (6, 1)))
    H = case.operator()
    for name in ("kfac", "shampoo-squared", "optimal"):
        assert kp.relative_error(H, kp.approximate(H, name)) <= ZERO_ERROR


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_white_noise_scales(route: str) -> None:
    """H = I: the root of Shampoo's square has unit gain, Shampoo's own (mn)^(-1/4)."""
    m, n = 4, 3
    H = kronecker_exact(np.eye(m), np.eye(n)).operator(route)
    X = torch.tensor(np.random.default_rng(4).standard_normal((m, n)))

    def gain(P: kp.KroneckerOperator) -> float:
        return float(torch.linalg.norm(P.power(-0.5).apply(X)) / torch.linalg.norm(X))

    square = kp.approximate(H, "shampoo-squared")
    unscaled = kp.KroneckerOperator(square.left, square.right, square.scale * H.trace())
    assert gain(square) == pytest.approx(1, rel=SCALAR)
    assert gain(kp.approximate(H, "diagonal")) == pytest.approx(1, rel=SCALAR)
    assert gain(kp.approximate(H, "shampoo")) == pytest.approx((m * n) ** -0.25, rel=SCALAR)
    assert gain(unscaled) == pytest.approx((m * n) ** -0.5, rel=SCALAR)


# ---------------------------------------------------------------- optimality


def no_kronecker_product_beats_the_optimum(case: Case, H: kp.SecondMoment) -> None:
    best = kp.approximate(H, "optimal")
    cosine, error = kp.cosine_similarity(H, best), kp.relative_error(H, best)
    m, n = case.shape
    rivals = [kp.approximate(H, name) for name in KRONECKER if name in case.approximations]
    rivals += [_kronecker(_psd(m, seed), _psd(n, seed + 1)) for seed in range(3)]
    rivals += [kp.KroneckerOperator(best.left, torch.tensor(_psd(n, 7)))]
    rivals += [kp.KroneckerOperator(torch.tensor(_psd(m, 8)), best.right)]
    for P in rivals:
        assert kp.cosine_similarity(H, P) <= cosine + INEQUALITY
        assert kp.relative_error(H, P) ** 2 >= error**2 - INEQUALITY
    assert kp.best_scale(H, best) == pytest.approx(1, abs=SCALAR)


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("ratio", [0.9, 0.999, 0.999999])
def test_nearly_tied_optimum(positions: int, ratio: float) -> None:
    """Two weakly coupled groups of units with sigma_2 / sigma_1 near 1: slow power iteration."""
    case = nearly_tied(positions, ratio)
    truth = oracle.leading_triple(case.H, case.shape)
    spectrum = oracle.kronecker_spectrum(case.H, case.shape)
    assert 1 - spectrum[1] / spectrum[0] < 2 * (1 - ratio) + 0.02
    for route in case.routes:
        H = case.operator(route)
        P = kp.approximate(H, "optimal")
        assert P.scale == pytest.approx(truth.sigma, rel=SCALAR)
        expected = truth.sigma / oracle.norm(case.H)
        assert kp.cosine_similarity(H, P) == pytest.approx(expected, abs=SCALAR)
        assert kp.best_scale(H, P) == pytest.approx(1, abs=SCALAR)


def nearly_tied(positions: int, ratio: float) -> Case:
    rng = np.random.default_rng(11)
    d, a = np.zeros((2, 40, positions, 6)), np.zeros((2, 40, positions, 4))
    base_d, base_a = (
        rng.standard_normal((40, positions, 3)),
        rng.standard_normal((40, positions, 2)),
    )
    d[0, ..., :3], a[0, ..., :2] = base_d, base_a
    d[1, ..., 3:], a[1, ..., 2:] = np.sqrt(ratio) * base_d, base_a
    d, a = d.reshape(80, positions, 6), a.reshape(80, positions, 4)
    coupling = 1e-4
    return Case(
        "nearly-tied",
        output_grads=d + coupling * rng.standard_normal(d.shape),
        inputs=a + coupling * rng.standard_normal(a.shape),
    )


def cosine_of_the_optimum_is_its_share_of_the_spectrum(case: Case, H: kp.SecondMoment) -> None:
    sigma = float(H.kronecker_spectrum(1)[0])
    cosine = kp.cosine_similarity(H, kp.approximate(H, "optimal"))
    assert cosine == pytest.approx(sigma / H.norm(), abs=SCALAR)


@pytest.mark.parametrize(
    "case",
    [
        factors_case("T1", 8, 4, 3),
        factors_case("T3", 6, 4, 5, positions=3),
        factors_case("C2", 5, 4, 3, columns=2, positions=1),
        matrices_case("matrices", 9, 3, 4),
    ],
    ids=str,
)
def test_alternating_least_squares_climbs_to_the_optimum(case: Case) -> None:
    H = case.operator()
    pairs = oracle.alternating_least_squares(case.H, case.shape, rounds=60)
    cosines = np.array([kp.cosine_similarity(H, _kronecker(*pair)) for pair in pairs])
    assert np.all(np.diff(cosines) >= -INEQUALITY)
    best = kp.approximate(H, "optimal")
    assert cosines[0] < kp.cosine_similarity(H, best) - 1e-6  # it had a way to go
    assert cosines[-1] == pytest.approx(kp.cosine_similarity(H, best), abs=SCALAR)
    left, right = pairs[-1]
    assert_close(as_numpy(best.left), left, ROOT_ENTRIES)
    assert_close(as_numpy(best.right), right, ROOT_ENTRIES)


@pytest.mark.parametrize("route", ["parameter", "dense"])
def test_alternating_least_squares_on_the_fixture(route: str) -> None:
    samples = kp.GradientSamples.from_matrices(torch.tensor(fixture.SAMPLES))
    H = kp.SecondMoment(samples, route=route)
    H_dense = oracle.second_moment(fixture.SAMPLES[:, None], np.full(4, 0.25))
    pairs = oracle.alternating_least_squares(H_dense, (2, 3), rounds=5)
    cosines = [kp.cosine_similarity(H, _kronecker(*pair)) for pair in pairs]
    assert cosines == pytest.approx(fixture.ALTERNATING_COSINES, abs=PRINTED)
    # the sequential sweep beats the simultaneous one after a single round
    assert cosines[0] > kp.cosine_similarity(H, kp.approximate(H, "shampoo-squared"))


def eigen_corrected_is_the_best_diagonal_of_its_basis(case: Case, H: kp.SecondMoment) -> None:
    """Shampoo, its square and any other diagonal in the same eigenbasis are further from H."""
    P = kp.approximate(H, "eigen-corrected")
    error = kp.relative_error(H, P) ** 2
    rng = np.random.default_rng(0)
    rivals = [kp.approximate(H, name) for name in ("shampoo", "shampoo-squared")]
    for _ in range(3):
        other = P.eigenvalues * torch.tensor(rng.uniform(0.5, 1.5, tuple(P.eigenvalues.shape)))
        rivals.append(kp.EigenOperator(P.left_basis, P.right_basis, other))
    for Q in rivals:
        assert error <= kp.relative_error(H, Q) ** 2 + INEQUALITY
    assert kp.best_scale(H, P) == pytest.approx(1, abs=SCALAR)
    assert P.trace() == pytest.approx(H.trace(), rel=SCALAR)


def test_error_splits_into_basis_and_eigenvalue_error() -> None:
    """|H - Q D Q^T|^2 = |offdiag(Q^T H Q)|^2 + |diag(Q^T H Q) - D|^2 for any Kronecker basis."""
    case = factors_case("", 9, 4, 3)
    H = case.operator()
    Q_L, Q_R = _orthogonal(4, 1), _orthogonal(3, 2)
    D = np.random.default_rng(3).uniform(0, 2, (4, 3))
    Q = np.kron(Q_L, Q_R)
    rotated = Q.T @ case.H @ Q
    off_diagonal = rotated - np.diag(np.diag(rotated))
    eigenvalue_error = np.diag(rotated) - D.reshape(-1)
    expected = oracle.norm(off_diagonal) ** 2 + np.sum(eigenvalue_error**2)
    P = kp.EigenOperator(torch.tensor(Q_L), torch.tensor(Q_R), torch.tensor(D))
    assert (kp.relative_error(H, P) * H.norm()) ** 2 == pytest.approx(expected, rel=SCALAR)


def test_eigen_corrected_recovers_a_non_separable_spectrum() -> None:
    """H = Q D Q^T with a D of full rank as a matrix: no Kronecker product, yet error zero."""
    Q_L, Q_R = _orthogonal(4, 5), _orthogonal(3, 6)
    D = np.random.default_rng(7).uniform(0.2, 3, (4, 3))
    case = Case(
        "non-separable",
        output_grads=np.array([Q_L[:, i] for i in range(4) for _ in range(3)]),
        inputs=np.array([Q_R[:, j] for _ in range(4) for j in range(3)]),
        given_weights=D.reshape(-1),
    )
    H = case.operator()
    assert kp.relative_error(H, kp.approximate(H, "eigen-corrected")) <= ZERO_ERROR
    assert kp.relative_error(H, kp.approximate(H, "optimal")) > 0.05


def diagonal_is_the_best_diagonal(case: Case, H: kp.SecondMoment) -> None:
    P = kp.approximate(H, "diagonal")
    cosine = np.linalg.norm(np.diag(case.H)) / oracle.norm(case.H)
    assert kp.cosine_similarity(H, P) == pytest.approx(cosine, abs=SCALAR)
    assert kp.best_scale(H, P) == pytest.approx(1, abs=SCALAR)
    assert P.trace() == pytest.approx(H.trace(), rel=SCALAR)


# ---------------------------------------------------------------- traces, overlaps, few samples


def trace_scale_matches_all_traces(case: Case, H: kp.SecondMoment) -> None:
    P = kp.approximate(H, "shampoo-squared")
    assert _trace(P) == pytest.approx(H.trace(), rel=SCALAR)
    matrix = dense(P)
    left, right = oracle.left_factor(case.H, case.shape), oracle.right_factor(case.H, case.shape)
    assert_close(oracle.left_factor(matrix, case.shape), left, ENTRIES)
    assert_close(oracle.right_factor(matrix, case.shape), right, ENTRIES)


def squared_shampoo_is_the_unscaled_square(case: Case, H: kp.SecondMoment) -> None:
    square, root = kp.approximate(H, "shampoo-squared"), kp.approximate(H, "shampoo")
    assert_close(dense(root.power(2)), dense(square) * H.trace(), ENTRIES)
    # |L^1/2 kron R^1/2|^2 = Tr L Tr R
    assert root.norm() == pytest.approx(H.trace(), rel=SCALAR)


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_overlap_of_one_step_with_the_optimum(route: str) -> None:
    """cos(L, U_1) = alpha_1 sigma_1 / sqrt(sum_i alpha_i^2 sigma_i^2), alpha_i = <V_i, I>."""
    case = factors_case("", 8, 4, 3)
    _, sigma, right_vectors = np.linalg.svd(oracle.rearrange(case.H, case.shape))
    alpha = right_vectors[: len(sigma)] @ np.eye(3).reshape(-1)
    expected = abs(alpha[0]) * sigma[0] / np.linalg.norm(alpha * sigma)
    H = case.operator(route)
    L = as_numpy(kp.approximate(H, "shampoo-squared").left)
    U = as_numpy(kp.approximate(H, "optimal").left)
    assert np.sum(L * U) / np.linalg.norm(L) == pytest.approx(expected, abs=ROOT_ENTRIES)


@pytest.mark.parametrize("route", ["parameter", "dense"])
def test_optimum_of_a_single_matrix_is_rank_one(route: str) -> None:
    """R(g g^T) = G kron G: the optimum keeps only the leading singular pair of G."""
    case = matrices_case("", 1, 4, 3)
    u, s, vt = np.linalg.svd(case.G[0, 0])
    H = case.operator(route)
    P = kp.approximate(H, "optimal")
    assert_close(as_numpy(P.left), np.outer(u[:, 0], u[:, 0]), ROOT_ENTRIES)
    assert_close(as_numpy(P.right), np.outer(vt[0], vt[0]), ROOT_ENTRIES)
    assert kp.cosine_similarity(H, P) == pytest.approx(s[0] ** 2 / np.sum(s**2), abs=SCALAR)
    expected = [s[0] ** 2, s[0] * s[1]]
    assert_close(as_numpy(H.kronecker_spectrum(2)), expected, SCALAR)


def shampoo_dominates_the_target(case: Case, H: kp.SecondMoment) -> None:
    """H <= r L^1/2 kron R^1/2 in the Loewner order, r the largest rank of a sample."""
    rank = max(np.linalg.matrix_rank(G) for G in case.G.reshape(-1, *case.shape))
    gap = rank * dense(kp.approximate(H, "shampoo")) - case.H
    assert np.linalg.eigvalsh(gap)[0] >= -ROOT_ENTRIES * oracle.norm(case.H)


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_magnitude_bounds(route: str, power: float) -> None:
    """How much P^-p can shrink or stretch, from the extreme eigenvalues of H alone."""
    case = factors_case("", 60, 4, 3)
    values = np.linalg.eigvalsh(case.H)
    low, high = values[0], values[-1]
    assert low > 0.001 * high  # else the bounds say nothing
    H = case.operator(route)
    size = float(len(case.H))
    bounds = {
        "shampoo": ((size * high**2) ** (-power / 2), (size * low**2) ** (-power / 2)),
        "shampoo-squared": (low**power * high ** (-2 * power), high**power * low ** (-2 * power)),
        "eigen-corrected": (high**-power, low**-power),
        "diagonal": (high**-power, low**-power),
    }
    for name, (least, most) in bounds.items():
        gains = 1 / np.linalg.eigvalsh(dense(kp.approximate(H, name))) ** power
        inverse = np.linalg.eigvalsh(dense(kp.approximate(H, name).power(-power)))
        assert_close(np.sort(gains), inverse, ROOT_ENTRIES)
        assert least * (1 - SCALAR) <= inverse[0]
        assert inverse[-1] <= most * (1 + SCALAR)
