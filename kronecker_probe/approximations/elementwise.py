"""Operators without eigenvectors to learn: the diagonal of H, and its mean."""

from __future__ import annotations

from kronecker_probe.operators.factors.factor import IdentityFactor
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator


def diagonal(target: SecondMoment) -> DiagonalOperator:
    """E[G o G], what Adam and AdaGrad hold."""
    return DiagonalOperator(target.diagonal())


def identity(target: SecondMoment) -> KroneckerOperator:
    """(Tr H / mn) I, the nearest multiple of the identity: plain gradient descent."""
    m, n = target.shape
    left, right = IdentityFactor(m, target.device), IdentityFactor(n, target.device)
    return KroneckerOperator(left, right, target.trace() / (m * n))
