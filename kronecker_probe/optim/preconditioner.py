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
from kronecker_probe.optim.shapes import Layout, Side, layout
from kronecker_probe.optim.statistics import (
    statistics_correction,
    update_diagonal,
    update_factor,
)

Group = Mapping[str, Any]
State = dict[str, Any]

# A held root whose smallest eigenvalue is within this many roundings of its largest is noise there.
_RESOLUTION = 16


def layout_of(param: Tensor, group: Group) -> Layout:
    """The parameter as a matrix, and which sides have a factor."""
    return layout(param.shape, group["max_preconditioner_dim"])


def state_shapes(param: Tensor, group: Group) -> dict[str, tuple[int, ...]]:
    """Every tensor that this module holds in the state of a parameter, and its shape."""
    matrix = layout_of(param, group)
    if not matrix.sides:
        return {"second_moment": tuple(param.shape)}
    return {
        f"{side}_{kind}": (matrix.size(side), matrix.size(side))
        for kind in ("factor", "inverse_root")
        for side in matrix.sides
    }


def update(param: Tensor, group: Group, state: State, gradient: Tensor) -> None:
    """Adds a gradient, in the dtype of the state, to the statistics."""
    statistics, beta2 = group["statistics"], group["betas"][1]
    matrix = layout_of(param, group)
    flat = gradient.reshape(matrix.shape)
    for side in matrix.sides:
        key = f"{side}_factor"
        if key not in state:
            state[key] = flat.new_zeros(matrix.size(side), matrix.size(side))
        update_factor(state[key], flat, side, statistics, beta2)
    if not matrix.sides:
        if "second_moment" not in state:
            state["second_moment"] = flat.new_zeros(param.shape)
        update_diagonal(state["second_moment"], gradient, statistics, beta2)


def refresh_is_due(group: Group, step: int) -> bool:
    """Whether the roots are computed in this step."""
    since_start: int = step - group["start_preconditioning_step"]
    frequency: int = group["precondition_frequency"]
    return since_start >= 0 and since_start % frequency == 0


def refresh(param: Tensor, group: Group, state: State) -> dict[Side, InvalidInputError]:
    """Computes the inverse roots; those that fail are left as they are, and returned."""
    failures: dict[Side, InvalidInputError] = {}
    matrix = layout_of(param, group)
    correction = _correction(group, state)
    for side in matrix.sides:
        exponent = group["exponent"]
        if exponent is None:
            exponent = matrix.default_exponent
        try:
            # (A / b + eps I)^e = b^-e (A + b eps I)^e needs no copy of the factor.
            root = psd_power(state[f"{side}_factor"], exponent, correction * group["epsilon"])
        except InvalidInputError as error:
            failures[side] = error
        else:
            state[f"{side}_inverse_root"] = root.mul_(correction**-exponent)
    return failures


def is_ready(param: Tensor, group: Group, state: State) -> bool:
    """Whether there is a preconditioner: every root was found once, or the diagonal has started."""
    sides = layout_of(param, group).sides
    if sides:
        return all(f"{side}_inverse_root" in state for side in sides)
    start: int = group["start_preconditioning_step"]
    steps: int = state.get("step", 0)
    return steps >= start


def apply(param: Tensor, group: Group, state: State, filtered: Tensor) -> Tensor:
    """P^(-1/2) M in the shape of the parameter, a new tensor."""
    matrix = layout_of(param, group)
    if not matrix.sides:
        correction = _correction(group, state)
        return adam_direction(filtered, state["second_moment"], correction, group["epsilon"])
    direction = filtered.reshape(matrix.shape)
    if "left" in matrix.sides:
        direction = state["left_inverse_root"] @ direction
    if "right" in matrix.sides:
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
    matrix = layout_of(param, group)
    if not matrix.sides:
        moment = state["second_moment"].double()
        denominator = adam_denominator(moment, _correction(group, state), group["epsilon"])
        return DiagonalOperator(denominator.square_().reshape(matrix.shape))

    def factor(side: Side) -> Tensor:
        what = f"{side} inverse root of {name}"
        if side in matrix.sides:
            return _inverse_square(state[f"{side}_inverse_root"], group["epsilon"], what)
        return _identity(matrix.size(side), param, what)

    return KroneckerOperator(factor("left"), factor("right"))


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
    sides = layout_of(param, group).sides
    lacking = [side for side in sides if f"{side}_inverse_root" not in state]
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
            f"the {what} is the identity [{size}, {size}], which would take "
            f"{needed / 1e9:.1f} GB. Raise max_preconditioner_dim, or do not measure it."
        )
    return torch.eye(size, dtype=torch.float64, device=param.device)
