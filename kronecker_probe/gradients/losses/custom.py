"""Losses of no known family: are they a mean or a sum of one term per example?"""

from __future__ import annotations

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, KroneckerProbeError, UnsupportedError
from kronecker_probe.gradients.losses.evaluation import COARSEST, Evaluator
from kronecker_probe.gradients.losses.resolved import CustomLoss

# Over the tolerance of a single entry: a loss's own cancellations are not known.
SLACK = 8


def reduction_of(single: Tensor, repeated: Tensor, copies: int, tolerance: float) -> str | None:
    """Mean or sum, from gradients on a batch and on the batch with copies of it behind.

    Args:
        single: Gradient of the batch alone, [N, ...].
        repeated: Gradient of the first copy among ``copies`` of them, at other outputs.
        copies: Of the batch.
        tolerance: Relative, of an example's gradient.

    Returns:
        "mean", "sum", or None where it is neither, or all gradients are zero.
    """
    if not bool(single.any()):
        return None
    for reduction, factor in (("mean", copies), ("sum", 1)):
        if agree(repeated * factor, single, tolerance):
            return reduction
    return None


def agree(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Equal for each example up to rounding, relative to it or a hundredth of the largest one."""
    rows = len(other)
    error = (one - other).reshape(rows, -1).norm(dim=1)
    size = other.reshape(rows, -1).norm(dim=1)
    return bool((error <= tolerance * (size + 0.01 * size.max())).all())


def custom_loss(
    evaluator: Evaluator, outputs: Tensor, targets: Tensor, value: float, gradient: Tensor
) -> CustomLoss:
    """The loss as a sum of shares, if it is one.

    Checked at the model's outputs and at others near them: on the batch followed by a copy of it,
    where a mean halves the gradient and a sum keeps it, and with the outputs of every other example
    exchanged, which must leave the gradients of the rest as they are.

    Raises:
        InvalidInputError: The loss does not depend on the outputs at all.
        UnsupportedError: It is no mean or sum of terms of one example each, or it is random.
    """
    tolerance = min(SLACK * evaluator.tolerance, COARSEST)
    near = _near(outputs)
    try:
        other = evaluator.gradient(near, targets)
        both = evaluator.gradient(torch.cat([outputs, near]), torch.cat([targets, targets]))
    except KroneckerProbeError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnsupportedError(
            f"loss_fn fails on this batch followed by a copy of it ({error}), so that it is "
            "unknown whether it is a mean or a sum over examples; if it holds values for each "
            "example, make these part of the targets."
        ) from error
    check_broadcast(evaluator, near, targets, other)
    if not bool(gradient.any()) and not bool(other.any()):
        raise InvalidInputError(
            "The gradient of loss_fn is zero at the model's outputs and near them: every label is "
            "ignored, or every example is beyond a margin; give a batch that the loss depends on."
        )
    single = torch.cat([gradient, other])
    reduction = reduction_of(single, both, 2, tolerance)
    problem = "" if reduction else _NEITHER
    if reduction and len(outputs) > 1 and _coupled(evaluator, outputs, near, targets, single):
        problem = _COUPLED
    if reduction is None or problem:
        again = evaluator.gradient(outputs, targets)
        raise UnsupportedError(problem if agree(again, gradient, tolerance) else _RANDOM)
    factor = len(outputs) if reduction == "mean" else 1
    return CustomLoss("custom", reduction, value, evaluator, factor, targets)


def check_broadcast(
    evaluator: Evaluator, outputs: Tensor, targets: Tensor, gradient: Tensor
) -> None:
    """Refuse [N] against [N, 1], where each output meets the targets of all examples.

    What a batch's labels normalize may differ by one factor between the batch and half of it.

    Raises:
        InvalidInputError: An example's gradient changes otherwise with the targets of others.
    """
    usual = [outputs.shape[:d] + outputs.shape[d + 1 :] for d in range(1, outputs.ndim)]
    if targets.shape == outputs.shape or len(outputs) < 3:
        return
    if targets.shape in usual and not targets.dtype.is_floating_point:  # class indices
        return
    half = (len(outputs) + 1) // 2
    fewer = evaluator.gradient(outputs[:half], targets[:half])
    kept = gradient[:half]
    if not bool(kept.any()):
        return
    ratio = (fewer * kept).sum() / kept.square().sum()
    if not agree(fewer, ratio * kept, max(evaluator.tolerance, 1e-3)):
        raise InvalidInputError(
            f"targets {list(targets.shape)} with outputs {list(outputs.shape)}: an example's "
            "gradient changes with the targets of others, as by broadcasting one against the "
            "other; give targets of the outputs' shape."
        )


_WHY = (
    "so that no example has a share of its own; give the data term alone, as a mean or a sum over "
    "examples, without roots, ranks, other normalizers or weights by place in the batch."
)
_NEITHER = (
    "loss_fn is neither a mean nor a sum over data: on this batch followed by a copy of it the "
    f"gradient is neither half of what it was nor the same, {_WHY}"
)
_COUPLED = f"loss_fn couples data: one's gradient changes with the outputs of others, {_WHY}"
_RANDOM = (
    "loss_fn is random: two calls on the same outputs and targets differ; draw its noise in the "
    "examples, or pass the loss without it."
)


def _coupled(
    evaluator: Evaluator, outputs: Tensor, near: Tensor, targets: Tensor, single: Tensor
) -> bool:
    """Whether an example's gradient depends on the outputs of another."""
    tolerance = min(SLACK * evaluator.tolerance, COARSEST)
    here, there = single.chunk(2)
    generator = torch.Generator("cpu").manual_seed(1)
    order = torch.randperm(len(outputs), generator=generator, device="cpu").to(outputs.device)
    exchanged = (order % 2 == 0).view(-1, *[1] * (outputs.ndim - 1))
    mixed = evaluator.gradient(torch.where(exchanged, near, outputs), targets)
    return not agree(mixed, torch.where(exchanged, there, here), tolerance)


def _near(outputs: Tensor) -> Tensor:
    """Other outputs that a loss will take where it takes these.

    Between those of neighbouring examples, and 1 to 5 % nearer to zero: probabilities, positive or
    negative numbers stay what they are.
    """
    generator = torch.Generator(outputs.device).manual_seed(2)
    u = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    between = outputs + (0.25 + 0.5 * u) * (outputs.roll(1, dims=0) - outputs)
    size = 1e-2 * float(outputs.abs().max()) or 1e-2
    return torch.where(between == 0, size * u, between * (0.99 - 0.04 * u))
