"""The oracle against numbers worked out by hand, so that it can be trusted against the package."""

from __future__ import annotations

import numpy as np
import pytest

from tests import oracle
from tests import reference_fixture as fixture
from tests.tolerances import ENTRIES, PRINTED

SHAPE = (2, 3)


@pytest.fixture
def H() -> oracle.Array:
    return oracle.second_moment(fixture.SAMPLES[:, None], np.full(4, 0.25))


def test_second_moment_of_one_matrix_by_hand() -> None:
    G = np.array([[[[1.0, 2.0], [3.0, 4.0]]]])
    by_hand = 0.5 * np.array([[1, 2, 3, 4], [2, 4, 6, 8], [3, 6, 9, 12], [4, 8, 12, 16]])
    np.testing.assert_array_equal(oracle.second_moment(G, np.array([0.5])), by_hand)


def test_columns_by_hand() -> None:
    d = np.array([[[[1.0, 0.0], [0.0, 2.0]]]])  # one datum, one column, two positions
    a = np.array([[[1.0, 1.0, 0.0], [0.0, 1.0, 3.0]]])
    np.testing.assert_array_equal(oracle.columns(d, a)[0, 0], [[1, 1, 0], [0, 2, 6]])


def test_columns_share_their_datums_inputs() -> None:
    d = np.array([[[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]]])  # N = 2, C = 2, T = 1, m = 1
    a = np.array([[[1.0, 10.0]], [[2.0, 20.0]]])
    np.testing.assert_array_equal(
        oracle.columns(d, a), [[[[1, 10]], [[2, 20]]], [[[6, 60]], [[8, 80]]]]
    )


def test_rearrangement_of_a_kronecker_product_is_an_outer_product(
    rng: np.random.Generator,
) -> None:
    A, C = rng.standard_normal((3, 3)), rng.standard_normal((2, 2))  # not symmetric on purpose
    R = oracle.rearrange(np.kron(A, C), (3, 2))
    np.testing.assert_array_equal(R, np.outer(A.reshape(-1), C.reshape(-1)))


def test_rearrangement_entry_by_entry() -> None:
    H = np.arange(36.0).reshape(6, 6)
    R = oracle.rearrange(H, SHAPE)
    m, n = SHAPE
    for i, k in np.ndindex(m, m):
        for j, q in np.ndindex(n, n):
            assert R[i * m + k, j * n + q] == H[i * n + j, k * n + q]


def test_vec_convention(rng: np.random.Generator) -> None:
    L, G, R = rng.standard_normal((2, 2)), rng.standard_normal(SHAPE), rng.standard_normal((3, 3))
    np.testing.assert_allclose(
        oracle.apply(np.kron(L, R), G), L @ G @ R.T, rtol=ENTRIES, atol=ENTRIES
    )


def test_fixture_by_hand(H: oracle.Array) -> None:
    # integers and quarters: exact in floating point, so equality is meant
    np.testing.assert_array_equal(oracle.left_factor(H, SHAPE), fixture.LEFT)
    np.testing.assert_array_equal(oracle.right_factor(H, SHAPE), fixture.RIGHT)
    np.testing.assert_array_equal(np.mean([G @ G.T for G in fixture.SAMPLES], axis=0), fixture.LEFT)
    np.testing.assert_array_equal(
        np.mean([G.T @ G for G in fixture.SAMPLES], axis=0), fixture.RIGHT
    )
    assert np.trace(H) == fixture.TRACE
    # norm(H)^2 is the squared norm of the Gram matrix over N^2, and the Gram matrix by hand is
    gram = fixture.SAMPLES.reshape(4, 6) @ fixture.SAMPLES.reshape(4, 6).T
    np.testing.assert_array_equal(np.diag(gram), [7, 7, 8, 6])
    np.testing.assert_array_equal(gram[np.triu_indices(4, 1)], [1, -2, 3, 3, 1, 3])
    assert oracle.norm(H) ** 2 == pytest.approx(fixture.SQUARED_NORM, rel=ENTRIES)
    assert fixture.SQUARED_NORM == (49 + 49 + 64 + 36 + 2 * (1 + 4 + 9 + 9 + 1 + 9)) / 16


def test_fixture_spectrum(H: oracle.Array) -> None:
    spectrum = oracle.kronecker_spectrum(H, SHAPE)
    np.testing.assert_allclose(spectrum, fixture.SPECTRUM, rtol=0, atol=PRINTED)


