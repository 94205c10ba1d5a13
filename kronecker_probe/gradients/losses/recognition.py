"""Which loss a function is: recognized by its gradients, never by its name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronecker_probe.errors import (
    InvalidInputError,
    KroneckerProbeError,
    NonFiniteError,
)
from kronecker_probe.gradients.isolation import modules_restored
from kronecker_probe.gradients.losses.custom import agree, custom_loss, reduction_of
from kronecker_probe.gradients.losses.evaluation import (
    Evaluator,
    LossFunction,
    at_least_float32,
    evaluators,
)
from kronecker_probe.gradients.losses.families import Family, Point, families
from kronecker_probe.gradients.losses.resolved import ResolvedLoss
from kronecker_probe.gradients.losses.targets import check_device_labels, explained

# Numbers of outputs up to which all data are evaluated together, three times over.
MANY_OUTPUTS = 1 << 18


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
    scales = factor * found.scales
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
        if probes.few is not None and family.fit(probes.few, evaluator.tolerance) is None:
            continue
        scales = family.fit([*probes.all_data, here], evaluator.tolerance)
        if scales is not None:
            return _Found(family, probes.reduction, scales)
    return None


@dataclass(frozen=True)
class _Probes:
    """Gradients at random outputs: of all data, and where these are many, of a few."""

    reduction: str
    all_data: list[Point]
    few: list[Point] | None


def _probe(evaluator: Evaluator, outputs: Tensor, targets: Tensor) -> _Probes | None:
    places = [evaluator.rounded(place) for place in _places(outputs, targets)]
    first = evaluator.gradient(places[0], targets)
    _check_broadcast(evaluator, places[0], targets, first)
    if not bool(torch.isfinite(first).all()):
        return None
    if outputs.numel() <= MANY_OUTPUTS:
        found = _repeated(evaluator, places, targets, first)
        return None if found is None else _Probes(found[0], found[1], None)
    rows = _some_rows(first)
    chosen = [place[rows] for place in places]
    found = _repeated(evaluator, chosen, targets[rows], evaluator.gradient(chosen[0], targets[rows]))
    if found is None:
        return None
    second = evaluator.gradient(places[1], targets)
    return _Probes(found[0], [(places[0], first), (places[1], second)], found[1])


def _repeated(
    evaluator: Evaluator, places: list[Tensor], targets: Tensor, first: Tensor
) -> tuple[str, list[Point]] | None:
    """Mean or sum, and the gradients of a batch at every place, from one call on all places."""
    copies = len(places)
    gradients = evaluator.gradient(torch.cat(places), torch.cat([targets] * copies)).chunk(copies)
    reduction = reduction_of(first, gradients[0], copies, evaluator.tolerance)
    if reduction is None:
        return None
    factor = copies if reduction == "mean" else 1
    rest = [(f, factor * g) for f, g in zip(places[1:], gradients[1:], strict=True)]
    return reduction, [(places[0], first), *rest]


def _places(outputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Three outputs at random, the first two far apart everywhere, and in every softmax.

    Of the targets' size, lest a difference from them lose the outputs; and between 0 and 1 where
    the model's are, which may be probabilities, on which others stop a CUDA device.
    """
    generator = torch.Generator(outputs.device).manual_seed(0)
    shape = (3, *outputs.shape)
    u = torch.rand(shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    flip = torch.where(u[2].reshape(len(outputs), -1)[:, 0] < 0.5, 1, -1)
    sign = _alternating(outputs) * flip.view(-1, *[1] * (outputs.ndim - 1))
    size = max(1.0, float(targets.abs().max())) if targets.dtype.is_floating_point else 1.0
    near, far = sign * (1 + u[0]), -sign * (1 + u[1])
    third = 4 * u[2] - 2
    if size == 1 and bool((outputs >= 0).all()) and bool((outputs <= 1).all()):
        return [0.5 + 0.2 * place for place in (near, far, third)]
    return [size * place for place in (near, far, third)]


def _alternating(outputs: Tensor) -> Tensor:
    """1 and -1 in turn along every dimension but the first."""
    sign = outputs.new_ones((1,) * outputs.ndim)
    for d in range(1, outputs.ndim):
        along = 1 - 2 * (torch.arange(outputs.shape[d], device=outputs.device) % 2)
        sign = sign * along.to(outputs.dtype).view(-1, *[1] * (outputs.ndim - d - 1))
    return sign


def _some_rows(gradient: Tensor) -> Tensor:
    """Data on which the loss depends, few enough, spread over the batch."""
    rows = gradient.reshape(len(gradient), -1).any(1).nonzero()[:, 0]
    count = max(2, MANY_OUTPUTS // gradient[0].numel())
    stride = max(1, math.ceil(len(rows) / count))
    return rows[::stride]


def _check_broadcast(
    evaluator: Evaluator, outputs: Tensor, targets: Tensor, gradient: Tensor
) -> None:
    """Refuse [N] against [N, 1], where each output meets the targets of all data."""
    if not targets.dtype.is_floating_point or targets.shape == outputs.shape or len(outputs) < 3:
        return
    half = (len(outputs) + 1) // 2
    fewer = evaluator.gradient(outputs[:half], targets[:half])
    kept = gradient[:half]
    ratio = (fewer * kept).sum() / kept.square().sum()
    if not agree(fewer, ratio * kept, max(evaluator.tolerance, 1e-3)):
        raise InvalidInputError(
            f"targets {list(targets.shape)} with outputs {list(outputs.shape)}: a datum's gradient "
            "changes with the targets of others, as by broadcasting one against the other; give "
            "targets of the outputs' shape."
        )
