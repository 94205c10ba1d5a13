"""One factor fitted, the other the identity."""

from __future__ import annotations

from kronecker_probe.operators.factors.factor import IdentityFactor
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.kronecker import KroneckerOperator


def left_only(target: SecondMoment) -> KroneckerOperator:
    """L kron I / n with L = E[G G^T]: the nearest product whose right factor is the identity.

    One-sided Shampoo; also the von Neumann and KL optimum with that factor held at I.
    """
    n = target.shape[1]
    return KroneckerOperator(target.left_factor, IdentityFactor(n, target.device), 1.0 / n)


def right_only(target: SecondMoment) -> KroneckerOperator:
    """I / m kron R with R = E[G^T G], the mirror of :func:`left_only`."""
    m = target.shape[0]
    return KroneckerOperator(IdentityFactor(m, target.device), target.right_factor, 1.0 / m)
