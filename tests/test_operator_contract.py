"""The contract of every operator, once; a new class inherits the suite by saying how it is made."""

from __future__ import annotations

import abc
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.factors.factor import IdentityFactor
from kronecker_probe.operators.structures.kronecker_sum import SkewTerm
from tests import oracle
from tests.cases import as_numpy, assert_close, dense, factors_case, matrices_case
from tests.grid import Checks
from tests.oracle import Array
from tests.tolerances import ENTRIES, SCALAR

SHAPE = (5, 4)


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _psd(size: int, seed: int) -> Array:
    X = _rng(seed).standard_normal((size, size))
    return X @ X.T


def _symmetric(size: int, seed: int, sign: int = 1) -> Array:
    X = _rng(seed).standard_normal((size, size))
    return X + sign * X.T


def _basis(size: int, kept: int, seed: int) -> Array:
    return np.linalg.qr(_rng(seed).standard_normal((size, size)))[0][:, :kept]


def kronecker(shape: tuple[int, int] = SHAPE, seed: int = 1) -> tuple[Operator, Array]:
    left, right = _psd(shape[0], seed), _psd(shape[1], seed + 1)
    P = kp.KroneckerOperator(torch.tensor(left), torch.tensor(right), scale=0.7)
    return P, 0.7 * np.kron(left, right)


def one_sided() -> tuple[Operator, Array]:
    left = _psd(SHAPE[0], 3)
    right = IdentityFactor(SHAPE[1], torch.device("cpu"))
    return kp.KroneckerOperator(torch.tensor(left), right, 0.5), 0.5 * np.kron(left, np.eye(4))


def identity() -> tuple[Operator, Array]:
    sides = [IdentityFactor(size, torch.device("cpu")) for size in SHAPE]
    return kp.KroneckerOperator(sides[0], sides[1], 3.0), 3.0 * np.eye(20)


def eigen(shape: tuple[int, int] = SHAPE, thin: int = 0) -> tuple[Operator, Array]:
    left, right = _basis(shape[0], shape[0], 5), _basis(shape[1], shape[1] - thin, 6)
    values = _rng(7).uniform(0.1, 2, (left.shape[1], right.shape[1]))
    both = np.kron(left, right)
    P = kp.EigenOperator(*(torch.tensor(part) for part in (left, right, values)))
    return P, (both * values.reshape(-1)) @ both.T


def diagonal(shape: tuple[int, int] = SHAPE) -> tuple[Operator, Array]:
    values = _rng(8).uniform(0, 2, shape)
    return kp.DiagonalOperator(torch.tensor(values)), np.diag(values.reshape(-1))


def explicit(shape: tuple[int, int] = SHAPE) -> tuple[Operator, Array]:
    H = _psd(shape[0] * shape[1], 9)
    return kp.DenseOperator(torch.tensor(H), shape), H


def products(shape: tuple[int, int] = SHAPE, skew: bool = True) -> tuple[Operator, Array]:
    m, n = shape
    left, right = _symmetric(m, 10), _symmetric(n, 11)
    first, expected = kronecker(shape, 12)
    assert isinstance(first, kp.KroneckerOperator)
    terms = [first, kp.KroneckerOperator(torch.tensor(left), torch.tensor(right), -0.4)]
    expected = expected - 0.4 * np.kron(left, right)
    if not skew:
        return kp.KroneckerSum(terms), expected
    left, right = _symmetric(m, 13, -1), _symmetric(n, 14, -1)
    last = SkewTerm(torch.tensor(left), torch.tensor(right), 0.3)
    return kp.KroneckerSum(terms, [last]), expected + 0.3 * np.kron(left, right)


Part = Callable[[tuple[int, int]], tuple[Operator, Array]]


def blocks(rows: tuple[int, ...], columns: tuple[int, ...], *parts: Part) -> tuple[Operator, Array]:
    """A grid of the given sizes, filled with the parts in turn."""
    shape = (sum(rows), sum(columns))
    entry = np.arange(shape[0] * shape[1]).reshape(shape)
    expected = np.zeros((entry.size, entry.size))
    grid: list[list[Operator]] = []
    for i, m in enumerate(rows):
        grid.append([])
        for k, n in enumerate(columns):
            P, matrix = parts[(i * len(columns) + k) % len(parts)]((m, n))
            top, side = sum(rows[:i]), sum(columns[:k])
            index = entry[top : top + m, side : side + n].reshape(-1)
            expected[np.ix_(index, index)] = matrix
            grid[-1].append(P)
    return kp.BlockOperator(grid), expected


def target(positions: int, route: str, seed: int = 0) -> tuple[Operator, Array]:
    columns = 2 if positions > 1 else None
    case = factors_case("", 6, *SHAPE, columns=columns, positions=positions, seed=seed)
    if columns is None:
        case = factors_case("", 6, *SHAPE, seed=seed)
    return case.operator(route), case.H


def target_of_matrices() -> tuple[Operator, Array]:
    case = matrices_case("", 5, *SHAPE)
    return case.operator("parameter"), case.H


