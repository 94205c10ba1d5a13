"""What tensors of gradient samples must be: shapes, dtypes, finite values."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError


def check_range(side: str, part: slice, size: int) -> slice:
    """``part`` with its ends, of a side of ``size``.

    Raises:
        InvalidInputError: Not a nonempty slice in steps of 1.
    """
    if isinstance(part, slice) and part.step in (None, 1):
        start, stop, _ = part.indices(size)
        if start < stop:
            return slice(start, stop)
    raise InvalidInputError(
        f"block got {side}={part!r} of {size}; give a nonempty slice in steps of 1."
    )


def check_count(name: str, value: object) -> None:
    """Refuse what is no positive whole number.

    Raises:
        InvalidInputError: It is none; names the option.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInputError(f"{name}={value!r}; give a positive whole number.")


def check_seed(seed: object) -> int:
    """The seed of a random generator.

    Raises:
        InvalidInputError: Not a whole number of 64 bits.
    """
    try:
        value = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        value = None
    if value is None or isinstance(seed, bool) or not -(2**63) <= value < 2**64:
        raise InvalidInputError(f"seed={seed!r}; give a whole number of at most 64 bits.")
    return value


def dims(tensor: Tensor) -> str:
    """The shape of a tensor, for messages."""
    return str(list(tensor.shape))


def check_tensors(**given: object) -> None:
    """Refuse arguments that are no tensors.

    Raises:
        InvalidInputError: One of them is something else.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InvalidInputError(
                f"{name} is a {type(value).__name__}; give a torch tensor (torch.as_tensor)."
            )


def check_values(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is empty, not real floating point, or not finite.

    Raises:
        InvalidInputError: Empty, or of another dtype.
        NonFiniteError: A NaN or an infinity.
    """
    if not tensor.dtype.is_floating_point:
        raise InvalidInputError(
            f"{name} have dtype {tensor.dtype}; gradients must be real floating point."
        )
    if tensor.numel() == 0:
        raise InvalidInputError(
            f"{name} are empty, {dims(tensor)}; at least one datum, row and column is needed."
        )
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{name} {dims(tensor)} hold {bad} NaN or infinite values; remove those data or find "
            "the step that produced them."
        )


def check_weights(
    weights: Tensor | Sequence[float] | None, count: int, device: torch.device
) -> Tensor:
    """Weights as float64 [N]; 1/N each for None.

    Raises:
        InvalidInputError: Complex, negative, or not one a datum.
        NonFiniteError: A NaN or an infinity.
    """
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device=device)
    if isinstance(weights, Tensor) and weights.is_complex():
        raise InvalidInputError(f"weights have dtype {weights.dtype}; give real ones.")
    given = torch.as_tensor(weights, dtype=torch.float64, device=device).detach()
    if given.shape != (count,):
        raise InvalidInputError(f"weights are {dims(given)}; {count} data need shape [{count}].")
    if not bool(torch.isfinite(given).all()):
        raise NonFiniteError("weights hold NaN or infinite values; give finite, nonnegative ones.")
    if bool((given < 0).any()):
        raise InvalidInputError(
            f"weights go down to {float(given.min()):g}; a second moment needs weights >= 0."
        )
    return given


def check_alike(shapes: Collection[tuple[int, int]], devices: Collection[str]) -> None:
    """Refuse to stack samples of more than one shape or device.

    Raises:
        InvalidInputError: Names them.
    """
    if len(shapes) > 1:
        told = " and ".join(sorted(f"{m} x {n}" for m, n in shapes))
        raise InvalidInputError(f"stack got samples of {told} matrices; all must have one shape.")
    if len(devices) > 1:
        raise InvalidInputError(
            f"stack got samples on {' and '.join(sorted(devices))}; move them to one with "
            ".to(device)."
        )


def check_scales(scales: Sequence[float] | None, count: int) -> list[float]:
    """A finite scale >= 0 for each of ``count`` stacked parts; ones for None.

    Raises:
        InvalidInputError: Another number of them, or one out of range.
    """
    factors = [1.0] * count if scales is None else [float(scale) for scale in scales]
    if len(factors) != count or not all(0 <= factor < math.inf for factor in factors):
        raise InvalidInputError(
            f"stack got {count} parts and scales={scales!r}; give one finite scale >= 0 for each "
            "part."
        )
    return factors
