"""What tensors of gradient samples must be: shapes, dtypes, finite values."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

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
            f"{name} are empty, {dims(tensor)}; at least one example, row and column is needed."
        )
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{name} {dims(tensor)} hold {bad} NaN or infinite values; remove those examples or "
            "find the step that produced them."
        )


def check_weights(
    weights: Tensor | Sequence[float] | None, count: int, device: torch.device
) -> Tensor:
    """Weights as float64 [N]; 1/N each for None.

    Raises:
        InvalidInputError: Complex, negative, or not one per example.
        NonFiniteError: A NaN or an infinity.
    """
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device=device)
    if isinstance(weights, Tensor) and weights.is_complex():
        raise InvalidInputError(f"weights have dtype {weights.dtype}; give real ones.")
    given = torch.as_tensor(weights, dtype=torch.float64, device=device).detach()
    if given.shape != (count,):
        raise InvalidInputError(
            f"weights are {dims(given)}; {count} examples need shape [{count}]."
        )
    if not bool(torch.isfinite(given).all()):
        raise NonFiniteError("weights hold NaN or infinite values; give finite, nonnegative ones.")
    if bool((given < 0).any()):
        raise InvalidInputError(
            f"weights go down to {float(given.min()):g}; a second moment needs weights >= 0."
        )
    return given


def check_factors(
    output_grads: Tensor, inputs: Tensor, weights: Tensor | Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d [N, C, T, m], a [N, T, n] and the weights; see ``GradientSamples.from_factors``."""
    check_tensors(output_grads=output_grads, inputs=inputs)
    got = f"from_factors got output_grads {dims(output_grads)} and inputs {dims(inputs)}"
    if (output_grads.ndim, inputs.ndim) not in {(2, 2), (3, 3), (4, 3)}:
        raise InvalidInputError(
            f"{got}; give [N, m] with [N, n], [N, T, m] with [N, T, n], or [N, C, T, m] with "
            "[N, T, n]."
        )
    d = output_grads
    if d.ndim == 2:
        d, inputs = d[:, None], inputs[:, None]
    if d.ndim == 3:
        d = d[:, None]
    if d.shape[0] != inputs.shape[0] or d.shape[2] != inputs.shape[1]:
        raise InvalidInputError(f"{got}: they must agree in N (examples) and T (shared positions).")
    check_values("output_grads", d)
    check_values("inputs", inputs)
    if d.device != inputs.device:
        raise InvalidInputError(
            f"output_grads are on {d.device} and inputs on {inputs.device}; move one."
        )
    return d.detach(), inputs.detach(), check_weights(weights, d.shape[0], d.device)


def check_matrices(
    matrices: Tensor, weights: Tensor | Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """G [N, C, m, n] and the weights; see ``GradientSamples.from_matrices``."""
    check_tensors(matrices=matrices)
    if matrices.ndim not in (3, 4):
        raise InvalidInputError(
            f"from_matrices got a tensor {dims(matrices)}; give [N, m, n] or [N, C, m, n]."
        )
    values = matrices if matrices.ndim == 4 else matrices[:, None]
    check_values("matrices", values)
    return values.detach(), check_weights(weights, values.shape[0], values.device)


def check_embedding(
    tokens: Tensor, output_grads: Tensor, vocabulary: int, weights: Tensor | Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k [N, T], d [N, C, T, D] and the weights; see ``GradientSamples.from_embedding``."""
    check_tensors(tokens=tokens, output_grads=output_grads)
    d = output_grads[:, None] if output_grads.ndim == 3 else output_grads
    if tokens.ndim != 2 or d.ndim != 4 or (d.shape[0], d.shape[2]) != tuple(tokens.shape):
        raise InvalidInputError(
            f"from_embedding got tokens {dims(tokens)} and output_grads {dims(output_grads)}; "
            "give [N, T] with [N, T, D] or [N, C, T, D]."
        )
    if tokens.dtype not in (torch.int32, torch.int64):
        raise InvalidInputError(f"tokens have dtype {tokens.dtype}; give int64 indices.")
    check_values("output_grads", d)
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise InvalidInputError(
            f"tokens range over {int(tokens.min())}..{int(tokens.max())}, and vocabulary="
            f"{vocabulary}; every token must be in 0..{vocabulary - 1}."
        )
    if tokens.device != d.device:
        raise InvalidInputError(f"tokens are on {tokens.device} and output_grads on {d.device}.")
    return tokens.long(), d.detach(), check_weights(weights, len(tokens), d.device)


def check_parts(parts: Sequence[Any], kind: type) -> None:
    """Refuse to stack nothing, or samples of more than one shape or device.

    Raises:
        InvalidInputError: Names what it got.
    """
    for part in parts:
        if not isinstance(part, kind):
            raise InvalidInputError(f"stack got a {type(part).__name__}; give GradientSamples.")
    if not parts:
        raise InvalidInputError("stack got no samples; give at least one set.")
    shapes = sorted({f"{part.shape[0]} x {part.shape[1]}" for part in parts})
    if len(shapes) > 1:
        raise InvalidInputError(
            f"stack got samples of {' and '.join(shapes)} matrices; all must have one shape."
        )
    devices = {str(part.device) for part in parts}
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
