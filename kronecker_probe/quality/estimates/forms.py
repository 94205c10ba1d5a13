"""<H_i, P> of each draw with any operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples
from kronecker_probe.linalg.gram import chunk_rows
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.block import BlockOperator
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.eigen import EigenOperator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator

# Eigenvalues below this share of the largest span no range to whiten.
NULL = 1e-12


def draw_forms(target: SecondMoment, operator: Operator) -> Tensor:
    """sum_c <G_ic, P G_ic> of each datum, without its weight, float64 [N].

    Args:
        target: H.
        operator: P, of H's shape.
    """
    if isinstance(operator, KroneckerOperator):
        forms = target.quadratic_forms(operator.left_factor, operator.right_factor)
        return operator.scale * forms
    if isinstance(operator, BlockOperator):
        parts = (draw_forms(target.block(r, c), one) for r, c, one in operator.blocks)
        return torch.stack(list(parts)).sum(dim=0)
    if isinstance(operator, EigenOperator):
        left, right, values = operator.left_basis, operator.right_basis, operator.eigenvalues
        return _elementwise(target, values, left, right)
    if isinstance(operator, DiagonalOperator):
        return _elementwise(target, operator.values, None, None)
    return _over_matrices(target, lambda g: (g * operator.apply(g)).sum(dim=(1, 2, 3)))


def diagonal_pairs(target: SecondMoment, weights: Tensor) -> tuple[Tensor, Tensor]:
    """<D_i, D> and |D_i|^2 of the diagonals D_i = sum_c G_ic o G_ic, D = sum_i weights_i D_i.

    Both float64 [N].
    """
    samples = target.samples
    mean = torch.zeros(target.shape, dtype=torch.float64, device=samples.device)
    if isinstance(samples, FactoredSamples) and samples.n_positions == 1:
        d, a = _squares(samples)
        mean = (d * weights[:, None]).T @ a
        return ((d @ mean) * a).sum(dim=1), d.square().sum(dim=1) * a.square().sum(dim=1)
    m, n = target.shape
    step = chunk_rows(samples.n_columns * m * n)
    for start in range(0, samples.n_examples, step):
        squares = samples.matrices(start, start + step).square().sum(dim=1)
        mean += (squares * weights[start : start + step, None, None]).sum(dim=0)
    norms = _over_matrices(target, lambda g: g.square().sum(dim=1).square().sum(dim=(1, 2)))
    return _elementwise(target, mean, None, None), norms


def weakest_direction(target: SecondMoment, operator: KroneckerOperator) -> float:
    """The fewest effective draws of any eigenvector of P's factors, after whitening by P.

    With x_i the size of draw i along an eigenvector u of L, sum_c |u^T G_ic R^{-1/2}|^2 (and the
    same on the right), it is the least of (sum x_i)^2 / sum x_i^2 with the weights inside. What
    divides by the spectra of L and R rests on all of these alike.
    """
    samples = target.samples
    bases = []
    for factor in (operator.left_factor, operator.right_factor):
        eigen = factor.eigen()
        kept = eigen.values > NULL * eigen.values[0]
        bases.append(eigen.basis.vectors[:, kept] / eigen.values[kept].sqrt())
    if isinstance(samples, FactoredSamples) and samples.n_positions == 1:
        d, a = _squares(samples, *bases)
        sizes = [d * a.sum(dim=1, keepdim=True), a * d.sum(dim=1, keepdim=True)]
    else:

        def of_sides(g: Tensor) -> Tensor:
            squares = (bases[0].T @ g @ bases[1]).square().sum(dim=1)
            return torch.cat([squares.sum(dim=2), squares.sum(dim=1)], dim=1)

        sizes = [_over_matrices(target, of_sides)]
    weighted = torch.cat(sizes, dim=1) * samples.weights[:, None]
    counts = weighted.sum(dim=0).square() / weighted.square().sum(dim=0)
    return float(counts.min())


def _elementwise(
    target: SecondMoment, values: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """sum_c <D, (Q_L^T G_ic Q_R)^{o2}>; None for the identity."""
    samples = target.samples
    if isinstance(samples, FactoredSamples) and samples.n_positions == 1:
        d, a = _squares(samples, left, right)
        return ((d @ values) * a).sum(dim=1)

    def form(g: Tensor) -> Tensor:
        g = g if left is None else left.T @ g
        g = g if right is None else g @ right
        return (g.square() * values).sum(dim=(1, 2, 3))

    return _over_matrices(target, form)


def _squares(
    samples: FactoredSamples, left: Tensor | None = None, right: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum_c (Q_L^T d_ic)^{o2} [N, r] and (Q_R^T a_i)^{o2} [N, s] of unshared draws."""
    d, a = samples.output_grads[:, :, 0], samples.inputs[:, 0].double()
    a = (a if right is None else a @ right).square()
    out: list[Tensor] = []
    step = chunk_rows(d.shape[1] * d.shape[2])
    for start in range(0, len(d), step):
        part = d[start : start + step].double()
        out.append((part if left is None else part @ left).square().sum(dim=1))
    return torch.cat(out), a


def _over_matrices(target: SecondMoment, form: Callable[[Tensor], Tensor]) -> Tensor:
    """``form`` of G [k, C, m, n], chunk by chunk, float64 [N]."""
    samples = target.samples
    m, n = target.shape
    step = chunk_rows(samples.n_columns * m * n)
    starts = range(0, samples.n_examples, step)
    return torch.cat([form(samples.matrices(start, start + step)) for start in starts])
