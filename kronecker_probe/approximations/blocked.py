"""Block-diagonal versions of any approximation."""

from __future__ import annotations

from collections.abc import Callable

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.block import BlockOperator, spans
from kronecker_probe.operators.structures.eigen import EigenOperator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator


def blocked(
    target: SecondMoment, build: Callable[[SecondMoment], Operator], block_size: int
) -> Operator:
    """``build`` of every block of at most ``block_size`` x ``block_size``, zero across blocks.

    As the blocking of Distributed Shampoo (Shi et al., 2023) splits a large matrix. A matrix of
    one block is approximated as a whole.
    """
    m, n = target.shape
    rows, columns = spans(m, block_size), spans(n, block_size)
    if len(rows) == len(columns) == 1:
        return build(target)
    return BlockOperator([[_one(target, build, r, c) for c in columns] for r in rows])


def _one(
    target: SecondMoment,
    build: Callable[[SecondMoment], Operator],
    rows: slice,
    columns: slice,
) -> Operator:
    try:
        return _formed(build(target.block(rows, columns)))
    except UnsupportedError as error:
        where = f"[{rows.start}:{rows.stop}, {columns.start}:{columns.stop}]"
        raise UnsupportedError(f"Block {where}: {error}", error.code) from error


def _formed(operator: Operator) -> Operator:
    """The same with small matrices in place of a block's samples and N x N Grams."""
    if isinstance(operator, KroneckerOperator):
        return KroneckerOperator(operator.left, operator.right, operator.scale, operator.info)
    if isinstance(operator, EigenOperator):
        return EigenOperator(
            operator.left_basis, operator.right_basis, operator.eigenvalues, exact=operator.exact
        )
    return operator
