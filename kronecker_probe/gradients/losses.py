"""Which loss a function is: recognized by its value and gradient, never by its name alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ResolvedLoss:
    """A loss as a sum of terms: l_i = scale * sum_t term(f_it, y_it).

    l_i is datum i's additive share of the batch loss, times N for a mean and times 1 for a sum.
    A term is a cross-entropy at one position, or one squared difference.

    Attributes:
        kind: "cross-entropy" or "mse".
        reduction: "mean" or "sum".
        class_dim: The dimension of the outputs that holds the classes; -1 for "mse".
        scale: c in l_i = c sum_t term.
        value: The loss of the whole batch, as loss_fn returned it.
    """

    kind: str
    reduction: str
    class_dim: int
    scale: float
    value: float

    def n_columns(self, outputs: Tensor) -> int:
        """Columns of the loss-Hessian root of one datum: its numbers of outputs."""
        return outputs[0].numel()

    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """Columns s of S with S S^T = the Hessian of l_i in the outputs, all data at once.

        Cross-entropy: sqrt(c p_k) (e_k - p) for each class k and position; MSE: sqrt(2c) e_j.

        Yields:
            float tensors of the outputs' shape.
        """
        flat = _at_least_float32(outputs)
        if self.kind == "mse":
            columns = _basis_columns(flat, math.sqrt(2 * self.scale))
        else:
            p = flat.movedim(self.class_dim, -1).softmax(dim=-1)
            columns = (
                column.movedim(-1, self.class_dim) for column in _softmax_columns(p, self.scale)
            )
        yield from columns

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Output gradient for labels drawn from the model, with covariance the Hessian of l_i.

        Labels follow exp(-term); the gradient is scaled by sqrt(c), so that a mean over
        positions, or over output dimensions, still gives the Gauss-Newton of the loss.

        Returns:
            A float tensor of the outputs' shape.
        """
        flat = _at_least_float32(outputs)
        if self.kind == "mse":
            noise = torch.randn(
                flat.shape, dtype=flat.dtype, device=flat.device, generator=generator
            )
            return math.sqrt(2 * self.scale) * noise
        p = flat.movedim(self.class_dim, -1).softmax(dim=-1)
        labels = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
        onehot = torch.zeros_like(p).view(-1, p.shape[-1]).scatter_(1, labels, 1.0).view(p.shape)
        return math.sqrt(self.scale) * (p - onehot).movedim(-1, self.class_dim)

    def true_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of l_i in the outputs at the given labels.

        Returns:
            A float tensor of the outputs' shape.
        """
        flat = _at_least_float32(outputs)
        if self.kind == "mse":
            return 2 * self.scale * (flat - targets.to(flat.dtype))
        p = flat.movedim(self.class_dim, -1).softmax(dim=-1)
        onehot = F.one_hot(targets, p.shape[-1]).to(p.dtype)
        return self.scale * (p - onehot).movedim(-1, self.class_dim)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> float | None:
        """Share of correct labels; None for regression."""
        if self.kind == "mse":
            return None
        return float((outputs.argmax(dim=self.class_dim) == targets).double().mean())


def _basis_columns(outputs: Tensor, value: float) -> Iterator[Tensor]:
    """value e_j for every output j of a datum."""
    for j in range(outputs[0].numel()):
        column = torch.zeros_like(outputs).flatten(1)
        column[:, j] = value
        yield column.view(outputs.shape)


def _softmax_columns(p: Tensor, scale: float) -> Iterator[Tensor]:
    """sqrt(c p_k) (e_k - p) at each position, for probabilities ``p`` [N, ..., C]."""
    flat = p.reshape(p.shape[0], -1, p.shape[-1])
    for t in range(flat.shape[1]):
        for k in range(flat.shape[2]):
            column = torch.zeros_like(flat)
            root = (scale * flat[:, t, k]).sqrt()
            column[:, t] = -root[:, None] * flat[:, t]
            column[:, t, k] += root
            yield column.view(p.shape)


def _at_least_float32(outputs: Tensor) -> Tensor:
    detached = outputs.detach()
    return detached if detached.dtype == torch.float64 else detached.float()


def resolve_loss(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> ResolvedLoss:
    """Recognize cross-entropy or MSE, mean or sum, by value and gradient on this batch.

    Args:
        loss_fn: Takes (outputs, targets), returns a scalar.
        outputs: [N, C], [N, C, ...] or [N, ..., C] for cross-entropy; any [N, ...] for MSE.
        targets: Class indices (int64) for cross-entropy, values of the outputs' shape for MSE.

    Raises:
        InvalidInputError: Targets of the wrong dtype, shape or range.
        NonFiniteError: The outputs or the loss are NaN or infinite.
        UnsupportedError: The loss is none of these; the message says what it was compared with.
    """
    if not bool(torch.isfinite(outputs).all()):
        raise NonFiniteError(
            "The model's outputs hold NaN or infinite values; check the inputs and the weights."
        )
    candidates = _candidates(outputs, targets)
    total = float(_scalar(loss_fn(outputs.detach(), targets)))
    if not math.isfinite(total):
        raise NonFiniteError(f"The loss is {total}; check targets and outputs for NaN.")
    # Compared at random outputs: at a perfect fit every gradient vanishes and nothing is told.
    leaf = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    leaf = leaf.to(outputs.device, _at_least_float32(outputs).dtype).requires_grad_(True)
    with torch.enable_grad():
        value = _scalar(loss_fn(leaf, targets))
        gradient = torch.autograd.grad(value, leaf, allow_unused=True)[0]
    for kind, reduction, class_dim, scale in candidates:
        loss = ResolvedLoss(kind, reduction, class_dim, scale, total)
        if gradient is not None and _close(gradient, _batch_gradient(loss, leaf, targets)):
            return loss
    tried = " or ".join(
        dict.fromkeys(f"{kind} ({reduction})" for kind, reduction, *_ in candidates)
    )
    raise UnsupportedError(
        f"loss_fn is not {tried} of outputs {list(outputs.shape)}: its gradient differs. "
        "Supported: "
        "cross-entropy on class indices and MSE, as a mean or a sum over data, without class "
        "weights, label smoothing, ignored targets or added penalties; pass the data term alone."
    )


def _scalar(value: object) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UnsupportedError(
        f"loss_fn(outputs, targets) returned {got}; it must return a scalar tensor, the mean or "
        "sum over data (not reduction='none')."
    )


def _candidates(outputs: Tensor, targets: Tensor) -> list[tuple[str, str, int, float]]:
    """(kind, reduction, class_dim, scale) that fit the dtypes and shapes."""
    shapes = f"targets {list(targets.shape)} {targets.dtype} with outputs {list(outputs.shape)}"
    if targets.dtype.is_floating_point:
        if targets.shape != outputs.shape:
            raise InvalidInputError(
                f"{shapes}: MSE needs targets of the outputs' shape (no broadcasting), and "
                "cross-entropy needs class indices (int64)."
            )
        size = outputs[0].numel()
        return [("mse", "mean", -1, 1.0 / size), ("mse", "sum", -1, 1.0)]
    if targets.dtype != torch.int64:
        raise InvalidInputError(
            f"{shapes}: give class indices as int64 (targets.long()) or MSE targets as floats."
        )
    dims = [
        d
        for d in dict.fromkeys((1, outputs.ndim - 1))
        if d < outputs.ndim and targets.shape == outputs.shape[:d] + outputs.shape[d + 1 :]
    ]
    if outputs.ndim < 2 or not dims:
        raise InvalidInputError(
            f"{shapes}: class indices must be [N, ...] for outputs [N, C, ...] or [N, ..., C]."
        )
    found = []
    for d in dims:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[d]:
            raise InvalidInputError(
                f"targets range over {low}..{high}, and the outputs have {outputs.shape[d]} "
                "classes; every label must be a valid class (ignored targets are not supported)."
            )
        terms = targets[0].numel()
        found += [("cross-entropy", "mean", d, 1.0 / terms), ("cross-entropy", "sum", d, 1.0)]
    return found


def _batch_gradient(loss: ResolvedLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    gradient = loss.true_gradient(outputs, targets)
    return gradient / outputs.shape[0] if loss.reduction == "mean" else gradient


def _close(gradient: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of the outputs' dtype."""
    eps = torch.finfo(gradient.dtype).eps
    error = torch.linalg.vector_norm(gradient.double() - expected.double())
    size = torch.linalg.vector_norm(expected.double())
    return float(error) <= 64 * eps * float(size)
