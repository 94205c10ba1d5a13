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

    def batch_value(self, outputs: Tensor, targets: Tensor) -> float:
        """The loss of the batch at the given labels, in float64."""
        flat = outputs.detach().double()
        if self.kind == "mse":
            total = float((flat - targets.double()).square().sum())
        else:
            total = float(
                F.cross_entropy(flat.movedim(self.class_dim, 1), targets, reduction="sum")
            )
        return self.term_weight(outputs) * total

    def batch_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the batch loss in the outputs at the given labels, of the outputs' shape."""
        return self.term_weight(outputs) / self.scale * self.true_gradient(outputs, targets)

    def term_weight(self, outputs: Tensor) -> float:
        """Weight of one term in the loss of the batch."""
        return self.scale / outputs.shape[0] if self.reduction == "mean" else self.scale

    def accuracy(self, outputs: Tensor, targets: Tensor) -> float | None:
        """Share of correct labels; None for regression."""
        if self.kind == "mse":
            return None
        return float((outputs.argmax(dim=self.class_dim) == targets).double().mean())


def _basis_columns(outputs: Tensor, value: float) -> Iterator[Tensor]:
    """value e_j for every output j of a datum."""
    for j in range(outputs[0].numel()):
        column = torch.zeros_like(outputs).reshape(outputs.shape[0], -1)
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
        outputs: [N, C], [N, C, ...] or [N, ..., C] for cross-entropy; any [N, ...] for MSE. Finite.
        targets: Class indices (int64) for cross-entropy, values of the outputs' shape for MSE.

    Raises:
        InvalidInputError: Targets of the wrong dtype, shape or range.
        NonFiniteError: The loss is NaN or infinite.
        UnsupportedError: The loss is none of these; the message says what it was compared with.
    """
    candidates = _candidates(outputs, targets)
    actual = _at_least_float32(outputs)
    total = float(_scalar(loss_fn(actual.clone(), targets)).detach())
    if not math.isfinite(total):
        raise NonFiniteError(f"The loss is {total}; check targets and outputs for NaN.")
    # Compared at random outputs, too: at a perfect fit every gradient vanishes and tells nothing.
    leaf = torch.randn(
        outputs.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    ).to(actual)
    leaf.requires_grad_(True)
    with torch.enable_grad():
        value = _scalar(loss_fn(leaf, targets))
    if not value.requires_grad:
        raise UnsupportedError("loss_fn(outputs, targets) has no gradient in outputs.")
    gradient = torch.autograd.grad(value, leaf, allow_unused=True)[0]
    for kind, reduction, class_dim, scale in candidates:
        loss = ResolvedLoss(kind, reduction, class_dim, scale, total)
        if (
            gradient is not None
            and _close(gradient, loss.batch_gradient(leaf, targets))
            and _same_value(loss, float(value.detach()), leaf, targets)
            and _same_value(loss, total, actual, targets)
        ):
            return loss
    tried = " or ".join(
        dict.fromkeys(f"{kind} ({reduction})" for kind, reduction, *_ in candidates)
    )
    raise UnsupportedError(
        f"loss_fn is not {tried} of outputs {list(outputs.shape)}: its value or gradient differs. "
        "Supported: cross-entropy on logits and class indices (for NLLLoss on log-probabilities, "
        "cross_entropy is the same loss) and MSE, as a mean or a sum over data, without class "
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
        return _scales("mse", -1, size)
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
        found += _scales("cross-entropy", d, targets[0].numel())
    return found


def _scales(kind: str, class_dim: int, terms: int) -> list[tuple[str, str, int, float]]:
    """A mean over data of a mean or a sum over a datum's terms, and a sum over everything."""
    per_datum = dict.fromkeys((1.0 / terms, 1.0))
    means = [(kind, "mean", class_dim, scale) for scale in per_datum]
    return [*means, (kind, "sum", class_dim, 1.0)]


def _close(gradient: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of the outputs' dtype."""
    eps = torch.finfo(gradient.dtype).eps
    error = torch.linalg.vector_norm(gradient.double() - expected.double())
    size = torch.linalg.vector_norm(expected.double())
    return float(error) <= 64 * eps * float(size)


def _same_value(loss: ResolvedLoss, value: float, outputs: Tensor, targets: Tensor) -> bool:
    """Equal up to the rounding of outputs and targets, carried through the terms."""
    rounding = 64 * torch.finfo(outputs.dtype).eps
    expected = loss.batch_value(outputs, targets)
    total = loss.term_weight(outputs) * (outputs if loss.kind == "mse" else targets).numel()
    largest = float(outputs.detach().abs().max())
    if loss.kind == "mse":  # a term d^2 moves by 2 d e + e^2 when d moves by e
        e = rounding * max(largest, float(targets.abs().max()))
        slack = 2 * e * math.sqrt(total * expected) + total * e**2
    else:  # a term moves by as much as its logits
        slack = total * rounding * largest
    return abs(value - expected) <= rounding * expected + slack
