"""The vectors d and a of factored samples, as rows whose Grams are computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples
from kronecker_probe.operators.factors.vectors import Rows


def vectors(samples: FactoredSamples) -> tuple[Rows, Rows]:
    """d and a; a position is a vector like a column is, as both sum within one example."""
    return Rows(samples.output_grads.flatten(1, 2)), Rows(samples.inputs)


def pooled_vectors(samples: FactoredSamples) -> tuple[Rows, Rows]:
    """The mean of d and the sum of a over positions."""
    d, a = samples.output_grads.double(), samples.inputs.double()
    return Rows(d.mean(dim=2)), Rows(a.sum(dim=1, keepdim=True))


def position_vectors(samples: FactoredSamples) -> tuple[Rows, Rows]:
    """d as [N T, C, m] and a as [N T, 1, n]: each position as an example of its own."""
    d, a = samples.output_grads.transpose(1, 2), samples.inputs
    return Rows(d.flatten(0, 1)), Rows(a.flatten(0, 1)[:, None])


def transformed(
    samples: FactoredSamples, left: Tensor, right: Tensor, scale: float
) -> FactoredSamples:
    """The samples T_L^T G T_R in float64, with ``scale`` times their weights."""

    def times(rows: Tensor, transform: Tensor) -> Tensor:
        out = transform.new_empty(*rows.shape[:-1], transform.shape[1])
        for one, image in zip(rows, out, strict=True):
            torch.matmul(one.double(), transform, out=image)
        return out

    d, a = times(samples.output_grads, left), times(samples.inputs, right)
    return FactoredSamples(d, a, samples.weights * scale)


def unshared(samples: GradientSamples) -> FactoredSamples | None:
    """The samples as G_ic = d_ic a_i^T; None where they are no such products.

    A parameter of one column (a bias, a norm's weight) has a = 1 whatever its layer shares.
    """
    if isinstance(samples, FactoredSamples) and samples.n_positions == 1:
        return samples
    m, n = samples.shape
    if n == 1:
        d = samples.matrices().mT  # [N, C, 1, m]
        a = d.new_ones(len(d), 1, 1)
    elif m == 1 and samples.n_columns == 1:
        a = samples.matrices()[:, 0]  # [N, 1, n]
        d = a.new_ones(len(a), 1, 1, 1)
    else:
        return None
    return FactoredSamples(d, a, samples.weights, samples.independent)