MADE: dict[str, Callable[[], tuple[Operator, Array]]] = {
    "kronecker": kronecker,
    "one-sided": one_sided,
    "identity": identity,
    "eigen": eigen,
    "eigen-thin": lambda: eigen(thin=2),
    "diagonal": diagonal,
    "dense": explicit,
    "sum": lambda: products(skew=False),
    "sum-skew": products,
    "blocks-2": lambda: blocks((2, 2, 1), (2, 2), kronecker, diagonal, eigen),
    "blocks-3": lambda: blocks((3, 2), (3, 1), eigen, products, explicit),
    "blocks-nested": lambda: blocks(
        (2, 3), (4,), kronecker, lambda s: blocks((1, 2), (2, 2), eigen, kronecker)
    ),
    "target-sample": lambda: target(1, "sample"),
    "target-parameter": lambda: target(3, "parameter"),
    "target-dense": lambda: target(1, "dense", seed=1),
    "target-matrices": target_of_matrices,
}


class OperatorContract(abc.ABC):
    """What holds for every operator; inherit it and say how one is made.

    A subclass whose name starts with ``Test`` is collected.
    """

    @abc.abstractmethod
    def make(self) -> tuple[Operator, Array]:
        """A fresh operator and the dense matrix that it stands for."""

    def test_shape_and_dense_matrix(self) -> None:
        P, expected = self.make()
        m, n = P.shape
        assert expected.shape == (m * n, m * n)
        assert_close(dense(P), expected, ENTRIES)
        assert_close(dense(P), dense(P).T, ENTRIES)
        assert P.device == torch.device("cpu")

    def test_apply(self) -> None:
        P, expected = self.make()
        X = _rng(20).standard_normal((2, 3, *P.shape))
        bound = oracle.norm(expected) * float(np.linalg.norm(X))
        result = oracle.apply(expected, X)
        assert_close(as_numpy(P.apply(torch.tensor(X))), result, ENTRIES, scale=bound)
        single = P.apply(torch.tensor(X[0, 0], dtype=torch.float32))
        assert single.dtype == torch.float32
        assert_close(as_numpy(single), result[0, 0], 1e-5, scale=bound)
        x = X[1, 1].reshape(-1)
        assert_close(P.to_scipy() @ x, result[1, 1].reshape(-1), ENTRIES, scale=bound)

    def test_norm_and_trace(self) -> None:
        P, expected = self.make()
        assert P.norm() == pytest.approx(oracle.norm(expected), rel=SCALAR)
        assert P.trace() == pytest.approx(np.trace(expected), abs=SCALAR * oracle.norm(expected))

    def test_diagonals(self) -> None:
        P, expected = self.make()
        m, n = P.shape
        assert_close(as_numpy(P.diagonal()), np.diag(expected).reshape(m, n), ENTRIES)
        left, right = _basis(m, m - 1, 21), _basis(n, n, 22)
        both = np.kron(left, right)
        projected = np.einsum("ap,ab,bp->p", both, expected, both).reshape(m - 1, n)
        actual = P.projected_diagonal(torch.tensor(left), torch.tensor(right))
        assert_close(as_numpy(actual), projected, ENTRIES, scale=oracle.norm(expected))

    @pytest.mark.parametrize("sign", [1, -1])
    def test_inner_with_a_product_of_any_parity(self, sign: int) -> None:
        P, expected = self.make()
        left, right = (_symmetric(size, 23 + i, sign) for i, size in enumerate(P.shape))
        actual = P.kronecker_inner(torch.tensor(left), torch.tensor(right))
        bound = oracle.norm(expected) * float(np.linalg.norm(left) * np.linalg.norm(right))
        assert_close(actual, oracle.inner(expected, np.kron(left, right)), SCALAR, scale=bound)

    def test_principal_blocks(self) -> None:
        P, expected = self.make()
        m, n = P.shape
        entry = np.arange(m * n).reshape(m, n)
        for rows, columns in (
            (slice(0, m), slice(0, n)),
            (slice(1, m), slice(0, n - 1)),
            (slice(2, 3), slice(1, 3)),
        ):
            index = entry[rows, columns].reshape(-1)
            part = P.block(rows, columns)
            assert part.shape == entry[rows, columns].shape
            assert_close(
                dense(part), expected[np.ix_(index, index)], ENTRIES, scale=oracle.norm(expected)
            )

    def test_inner_with_every_other_kind(self) -> None:
        P, expected = self.make()
        with Checks() as check:
            for name, make in MADE.items():
                check(name, self.inner_in_either_order, P, expected, *make())

    @staticmethod
    def inner_in_either_order(P: Operator, expected: Array, Q: Operator, other: Array) -> None:
        if P.shape != Q.shape:
            return
        bound = oracle.norm(expected) * oracle.norm(other)
        assert_close(P.inner(Q), oracle.inner(expected, other), SCALAR, scale=bound)
        assert_close(Q.inner(P), oracle.inner(expected, other), SCALAR, scale=bound)


def _suite(name: str) -> type[OperatorContract]:
    def make(self: OperatorContract) -> tuple[Operator, Array]:
        return MADE[name]()

    return type(f"Test[{name}]", (OperatorContract,), {"make": make})


for _name in MADE:
    globals()[f"Test_{_name}"] = _suite(_name)


def test_every_operator_class_is_in_the_suite() -> None:
    made = {type(make()[0]) for make in MADE.values()}
    assert {one for one in Operator.__subclasses__() if one.__module__.startswith("kron")} == made


def test_inner_is_symmetric_and_positive_on_itself() -> None:
    for first, second in product(MADE, repeat=2):
        P, Q = MADE[first]()[0], MADE[second]()[0]
        assert P.inner(Q) == pytest.approx(Q.inner(P), abs=SCALAR * P.norm() * Q.norm())
    for make in MADE.values():
        P = make()[0]
        assert P.inner(P) == pytest.approx(P.norm() ** 2, rel=SCALAR)
