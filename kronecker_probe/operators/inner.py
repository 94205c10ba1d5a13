"""<P, Q> = tr(P Q) between any two operators, by the cheaper structure of the two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.block import BlockOperator
from kronecker_probe.operators.structures.dense import DenseOperator
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.eigen import EigenOperator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.operators.structures.kronecker_sum import KroneckerSum


def inner(p: Operator, q: Operator) -> float:
    """<P, Q> of two operators of one shape.

    Raises:
        InvalidInputError: The shapes differ, or one is no operator.
    """
    for one in (p, q):
        if not isinstance(one, Operator):
            raise InvalidInputError(
                f"Inner product with a {type(one).__name__}; give an operator (a matrix "
                "[mn, mn] becomes one by kp.DenseOperator)."
            )
    if p.shape != q.shape:
        raise InvalidInputError(
            f"Inner product of operators on {p.shape[0]} x {p.shape[1]} and {q.shape[0]} x "
            f"{q.shape[1]} matrices; both must have one shape."
        )
    rank = {kind: number for number, kind in enumerate(_RULES)}
    first, second = sorted((p, q), key=lambda one: rank[type(one)])
    return _RULES[type(first)](first, second)


def _with_diagonal(p: DiagonalOperator, q: Operator) -> float:
    return float((p.values * q.diagonal()).sum())


def _with_eigen(p: EigenOperator, q: Operator) -> float:
    if isinstance(q, SecondMoment):
        projected = q.eigen_diagonal(p.left, p.right)
    else:
        projected = q.projected_diagonal(p.left_basis, p.right_basis)
    return float((p.eigenvalues * projected).sum())


def _with_block(p: BlockOperator, q: Operator) -> float:
    return math.fsum(inner(one, q.block(rows, columns)) for rows, columns, one in p.blocks)


def _with_sum(p: KroneckerSum, q: Operator) -> float:
    found = [inner(term, q) for term in p.terms]
    found += [skew.scale * q.kronecker_inner(skew.left, skew.right) for skew in p.skew]
    return math.fsum(found)


def _with_kronecker(p: KroneckerOperator, q: Operator) -> float:
    if isinstance(q, KroneckerOperator):
        left, right = p.left_factor.inner(q.left_factor), p.right_factor.inner(q.right_factor)
        return p.scale * q.scale * left * right
    if isinstance(q, SecondMoment):
        return p.scale * q.factor_inner(p.left_factor, p.right_factor)
    return p.scale * q.kronecker_inner(p.left, p.right)


def _with_dense(p: DenseOperator, q: Operator) -> float:
    return float((p.to_dense() * q.to_dense()).sum())


def _of_targets(p: SecondMoment, q: SecondMoment) -> float:
    return p.cross_inner(q)


# One rule a structure; of a pair, the structure that comes first here decides.
_RULES: dict[type[Operator], Callable[[Any, Any], float]] = {
    DiagonalOperator: _with_diagonal,
    EigenOperator: _with_eigen,
    BlockOperator: _with_block,
    KroneckerSum: _with_sum,
    KroneckerOperator: _with_kronecker,
    DenseOperator: _with_dense,
    SecondMoment: _of_targets,
}
