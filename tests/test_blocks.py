"""Block-diagonal versions of every approximation, as an optimizer's blocking makes them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnsupportedError
from tests import approximation_oracle as more
from tests import oracle
from tests.cases import Case, as_numpy, assert_close, dense, factors_case, matrices_case
from tests.oracle import Array, Shape
from tests.tolerances import ENTRIES, INEQUALITY, ROOT_ENTRIES, SCALAR

FACTORED = ("kfac", "kfac-reduce", "tkfac", "ekfac")
BY_MATRIX = {
    "optimal": oracle.optimal,
    "optimal:rank=2": partial(more.truncated, rank=2),
    "shampoo-squared": oracle.shampoo_squared,
    "shampoo-squared-sequential": more.sequential,
    "shampoo": oracle.shampoo,
    "divergence:q=0.5": partial(more.alternate, q=0.5),
    "left-only": more.left_only,
    "right-only": more.right_only,
    "eigen-corrected": oracle.eigen_corrected,
    "diagonal": lambda H, shape: oracle.diagonal(H),
    "identity": more.identity,
}
CASES = (
    factors_case("T1", 7, 5, 4),
    factors_case("T1-N-gt", 40, 5, 4, given_weights=np.linspace(0.1, 2, 40)),
    factors_case("C2-T3", 6, 4, 5, columns=2, positions=3),
    matrices_case("matrices", 8, 5, 4),
)


def with_block_size(name: str, size: int) -> str:
    return f"{name}{',' if ':' in name else ':'}block_size={size}"


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", BY_MATRIX)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_block_is_approximated_by_itself(case: Case, name: str, size: int) -> None:
    H = case.operator()
    P = kp.approximate(H, with_block_size(name, size))
    expected = more.blocked(case.H, case.shape, size, BY_MATRIX[name])
    assert isinstance(P, kp.BlockOperator)
    assert_close(dense(P), expected, ROOT_ENTRIES)
    assert kp.cosine_similarity(H, P) == pytest.approx(oracle.cosine(case.H, expected), abs=1e-9)
    assert H.norm() == pytest.approx(oracle.norm(case.H), rel=SCALAR)  # of the whole


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_blocks_of_factored_approximations_see_their_part_of_d_and_a(case: Case, name: str) -> None:
    P = kp.approximate(case.operator(), name, block_size=2)
    m, n = case.shape
    entry = np.arange(m * n).reshape(m, n)
    assert case.output_grads is not None
    assert case.inputs is not None
    for i in range(0, m, 2):
        for k in range(0, n, 2):
            part = case.with_(
                output_grads=case.output_grads[..., i : i + 2], inputs=case.inputs[..., k : k + 2]
            )
            index = entry[i : i + 2, k : k + 2].reshape(-1)
            alone = dense(kp.approximate(part.operator(), name))
            assert_close(dense(P)[np.ix_(index, index)], alone, ENTRIES)


@pytest.mark.parametrize("name", [*BY_MATRIX, *FACTORED, "divergence:q=0"])
@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_one_block_is_the_unblocked_operator(route: str, name: str) -> None:
    H = factors_case("", 20, 4, 3).operator(route)
    whole, single = kp.approximate(H, name), kp.approximate(H, with_block_size(name, 4))
    assert type(single) is type(whole)
    # the same sums, but a fit's rounds may add them in another order
    assert_close(dense(single), dense(whole), ENTRIES)


@pytest.mark.parametrize("name", ["shampoo-squared", "eigen-corrected", "diagonal", "kfac"])
@pytest.mark.parametrize("power", [-0.5, 0.5])
def test_powers_go_block_by_block(name: str, power: float) -> None:
    case = factors_case("", 40, 5, 4)
    P = kp.approximate(case.operator(), name, block_size=3)
    assert isinstance(P, kp.BlockOperator)
    expected = oracle.matrix_power(dense(P), power)
    assert_close(dense(P.power(power)), expected, ROOT_ENTRIES)


def test_powers_of_blocks_without_any_are_refused() -> None:
    case = factors_case("", 7, 4, 4)
    sums = kp.approximate(case.operator(), "optimal:rank=2,block_size=2")
    with pytest.raises(UnsupportedError, match="2 Kronecker products"):
        sums.power(-0.5)  # type: ignore[attr-defined]
    targets = kp.BlockOperator([[case.operator()]])
    with pytest.raises(UnsupportedError, match="no powers"):
        targets.power(-0.5)


def test_info_tells_the_worst_block() -> None:
    case = factors_case("", 40, 5, 4)
    P = kp.approximate(case.operator(), "divergence:q=0.5,block_size=3")
    assert isinstance(P, kp.BlockOperator)
    infos = [one.info for _, _, one in P.blocks]  # type: ignore[attr-defined]
    assert P.info == {key: max(info[key] for info in infos) for key in ("rounds", "residual")}


def test_blocks_hold_small_matrices_and_no_samples() -> None:
    """Not the N x N Grams of every block."""
    from kronecker_probe.operators.factors.factor import MatrixFactor

    case = factors_case("", 7, 6, 6)
    for name in ("shampoo-squared", "kfac", "optimal", "divergence:q=0.5", "left-only"):
        P = kp.approximate(case.operator(), name, block_size=3)
        assert isinstance(P, kp.BlockOperator)
        for _, _, one in P.blocks:
            assert isinstance(one, kp.KroneckerOperator)
            assert isinstance(one.left_factor, MatrixFactor)
            assert isinstance(one.right_factor, MatrixFactor)


def test_an_unsupported_block_is_named() -> None:
    case = factors_case("", 3, 6, 3)
    with pytest.raises(UnsupportedError, match=r"Block \[0:3, 0:3\].*q=0"):
        kp.approximate(case.operator(), "divergence:q=0,block_size=3")


@pytest.mark.parametrize("size", [0, -1, 1.5, "x"])
def test_bad_block_size_is_refused(size: object) -> None:
    with pytest.raises(InvalidInputError, match=r"kfac got block_size=.*integer >= 1"):
        kp.approximate(factors_case("", 7, 4, 4).operator(), "kfac", block_size=size)


def test_malformed_grids_are_refused() -> None:
    small, large = (kp.DiagonalOperator(torch.ones(k, 2).double()) for k in (2, 3))
    with pytest.raises(InvalidInputError, match="no blocks"):
        kp.BlockOperator([])
    with pytest.raises(InvalidInputError, match=r"Block row 0.*\(3, 2\)"):
        kp.BlockOperator([[small, large]])
    with pytest.raises(InvalidInputError, match="Block row 1"):
        kp.BlockOperator([[small, small], [large]])
    assert kp.BlockOperator([[small], [large]]).shape == (5, 2)


def diagonal_of_h(H: Array, shape: Shape) -> Array:
    return oracle.diagonal(H)


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_finer_blocks_of_the_optimum_and_limits(
    m: int, n: int, n_examples: int, size: int, seed: int
) -> None:
    """Blocks of one entry are the diagonal; no product within blocks beats the blocks' optima."""
    case = factors_case("", n_examples, m, n, seed=seed)
    assume(np.any(case.H))
    H = case.operator()
    finest = kp.approximate(H, "shampoo-squared", block_size=1)
    assert_close(as_numpy(finest.diagonal()), np.diag(case.H).reshape(m, n), ENTRIES)
    assert_close(dense(finest), diagonal_of_h(case.H, (m, n)), ENTRIES)
    best = kp.cosine_similarity(H, kp.approximate(H, "optimal", block_size=size))
    for name in ("shampoo-squared", "kfac", "shampoo", "left-only"):
        rival = kp.approximate(H, name, block_size=size)
        assert kp.cosine_similarity(H, rival) <= best + INEQUALITY
