"""Shampoo's factors as an estimate of H, and their square."""

from __future__ import annotations

from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.kronecker import KroneckerOperator


def shampoo(target: SecondMoment) -> KroneckerOperator:
    """L^{1/2} kron R^{1/2}, with L = E[G G^T] and R = E[G^T G].

    What Shampoo's exponent -1/4 takes for H when H^{-1/2} is wanted (Gupta et al., 2018;
    Morwani et al., 2024, Section 3).
    """
    return KroneckerOperator(target.left_factor.power(0.5), target.right_factor.power(0.5))


def shampoo_squared(target: SecondMoment) -> KroneckerOperator:
    """L kron R / Tr L: one simultaneous power step from the identity, with H's trace.

    Morwani et al. (2024), Section 3; exact when H is a Kronecker product. It is also the
    von Neumann optimum and, on unshared per-example gradients, TKFAC.
    """
    trace = target.trace()
    scale = 1.0 / trace if trace > 0 else 0.0
    return KroneckerOperator(target.left_factor, target.right_factor, scale)


def shampoo_squared_sequential(target: SecondMoment) -> KroneckerOperator:
    """L kron E[G^T L G] / |L|^2: the second side sees the first one updated.

    One sweep of alternating least squares from the identity, where :func:`shampoo_squared` takes
    both half steps at once. The scale is the least-squares one of its last half step, so that
    |H - P| is the smallest for this L.
    """
    left = target.left_factor
    norm = left.norm()
    scale = 1.0 / norm**2 if norm > 0 else 0.0
    return KroneckerOperator(left, target.right_step(left), scale)
