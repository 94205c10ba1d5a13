"""Which loss a function is: recognized by its gradients, never by its name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronecker_probe.errors import (
    KroneckerProbeError,
    NonFiniteError,
)
from kronecker_probe.gradients.isolation import modules_restored
from kronecker_probe.gradients.losses.custom import check_broadcast, custom_loss, reduction_of
from kronecker_probe.gradients.losses.evaluation import (
    Evaluator,
    LossFunction,
    at_least_float32,
    evaluators,
)
from kronecker_probe.gradients.losses.families import Family, Point, families, pooled
from kronecker_probe.gradients.losses.resolved import ResolvedLoss
from kronecker_probe.gradients.losses.targets import check_device_labels, explained

# Outputs up to which a few data stand for all, where the family and the reduction are sought.
FEW_OUTPUTS = 1 << 11


def resolve_loss(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> ResolvedLoss:
    """What a loss is on this batch, found from a few of its values and gradients.

    The cross-entropy family (class indices, probabilities, label smoothing, class weights,
    ignored targets; classes in dimension 1 or last), squared errors and binary cross-entropies on
    logits (with weights and ``pos_weight``) have gradients s (phi(f) - q): two random outputs
    give s, a third and the model's own must fit. Any other loss is custom: it must be a mean or a
    sum over data, which is checked.

    Nothing is drawn from the global random generators, and the loss is called with copies.

    Args:
        loss_fn: Takes (outputs, targets), returns a scalar.
        outputs: [N, ...], finite.
        targets: [N, ...].

    Raises:
        InvalidInputError: Targets whose dtype, shape or range the loss does not take, or a loss
            that does not depend on this batch.
        NonFiniteError: The loss or its gradient is NaN or infinite.
        UnsupportedError: The loss is no scalar, has no gradient in the outputs, is no mean or sum
            over data, is random, or depends on parameters besides the outputs.
    """
    check_device_labels(loss_fn, outputs, targets)
    if isinstance(loss_fn, nn.Module):
        with modules_restored(loss_fn):
            return _resolved(loss_fn, at_least_float32(outputs), targets, outputs)
    return _resolved(loss_fn, at_least_float32(outputs), targets, outputs)


def _resolved(
    loss_fn: LossFunction, outputs: Tensor, targets: Tensor, given: Tensor
) -> ResolvedLoss:
    evaluator, value, gradient = _first(loss_fn, outputs, targets, given)
    found = _recognized(evaluator, outputs, targets, gradient)
    if found is None:
        return custom_loss(evaluator, outputs, targets, value, gradient)
    factor = len(outputs) if found.reduction == "mean" else 1
    scales = factor * pooled(found.scales, evaluator.tolerance)
    return found.family.resolved(scales, found.reduction, value, evaluator, factor)


def _first(
    loss_fn: LossFunction, outputs: Tensor, targets: Tensor, given: Tensor
) -> tuple[Evaluator, float, Tensor]:
    """How the loss can be called, its value and its gradient at the model's outputs."""
    *wider, last = evaluators(loss_fn, given)
    for evaluator in wider:
        try:
            return _evaluated(evaluator, outputs, targets)
        except KroneckerProbeError:
            raise
        except Exception:  # it may take the model's own precision only
            continue
    try:
        return _evaluated(last, outputs, targets)
    except KroneckerProbeError:
        raise
    except Exception as error:
        reason = explained(error, outputs, targets)
        if reason is None:
            raise
        raise reason from error


def _evaluated(
    evaluator: Evaluator, outputs: Tensor, targets: Tensor
) -> tuple[Evaluator, float, Tensor]:
    value, gradient = evaluator.value_and_gradient(outputs, targets)
    total = float(value)
    if not math.isfinite(total):
        raise NonFiniteError(
            f"The loss is {total}; check targets and outputs for NaN, and whether every label of "
            "the batch is ignored."
        )
    if not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError("The gradient of loss_fn in the outputs holds NaN or infinite values.")
    return evaluator, total, gradient


@dataclass(frozen=True)
class _Found:
    """A family, and s of the batch loss."""

    family: Family
    reduction: str
    scales: Tensor


