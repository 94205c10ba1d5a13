"""Weighted draws of a layer's gradient matrix, factored or dense."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError


class GradientSamples(abc.ABC):
    """N weighted draws of an m x n gradient matrix, C columns each.

    A *datum* i contributes the C matrices G_ic with the same weight w_i, so that the second
    moment is H = sum_i w_i sum_c vec(G_ic) vec(G_ic)^T. One label draw or one mini-batch
    gradient has C = 1; the exact Gauss-Newton has one column a class.

    Build one with :meth:`from_factors` or :meth:`from_matrices`, or by ``kp.capture``.

    Attributes:
        weights: float64 [N], used as given, never renormalized.
    """

    weights: Tensor

    @staticmethod
    def from_factors(
        output_grads: Tensor, inputs: Tensor, weights: Tensor | Sequence[float] | None = None
    ) -> FactoredSamples:
        """Draws G_i = sum_t d_it a_it^T of a linear layer, kept as factors.

        Args:
            output_grads: d, [N, m], or [N, T, m] with T shared positions, or [N, C, T, m] with
                C columns that share a datum's inputs.
            inputs: a, [N, n] or [N, T, n].
            weights: [N], nonnegative, used as given; None means 1/N each.

        Returns:
            The samples; the tensors are kept as they are, without a copy.

        Raises:
            InvalidInputError: The shapes do not fit, or a dtype is not floating point.
            NonFiniteError: A NaN or an infinity in a tensor or weight.
        """
        _check_tensors(output_grads=output_grads, inputs=inputs)
        forms = {(2, 2), (3, 3), (4, 3)}
        if (output_grads.ndim, inputs.ndim) not in forms:
            raise InvalidInputError(
                f"from_factors got output_grads {_dims(output_grads)} and inputs {_dims(inputs)}; "
                "give [N, m] with [N, n], [N, T, m] with [N, T, n], or [N, C, T, m] with [N, T, n]."
            )
        d = output_grads
        if d.ndim == 2:
            d, inputs = d[:, None], inputs[:, None]
        if d.ndim == 3:
            d = d[:, None]
        if d.shape[0] != inputs.shape[0] or d.shape[2] != inputs.shape[1]:
            raise InvalidInputError(
                f"from_factors got output_grads {_dims(output_grads)} and inputs {_dims(inputs)}: "
                "they must agree in N (data) and T (shared positions)."
            )
        _check_values("output_grads", d)
        _check_values("inputs", inputs)
        if d.device != inputs.device:
            raise InvalidInputError(
                f"output_grads are on {d.device} and inputs on {inputs.device}; move one."
            )
        checked = _check_weights(weights, d.shape[0], d.device)
        return FactoredSamples(d.detach(), inputs.detach(), checked)

    @staticmethod
    def from_matrices(
        matrices: Tensor, weights: Tensor | Sequence[float] | None = None
    ) -> MatrixSamples:
        """Draws given as matrices.

        Args:
            matrices: G, [N, m, n], or [N, C, m, n] with C columns a datum.
            weights: [N], nonnegative, used as given; None means 1/N each.

        Returns:
            The samples; the tensor is kept as it is, without a copy.

        Raises:
            InvalidInputError: The shape does not fit, or the dtype is not floating point.
            NonFiniteError: A NaN or an infinity in a tensor or weight.
        """
        _check_tensors(matrices=matrices)
        if matrices.ndim not in (3, 4):
            raise InvalidInputError(
                f"from_matrices got a tensor {_dims(matrices)}; give [N, m, n] or [N, C, m, n]."
            )
        values = matrices if matrices.ndim == 4 else matrices[:, None]
        _check_values("matrices", values)
        checked = _check_weights(weights, values.shape[0], values.device)
        return MatrixSamples(values.detach(), checked)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs."""

    @property
    @abc.abstractmethod
    def n_columns(self) -> int:
        """C, the gradient columns of one datum."""

    @property
    @abc.abstractmethod
    def n_positions(self) -> int | None:
        """T, the shared positions; None for draws without factors."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes that the draws hold."""

    @abc.abstractmethod
    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        """G of data ``start`` to ``stop`` as float64 [k, C, m, n]."""

    @abc.abstractmethod
    def subset(self, index: slice | Tensor | Sequence[int]) -> GradientSamples:
        """The data at ``index``, with their weights as they are."""

    @abc.abstractmethod
    def to(self, device: torch.device | str) -> GradientSamples:
        """The same samples on another device."""

    @property
    def n_data(self) -> int:
        """N, the independent draws."""
        return self.weights.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the draws live."""
        return self.weights.device

    def __len__(self) -> int:
        return self.n_data

    def __repr__(self) -> str:
        m, n = self.shape
        shared = "" if self.n_positions is None else f", T={self.n_positions}"
        return (
            f"{type(self).__name__}({m} x {n}, N={self.n_data}, C={self.n_columns}{shared}, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )


@final
class FactoredSamples(GradientSamples):
    """G_ic = sum_t d_ict a_it^T, kept as (d, a).

    Attributes:
        output_grads: d, [N, C, T, m].
        inputs: a, [N, T, n].
        weights: float64 [N].
    """

    def __init__(self, output_grads: Tensor, inputs: Tensor, weights: Tensor) -> None:
        self.output_grads = output_grads
        self.inputs = inputs
        self.weights = weights

    @property
    def shape(self) -> tuple[int, int]:
        return self.output_grads.shape[3], self.inputs.shape[2]

    @property
    def n_columns(self) -> int:
        return self.output_grads.shape[1]

    @property
    def n_positions(self) -> int:
        return self.output_grads.shape[2]

    @property
    def nbytes(self) -> int:
        return self.output_grads.nbytes + self.inputs.nbytes

    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        d = self.output_grads[start:stop].double()
        a = self.inputs[start:stop].double()
        return d.mT @ a[:, None]

    def subset(self, index: slice | Tensor | Sequence[int]) -> FactoredSamples:
        return FactoredSamples(self.output_grads[index], self.inputs[index], self.weights[index])

    def to(self, device: torch.device | str) -> FactoredSamples:
        return FactoredSamples(
            self.output_grads.to(device), self.inputs.to(device), self.weights.to(device)
        )


@final
class MatrixSamples(GradientSamples):
    """G_ic kept as matrices.

    Attributes:
        values: G, [N, C, m, n].
        weights: float64 [N].
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.values = values
        self.weights = weights

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[3]

    @property
    def n_columns(self) -> int:
        return self.values.shape[1]

    @property
    def n_positions(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def matrices(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.values[start:stop].double()

    def subset(self, index: slice | Tensor | Sequence[int]) -> MatrixSamples:
        return MatrixSamples(self.values[index], self.weights[index])

    def to(self, device: torch.device | str) -> MatrixSamples:
        return MatrixSamples(self.values.to(device), self.weights.to(device))


def _dims(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InvalidInputError(
                f"{name} is a {type(value).__name__}; give a torch tensor (torch.as_tensor)."
            )


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise InvalidInputError(
            f"{name} have dtype {tensor.dtype}; gradients must be real floating point."
        )
    if tensor.numel() == 0:
        raise InvalidInputError(
            f"{name} are empty, {_dims(tensor)}; at least one datum, row and column is needed."
        )
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{name} {_dims(tensor)} hold {bad} NaN or infinite values; remove those data or find "
            "the step that produced them."
        )


def _check_weights(
    weights: Tensor | Sequence[float] | None, count: int, device: torch.device
) -> Tensor:
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device=device)
    if isinstance(weights, Tensor) and weights.is_complex():
        raise InvalidInputError(f"weights have dtype {weights.dtype}; give real ones.")
    given = torch.as_tensor(weights, dtype=torch.float64, device=device).detach()
    if given.shape != (count,):
        raise InvalidInputError(f"weights are {_dims(given)}; {count} data need shape [{count}].")
    if not bool(torch.isfinite(given).all()):
        raise NonFiniteError("weights hold NaN or infinite values; give finite, nonnegative ones.")
    if bool((given < 0).any()):
        raise InvalidInputError(
            f"weights go down to {float(given.min()):g}; a second moment needs weights >= 0."
        )
    return given
