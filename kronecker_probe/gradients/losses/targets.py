"""Targets that a loss cannot take, refused before it fails: dtype, shape and range."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.losses.evaluation import LossFunction

# What F.cross_entropy ignores by default.
IGNORE_INDEX = -100


def labels_outside(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int] | None:
    """Which of the class indices [N, ...] are no class of [N, C, ...] or [N, ..., C], and C.

    None where all are classes, or the targets are no class indices.
    """
    if targets.dtype.is_floating_point or targets.dtype.is_complex or outputs.ndim < 2:
        return None
    found = None
    for d in (1, outputs.ndim - 1):
        if targets.shape == outputs.shape[:d] + outputs.shape[d + 1 :]:
            outside = (targets < 0) | (targets >= outputs.shape[d])
            if not bool(outside.any()):
                return None
            found = outside, outputs.shape[d]
    return found


def check_device_labels(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> None:
    """Refuse labels outside the classes where they would stop the device for good.

    A kernel that meets one leaves a CUDA device unusable for the process. So the examples that hold
    them are tried on the CPU; where the loss itself holds tensors on the device and cannot run
    there, only its ``ignore_index`` is let through.

    Raises:
        InvalidInputError: The loss does not take these labels.
    """
    found = labels_outside(outputs, targets) if outputs.device.type != "cpu" else None
    if found is None:
        return
    outside, classes = found
    rows = outside.flatten(1).any(1) if outside.ndim > 1 else outside
    host = copy.deepcopy(loss_fn).cpu() if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        host(outputs.detach()[rows].float().cpu(), targets[rows].cpu())
    except IndexError as error:
        raise outside_error(targets, classes, error) from error
    except Exception as error:
        ignored = getattr(loss_fn, "ignore_index", IGNORE_INDEX)
        if bool((targets[outside] != ignored).any()):
            raise outside_error(targets, classes, error) from error


def outside_error(targets: Tensor, classes: int, error: Exception) -> InvalidInputError:
    """The error for labels that are no class."""
    return InvalidInputError(
        f"targets range over {int(targets.min())}..{int(targets.max())}, and the outputs have "
        f"{classes} classes; every label must be a class from 0 to {classes - 1} (ignored targets "
        f"need the loss's ignore_index). loss_fn raised {_said(error)}"
    )


def explained(error: Exception, outputs: Tensor, targets: Tensor) -> InvalidInputError | None:
    """What about the targets may have made the loss fail; None where nothing is unusual."""
    found = labels_outside(outputs, targets)
    if found is not None:
        return outside_error(targets, found[1], error)
    shapes = f"targets {list(targets.shape)} {targets.dtype} with outputs {list(outputs.shape)}"
    said = f"loss_fn raised {_said(error)}"
    if targets.dtype.is_floating_point:
        if targets.shape == outputs.shape:
            return None
        return InvalidInputError(
            f"{shapes}: MSE needs targets of the outputs' shape (no broadcasting), and "
            f"cross-entropy needs class indices (int64). {said}"
        )
    if "int64" not in str(targets.dtype):
        return InvalidInputError(
            f"{shapes}: give class indices as int64 (targets.long()) or MSE targets as floats. "
            f"{said}"
        )
    dims = {1, outputs.ndim - 1} if outputs.ndim > 1 else set()
    if any(targets.shape == outputs.shape[:d] + outputs.shape[d + 1 :] for d in dims):
        return None
    return InvalidInputError(
        f"{shapes}: class indices must be [N, ...] for outputs [N, C, ...] or [N, ..., C]. {said}"
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