def _recognized(
    evaluator: Evaluator, outputs: Tensor, targets: Tensor, gradient: Tensor
) -> _Found | None:
    """The family that all gradients fit; None if there is none, or no mean or sum over data."""
    try:
        probes = _probe(evaluator, outputs, targets)
    except KroneckerProbeError:
        raise
    except Exception:  # random outputs may be none that it takes; the model's own are
        return None
    if probes is None:
        return None
    here = (outputs, gradient)
    for family in families(outputs, targets):
        if probes.few and family.fit(probes.few, evaluator.tolerance) is None:
            continue
        scales = family.fit([*probes.all_data, here], evaluator.tolerance)
        if scales is not None:
            return _Found(family, probes.reduction, scales)
    return None


@dataclass(frozen=True)
class _Probes:
    """Gradients at random outputs: two of all data and three of a few, or three of all."""

    reduction: str
    all_data: list[Point]
    few: list[Point]


def _probe(evaluator: Evaluator, outputs: Tensor, targets: Tensor) -> _Probes | None:
    one, other = (evaluator.rounded(place) for place in _places(outputs, targets))
    first = evaluator.gradient(one, targets)
    if not bool(torch.isfinite(first).all()):
        return None
    check_broadcast(evaluator, one, targets, first)
    rows = _some_rows(first)
    few = [one[rows], other[rows], evaluator.rounded(_between(one[rows], other[rows]))]
    chosen, copies = targets[rows], len(few)
    single = first if len(rows) == len(first) else evaluator.gradient(few[0], chosen)
    gradients = evaluator.gradient(torch.cat(few), torch.cat([chosen] * copies)).chunk(copies)
    reduction = reduction_of(single, gradients[0], copies, evaluator.tolerance)
    if reduction is None:
        return None
    factor = copies if reduction == "mean" else 1
    points = [(f, factor * g) for f, g in zip(few, gradients, strict=True)]
    if len(rows) == len(first):
        return _Probes(reduction, points, [])
    second = evaluator.gradient(other, targets)
    return _Probes(reduction, [(one, first), (other, second)], points)


def _places(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs at random, far apart everywhere, and in every softmax.

    Of the targets' size, lest a difference from them lose the outputs; and between 0 and 1 where
    the model's are, which may be probabilities, on which others stop a CUDA device.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    rest = outputs[:1].numel()
    row = _uniform((2, rest), outputs, generator)
    u = _uniform((len(outputs), 2), outputs, generator)
    sign = _alternating(outputs).reshape(1, rest)
    away = torch.where(u[:, :1] < 0.5, 0.5, -0.5) * sign
    size = max(1.0, float(targets.abs().max())) if targets.dtype.is_floating_point else 1.0
    centre = 0.0
    low, high = (float(end) for end in outputs.aminmax())
    if size == 1 and low >= 0 and high <= 1:
        size, centre = 0.2, 0.5
    one = size * away * (2 + row[0] + u[:, :1]) + centre
    other = -size * away * (2 + row[1] + u[:, 1:]) + centre
    return one.view(outputs.shape), other.view(outputs.shape)


def _between(one: Tensor, other: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    return one + _uniform(one.shape, one, generator) * (other - one)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """On the CPU first, so that every device sees the same numbers."""
    return torch.rand(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def _alternating(outputs: Tensor) -> Tensor:
    """1 and -1 in turn along every dimension but the first, for one datum."""
    sign = outputs.new_ones((1,) * outputs.ndim)
    for d in range(1, outputs.ndim):
        along = 1 - 2 * (torch.arange(outputs.shape[d], device=outputs.device) % 2)
        sign = sign * along.to(outputs.dtype).view(-1, *[1] * (outputs.ndim - d - 1))
    return sign


def _some_rows(gradient: Tensor) -> Tensor:
    """Data on which the loss depends, few enough, spread over the batch."""
    rows = torch.arange(len(gradient), device=gradient.device)
    if gradient.numel() > FEW_OUTPUTS:
        rows = gradient.reshape(len(gradient), -1).any(1).nonzero()[:, 0]
        count = max(2, FEW_OUTPUTS // gradient[0].numel())
        rows = rows[:: max(1, math.ceil(len(rows) / count))]
    return rows