@pytest.mark.parametrize("name", sorted(fixture.COSINE))
def test_fixture_cosines(H: oracle.Array, name: str) -> None:
    P = getattr(oracle, name.replace("-", "_"))(H, SHAPE)
    assert oracle.cosine(H, P) == pytest.approx(fixture.COSINE[name], abs=PRINTED)


@pytest.mark.parametrize("name", sorted(fixture.RELATIVE_ERROR))
def test_fixture_relative_errors(H: oracle.Array, name: str) -> None:
    P = getattr(oracle, name.replace("-", "_"))(H, SHAPE)
    assert oracle.relative_error(H, P) == pytest.approx(fixture.RELATIVE_ERROR[name], abs=PRINTED)


def test_fixture_best_scale(H: oracle.Array) -> None:
    scale = oracle.best_scale(H, oracle.shampoo_squared(H, SHAPE))
    assert scale == pytest.approx(fixture.BEST_SCALE_OF_SHAMPOO_SQUARED, abs=PRINTED)


def test_fixture_alternating_least_squares(H: oracle.Array) -> None:
    pairs = oracle.alternating_least_squares(H, SHAPE, rounds=5)
    cosines = [oracle.cosine(H, np.kron(*pair)) for pair in pairs]
    np.testing.assert_allclose(cosines, fixture.ALTERNATING_COSINES, rtol=0, atol=PRINTED)


def test_matrix_power_by_hand() -> None:
    # [[2, 1], [1, 2]] has eigenvalues 3 and 1 on (1, 1) and (1, -1)
    A = np.array([[2.0, 1.0], [1.0, 2.0]])
    root3 = np.sqrt(3)
    by_hand = np.array([[root3 + 1, root3 - 1], [root3 - 1, root3 + 1]]) / 2
    np.testing.assert_allclose(oracle.matrix_power(A, 0.5), by_hand, rtol=ENTRIES)
    np.testing.assert_allclose(
        oracle.matrix_power(A, -1), np.array([[2, -1], [-1, 2]]) / 3, rtol=ENTRIES
    )


def test_negative_matrix_power_leaves_the_null_space() -> None:
    A = np.array([[4.0, 4.0], [4.0, 4.0]])  # eigenvalues 8 and 0
    np.testing.assert_allclose(oracle.matrix_power(A, -1), A / 64, rtol=ENTRIES)
    np.testing.assert_array_equal(oracle.matrix_power(np.zeros((2, 2)), -1), np.zeros((2, 2)))


def test_kfac_by_hand() -> None:
    d = np.array([[1.0, 0.0], [0.0, 2.0]])
    a = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    left, right = oracle.kfac_factors(d, a, np.array([0.5, 0.5]))
    np.testing.assert_array_equal(left, np.diag([0.5, 2.0]))
    np.testing.assert_array_equal(right, [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 4.5]])


def test_kfac_expand_counts_every_position() -> None:
    d = np.array([[[1.0], [2.0]]])  # N = 1, T = 2, m = 1
    a = np.array([[[3.0], [4.0]]])
    left, right = oracle.kfac_factors(d, a, np.array([1.0]))
    assert left.item() == 5.0  # 1 + 4
    assert right.item() == 12.5  # (9 + 16) / 2


def test_diagonal_and_best_diagonal_agree_in_the_standard_basis(H: oracle.Array) -> None:
    np.testing.assert_array_equal(oracle.best_diagonal_in(np.eye(6), H), oracle.diagonal(H))


def test_swap_sides_matches_transposed_samples(H: oracle.Array) -> None:
    transposed = fixture.SAMPLES.transpose(0, 2, 1)[:, None]
    np.testing.assert_array_equal(
        oracle.swap_sides(H, SHAPE), oracle.second_moment(transposed, np.full(4, 0.25))
    )


def test_metrics_by_hand() -> None:
    H, P = np.diag([3.0, 4.0]), np.diag([1.0, 0.0])
    assert oracle.norm(H) == 5.0
    assert oracle.cosine(H, P) == pytest.approx(0.6)
    assert oracle.relative_error(H, P) == pytest.approx(np.sqrt(20) / 5)
    assert oracle.best_scale(H, P) == 3.0
    assert oracle.best_scale_error(H, P) == pytest.approx(0.8)
