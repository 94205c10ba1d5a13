"""The preconditioner of one parameter: statistics in, inverse roots, directions out.

Every function takes the options of the parameter's group and the parameter's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.linalg.memory import available_bytes
from kronecker_probe.linalg.roots import psd_power
from kronecker_probe.operators.diagonal import DiagonalOperator
from kronecker_probe.operators.kronecker import KroneckerOperator
from kronecker_probe.optim.grafting import adam_denominator, adam_direction
from kronecker_probe.optim.shapes import (
    Side,
    default_exponent,
    matrix_shape,
    preconditioned_sides,
    side_size,
)
from kronecker_probe.optim.statistics import (
    statistics_correction,
    update_diagonal,
    update_factor,
)

Group = Mapping[str, Any]
State = dict[str, Any]

# A held root whose smallest eigenvalue is within this many roundings of its largest is noise there.
_RESOLUTION = 16


def sides_of(param: Tensor, group: Group) -> tuple[Side, ...]:
    """The sides of a parameter that have a factor."""
    return preconditioned_sides(matrix_shape(param), group["max_preconditioner_dim"])


def state_shapes(param: Tensor, group: Group) -> dict[str, tuple[int, ...]]:
    """Every tensor that this module holds in the state of a parameter, and its shape."""
    sides = sides_of(param, group)
    if not sides:
        return {"second_moment": tuple(param.shape)}
    square = {side: (side_size(matrix_shape(param), side),) * 2 for side in sides}
    return {f"{side}_{kind}": square[side] for kind in ("factor", "inverse_root") for side in sides}


def update(param: Tensor, group: Group, state: State, gradient: Tensor) -> None:
    """Adds a gradient, in the dtype of the state, to the statistics."""
    statistics, beta2 = group["statistics"], group["betas"][1]
    matrix = gradient.reshape(matrix_shape(param))
    sides = sides_of(param, group)
    for side in sides:
        key = f"{side}_factor"
        if key not in state:
            size = side_size(matrix_shape(param), side)
            state[key] = matrix.new_zeros(size, size)
        update_factor(state[key], matrix, side, statistics, beta2)
    if not sides:
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(
                gradient, memory_format=torch.contiguous_format
            )
        update_diagonal(state["second_moment"], gradient, statistics, beta2)


def refresh_is_due(group: Group, step: int) -> bool:
    """Whether the roots are computed in this step."""
    since_start: int = step - group["start_preconditioning_step"]
    frequency: int = group["precondition_frequency"]
    return since_start >= 0 and since_start % frequency == 0


def refresh(param: Tensor, group: Group, state: State) -> dict[Side, InvalidInputError]:
    """Computes the inverse roots; those that fail are left as they are, and returned."""
    failures: dict[Side, InvalidInputError] = {}
    sides = sides_of(param, group)
    for side in sides:
        exponent = group["exponent"]
        if exponent is None:
            exponent = default_exponent(sides)
        factor = state[f"{side}_factor"] / _correction(group, state)
        try:
            state[f"{side}_inverse_root"] = psd_power(factor, exponent, group["epsilon"])
        except InvalidInputError as error:
            failures[side] = error
    return failures


def is_ready(param: Tensor, group: Group, state: State) -> bool:
    """Whether there is a preconditioner: every root was found once, or the diagonal has started."""
    sides = sides_of(param, group)
    if sides:
        return all(f"{side}_inverse_root" in state for side in sides)
    start: int = group["start_preconditioning_step"]
    steps: int = state.get("step", 0)
    return steps >= start


def apply(param: Tensor, group: Group, state: State, filtered: Tensor) -> Tensor:
    """P^(-1/2) M in the shape of the parameter, a new tensor."""
    sides = sides_of(param, group)
    if not sides:
        correction = _correction(group, state)
        return adam_direction(filtered, state["second_moment"], correction, group["epsilon"])
    direction = filtered.reshape(matrix_shape(param))
    if "left" in sides:
        direction = state["left_inverse_root"] @ direction
    if "right" in sides:
        direction = direction @ state["right_inverse_root"]
    return direction.view(param.shape)


def operator(
    param: Tensor, name: str, group: Group, state: State
) -> KroneckerOperator | DiagonalOperator:
    """The operator P with ``apply`` = P^(-1/2), in float64.

    Raises:
        UnsupportedError: There is none yet, it cannot be resolved, or an identity is too large.
    """
    if not is_ready(param, group, state):
        raise UnsupportedError(_why_absent(param, name, group, state))
    m, n = matrix_shape(param)
    sides = sides_of(param, group)
    if not sides:
        moment = state["second_moment"].double()
        denominator = adam_denominator(moment, _correction(group, state), group["epsilon"])
        return DiagonalOperator(denominator.square_().reshape(m, n))
    factors: dict[Side, Tensor] = {}
    for side in sides:
        root = state[f"{side}_inverse_root"]
        factors[side] = _inverse_square(root, group["epsilon"], f"{side} inverse root of {name}")
    return KroneckerOperator(
        factors["left"] if "left" in factors else _identity(m, param, f"left side of {name}"),
        factors["right"] if "right" in factors else _identity(n, param, f"right side of {name}"),
    )


def _correction(group: Group, state: State) -> float:
    return statistics_correction(
        group["statistics"], group["betas"][1], state["step"], group["bias_correction"]
    )


def _why_absent(param: Tensor, name: str, group: Group, state: State) -> str:
    steps, start = state.get("step", 0), group["start_preconditioning_step"]
    if steps < start:
        return (
            f"no preconditioner yet: the first refresh is at step {start}, "
            f"{steps} steps were taken ({name})"
        )
    lacking = [side for side in sides_of(param, group) if f"{side}_inverse_root" not in state]
    return (
        f"no preconditioner yet: no inverse root of the {' and '.join(lacking)} factor of {name} "
        f"was found in {steps} steps"
    )


def _inverse_square(root: Tensor, epsilon: float, what: str) -> Tensor:
    """A^-2 of a held inverse root A, with the pseudo-inverse where epsilon is 0."""
    values, vectors = eigh_descending(root.double())
    rounding = torch.finfo(root.dtype).eps * values[0]
    if epsilon == 0:
        null = values <= rounding * len(values)
        squared = values.masked_fill(null, torch.inf).pow(-2)
    elif values[-1] <= _RESOLUTION * rounding:
        raise UnsupportedError(
            f"the {what} is not resolved in {root.dtype}: its eigenvalues reach from "
            f"{float(values[-1]):.3g} to {float(values[0]):.3g}. Raise epsilon ({epsilon:g})."
        )
    else:
        squared = values.pow(-2)
    return (vectors * squared) @ vectors.mT


def _identity(size: int, param: Tensor, what: str) -> Tensor:
    needed = 8 * size**2
    if needed > available_bytes(param.device) // 2:
        raise UnsupportedError(
            f"the {what} has no factor, and its identity [{size}, {size}] would take "
            f"{needed / 2**30:.1f} GiB. Raise max_preconditioner_dim, or do not measure it."
        )
    return torch.eye(size, dtype=torch.float64, device=param.device)
