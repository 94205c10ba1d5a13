"""Which loss a function is: recognized by its gradients, never by its name."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kronecker_probe.errors import KroneckerProbeError, NonFiniteError
from kronecker_probe.gradients.losses.custom import check_broadcast, custom_loss, reduction_of
from kronecker_probe.gradients.losses.evaluation import (
    Evaluator,
    LossFunction,
    at_least_float32,
    evaluators,
    in_float64,
)
from kronecker_probe.gradients.losses.families import Family, Point, families, pooled
from kronecker_probe.gradients.losses.resolved import ResolvedLoss
from kronecker_probe.gradients.losses.targets import check_device_labels, explained
from kronecker_probe.gradients.tracing.isolation import modules_restored

# Outputs up to which a few examples stand for all, where the family and the reduction are sought.
FEW_OUTPUTS = 1 << 11
# Relative change of outputs that float32 rounds away.
UNSEEN = 2.0**-30


def resolve_loss(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> ResolvedLoss:
    """What a loss is on this batch, found from a few of its values and gradients.

    The cross-entropy family (class indices, probabilities, label smoothing, class weights,
    ignored targets; classes in dimension 1 or last), squared errors and binary cross-entropies on
    logits (with weights and ``pos_weight``) have gradients s (phi(f) - q): two random outputs
    give s, a third and the model's own must fit, those of a few examples in float64 where the loss
    computes in it, which shows a penalty far below the rounding of float32. Any other loss is
    custom: it must be a mean or a sum over examples, which is checked.

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
            over examples, is random, or depends on parameters besides the outputs.
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
    probes = _probes(evaluator, outputs, targets)
    found = None if probes is None else _recognized(evaluator, outputs, targets, gradient, probes)
    if found is None:
        loss = custom_loss(evaluator, outputs, targets, value, gradient)
        # at a fitted model second derivatives lie below the rounding of float32
        wider = probes is not None and bool(probes.precise)
        return replace(loss, evaluator=in_float64(evaluator)) if wider else loss
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
    evaluator: Evaluator, outputs: Tensor, targets: Tensor, gradient: Tensor, probes: _Probes
) -> _Found | None:
    """The family that all gradients fit; None if there is none."""
    here = (outputs, gradient)
    for family in families(outputs, targets):
        few, tolerance = probes.few, evaluator.tolerance
        if probes.precise:
            few, tolerance = probes.precise, in_float64(evaluator).tolerance
        if few and family.fit(few, tolerance) is None:
            continue
        scales = family.fit([*probes.all_data, here], evaluator.tolerance)
        if scales is not None:
            return _Found(family, probes.reduction, scales)
    return None


@dataclass(frozen=True)
class _Probes:
    """Gradients at random outputs: two of all examples and three of a few, or three of all.

    Attributes:
        reduction: "mean" or "sum".
        all_data: Of all examples.
        few: Of a few examples; empty where these are all.
        precise: Of a few at two random outputs and at the model's, in float64; empty where the
            loss does not compute in it, or all is in float64 anyway.
    """

    reduction: str
    all_data: list[Point]
    few: list[Point]
    precise: list[Point]


def _probes(evaluator: Evaluator, outputs: Tensor, targets: Tensor) -> _Probes | None:
    """Gradients that identify the family; None where the loss has none, or is no mean or sum."""
    try:
        return _probe(evaluator, outputs, targets)
    except KroneckerProbeError:
        raise
    except Exception:  # random outputs may be none that it takes; the model's own are
        return None


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
    precise = _precise(evaluator, [*few[:2], outputs[rows]], chosen)
    if len(rows) == len(first):
        return _Probes(reduction, points, [], precise)
    second = evaluator.gradient(other, targets)
    return _Probes(reduction, [(one, first), (other, second)], points, precise)


def _precise(evaluator: Evaluator, places: list[Tensor], targets: Tensor) -> list[Point]:
    """Gradients at all ``places`` in float64; none where the loss does not compute in it.

    A loss that goes on in float32 does not see a change of the outputs below their rounding.
    """
    double = in_float64(evaluator)
    if double == evaluator:
        return []
    outputs = torch.cat([*places, places[0]]).double()
    count = len(places) + 1
    changed = outputs.chunk(count)[-1].mul_(1 + UNSEEN)
    try:
        gradient = double.gradient(outputs, torch.cat([targets] * count))
    except Exception:  # it may hold weights in float32, and the device no float64 at all
        return []
    *gradients, last = gradient.chunk(count)
    seen = ((last != gradients[0]) & (changed != 0)).count_nonzero()
    if not bool(torch.isfinite(gradient).all()) or bool(2 * seen < last.count_nonzero()):
        return []
    return list(zip(outputs.chunk(count)[:-1], gradients, strict=True))


def _places(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs at random, far apart everywhere, and in every softmax.

    Of the targets' size, so that a difference from them keeps the digits of the outputs; and
    between 0 and 1 where the model's are, which may be probabilities, on which others stop a CUDA
    device.
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
    """1 and -1 in turn along every dimension but the first, for one example."""
    sign = outputs.new_ones((1,) * outputs.ndim)
    for d in range(1, outputs.ndim):
        along = 1 - 2 * (torch.arange(outputs.shape[d], device=outputs.device) % 2)
        sign = sign * along.to(outputs.dtype).view(-1, *[1] * (outputs.ndim - d - 1))
    return sign


def _some_rows(gradient: Tensor) -> Tensor:
    """Examples on which the loss depends, few enough, spread over the batch."""
    rows = torch.arange(len(gradient), device=gradient.device)
    if gradient.numel() > FEW_OUTPUTS:
        rows = gradient.reshape(len(gradient), -1).any(1).nonzero()[:, 0]
        count = max(2, FEW_OUTPUTS // gradient[0].numel())
        rows = rows[:: max(1, math.ceil(len(rows) / count))]
    return rows
