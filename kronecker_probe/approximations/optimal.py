"""The Frobenius-optimal Kronecker product, sums of several, and what each further one buys."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kronecker_probe.errors import UndefinedMetricWarning
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.operators.structures.kronecker_sum import KroneckerSum, SkewTerm


def optimal(target: SecondMoment, rank: int = 1) -> KroneckerOperator | KroneckerSum:
    """The nearest sum of ``rank`` Kronecker products: leading singular triples of R(H).

    Van Loan and Pitsianis (1993); Morwani et al. (2024), Section 3, where power iteration finds
    the first one. Factors have unit Frobenius norm; those of the first term are PSD. ``info``
    holds rounds and residual.

    Args:
        target: H.
        rank: How many products; what is more than the rank of R(H) adds nothing.

    Returns:
        A Kronecker product for rank 1; else their sum, which may have negative eigenvalues.
    """
    if rank == 1 or target.leading_product.singular_value == 0.0:
        return leading_kronecker(target)
    found = target.leading_terms(rank)
    info = {"rounds": float(found.rounds), "residual": found.residual}
    symmetric = [
        KroneckerOperator(term.left, term.right, term.singular_value)
        for term in found.terms
        if not term.skew
    ]
    skew = [
        SkewTerm(term.left.matrix, term.right.matrix, term.singular_value)
        for term in found.terms
        if term.skew
    ]
    return KroneckerSum(symmetric, skew, info)


def leading_kronecker(target: SecondMoment) -> KroneckerOperator:
    """sigma_1 U_1 kron V_1, the leading singular triple of R(H)."""
    product = target.leading_product
    info = {"rounds": float(product.rounds), "residual": product.residual}
    return KroneckerOperator(product.left, product.right, product.singular_value, info)


def kronecker_energy(target: SecondMoment, k: int | None = None) -> Tensor:
    """The share of |H|^2 that the best sums of 1, 2, ..., k Kronecker products hold.

    Entry r - 1 is sum_{i <= r} sigma_i^2 / |H|^2 = 1 - (relative error of "optimal:rank=r")^2, so
    its steps are what each further term buys and its root is the cosine of that sum.

    Args:
        target: H.
        k: How many; None as for ``kronecker_spectrum``.

    Returns:
        float64 CPU, ascending, at most 1; of fewer entries than k where R(H) has a smaller rank.
        NaN with an UndefinedMetricWarning when H = 0.

    Raises:
        InvalidInputError: k is not positive.
    """
    norm = target.norm()
    if norm == 0:
        warnings.warn(
            "kronecker_energy: H = 0: no quality number is defined.",
            UndefinedMetricWarning,
            stacklevel=2,
        )
        return torch.full((1,), torch.nan, dtype=torch.float64)
    shares = (target.kronecker_spectrum(k) / norm).square()
    return shares.cumsum(0).clamp_max(1.0)
