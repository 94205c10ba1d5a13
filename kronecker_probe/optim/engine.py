"""The optimizer that all presets are: one engine, four choices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from kronecker_probe.errors import InvalidInputError, UnsupportedError, unknown_name
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.block import BlockOperator
from kronecker_probe.optim import checks
from kronecker_probe.optim.config import (
    SECTIONS,
    Basis,
    Inverse,
    Magnitude,
    Shapes,
    Spectrum,
    Statistics,
    check_together,
)
from kronecker_probe.optim.precision import full_precision, state_dtype
from kronecker_probe.optim.preconditioner import Failure, Recipe
from kronecker_probe.optim.stack import Member, Stack, stacks_of

Group = dict[str, Any]

# Keys of a group that are no options: torch's own, a scheduler's, and a label.
_NOT_OPTIONS = ("params", "param_names", "initial_lr", "name")
NONFINITE = ("raise", "skip")


@final
class KroneckerOptimizer(Optimizer):
    r"""Kronecker-factored preconditioning of averaged gradients, in batches of equal blocks.

    A step, for each block of a parameter and its gradient G, at its step t::

        factors <- statistics of G                      statistics
        bases or roots, when they are due               basis
        M <- beta1 M + (1 - beta1) G
        U = P^{-power} M / (1 - beta1^t)                spectrum
        U <- U |graft direction| / |U|                  magnitude
        W <- (1 - lr weight_decay) W - lr U

    With ``momentum`` mu, buf <- mu buf + U + weight_decay W and W <- W - lr buf take the place of
    the last line. t counts, for each parameter, the steps in which it had a gradient; without one
    it is left alone.

    The state is at least float32; products run without autocast and TF32. A refresh that fails
    keeps what was held (the grafted direction if there is nothing), warns once for a factor, and
    raises after ``failures`` of them.

    Args:
        params: Parameters, ``named_parameters()`` (messages then use the names), or groups, in
            which every option below can be set apart; a section also as a dict of some fields,
            which are changed in the optimizer's own.
        lr: Learning rate.
        betas: Decays of the gradient's average (0: none) and of the statistics.
        weight_decay: Decoupled.
        momentum: Of the update itself.
        statistics: What the factors accumulate.
        basis: When and how bases and roots are refreshed.
        spectrum: What the entries are divided by.
        inverse: How inverse factors are updated, for spectrum.eigenvalues="inverse-free".
        magnitude: Whose length the step takes.
        shapes: How parameters are cut.
        nesterov: Of a polar factor's average.
        scale_by_shape: Multiply the update of an m x n block by max(1, m / n)^1/2, as Muon does.
        nonfinite: A gradient that is not finite: "raise" an error, or "skip" the whole step.
        failures: Refreshes of one factor that may fail.

    Raises:
        InvalidInputError: An option out of range, or choices that do not go together.
        UnknownNameError: An unknown option.
        UnsupportedError: A parameter that is not dense, real and floating-point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        statistics: Statistics | None = None,
        basis: Basis | None = None,
        spectrum: Spectrum | None = None,
        inverse: Inverse | None = None,
        magnitude: Magnitude | None = None,
        shapes: Shapes | None = None,
        nesterov: bool = False,
        scale_by_shape: bool = False,
        nonfinite: str = "raise",
        failures: int = 3,
    ) -> None:
        defaults: Group = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "statistics": statistics or Statistics(),
            "basis": basis or Basis(),
            "spectrum": spectrum or Spectrum(),
            "inverse": inverse or Inverse(),
            "magnitude": magnitude or Magnitude(),
            "shapes": shapes or Shapes(),
            "nesterov": nesterov,
            "scale_by_shape": scale_by_shape,
        }
        _check_group(defaults, "")
        if nonfinite not in NONFINITE:
            raise unknown_name("nonfinite", nonfinite, NONFINITE)
        self.nonfinite = nonfinite
        self.allowed_failures = failures
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop the stacks; they are built again from the state of the parameters."""
        self._stacks: dict[int, list[Stack]] = {}
        self._failed: dict[tuple[int, int, int], int] = {}
        self._blocks = 0

    def __getstate__(self) -> dict[str, Any]:
        held: dict[str, Any] = super().__getstate__()
        return {**held, "nonfinite": self.nonfinite, "allowed_failures": self.allowed_failures}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; options that it does not set are those of the optimizer.

        Raises:
            InvalidInputError: An option out of range, or choices that do not go together.
            UnknownNameError: An unknown option.
            UnsupportedError: A parameter that is not dense, real and floating-point.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise InvalidInputError(
                "A parameter group is a dict with 'params' and, if wanted, options of its own; "
                f"got {type(param_group).__name__}."
            )
        where = f" of parameter group {len(self.param_groups)}"
        group = dict(param_group)
        for key in group:
            if key not in self.defaults and key not in _NOT_OPTIONS:
                raise unknown_name(f"option{where}", key, self.defaults)
        for section in SECTIONS:
            if isinstance(given := group.get(section), Mapping):
                group[section] = self.defaults[section].replace(**given)
        _check_group(self.defaults | group, where)
        super().add_param_group(group)
        try:
            for param in self.param_groups[-1]["params"]:
                checks.check_parameter(param, self._name(param))
        except InvalidInputError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter with a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            NonFiniteError: A gradient is not finite or its squares overflow; no weight and no
                state was changed.
            UnsupportedError: A gradient is sparse; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [
            (k, group, [p for p in group["params"] if p.grad is not None and p.numel()])
            for k, group in enumerate(self.param_groups)
        ]
        every = [param for _, _, params in active for param in params]
        for _, group, _ in active:
            _check_group(group, "")
        if not checks.check_gradients(every, self._name, skip=self.nonfinite == "skip"):
            return loss
        with full_precision(param.device.type for param in every):
            for k, group, params in active:
                if params:
                    self._step_group(k, group, params)
        return loss

    def _step_group(self, number: int, group: Group, params: list[Tensor]) -> None:
        self._build(number, group, params)
        steps = {}
        for param in params:
            state = self.state[param]
            state["step"] = steps[id(param)] = state["step"] + 1
        parts: dict[tuple[int, int], Tensor] = {}
        for stack in self._stacks[number]:
            members = [one for one in stack.members if id(one.param) in steps]
            for step in sorted({steps[id(one.param)] for one in members}):
                turn = stack.step([one for one in members if steps[id(one.param)] == step], step)
                parts |= turn.directions
                self._note(turn.failures, step)
        recipe = recipe_of(group)
        updates = [_assembled(param, recipe, parts) for param in params]
        self._apply(group, params, updates, [steps[id(param)] for param in params])

    def _apply(
        self, group: Group, params: list[Tensor], updates: list[Tensor], steps: list[int]
    ) -> None:
        """W <- (1 - lr weight_decay) W - lr U, or by way of the momentum."""
        lr, decay, mu = group["lr"], group["weight_decay"], group["momentum"]
        beta1, corrects = group["betas"][0], group["statistics"].bias_correction
        rates = [1.0 / (1.0 - beta1**step) if corrects else 1.0 for step in steps]
        if group["scale_by_shape"]:
            rates = [
                rate * math.sqrt(max(1.0, p.shape[0] / (p.numel() / p.shape[0]))) if p.ndim else rate
                for rate, p in zip(rates, params, strict=True)
            ]
        if mu == 0:
            if decay > 0:
                torch._foreach_mul_(params, 1 - lr * decay)
            if len(set(rates)) == 1:
                torch._foreach_add_(params, _as(updates, params), alpha=-lr * rates[0])
            else:
                torch._foreach_mul_(updates, rates)
                torch._foreach_add_(params, _as(updates, params), alpha=-lr)
            return
        torch._foreach_mul_(updates, rates)
        if decay > 0:
            wide = [p.to(u.dtype) for p, u in zip(params, updates, strict=True)]
            torch._foreach_add_(updates, wide, alpha=decay)
        buffers = [self._buffer(param) for param in params]
        torch._foreach_mul_(buffers, mu)
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, _as(buffers, params), alpha=-lr)

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=state_dtype(param.dtype))
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _build(self, number: int, group: Group, params: Sequence[Tensor]) -> None:
        """Stacks for the parameters that have none, filled with their loaded state if any."""
        known = self._stacks.setdefault(number, [])
        having = {id(member.param) for stack in known for member in stack.members}
        new = [param for param in params if id(param) not in having]
        if not new:
            return
        for stack in stacks_of(new, recipe_of(group), state_dtype, self._blocks):
            known.append(stack)
            self._blocks += len(stack.state["offset"])
            for member in stack.members:
                state = self.state[member.param]
                if "step" in state:
                    stack.fill(member, state)
                state |= stack.views(member)
        for param in new:
            self.state[param].setdefault("step", 0)

    def _note(self, failures: Iterable[tuple[Tensor, Failure]], step: int) -> None:
        """Warn of a factor's first failure, and stop after too many."""
        for param, failure in failures:
            key = id(param), failure.block, failure.side
            self._failed[key] = count = self._failed.get(key, 0) + 1
            message = (
                f"{failure.reason[:1].upper()}{failure.reason[1:]} of {self._name(param)} at step "
                f"{step}."
            )
            if count > self.allowed_failures:
                raise InvalidInputError(
                    f"{message} It failed {count} times; raise spectrum.epsilon, or "
                    "lower the learning rate."
                )
            if count == 1:
                warnings.warn(
                    f"{message} Going on with the last good one, or the grafted direction.",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def operator(self, param: Tensor) -> Operator:
        """The preconditioner in use: P with direction = P^{-power} M, as held right now.

        The direction is that before grafting, bias correction of M, and weight decay; ``power`` is
        that of ``spectrum``. It is stale, damped and cut into blocks as the optimizer's is.

        Args:
            param: A parameter of this optimizer, seen as an m x n matrix.

        Returns:
            An operator on R^{m x n} in float64, on the device of the parameter.

        Raises:
            InvalidInputError: Not a parameter of this optimizer.
            UnsupportedError: There is none yet, or it cannot be resolved; the message says why.
        """
        number = next(
            (k for k, g in enumerate(self.param_groups) if any(param is p for p in g["params"])),
            None,
        )
        if number is None:
            raise InvalidInputError(
                f"A tensor of shape {list(param.shape)} is not a parameter of this optimizer. "
                "Pass one of those that it was built with."
            )
        group, state = self.param_groups[number], self.state.get(param, {})
        if state.get("step", 0) == 0:
            raise UnsupportedError(
                f"no preconditioner yet: no step was taken with a gradient ({self._name(param)})"
            )
        self._build(number, group, [param])
        return _operator(param, self._stacks[number], state["step"], self._name(param))

    def state_dict(self) -> StateDict:
        """As torch has it, with the sections of options as plain dicts."""
        found = super().state_dict()
        for group in found["param_groups"]:
            for section in SECTIONS:
                group[section] = group[section].as_dict()
        return found

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads a state, copied and in its own precision, after checking that it fits.

        Raises:
            InvalidInputError: Not a state of this optimizer on parameters of these shapes;
                nothing was changed.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        for index, group in enumerate(groups):
            where = f" of loaded parameter group {index}"
            missing = [key for key in self.defaults if key not in group]
            if missing:
                raise InvalidInputError(
                    f"The options{where} lack {', '.join(missing)}: they are not those of this "
                    "optimizer."
                )
            for section, kind in SECTIONS.items():
                group[section] = kind.of(group[section])
            _check_group(group, where)
        loaded = self._checked_states(state_dict, groups)
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._forget()
        for param, state in loaded:
            self.state[param] = state
        for number, group in enumerate(self.param_groups):
            self._build(number, group, [p for p in group["params"] if self.state.get(p)])

    def _checked_states(
        self, state_dict: StateDict, groups: Sequence[Group]
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """Copies of the loaded states with their parameters, in the precision of the state."""
        found = []
        for own, given in zip(self.param_groups, groups, strict=False):
            for param, key in zip(own["params"], given["params"], strict=False):
                state = state_dict["state"].get(key)
                if state is None:
                    continue
                (stack, *_) = stacks = stacks_of([param], recipe_of(given), state_dtype, 0)
                shapes = {
                    name: tuple(view.shape)
                    for one in stacks
                    for member in one.members
                    for name, view in one.views(member).items()
                }
                shapes["momentum_buffer"] = tuple(param.shape)
                checks.check_state(state, shapes, self._name(param))
                found.append((param, {k: _copied(v, param) for k, v in state.items()}))
                del stack
        return found

    def _name(self, param: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for position, other in enumerate(group["params"]):
                if other is param:
                    if "param_names" in group:
                        return f"parameter {group['param_names'][position]!r}"
                    shape = list(param.shape)
                    return f"parameter {position} of group {index}, of shape {shape}"
        raise AssertionError("a parameter of this optimizer")


def recipe_of(group: Mapping[str, Any]) -> Recipe:
    """The choices of a group."""
    sections = [group[name] for name in SECTIONS]
    return Recipe(*sections, betas=tuple(group["betas"]), nesterov=group["nesterov"])


def _check_group(group: Mapping[str, Any], where: str) -> None:
    for name, kind in SECTIONS.items():
        if not isinstance(group[name], kind):
            raise InvalidInputError(
                f"{name}{where} is a {type(group[name]).__name__}; give a {kind.__name__}."
            )
    for name in ("lr", "weight_decay"):
        checks.check_number(group[name], f"{name}{where}", lambda v: v >= 0, "at least 0")
    checks.check_number(group["momentum"], f"momentum{where}", lambda v: 0 <= v < 1, "in [0, 1)")
    checks.check_betas(group["betas"], f"betas{where}")
    check_together(group["statistics"], group["basis"], group["spectrum"])


def _assembled(param: Tensor, recipe: Recipe, parts: Mapping[tuple[int, int], Tensor]) -> Tensor:
    from kronecker_probe.optim.tiles import layout

    cut = layout(param.shape, recipe.shapes)
    return cut.assemble([parts[id(param), k] for k in range(len(cut.tiles))], param)


def _as(updates: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    return [u.to(p.dtype) for u, p in zip(updates, params, strict=True)]


def _copied(value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.clone()
    return value.to(device=param.device, dtype=state_dtype(param.dtype), copy=True)


def _operator(param: Tensor, stacks: Sequence[Stack], step: int, name: str) -> Operator:
    """The operators of a parameter's blocks, in their grid."""
    found: dict[tuple[int, ...], Operator] = {}
    for stack in stacks:
        for member in stack.members:
            if member.param is not param:
                continue
            found |= _member_operators(stack, member, step, name)
    rows = sorted({place[0] for place in found})
    columns = sorted({place[1] for place in found})
    if len(rows) == len(columns) == 1:
        return found[rows[0], columns[0]]
    return BlockOperator([[found[r, c] for c in columns] for r in rows])


def _member_operators(
    stack: Stack, member: Member, step: int, name: str
) -> dict[tuple[int, ...], Operator]:
    """Those of a tile, by the first row and column of each block."""
    one, tile = stack.preconditioner, member.blocks
    m = param_rows = member.layout.shape[0]
    if len(member.layout.shape) > 2 and any(g > 1 for g in tile.grid[1:]):
        raise UnsupportedError(
            f"{name} is cut along several of its {len(member.layout.shape)} merged dimensions, so "
            "that its blocks are no rectangles of the m x n matrix; use shapes.merge=0"
        )
    if (member.param.shape[0] if member.param.ndim else 1) != param_rows:
        raise UnsupportedError(
            f"{name} has its first dimension merged with others into {m}, so that its blocks are "
            "none of the m x n matrix; use shapes.merge=0"
        )
    ready = one.ready(stack.state, step)
    found = {}
    for k in range(tile.count):
        row = member.start + k
        if ready is False or (ready is not True and not bool(ready[row])):
            first = one.recipe.basis.first
            raise UnsupportedError(
                f"no preconditioner yet: the first refresh is at step {first}, {step} steps were "
                f"taken ({name})"
                if step < first
                else f"no preconditioner yet: no refresh of {name} succeeded in {step} steps"
            )
        try:
            operator = one.operator(stack.state, row, step)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from error
        i, j = (k // tile.grid[1], k % tile.grid[1]) if len(tile.grid) > 1 else (k, 0)
        corner = tile.corner[0][0], tile.corner[1][0] if len(tile.corner) > 1 else 0
        block = tile.block[0], tile.block[1] if len(tile.block) > 1 else 1
        found[corner[0] + i * block[0], corner[1] + j * block[1]] = operator
    return found
