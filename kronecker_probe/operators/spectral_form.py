"""Exact eigenvalues and eigenvectors of an operator, in the form that its structure allows.

They give every function f(P) of an operator P: f(P) x = f(0) x + Q (f(D) - f(0)) Q^T x, where
the columns of Q are the eigenvectors that are held, and everything else is null.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.linalg.gram import chunk_rows
from kronecker_probe.linalg.memory import require_memory
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.factors.factor import Eigenbasis
from kronecker_probe.operators.second_moment.kernels.sample_rows import SampleRows
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.block import BlockOperator
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.eigen import EigenOperator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator

Function: TypeAlias = Callable[[Tensor], Tensor]

# Largest matrix (the Gram of the samples, or a dense operator) that is decomposed.
EXACT_SIZE = 4096
# Eigenvalues that are negative by more than this share of the largest are no rounding.
INDEFINITE = 1e-8


class SpectralForm(abc.ABC):
    """P = Q diag(D) Q^T with orthonormal eigenvectors Q; what is orthogonal to them is null.

    Attributes:
        shape: (m, n).
        values: D, float64 1-D, nonnegative, in no particular order.
    """

    def __init__(self, shape: tuple[int, int], values: Tensor) -> None:
        self.shape = shape
        self.values = _checked(values)

    @property
    def null(self) -> int:
        """Dimensions beside the eigenvectors that are held; P is zero there."""
        return self.shape[0] * self.shape[1] - self.values.numel()

    @abc.abstractmethod
    def rotate(self, x: Tensor) -> Tensor:
        """Q^T x of float64 ``x`` [b, m, n], [b, k] in the order of ``values``."""

    @abc.abstractmethod
    def restore(self, y: Tensor) -> Tensor:
        """Q y of float64 ``y`` [b, k], [b, m, n]."""

    def apply(self, f: Function, x: Tensor) -> Tensor:
        """f(P) x of float64 ``x`` [b, m, n]; f maps nonnegative tensors entrywise."""
        return next(self.apply_each([f], x))

    def apply_each(self, functions: Sequence[Function], x: Tensor) -> Iterator[Tensor]:
        """f(P) x for each of several f, from one rotation of ``x``."""
        rotated = self.rotate(x)
        for f in functions:
            zero = self._at_zero(f) if self.null else 0.0
            image = self.restore((f(self.values) - zero) * rotated)
            yield image + zero * x if self.null else image

    @abc.abstractmethod
    def diagonal_of(self, other: Operator) -> Tensor:
        """q_k^T H q_k of another operator H, float64, in the order of ``values``."""

    def sum_of(self, f: Function) -> float:
        """tr f(P)."""
        return float(f(self.values).sum()) + self.null * self._at_zero(f)

    def expectation(self, f: Function, other: Operator) -> float:
        """tr(f(P) H)."""
        diagonal = self.diagonal_of(other)
        found = float(f(self.values) @ diagonal)
        if self.null:
            found += self._at_zero(f) * max(0.0, other.trace() - float(diagonal.sum()))
        return found

    def _at_zero(self, f: Function) -> float:
        return float(f(self.values.new_zeros(1))[0])


@final
class KroneckerForm(SpectralForm):
    """Eigenvectors that are Kronecker products of two bases.

    Args:
        left: Q_L [m, r].
        right: Q_R [n, s].
        values: D, [r, s].
    """

    def __init__(self, left: Eigenbasis, right: Eigenbasis, values: Tensor) -> None:
        super().__init__((left.size, right.size), values.reshape(-1))
        self.left = left
        self.right = right

    def rotate(self, x: Tensor) -> Tensor:
        return (self.left.vectors.T @ x @ self.right.vectors).flatten(1)

    def restore(self, y: Tensor) -> Tensor:
        inside = y.view(len(y), self.left.rank, self.right.rank)
        return self.left.vectors @ inside @ self.right.vectors.T

    def diagonal_of(self, other: Operator) -> Tensor:
        return other.eigen_diagonal(self.left, self.right).reshape(-1)


@final
class CoordinateForm(SpectralForm):
    """Eigenvectors that are the coordinates of the parameter.

    Args:
        values: D, [m, n].
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__((values.shape[0], values.shape[1]), values.reshape(-1))

    def rotate(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def restore(self, y: Tensor) -> Tensor:
        return y.view(len(y), *self.shape)

    def diagonal_of(self, other: Operator) -> Tensor:
        return other.diagonal().reshape(-1)


@final
class BlockForm(SpectralForm):
    """Eigenvectors that live on one block of a partition of the m x n matrix each.

    Args:
        shape: (m, n).
        parts: (rows, columns, the form of that block), of all blocks.
    """

    def __init__(
        self, shape: tuple[int, int], parts: Sequence[tuple[slice, slice, SpectralForm]]
    ) -> None:
        super().__init__(shape, torch.cat([form.values for _, _, form in parts]))
        self.parts = tuple(parts)

    def rotate(self, x: Tensor) -> Tensor:
        return torch.cat([form.rotate(x[:, rows, cols]) for rows, cols, form in self.parts], dim=1)

    def restore(self, y: Tensor) -> Tensor:
        out = y.new_empty(len(y), *self.shape)
        sizes = [form.values.numel() for _, _, form in self.parts]
        for (rows, columns, form), part in zip(
            self.parts, torch.split(y, sizes, dim=1), strict=True
        ):
            out[:, rows, columns] = form.restore(part)
        return out

    def diagonal_of(self, other: Operator) -> Tensor:
        return torch.cat(
            [form.diagonal_of(other.block(rows, columns)) for rows, columns, form in self.parts]
        )


@final
class DenseForm(SpectralForm):
    """Eigenvectors as an explicit matrix [mn, mn]."""

    def __init__(self, shape: tuple[int, int], values: Tensor, vectors: Tensor) -> None:
        super().__init__(shape, values)
        self.vectors = vectors

    def rotate(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.vectors

    def restore(self, y: Tensor) -> Tensor:
        return (y @ self.vectors.T).view(len(y), *self.shape)

    def diagonal_of(self, other: Operator) -> Tensor:
        columns = self.vectors.T.reshape(-1, *self.shape)
        return (other.apply(columns) * columns).sum(dim=(1, 2))


@final
class SampleForm(SpectralForm):
    """Eigenvectors X^T u / |X^T u| of H = X^T X, from the Gram X X^T of the samples."""

    def __init__(self, rows: SampleRows) -> None:
        values, vectors = eigh_descending(rows.gram())
        floor = len(values) * torch.finfo(torch.float64).eps * max(0.0, float(values[0]))
        rank = min(int((values > floor).sum()), rows.shape[0] * rows.shape[1])
        super().__init__(rows.shape, values[:rank])
        self.rows = rows
        self.vectors = vectors[:, :rank]

    def rotate(self, x: Tensor) -> Tensor:
        return (self.rows.coefficients(x) @ self.vectors) / self.values.sqrt()

    def restore(self, y: Tensor) -> Tensor:
        return self.rows.combine((y / self.values.sqrt()) @ self.vectors.T)

    def diagonal_of(self, other: Operator) -> Tensor:
        m, n = self.shape
        out = torch.empty_like(self.values)
        step = chunk_rows(m * n)
        for start in range(0, len(out), step):
            part = slice(start, min(start + step, len(out)))
            q = self.rows.combine((self.vectors[:, part] / self.values[part].sqrt()).T)
            out[part] = (other.apply(q) * q).sum(dim=(1, 2))
        return out


def spectral_form(operator: Operator) -> SpectralForm | None:
    """The exact eigenvalues and eigenvectors of ``operator``, or None where they are too many.

    Kronecker, eigen and diagonal operators, and blocks of them, hold them at any size. A second
    moment has at most as many as samples, and a matrix of any structure at most mn: those up to
    :data:`EXACT_SIZE` are found, once for each second moment.

    Raises:
        InvalidInputError: The operator is not PSD, beyond rounding.
        NonFiniteError: It holds a NaN or an infinity.
    """
    if isinstance(operator, KroneckerOperator):
        left, right = operator.left_factor.eigen(), operator.right_factor.eigen()
        values = operator.scale * torch.outer(left.values, right.values)
        return KroneckerForm(left.basis, right.basis, values)
    if isinstance(operator, EigenOperator):
        return KroneckerForm(operator.left, operator.right, operator.eigenvalues)
    if isinstance(operator, DiagonalOperator):
        return CoordinateForm(operator.values)
    if isinstance(operator, BlockOperator):
        return _block_form(operator)
    if not isinstance(operator, SecondMoment):
        return _dense_form(operator)
    if operator not in _KNOWN:
        _KNOWN[operator] = _second_moment_form(operator)
    return _KNOWN[operator]


def exact_form(operator: Operator) -> SpectralForm:
    """The exact eigenvalues of an approximation.

    Raises:
        UnsupportedError: It has none within reach.
    """
    form = spectral_form(operator)
    if form is None:
        m, n = operator.shape
        raise UnsupportedError(
            f"{type(operator).__name__} on {m} x {n} matrices has no exact eigenvalues above "
            f"mn = {EXACT_SIZE}; use a Kronecker, eigen or diagonal operator."
        )
    return form


# forms hold no reference to their second moment, so that an entry dies with it
_KNOWN: WeakKeyDictionary[SecondMoment, SpectralForm | None] = WeakKeyDictionary()


def _second_moment_form(target: SecondMoment) -> SpectralForm | None:
    rows = SampleRows(target.samples)
    if target.shape[0] * target.shape[1] <= rows.count:
        return _dense_form(target)
    if rows.count > EXACT_SIZE:
        return None
    require_memory(40 * rows.count**2, f"A Gram of {rows.count} samples", target.device)
    return SampleForm(rows)


def _block_form(operator: BlockOperator) -> SpectralForm | None:
    parts = []
    for rows, columns, one in operator.blocks:
        form = spectral_form(one)
        if form is None:
            return None
        parts.append((rows, columns, form))
    return BlockForm(operator.shape, parts)


def _dense_form(operator: Operator) -> SpectralForm | None:
    size = operator.shape[0] * operator.shape[1]
    if size > EXACT_SIZE:
        return None
    require_memory(40 * size**2, f"The spectrum of a {size} x {size} matrix", operator.device)
    matrix = operator.to_dense()
    values, vectors = eigh_descending(matrix)
    return DenseForm(operator.shape, values, vectors)


def _checked(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise NonFiniteError("The operator has a NaN or an infinity among its eigenvalues.")
    top = float(values.max()) if values.numel() else 0.0
    least = float(values.min()) if values.numel() else 0.0
    if least < -INDEFINITE * max(top, 0.0):
        raise InvalidInputError(
            f"The operator has eigenvalues from {least:.3g} to {top:.3g}: it is not PSD, so that "
            "its damped powers and its log-determinant are undefined; use a PSD approximation (any "
            "one Kronecker product is)."
        )
    return values.clamp_min(0)
