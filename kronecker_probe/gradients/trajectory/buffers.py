"""Ring buffers of gradient matrices, dense or in truncated factors, and what they cost."""

from __future__ import annotations

import abc
from typing import final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples, MatrixSamples

# Up to this smaller side a Gram's eigenvectors are cheap, and the truncation is the best there is.
EXACT_SIDE = 256
# Extra columns and rounds of the randomized range finder.
OVERSAMPLING, POWER_ROUNDS = 8, 2


class Ring(abc.ABC):
    """The last ``size`` gradients of one parameter, as m x n matrices.

    Attributes:
        rank: T of the factors; 0 for whole matrices.
        tensors: The slots, ``size`` in front of each.
    """

    rank: int
    tensors: tuple[Tensor, ...]

    @abc.abstractmethod
    def encode(self, gradient: Tensor) -> tuple[tuple[Tensor, ...], float]:
        """A gradient [m, n] as one slot of :attr:`tensors`, and the energy |G|^2 that it lacks."""

    def store(self, slot: int, encoded: tuple[Tensor, ...]) -> None:
        """Keep an encoded gradient."""
        for tensor, part in zip(self.tensors, encoded, strict=True):
            tensor[slot].copy_(part)

    @abc.abstractmethod
    def samples(self, slots: Tensor, weights: Tensor) -> GradientSamples:
        """Copies of some slots, in their order."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors)


@final
class DenseRing(Ring):
    """Gradients as they are."""

    rank = 0

    def __init__(self, size: int, shape: tuple[int, int], like: Tensor) -> None:
        self.tensors = (torch.empty(size, *shape, dtype=like.dtype, device=like.device),)

    def encode(self, gradient: Tensor) -> tuple[tuple[Tensor, ...], float]:
        return (gradient,), 0.0

    def samples(self, slots: Tensor, weights: Tensor) -> GradientSamples:
        (values,) = self.tensors
        return MatrixSamples(values[slots][:, None], weights, independent=False)


@final
class FactoredRing(Ring):
    """G ~ sum_t d_t a_t^T with ``rank`` terms: the leading singular vectors."""

    def __init__(self, size: int, shape: tuple[int, int], rank: int, like: Tensor) -> None:
        self.rank = rank
        dtype = torch.promote_types(like.dtype, torch.float32)
        d, a = (torch.empty(size, rank, side, dtype=dtype, device=like.device) for side in shape)
        self.tensors = (d, a)

    def encode(self, gradient: Tensor) -> tuple[tuple[Tensor, ...], float]:
        g = gradient.to(self.tensors[0].dtype)
        with torch.autocast(g.device.type, enabled=False):
            left, right = truncated(g, self.rank)
            rest = g - left.T @ right
        return (left, right), float(torch.linalg.vector_norm(rest, dtype=torch.float64)) ** 2

    def samples(self, slots: Tensor, weights: Tensor) -> GradientSamples:
        d, a = self.tensors
        return FactoredSamples(d[slots][:, None], a[slots], weights, independent=False)


def truncated(g: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """d [r, m] and a [r, n] with d^T a near ``g`` [m, n], exactly it where its rank is at most r.

    The best approximation of that rank up to a smaller side of 256; above, a randomized range
    finder with power rounds (Halko, Martinsson and Tropp, 2011), from fixed random numbers that
    leave torch's own generators alone.
    """
    if g.shape[0] > g.shape[1]:
        right, left = truncated(g.T, rank)
        return left, right
    if g.shape[0] <= EXACT_SIDE:
        wide = g.double()
        vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank].to(g.dtype)
    else:
        generator = torch.Generator().manual_seed(rank)
        columns = min(rank + OVERSAMPLING, g.shape[0])
        draw = torch.randn(g.shape[1], columns, generator=generator, dtype=torch.float32)
        basis = torch.linalg.qr(g @ draw.to(g)).Q
        for _ in range(POWER_ROUNDS):
            basis = torch.linalg.qr(g @ torch.linalg.qr(g.T @ basis).Q).Q
        small = basis.T @ g
        turned = torch.linalg.eigh(small @ small.T).eigenvectors.flip(1)[:, :rank]
        vectors = basis @ turned
    return vectors.T, vectors.T @ g


def ring_bytes(shape: tuple[int, int], dtype: torch.dtype, rank: int) -> int:
    """Bytes that one gradient takes; rank 0 for a whole matrix."""
    m, n = shape
    if rank == 0:
        return m * n * dtype.itemsize
    return rank * (m + n) * torch.promote_types(dtype, torch.float32).itemsize


def smaller_rank(shape: tuple[int, int], dtype: torch.dtype, rank: int) -> int:
    """``rank`` where factors of that rank take less memory than the matrix, else 0."""
    return rank if ring_bytes(shape, dtype, rank) < ring_bytes(shape, dtype, 0) else 0


def energies(gradients: list[Tensor]) -> list[float]:
    """|G|^2 of each gradient in float64, with one transfer per device."""
    found = [0.0] * len(gradients)
    for device in {gradient.device for gradient in gradients}:
        places = [i for i, gradient in enumerate(gradients) if gradient.device == device]
        norms = torch._foreach_norm([gradients[i] for i in places], 2, dtype=torch.float64)
        for place, norm in zip(places, torch.stack(norms).tolist(), strict=True):
            found[place] = norm**2
    return found
