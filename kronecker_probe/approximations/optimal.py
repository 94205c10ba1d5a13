"""The Frobenius-optimal Kronecker product."""

from __future__ import annotations

from kronecker_probe.operators.kronecker import KroneckerOperator
from kronecker_probe.operators.second_moment import SecondMoment


def optimal(target: SecondMoment) -> KroneckerOperator:
    """sigma_1 U_1 kron V_1, the leading singular triple of R(H).

    Van Loan and Pitsianis (1993); Morwani et al. (2024), Section 3, where power iteration finds
    it. Both factors are PSD with unit Frobenius norm; ``info`` holds rounds and residual.
    """
    product = target.leading_product
    info = {"rounds": float(product.rounds), "residual": product.residual}
    return KroneckerOperator(product.left, product.right, product.singular_value, info)
