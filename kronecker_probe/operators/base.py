"""The contract of every operator: symmetric and PSD on R^{m x n}."""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.linalg.memory import require_memory
from kronecker_probe.operators.factors.factor import Eigenbasis, Factor


class Operator(abc.ABC):
    """A symmetric PSD linear map on m x n matrices, an mn x mn matrix in row-major vec.

    Every number is float64 inside, whatever the dtype of the samples.

    Attributes:
        shape: (m, n) of the matrices that it acts on.
        device: Where it lives.
        inner_rank: Of two operators, the one of lower rank computes their inner product, because
            its structure makes that cheaper.
    """

    shape: tuple[int, int]
    device: torch.device
    inner_rank: ClassVar[int] = 5

    @abc.abstractmethod
    def norm(self) -> float:
        """The Frobenius norm of the mn x mn matrix."""

    @abc.abstractmethod
    def trace(self) -> float:
        """The trace of the mn x mn matrix."""

    @abc.abstractmethod
    def projected_diagonal(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        """diag((Q_L kron Q_R)^T P (Q_L kron Q_R)) as a matrix.

        Args:
            left_basis: Q_L, float64 [m, r].
            right_basis: Q_R, float64 [n, s].

        Returns:
            float64 [r, s].
        """

    @abc.abstractmethod
    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        """<P, A kron C> of ``left`` A [m, m] and ``right`` C [n, n], both symmetric or skew."""

    @abc.abstractmethod
    def block(self, rows: slice, columns: slice) -> Operator:
        """The operator on the sub-matrix G[rows, columns], zero elsewhere: a principal block.

        Args:
            rows: A range of the m outputs, with its start and stop.
            columns: A range of the n inputs likewise.
        """

    @abc.abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """P x of float64 ``x`` [b, m, n]."""

    def apply(self, x: Tensor) -> Tensor:
        """P x, for one matrix [m, n] or a batch [..., m, n], in the dtype of ``x``.

        Raises:
            InvalidInputError: The last two dimensions are not (m, n), or not real floating point.
        """
        if not x.dtype.is_floating_point:
            raise InvalidInputError(
                f"apply got dtype {x.dtype}; give a real floating-point tensor."
            )
        if x.shape[-2:] != self.shape:
            raise InvalidInputError(
                f"apply got {list(x.shape)}; this operator acts on [..., {self.shape[0]}, "
                f"{self.shape[1]}]."
            )
        flat = x.reshape(-1, *self.shape).to(device=self.device, dtype=torch.float64)
        return self._apply(flat).reshape(x.shape).to(x.dtype)

    def inner(self, other: Operator) -> float:
        """<P, Q> = tr(P Q), between any two operators of one shape.

        Raises:
            InvalidInputError: The shapes differ, or ``other`` is no operator.
        """
        if not isinstance(other, Operator):
            raise InvalidInputError(
                f"Inner product with a {type(other).__name__}; give an operator (a matrix "
                "[mn, mn] becomes one by kp.DenseOperator)."
            )
        if self.shape != other.shape:
            raise InvalidInputError(
                f"Inner product of operators on {self.shape[0]} x {self.shape[1]} and "
                f"{other.shape[0]} x {other.shape[1]} matrices; both must have one shape."
            )
        if other.inner_rank < self.inner_rank:
            return other._inner(self)
        return self._inner(other)

    def _inner(self, other: Operator) -> float:
        """<P, Q> with an operator of the same or a higher :attr:`inner_rank`."""
        return float((self.to_dense() * other.to_dense()).sum())

    def factor_inner(self, left: Factor, right: Factor) -> float:
        """<P, left kron right> of two factors."""
        return self.kronecker_inner(left.matrix, right.matrix)

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        """diag((Q_L kron Q_R)^T P (Q_L kron Q_R)) of two bases, float64 [r, s]."""
        return self.projected_diagonal(left.vectors, right.vectors)

    def diagonal(self) -> Tensor:
        """The diagonal of the mn x mn matrix, as float64 [m, n]."""
        m, n = self.shape
        return self.projected_diagonal(
            torch.eye(m, dtype=torch.float64, device=self.device),
            torch.eye(n, dtype=torch.float64, device=self.device),
        )

    def to_dense(self) -> Tensor:
        """The mn x mn matrix, float64.

        Raises:
            MemoryBudgetError: It does not fit in memory; the message says how large it is.
        """
        m, n = self.shape
        require_memory(16 * (m * n) ** 2, f"A dense {m * n} x {m * n} matrix", self.device)
        basis = torch.eye(m * n, dtype=torch.float64, device=self.device)
        return self._apply(basis.view(-1, m, n)).reshape(m * n, m * n)

    def to_scipy(self) -> LinearOperator:
        """A scipy LinearOperator of shape (mn, mn), float64, on row-major vectors."""
        size = self.shape[0] * self.shape[1]

        def matmat(x: np.ndarray) -> np.ndarray:
            batch = torch.from_numpy(np.ascontiguousarray(x.T)).double()
            out = self.apply(batch.view(-1, *self.shape).to(self.device))
            return out.cpu().reshape(-1, size).numpy().T

        def matvec(x: np.ndarray) -> np.ndarray:
            return matmat(x.reshape(size, 1))[:, 0]

        return LinearOperator(
            shape=(size, size),
            dtype=np.dtype(np.float64),
            matvec=matvec,
            rmatvec=matvec,
            matmat=matmat,
            rmatmat=matmat,
        )


def check_nonnegative(name: str, values: Tensor) -> None:
    """Refuse the spectrum of something that is not PSD.

    Raises:
        InvalidInputError: A value is negative.
    """
    if bool((values < 0).any()):
        raise InvalidInputError(
            f"{name} go down to {float(values.min()):g}; a PSD operator needs values >= 0."
        )
