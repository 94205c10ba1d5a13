"""The optimizer that all presets are: one engine, four choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from kronecker_probe.errors import (
    InvalidInputError,
    NonFiniteError,
    UnsupportedError,
    unknown_name,
)
from kronecker_probe.linalg.precision import full_precision
from kronecker_probe.operators.base import Operator
from kronecker_probe.optim.blocks.tiles import layout
from kronecker_probe.optim.engine.inspection import Inspection
from kronecker_probe.optim.engine.loading import checked_groups, checked_states
from kronecker_probe.optim.engine.stacks import Stacks
from kronecker_probe.optim.engine.weights import (
    apply_updates,
    check_gradients,
    check_parameter,
    check_updates,
)
from kronecker_probe.optim.layers.attached import ModelOptimizer
from kronecker_probe.optim.layers.samples import LayerSamples
from kronecker_probe.optim.options.groups import NOT_OPTIONS, Group, checked_recipe, recipe_of
from kronecker_probe.optim.options.sections import (
    SECTIONS,
    Basis,
    Inverse,
    Magnitude,
    Shapes,
    Spectrum,
    Statistics,
    Storage,
)

NONFINITE = ("raise", "skip")


@final
class KroneckerOptimizer(ModelOptimizer):
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
    raises after more than ``failures`` in a row.

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
        storage: How factors and roots are held.
        nesterov: Of a polar factor's average.
        scale_by_shape: Multiply the update of an m x n parameter by max(1, m / n)^1/2 (Muon).
        nonfinite: A gradient that is not finite: "raise" an error, or "skip" the whole step.
        failures: Refreshes of one factor in a row that may fail.

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
        statistics: Statistics | Mapping[str, Any] | None = None,
        basis: Basis | Mapping[str, Any] | None = None,
        spectrum: Spectrum | Mapping[str, Any] | None = None,
        inverse: Inverse | Mapping[str, Any] | None = None,
        magnitude: Magnitude | Mapping[str, Any] | None = None,
        shapes: Shapes | Mapping[str, Any] | None = None,
        storage: Storage | Mapping[str, Any] | None = None,
        nesterov: bool = False,
        scale_by_shape: bool = False,
        nonfinite: str = "raise",
        failures: int = 3,
    ) -> None:
        sections = (statistics, basis, spectrum, inverse, magnitude, shapes, storage)
        defaults: Group = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "scale_by_shape": scale_by_shape,
        }
        for (name, kind), given in zip(SECTIONS.items(), sections, strict=True):
            defaults[name] = kind.of(given or {})
        checked_recipe(defaults, "")
        if nonfinite not in NONFINITE:
            raise unknown_name("nonfinite", nonfinite, NONFINITE)
        if not isinstance(failures, int) or isinstance(failures, bool) or failures < 0:
            raise InvalidInputError(f"failures is {failures!r}; it must be an integer, at least 0.")
        self.nonfinite = nonfinite
        self.allowed_failures = failures
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop the stacks; they are built again from the state of the parameters."""
        self._stacks = Stacks(self._name)

    def __getstate__(self) -> dict[str, Any]:
        held: dict[str, Any] = super().__getstate__()
        return {**held, "nonfinite": self.nonfinite, "allowed_failures": self.allowed_failures}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and it is no option here
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not set are those of the optimizer.

        Raises:
            InvalidInputError, UnknownNameError, UnsupportedError: As the class raises them.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise InvalidInputError(
                "A parameter group is a dict with 'params' and, if wanted, options of its own; "
                f"got {type(param_group).__name__}."
            )
        where = f" of parameter group {len(self.param_groups)}"
        group = dict(param_group)
        for key in group:
            if key not in self.defaults and key not in NOT_OPTIONS:
                raise unknown_name(f"option{where}", key, self.defaults)
        for section in SECTIONS:
            if isinstance(given := group.get(section), Mapping):
                group[section] = self.defaults[section].replace(**given)
        checked_recipe(self.defaults | group, where)
        super().add_param_group(group)
        try:
            for param in self.param_groups[-1]["params"]:
                check_parameter(param, self._name(param))
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

        Returns:
            The loss of ``closure``, which evaluates the model again.

        Raises:
            NonFiniteError: A gradient is not finite or its squares overflow; no weight and no
                state was changed.
            UnsupportedError: A gradient is sparse; nothing was changed.
            InvalidInputError: An option was changed to what the state does not fit, and nothing
                was changed; or the refresh of a factor failed too often.
        """
        self._refuse_sampling()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [
            (k, group, [p for p in group["params"] if p.grad is not None and p.numel()])
            for k, group in enumerate(self.param_groups)
        ]
        for k, group, _ in active:
            checked_recipe(group, f" of parameter group {k}")
        self._stacks.check_changes(self.param_groups)
        skip = self.nonfinite == "skip"
        for _, group, params in active:
            largest = max(1.0, group["statistics"].batch_size)
            if not check_gradients(params, self._name, weight=largest, skip=skip):
                self._forget_records()
                return loss
        try:
            layers = self._recorded([(group, params) for _, group, params in active])
        except NonFiniteError:
            self._forget_records()
            if skip:
                return loss
            raise
        with full_precision(p.device.type for _, _, params in active for p in params):
            updates = []
            for k, group, params in active:  # no comprehension: warnings count its frame
                updates.append(self._updates(k, group, params, layers) if params else [])
            found = [u for some in updates for u in some]
            every = [p for _, _, params in active for p in params]
            if check_updates(every, found, self._name, skip=skip):
                for (_, group, params), some in zip(active, updates, strict=True):
                    if params:
                        states = [self.state[p] for p in params]
                        apply_updates(group, recipe_of(group), params, some, states)
        self._forget_records()
        return loss

    def _updates(
        self,
        number: int,
        group: Group,
        params: list[Tensor],
        layers: Mapping[int, LayerSamples],
    ) -> list[Tensor]:
        """The directions of a group's parameters, from their state as this step changes it."""
        stacks, shapes = self._stacks.of(number, group, params, self.state), group["shapes"]
        steps = {}
        for param in params:
            state = self.state[param]
            state["step"] = steps[id(param)] = state["step"] + 1
        parts: dict[tuple[int, int], Tensor] = {}
        for stack in stacks:
            members = [one for one in stack.members if id(one.param) in steps]
            for step in sorted({steps[id(one.param)] for one in members}):
                now = [one for one in members if steps[id(one.param)] == step]
                turn = stack.step(now, step, layers)
                parts |= turn.directions
                self._stacks.note(turn.failures, step, self.allowed_failures)
        cuts = [(param, layout(param.shape, shapes)) for param in params]
        return [
            cut.assemble([parts[id(param), k] for k in range(len(cut.tiles))], param)
            for param, cut in cuts
        ]

    def operator(self, param: Tensor) -> Operator:
        """The preconditioner in use: P with direction = P^{-power} M.

        The direction is that before grafting, bias correction of M, and weight decay; ``power`` is
        that of ``spectrum``. It is stale, damped and cut into blocks as the optimizer's is.

        Returns:
            An operator on R^{m x n}, the parameter seen as a matrix, in float64 and on its device.

        Raises:
            InvalidInputError: Not a parameter of this optimizer.
            UnsupportedError: There is none yet, or it cannot be resolved; the message says why.
        """
        return self.inspect(param).in_use()

    def inspect(self, param: Tensor) -> Inspection:
        """A parameter's factors with bases and counters; P with and without its damping.

        Raises:
            InvalidInputError: Not a parameter of this optimizer.
            UnsupportedError: No step was taken with a gradient of it.
        """
        number, name = self._group_of(param), self._name(param)
        state = self.state.get(param, {})
        if state.get("step", 0) == 0:
            raise UnsupportedError(
                f"no preconditioner yet: no step was taken with a gradient ({name})"
            )
        stacks = self._stacks.of(number, self.param_groups[number], [param], self.state)
        return Inspection(param, stacks, state["step"], name)

    def rule(self, param: Tensor) -> str | None:
        """The approximation of H that :meth:`operator` would be, fresh and undamped.

        Returns:
            Its name for ``kp.approximate``; None where there is none (blocks, a single factor,
            other exponents), or no step was taken.

        Raises:
            InvalidInputError: Not a parameter of this optimizer.
        """
        try:
            found = self.inspect(param)
        except UnsupportedError:  # no step
            return None
        return None if found.block_size else found.rule

    def state_dict(self) -> StateDict:
        """As torch has it, with the sections of options as plain dicts."""
        found = super().state_dict()
        for group in found["param_groups"]:
            for section in SECTIONS:
                group[section] = group[section].as_dict()
        return found

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads a state, copied and in its own precision, after checking that it fits.

        As with every optimizer of torch the options come with it: after loading the state of
        another preset this optimizer is that preset.

        Raises:
            InvalidInputError: Not a state of this optimizer on parameters of these shapes;
                nothing was changed.
        """
        incoming: dict[Tensor, dict[str, Any]] = {}

        def check(_: Optimizer, loaded: StateDict) -> StateDict:
            groups = checked_groups(loaded, self.param_groups, self.defaults)
            incoming.update(checked_states(loaded, groups, self.param_groups, self._name))
            return {**loaded, "param_groups": groups}

        def restore(_: Optimizer) -> None:
            self.state.update(incoming)
            for number, group in enumerate(self.param_groups):
                self._stacks.of(number, group, [], self.state)

        # Torch casts the state to the dtype of the parameter, which would round the statistics of
        # bfloat16 parameters: put exact copies instead, before the caller's hooks see them.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
