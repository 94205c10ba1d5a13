"""The three inner products of a pair, with and without each part of the examples; the jackknife."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kronecker_probe.quality.metrics.catalog import METRICS


@dataclass(frozen=True)
class Replicates:
    """<H, P>, |H|^2 and |P|^2: of all the examples, then of the examples without one of K parts.

    Weights are normalized to sum 1 in each replicate, so that all are of one scale. A second
    dimension holds several P whose numbers are averaged.

    Attributes:
        cross: <H, P>, float64 [1 + K] or [1 + K, r].
        target: |H|^2, float64 [1 + K].
        approximation: |P|^2, float64 [1 + K] or [1 + K, r].
        single: Whether a part is one example, else a group of them.
    """

    cross: Tensor
    target: Tensor
    approximation: Tensor
    single: bool

    def values(self, metric: str) -> Tensor:
        """A metric of each replicate, errors squared, float64 [1 + K]."""
        form = METRICS[metric].form
        assert form is not None, f"{metric} has no estimates"
        if self.cross.ndim == 1:
            return form(self.cross, self.target, self.approximation)
        return form(self.cross, self.target[:, None], self.approximation).mean(dim=1)

    def plus(self, other: Replicates) -> Replicates:
        """Those of P + P', which act on different blocks of H."""
        return Replicates(
            self.cross + other.cross,
            self.target,
            self.approximation + other.approximation,
            self.single,
        )


@dataclass(frozen=True)
class Jackknifed:
    """A bias-corrected value with its standard error and the degrees of freedom of that."""

    value: float
    stderr: float
    df: float


def jackknife(values: Tensor, single: bool) -> Jackknifed:
    """Bias correction and standard error by leaving out one of K parts at a time.

    With pseudo-values p_k = K t - (K - 1) t_(k) of the whole's t, the value is their mean and
    its variance sum_k psi_k^2 / (K (K - 1)), psi_k = p_k - mean. The degrees of freedom are those
    of a chi-square with the same first two moments, (sum psi^2)^2 / (2 sum psi^4), few where
    some examples dominate; and K - 1 where a part is a group of examples, near normal as their sums
    are.

    Args:
        values: t, t_(1), ..., t_(K), float64 [1 + K].
        single: Whether a part is one example.
    """
    count = len(values) - 1
    if count < 2 or not bool(torch.isfinite(values).all()):
        return Jackknifed(math.nan, math.nan, math.nan)
    pseudo = count * values[0] - (count - 1) * values[1:]
    value = pseudo.mean()
    squares = (pseudo - value).square()
    total = float(squares.sum())
    fourth = float(squares.square().sum())
    df = total**2 / (2 * fourth) if single and fourth > 0 else float(count - 1)
    return Jackknifed(float(value), math.sqrt(total / (count * (count - 1))), df)


def leave_one_out(whole: Tensor, parts: Tensor) -> Tensor:
    """A sum and what remains of it without each part, [1 + K, ...] of [...] and [K, ...]."""
    return torch.cat([whole[None], whole - parts])
