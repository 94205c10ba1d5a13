"""<H_i, P> of each example with any operator."""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.block import BlockOperator
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.eigen import EigenOperator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator

# Eigenvalues below this share of the largest span no range to whiten.
NULL = 1e-12


def example_forms(target: SecondMoment, operator: Operator) -> Tensor:
    """sum_c <G_ic, P G_ic> of each example, without its weight, float64 [N]."""
    if isinstance(operator, KroneckerOperator):
        forms = target.quadratic_forms(operator.left_factor, operator.right_factor)
        return operator.scale * forms
    if isinstance(operator, BlockOperator):
        parts = (example_forms(target.block(r, c), one) for r, c, one in operator.blocks)
        return torch.stack(list(parts)).sum(dim=0)
    kernels = kernels_for(target.samples)
    if isinstance(operator, EigenOperator):
        left, right, values = operator.left_basis, operator.right_basis, operator.eigenvalues
        return kernels.elementwise_forms(values, left, right)
    if isinstance(operator, DiagonalOperator):
        return kernels.elementwise_forms(operator.values, None, None)
    return kernels.over_matrices(lambda g: (g * operator.apply(g)).sum(dim=(1, 2, 3)))


def weakest_direction(target: SecondMoment, operator: KroneckerOperator) -> float:
    """The fewest effective examples of any eigenvector of P's factors, after whitening by P.

    With x_i the size of example i along an eigenvector u of L, sum_c |u^T G_ic R^{-1/2}|^2 (and the
    same on the right), it is the least of (sum x_i)^2 / sum x_i^2 with the weights inside. What
    divides by the spectra of L and R rests on all of these alike.
    """
    bases = []
    for factor in (operator.left_factor, operator.right_factor):
        eigen = factor.eigen()
        kept = eigen.values > NULL * eigen.values[0]
        bases.append(eigen.basis.vectors[:, kept] / eigen.values[kept].sqrt())
    energies = kernels_for(target.samples).energies(*bases)
    weighted = energies * target.samples.weights[:, None]
    counts = weighted.sum(dim=0).square() / weighted.square().sum(dim=0)
    return float(counts.min())
