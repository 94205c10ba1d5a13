"""Symmetries of the second moment: order, weights, scale, rotation and transposition of data."""

from __future__ import annotations

import numpy as np
import pytest

import kronecker_probe as kp
from tests import oracle
from tests.cases import (
    APPROXIMATIONS,
    KRONECKER,
    Case,
    as_numpy,
    assert_close,
    dense,
    factors_case,
    matrices_case,
)
from tests.oracle import Array
from tests.tolerances import ENTRIES, ROOT_ENTRIES, SCALAR


def _orthogonal(size: int, seed: int) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def _all_dense(case: Case, route: str) -> dict[str, Array]:
    H = case.operator(route)
    return {name: dense(kp.approximate(H, name)) for name in case.approximations}


SYMMETRY_CASES = (
    factors_case("T1", 7, 4, 3),
    factors_case("T1-N-gt-mn", 20, 4, 3),
    factors_case("T3", 6, 4, 3, positions=3),
    factors_case("C2-T2", 6, 4, 3, columns=2, positions=2),
    matrices_case("matrices", 7, 4, 3),
)
SYMMETRY_RUNS = [(case, route) for case in SYMMETRY_CASES for route in case.routes]
in_every_symmetry = pytest.mark.parametrize(("case", "route"), SYMMETRY_RUNS, ids=str)


def _map_sides(case: Case, left: Array, right: Array) -> Case:
    """G -> left G right^T."""
    if case.matrices is not None:
        return case.with_(matrices=left @ case.matrices @ right.T)
    assert case.output_grads is not None
    assert case.inputs is not None
    return case.with_(output_grads=case.output_grads @ left.T, inputs=case.inputs @ right.T)


@in_every_symmetry
def test_order_of_the_data_is_irrelevant(case: Case, route: str) -> None:
    order = np.random.default_rng(0).permutation(len(case.G))
    weights = np.linspace(0.5, 2, len(case.G))
    weighted = case.with_(given_weights=weights)
    permuted = case.with_(
        given_weights=weights[order],
        **{
            field: None if value is None else value[order]
            for field in ("matrices", "output_grads", "inputs")
            for value in [getattr(case, field)]
        },
    )
    assert_close(dense(permuted.operator(route)), dense(weighted.operator(route)), ENTRIES)
    expected = _all_dense(weighted, route)
    for name, actual in _all_dense(permuted, route).items():
        assert_close(actual, expected[name], ROOT_ENTRIES)


@in_every_symmetry
def test_weights_count_as_given(case: Case, route: str) -> None:
    doubled = case.with_(given_weights=2 * case.weights)
    assert_close(dense(doubled.operator(route)), 2 * case.H, ENTRIES)
    expected = _all_dense(case, route)
    for name, actual in _all_dense(doubled, route).items():
        assert_close(actual, 2 * expected[name], ROOT_ENTRIES)


@in_every_symmetry
def test_a_datum_may_be_split_into_two_of_half_the_weight(case: Case, route: str) -> None:
    twice = {
        field: None if value is None else np.concatenate([value, value])
        for field in ("matrices", "output_grads", "inputs")
        for value in [getattr(case, field)]
    }
    split = case.with_(given_weights=np.tile(case.weights / 2, 2), **twice)
    expected = _all_dense(case, route)
    for name, actual in _all_dense(split, route).items():
        assert_close(actual, expected[name], ROOT_ENTRIES)


@in_every_symmetry
@pytest.mark.parametrize("scale", [-3.0, 1e-9, 1e9])
def test_scaling_the_gradients_scales_by_the_square(case: Case, route: str, scale: float) -> None:
    scaled = _map_sides(case, scale * np.eye(4), np.eye(3))
    assert scaled.operator(route).norm() == pytest.approx(
        scale**2 * case.operator(route).norm(), rel=SCALAR
    )
    expected = _all_dense(case, route)
    for name, actual in _all_dense(scaled, route).items():
        assert_close(actual, scale**2 * expected[name], ROOT_ENTRIES)


@in_every_symmetry
def test_rotating_the_gradients_rotates_all_but_the_diagonal(case: Case, route: str) -> None:
    U, V = _orthogonal(4, 1), _orthogonal(3, 2)
    W = np.kron(U, V)
    rotated = _map_sides(case, U, V)
    H, K = case.operator(route), rotated.operator(route)
    assert_close(dense(K), W @ dense(H) @ W.T, ENTRIES)
    expected = _all_dense(case, route)
    for name, actual in _all_dense(rotated, route).items():
        turned = W @ expected[name] @ W.T
        if name == "diagonal":
            assert np.linalg.norm(actual - turned) > 0.05 * np.linalg.norm(turned)
        else:
            assert_close(actual, turned, ROOT_ENTRIES)
            P, Q = kp.approximate(H, name), kp.approximate(K, name)
            assert kp.cosine_similarity(K, Q) == pytest.approx(
                kp.cosine_similarity(H, P), abs=SCALAR
            )


@pytest.mark.parametrize(
    ("case", "route"), [run for run in SYMMETRY_RUNS if run[0].name != "C2-T2"], ids=str
)
def test_transposing_the_gradients_swaps_the_factors(case: Case, route: str) -> None:
    """K-FAC too for T = 1; its mean over positions sits on the right only as a scale."""
    if case.matrices is not None:
        transposed = case.with_(matrices=case.matrices.swapaxes(1, 2))
    else:
        transposed = case.with_(output_grads=case.inputs, inputs=case.output_grads)
    H, K = case.operator(route), transposed.operator(route)
    for name in case.approximations:
        P, Q = kp.approximate(H, name), kp.approximate(K, name)
        assert_close(dense(Q), oracle.swap_sides(dense(P), case.shape), ROOT_ENTRIES)
        if name in KRONECKER:
            for one, other in ((P.left, Q.right), (P.right, Q.left)):
                a, b = as_numpy(one), as_numpy(other)
                assert_close(a / np.trace(a), b / np.trace(b), ROOT_ENTRIES)


def test_every_approximation_is_covered_here() -> None:
    assert set(APPROXIMATIONS) == set(factors_case("", 3, 2, 2).approximations)
