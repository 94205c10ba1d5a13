"""Gradient matrices as thin factors, at a stated share of their energy."""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples, MatrixSamples
from kronecker_probe.gradients.trajectory.buffers import smaller_rank
from kronecker_probe.linalg.gram import chunk_rows

# Tolerance from which the decomposition of float32 matrices may be rough.
ROUGH = 1e-4


def truncate(samples: GradientSamples, tolerance: float) -> GradientSamples:
    """Matrices by their leading singular vectors, as shared positions of a layer.

    Every sample keeps the same number T of vectors: the smallest that drops at most ``tolerance``
    of sum_i w_i |G_i|^2. Sums over the samples cost T / min(m, n) of what they did, roughly.

    Args:
        samples: Any; only matrices with one column are truncated.
        tolerance: Share of the energy, in [0, 1).

    Returns:
        Factored samples, with the share that they lack as ``dropped_energy``; the samples as they
        are where factors would not be smaller.

    Raises:
        InvalidInputError: ``tolerance`` is out of range.
    """
    if not 0 <= tolerance < 1:
        raise InvalidInputError(f"tolerance={tolerance!r}; give a share of at least 0, below 1.")
    m, n = samples.shape
    if not isinstance(samples, MatrixSamples) or samples.n_columns > 1 or tolerance == 0:
        return samples
    g = samples.values[:, 0]
    g = g.mT if m > n else g  # the smaller side first
    # float32 resolves shares down to 1e-7, in half the time
    rough = g.dtype.itemsize <= 4 and tolerance >= ROUGH
    work = torch.float32 if rough else torch.float64
    parts = [_decomposed(part, work) for part in torch.split(g, chunk_rows(m * n))]
    energies = samples.weights @ torch.cat([values for values, _ in parts]).double()
    total = float(energies.sum())
    if total == 0:
        return samples
    tails = energies.flip(0).cumsum(0).flip(0) / total
    rank = max(1, int((tails > tolerance).sum()))
    if not smaller_rank((m, n), g.dtype, rank):
        return samples
    dtype = torch.promote_types(g.dtype, torch.float32)
    vectors = torch.cat([vectors[:, :, :rank] for _, vectors in parts]).mT.to(dtype)
    images = vectors @ g.to(dtype)
    left, right = (images, vectors) if m > n else (vectors, images)
    share, before = float(tails[rank]) if rank < len(tails) else 0.0, samples.dropped_energy
    return FactoredSamples(
        left[:, None].contiguous(),
        right.contiguous(),
        samples.weights,
        samples.independent,
        before + (1.0 - before) * share,
    )


def _decomposed(g: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Squared singular values, descending, and left singular vectors of ``g`` [k, m, n]."""
    wide = g.to(work)
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    return values.flip(1).clamp_min(0), vectors.flip(2)
