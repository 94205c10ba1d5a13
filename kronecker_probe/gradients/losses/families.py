"""Families of losses, fitted to gradients: dL/df = s (phi(f) - q), with one s >= 0 per position."""

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
    def norm(self, vectors: Tensor) -> Tensor:
        """Root of ``dot`` with itself."""

    @abc.abstractmethod
    def conditioning(self, outputs: Tensor) -> Tensor | int:
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
        (f0, g0), (f1, g1), *others = points
        phi0, phi1 = self.phi(f0), self.phi(f1)
        step = phi1 - phi0
        squares = self.dot(step, step)
        scales = self.dot(g1 - g0, step) / squares
        length, size0, size1 = squares.sqrt(), self.norm(g0), self.norm(g1)
        # A scale must stand out of the rounding of its gradients, unless both are 0: ignored.
        if not bool((scales * length >= 4 * tolerance * (size0 + size1)).all()):
            return None
        known = size0 + scales * self.norm(phi0)
        for f, g, phi in [(f1, g1, phi1), *((f, g, self.phi(f)) for f, g in others)]:
            error = self.norm(g - g0 - scales * (phi - phi0))
            terms = self.norm(g) + scales * self.norm(phi) + known
            if not bool((error <= tolerance * self.conditioning(f) * terms).all()):
                return None
        return scales


def pooled(scales: Tensor, tolerance: float) -> Tensor:
    """One value for all positions that count, where they differ by rounding alone."""
    counted = scales > 0
    common = scales.sum(dtype=torch.float64) / counted.sum()
    if bool((~counted | ((scales - common).abs() <= 16 * tolerance * common)).all()):
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

    def norm(self, vectors: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(vectors, dim=self.class_dim, keepdim=True)
        return norms

    def conditioning(self, outputs: Tensor) -> Tensor | int:
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

    def norm(self, vectors: Tensor) -> Tensor:
        return vectors.abs()

    def conditioning(self, outputs: Tensor) -> Tensor | int:
        return 1 if self.kind == "mse" else 1 + outputs.abs()

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
