"""Families of losses, fitted to gradients: dL/df = s (phi(f) - q), with one s >= 0 a position."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kronecker_probe.gradients.losses.evaluation import Evaluator
from kronecker_probe.gradients.losses.resolved import ElementwiseLoss, ResolvedLoss, SoftmaxLoss

# A gradient and where it was taken: outputs and dL/df.
Point = tuple[Tensor, Tensor]


class Family(abc.ABC):
    """Losses with dL/df = s (phi(f) - q) for a known phi, any q, and s >= 0."""

    @abc.abstractmethod
    def phi(self, outputs: Tensor) -> Tensor:
        """The model's expected label at its outputs."""

    @abc.abstractmethod
    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        """Inner products within the positions that share one s."""

    @abc.abstractmethod
    def conditioning(self, outputs: Tensor) -> Tensor:
        """Roundings of phi at ``outputs``, relative to one rounding of the outputs."""

    @abc.abstractmethod
    def resolved(
        self, scales: Tensor, reduction: str, value: float, evaluator: Evaluator, factor: int
    ) -> ResolvedLoss:
        """The loss with these scales of l_i."""

    def fit(self, points: list[Point], tolerance: float) -> Tensor | None:
        """s from the first two points; None where these or the others contradict it.

        Two gradients give s by least squares within a position, since q drops out of their
        difference; every further one is predicted, g = g_0 + s (phi(f) - phi(f_0)).
        """
        (f0, g0), (f1, g1) = points[:2]
        phi0 = self.phi(f0)
        step, change = self.phi(f1) - phi0, g1 - g0
        squares = self.dot(step, step)
        scales = self.dot(change, step) / squares
        length = squares.sqrt()
        # A scale must stand out of the rounding of its gradients, unless both are 0: ignored.
        size = self._norm(g0) + self._norm(g1)
        if not bool((scales * length >= 4 * tolerance * size).all()):
            return None
        base = self._norm(phi0)
        for f, g in points[1:]:
            phi = self.phi(f)
            error = self._norm(g - g0 - scales * (phi - phi0))
            terms = self._norm(g) + self._norm(g0) + scales * (self._norm(phi) + base)
            if not bool((error <= tolerance * self.conditioning(f) * terms).all()):
                return None
        return _pooled(scales, squares, length, tolerance)

    def _norm(self, vectors: Tensor) -> Tensor:
        return self.dot(vectors, vectors).sqrt()


def _pooled(scales: Tensor, squares: Tensor, length: Tensor, tolerance: float) -> Tensor:
    """One value for all positions that count, where rounding alone tells them apart."""
    counted = scales > 0
    weights = torch.where(counted, squares, 0).double()
    common = (weights * scales).sum() / weights.sum()
    spread = (scales - common).abs() * length.clamp(max=1)
    if bool((~counted | (spread <= 4 * tolerance * common)).all()):
        return torch.where(counted, common.to(scales.dtype), 0)
    return scales


@final
@dataclass(frozen=True)
class Softmax(Family):
    """The cross-entropy family: class indices or distributions, smoothed, weighted, ignored."""

    class_dim: int

    def phi(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(self.class_dim)

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum(self.class_dim, keepdim=True)

    def conditioning(self, outputs: Tensor) -> Tensor:
        return 1 + outputs.abs().amax(self.class_dim, keepdim=True)

    def resolved(
        self, scales: Tensor, reduction: str, value: float, evaluator: Evaluator, factor: int
    ) -> SoftmaxLoss:
        return SoftmaxLoss(
            "cross-entropy", reduction, value, evaluator, factor, self.class_dim, scales
        )


@final
@dataclass(frozen=True)
class Elementwise(Family):
    """Squares and binary cross-entropies, with any weights."""

    kind: str

    def phi(self, outputs: Tensor) -> Tensor:
        return outputs if self.kind == "mse" else outputs.sigmoid()

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        return one * other

    def conditioning(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs) if self.kind == "mse" else 1 + outputs.abs()

    def resolved(
        self, scales: Tensor, reduction: str, value: float, evaluator: Evaluator, factor: int
    ) -> ElementwiseLoss:
        return ElementwiseLoss(self.kind, reduction, value, evaluator, factor, scales)


def families(outputs: Tensor, targets: Tensor) -> list[Family]:
    """All families, the likeliest first."""
    dims = dict.fromkeys(d for d in (1, outputs.ndim - 1) if 0 < d < outputs.ndim)
    softmax: list[Family] = [Softmax(d) for d in dims if outputs.shape[d] > 1]
    elementwise: list[Family] = [Elementwise("mse"), Elementwise("binary-cross-entropy")]
    # Of class indices, the dimension that is missing in the targets is the classes'.
    softmax.sort(key=lambda f: targets.shape != _without(outputs, f))
    return [*elementwise, *softmax] if targets.dtype.is_floating_point else [*softmax, *elementwise]


def _without(outputs: Tensor, family: Family) -> torch.Size:
    d = family.class_dim if isinstance(family, Softmax) else outputs.ndim
    return outputs.shape[:d] + outputs.shape[d + 1 :]
