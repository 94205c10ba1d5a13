"""Sums over samples in parameter space, in float64 chunks: from factors, or from matrices."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples import FactoredSamples, GradientSamples
from kronecker_probe.linalg.gram import CHUNK_ELEMENTS, chunk_rows


class Kernels(abc.ABC):
    """The sums that parameter space needs, over one set of samples.

    ``None`` in place of a matrix means the identity.
    """

    def __init__(self, samples: GradientSamples) -> None:
        self.samples = samples
        self.weights = samples.weights
        self.shape = samples.shape

    @abc.abstractmethod
    def left_step(self, right: Tensor | None) -> Tensor:
        """sum_i w_i sum_c G V G^T, float64 [m, m]."""

    @abc.abstractmethod
    def right_step(self, left: Tensor | None) -> Tensor:
        """sum_i w_i sum_c G^T U G, float64 [n, n]."""

    @abc.abstractmethod
    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        """sum_i w_i sum_c <G, A G C>."""

    @abc.abstractmethod
    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        """sum_i w_i sum_c (Q_L^T G Q_R)^{o2}, float64 [r, s]."""

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """sum_i w_i sum_c G <G, x> of float64 ``x`` [b, m, n]."""

    def trace(self) -> float:
        """sum_i w_i sum_c |G|^2."""
        return float(self.left_step(None).diagonal().sum())


def _matrix_chunks(samples: GradientSamples) -> Iterator[tuple[slice, Tensor]]:
    m, n = samples.shape
    step = chunk_rows(samples.n_columns * m * n)
    for start in range(0, samples.n_data, step):
        part = slice(start, min(start + step, samples.n_data))
        yield part, samples.matrices(part.start, part.stop)


@final
class MatrixKernels(Kernels):
    """From G itself, formed a chunk at a time."""

    def left_step(self, right: Tensor | None) -> Tensor:
        m, _ = self.shape
        out = torch.zeros(m, m, dtype=torch.float64, device=self.weights.device)
        for part, g in _matrix_chunks(self.samples):
            image = g if right is None else g @ right
            weighted = image * self.weights[part, None, None, None]
            flat = weighted.permute(2, 0, 1, 3).reshape(m, -1)
            out.addmm_(flat, g.permute(2, 0, 1, 3).reshape(m, -1).T)
        return out

    def right_step(self, left: Tensor | None) -> Tensor:
        _, n = self.shape
        out = torch.zeros(n, n, dtype=torch.float64, device=self.weights.device)
        for part, g in _matrix_chunks(self.samples):
            image = g if left is None else left @ g
            weighted = image * self.weights[part, None, None, None]
            out.addmm_(g.reshape(-1, n).T, weighted.reshape(-1, n))
        return out

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.weights.device)
        for part, g in _matrix_chunks(self.samples):
            total += ((left @ g @ right) * g).sum(dim=(1, 2, 3)) @ self.weights[part]
        return float(total)

    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        total: Tensor | None = None
        for part, g in _matrix_chunks(self.samples):
            rotated = g if right_basis is None else g @ right_basis
            rotated = rotated if left_basis is None else left_basis.T @ rotated
            summed = torch.einsum("k,kcrs->rs", self.weights[part], rotated.square())
            total = summed if total is None else total + summed
        assert total is not None
        return total

    def apply(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x).flatten(1)
        for part, g in _matrix_chunks(self.samples):
            columns = g.flatten(2)
            coefficients = columns.flatten(0, 1) @ x.flatten(1).T
            weights = self.weights[part].repeat_interleave(g.shape[1])
            out += (coefficients * weights[:, None]).T @ columns.flatten(0, 1)
        return out.view(x.shape)


@final
class FactorKernels(Kernels):
    """From the factors (d, a), never forming G except where G itself is projected."""

    samples: FactoredSamples

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(w [k, 1, 1], d [k, C, T, m], a [k, T, n]) in float64."""
        s = self.samples
        m, n = s.shape
        step = chunk_rows(s.n_columns * s.n_positions * (m + s.n_positions) + s.n_positions * n)
        for i in range(0, s.n_data, step):
            part = slice(i, i + step)
            yield (
                self.weights[part, None, None],
                s.output_grads[part].double(),
                s.inputs[part].double(),
            )

    def _input_products(self, a: Tensor, right: Tensor | None) -> Tensor:
        """a V a^T, [k, T, T]."""
        image = a if right is None else a @ right
        if a.shape[1] == 1:
            return (image * a).sum(dim=2, keepdim=True)
        return image @ a.mT

    def _output_products(self, d: Tensor, left: Tensor | None) -> Tensor:
        """sum_c d U d^T, [k, T, T]."""
        image = d if left is None else d @ left
        if d.shape[2] == 1:
            return (image * d).sum(dim=(1, 3))[:, :, None]
        flat = (d.shape[0], d.shape[2], -1)
        return image.transpose(1, 2).reshape(flat) @ d.transpose(1, 2).reshape(flat).mT

    def left_step(self, right: Tensor | None) -> Tensor:
        m, _ = self.shape
        out = torch.zeros(m, m, dtype=torch.float64, device=self.weights.device)
        for w, d, a in self._chunks():
            products = (w * self._input_products(a, right))[:, None]
            image = products * d if d.shape[2] == 1 else products @ d
            out.addmm_(d.reshape(-1, m).T, image.reshape(-1, m))
        return out

    def right_step(self, left: Tensor | None) -> Tensor:
        _, n = self.shape
        out = torch.zeros(n, n, dtype=torch.float64, device=self.weights.device)
        for w, d, a in self._chunks():
            products = w * self._output_products(d, left)
            image = products * a if a.shape[1] == 1 else products @ a
            out.addmm_(a.reshape(-1, n).T, image.reshape(-1, n))
        return out

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.weights.device)
        for w, d, a in self._chunks():
            total += (w * self._input_products(a, right) * self._output_products(d, left)).sum()
        return float(total)

    def projected_diagonal(self, left_basis: Tensor | None, right_basis: Tensor | None) -> Tensor:
        total: Tensor | None = None
        for w, d, a in self._chunks():
            d = d if left_basis is None else d @ left_basis
            a = a if right_basis is None else a @ right_basis
            if a.shape[1] == 1:
                left = (w[:, :, 0] * d[:, :, 0].square().sum(dim=1)).T
                summed = left @ a[:, 0].square()
            else:
                summed = _shared_diagonal(w[:, 0, 0], d, a)
            total = summed if total is None else total + summed
        assert total is not None
        return total

    def apply(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for w, d, a in self._chunks():
            for one, image in zip(x, out, strict=True):
                coefficients = ((a @ one.T)[:, None] * d).sum(dim=(2, 3)) * w[:, :, 0]
                combined = (coefficients[:, :, None, None] * d).sum(dim=1)
                image.addmm_(combined.flatten(0, 1).T, a.flatten(0, 1))
        return out


def _shared_diagonal(weights: Tensor, d: Tensor, a: Tensor) -> Tensor:
    """sum_i w_i sum_c G^{o2} with G = d^T a formed a few data at a time."""
    step = chunk_rows(d.shape[1] * d.shape[3] * a.shape[2])
    total = torch.zeros(d.shape[3], a.shape[2], dtype=torch.float64, device=d.device)
    for i in range(0, d.shape[0], step):
        g = d[i : i + step].mT @ a[i : i + step, None]
        total += torch.einsum("k,kcrs->rs", weights[i : i + step], g.square())
    return total


def gradient_products(
    one: GradientSamples, part: slice, other: GradientSamples, other_part: slice
) -> Tensor:
    """<G_ic, G_jd> of two ranges of data, float64 [I, C, J, C']."""
    m, n = one.shape
    if not _from_factors(one, other):
        left = one.matrices(part.start, part.stop)
        right = other.matrices(other_part.start, other_part.stop)
        products = left.flatten(0, 1).flatten(1) @ right.flatten(0, 1).flatten(1).T
        return products.view(*left.shape[:2], *right.shape[:2])
    assert isinstance(one, FactoredSamples)
    assert isinstance(other, FactoredSamples)
    d1, a1 = one.output_grads[part].double(), one.inputs[part].double()
    d2, a2 = other.output_grads[other_part].double(), other.inputs[other_part].double()
    (i, c, t, _), (j, e, s, _) = d1.shape, d2.shape
    outputs = (d1.reshape(-1, m) @ d2.reshape(-1, m).T).view(i, c, t, j, e, s)
    inputs = (a1.reshape(-1, n) @ a2.reshape(-1, n).T).view(i, 1, t, j, 1, s)
    return (outputs * inputs).sum(dim=(2, 5))


def _from_factors(one: GradientSamples, other: GradientSamples) -> bool:
    """Whether <G, G'> costs less from factors, T T' (m + n), than from G, m n."""
    if one.n_positions is None or other.n_positions is None:
        return False
    m, n = one.shape
    return one.n_positions * other.n_positions * (m + n) <= m * n or (
        one.n_positions == other.n_positions == 1
    )


def squared_product_sum(one: GradientSamples, other: GradientSamples) -> float:
    """sum_ij w_i w_j' sum_cd <G_ic, G_jd>^2 = <H, H'>, block by block in bounded memory."""
    same = one is other
    formed = not _from_factors(one, other)
    steps = [_block_rows(samples, formed) for samples in (one, other)]
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for i in range(0, one.n_data, steps[0]):
        part = slice(i, min(i + steps[0], one.n_data))
        for j in range(i if same else 0, other.n_data, steps[1]):
            other_part = slice(j, min(j + steps[1], other.n_data))
            products = gradient_products(one, part, other, other_part).square_().sum(dim=(1, 3))
            block = one.weights[part] @ products @ other.weights[other_part]
            total += block if not same or i == j else 2 * block
    return float(total)


def _block_rows(samples: GradientSamples, formed: bool) -> int:
    m, n = samples.shape
    positions = 1 if formed else samples.n_positions or 1
    columns = samples.n_columns * positions
    width = samples.n_columns * m * n if formed else columns * (m + n)
    square = int(CHUNK_ELEMENTS**0.5) // columns
    return max(1, min(square, chunk_rows(width), max(16, -(-samples.n_data // 8))))


def kernels_for(samples: GradientSamples) -> Kernels:
    """The cheaper kernels for half steps: factors unless T is close to min(m, n)."""
    if not isinstance(samples, FactoredSamples):
        return MatrixKernels(samples)
    m, n = samples.shape
    t, c = samples.n_positions, samples.n_columns
    factored = t * n * n + t * t * n + c * (t * m * m + t * t * m)
    formed = c * (m * n * t + m * n * (m + n))
    return FactorKernels(samples) if t == 1 or factored <= formed else MatrixKernels(samples)
