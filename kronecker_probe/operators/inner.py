"""<P, Q> = tr(P Q) between any two operators, by the cheaper structure of the two."""

from __future__ import annotations

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.dense import DenseOperator
from kronecker_probe.operators.diagonal import DiagonalOperator
from kronecker_probe.operators.eigen import EigenOperator
from kronecker_probe.operators.kronecker import KroneckerOperator
from kronecker_probe.operators.second_moment import SecondMoment


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
    for one, other in ((p, q), (q, p)):
        if isinstance(one, DiagonalOperator):
            return float((one.values * other.diagonal()).sum())
    for one, other in ((p, q), (q, p)):
        if isinstance(one, EigenOperator):
            return _with_eigen(one, other)
    for one, other in ((p, q), (q, p)):
        if isinstance(one, KroneckerOperator):
            return _with_kronecker(one, other)
    if isinstance(p, DenseOperator) or isinstance(q, DenseOperator):
        return float((p.to_dense() * q.to_dense()).sum())
    assert isinstance(p, SecondMoment)
    assert isinstance(q, SecondMoment)
    return p.cross_inner(q)


def _with_eigen(p: EigenOperator, q: Operator) -> float:
    if isinstance(q, SecondMoment):
        projected = q.eigen_diagonal(p.left, p.right)
    else:
        projected = q.projected_diagonal(p.left_basis, p.right_basis)
    return float((p.eigenvalues * projected).sum())


def _with_kronecker(p: KroneckerOperator, q: Operator) -> float:
    if isinstance(q, KroneckerOperator):
        left, right = p.left_factor.inner(q.left_factor), p.right_factor.inner(q.right_factor)
        return p.scale * q.scale * left * right
    if isinstance(q, SecondMoment):
        return p.scale * q.factor_inner(p.left_factor, p.right_factor)
    return p.scale * q.kronecker_inner(p.left, p.right)
