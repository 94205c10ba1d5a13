"""Damping of positive semidefinite matrices: how large the epsilon of A + epsilon I is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, unknown_name

DampingUnit = Literal["absolute", "largest", "mean"]

# Applications of A^4 to a block of vectors, hence A^32 in all, and the vectors of the block.
_POWER_STEPS, _POWER_VECTORS = 8, 8


@dataclass(frozen=True)
class Damping:
    """The epsilon of A + epsilon I.

    An absolute epsilon that suits one layer is far below the rounding of another, whose factor is
    larger by orders of magnitude; relative ones follow the factor.

    Attributes:
        epsilon: At least 0, finite.
        unit: "absolute"; "largest": epsilon times the largest eigenvalue (that of the
            decomposition where a root is taken by one, otherwise :func:`largest_eigenvalue`, at
            most a few percent lower); "mean": epsilon times the mean eigenvalue tr(A) / d.
    """

    epsilon: float = 1e-12
    unit: DampingUnit = "absolute"

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon < math.inf:
            raise InvalidInputError(
                f"Damping epsilon must be finite and at least 0; got {self.epsilon!r}."
            )
        if self.unit not in get_args(DampingUnit):
            raise unknown_name("damping unit", self.unit, get_args(DampingUnit))

    def of(self, A: Tensor) -> Tensor:
        """The absolute epsilon of each matrix.

        Args:
            A: [..., d, d], symmetric PSD and finite, float32 or float64.

        Returns:
            [...], in the dtype of ``A``; negative scales, which a PSD matrix has by rounding
            only, count as 0.
        """
        if self.unit == "absolute":
            return torch.full(A.shape[:-2], self.epsilon, dtype=A.dtype, device=A.device)
        scale = largest_eigenvalue(A) if self.unit == "largest" else _mean_eigenvalue(A)
        return self.epsilon * scale.clamp_min(0)


def eigenvalue_bound(A: Tensor) -> Tensor:
    """An upper bound ||A^4||_F^(1/4) of |lambda| of symmetric matrices, by two products.

    At most rank^(1/8) times the largest |lambda|; it holds to rounding.

    Args:
        A: [..., d, d], symmetric and finite.

    Returns:
        [...].
    """
    scaled, scale = _unit_entries(A)
    square = scaled @ scaled
    fourth: Tensor = torch.linalg.matrix_norm(square @ square)
    return scale * fourth.sqrt().sqrt()


def largest_eigenvalue(A: Tensor) -> Tensor:
    """The largest eigenvalue of PSD matrices from below, by power iteration with A^4.

    The best Rayleigh quotient of eight vectors after A^32; with no gap in the spectrum at all it
    is a few percent low. No eigendecomposition, no host synchronization.

    Args:
        A: [..., d, d], symmetric PSD and finite.

    Returns:
        [...].
    """
    scaled, scale = _unit_entries(A)
    square = scaled @ scaled
    fourth = square @ square
    tiny = torch.finfo(A.dtype).tiny
    block = probes(A.shape[-1], _POWER_VECTORS, A).expand(*A.shape[:-1], -1)
    for _ in range(_POWER_STEPS):
        block = fourth @ block
        block = block / torch.linalg.vector_norm(block, dim=-2, keepdim=True).clamp_min(tiny)
    quotients = (block * (scaled @ block)).sum(-2)
    largest: Tensor = scale * quotients.amax(-1)
    return largest


def probes(d: int, count: int, like: Tensor) -> Tensor:
    """Fixed Gaussian vectors [d, count], the same in every call (the identity where d <= count)."""
    if d <= count:
        return torch.eye(d, dtype=like.dtype, device=like.device)
    generator = torch.Generator().manual_seed(d)
    drawn = torch.randn(d, count, generator=generator, dtype=torch.float64)
    return drawn.to(device=like.device, dtype=like.dtype)


def _unit_entries(A: Tensor) -> tuple[Tensor, Tensor]:
    """A divided by its largest |entry| (so that powers neither overflow nor vanish), and that."""
    scale = A.abs().amax((-2, -1))
    return A / torch.where(scale > 0, scale, 1.0)[..., None, None], scale


def _mean_eigenvalue(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).mean(-1)
