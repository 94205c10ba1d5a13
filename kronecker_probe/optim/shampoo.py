"""Shampoo: a Kronecker-factored preconditioner from second moments of the gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, final, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.operators.diagonal import DiagonalOperator
from kronecker_probe.operators.kronecker import KroneckerOperator
from kronecker_probe.optim import checks, options, preconditioner
from kronecker_probe.optim.grafting import adam_direction, graft_scale
from kronecker_probe.optim.precision import full_precision
from kronecker_probe.optim.shapes import Side, state_dtype
from kronecker_probe.optim.statistics import Statistics, bias_correction

Group = dict[str, Any]
State = dict[str, Any]


@final
class Shampoo(Optimizer):
    r"""Shampoo (Gupta et al., arXiv 1802.09568) as in Distributed Shampoo (arXiv 2309.06497).

    A parameter is an m x n matrix W, first dimension x the rest: a convolution weight is
    out x (in k k), a vector of length m is m x 1. At step t, with gradient G::

        L <- beta2 L + (1 - beta2) G G^T          R <- beta2 R + (1 - beta2) G^T G
        A_L = (L / b2 + epsilon I)^exponent       A_R likewise, at each refresh
        M <- beta1 M + (1 - beta1) G
        U = A_L (M / b1) A_R, scaled to the norm of the grafted method's direction
        W <- (1 - lr weight_decay) W - lr U

    with b = 1 - beta^t (bias correction) and t counted for each parameter by the steps in which
    it had a gradient. Without one it is left alone.

    **Which sides get a factor.** A side of a size from 2 to ``max_preconditioner_dim`` does; the
    others stay the identity. The default exponent is -1/(2k) for k factors: -1/4 for a matrix,
    -1/2 for a vector or where one side is too large. A parameter without any factor (a scalar,
    or both sides too large) keeps a diagonal second moment v and takes M / (sqrt(v) + epsilon),
    the direction of Adam; its power is always 1/2, whatever ``exponent`` says.

    **When.** Statistics are updated in every step, roots at step ``start_preconditioning_step``
    and every ``precondition_frequency`` steps from there. Before the first refresh the direction
    is the grafted method's own (of SGD with "none").

    **Roots** are found by eigendecomposition with a float64 retry. If one fails, the last good
    one is kept, or the grafted direction if there is none yet, with a warning, once for each
    factor.

    **State** is at least float32, for bfloat16 and float16 parameters too; ``state_dict`` and
    ``load_state_dict`` keep it so and copy it, and a resumed run continues bitwise. Products run
    without autocast and TF32.

    Args:
        params: Parameters, ``named_parameters()`` (messages then use the names), or groups, in
            which every option below can be set apart.
        lr: Learning rate. 1e-2 follows Distributed Shampoo; with Adam grafting that of Adam
            transfers (often 1e-3).
        betas: Decays of the gradient's average (0: none) and of the statistics. The second has
            no part in a sum.
        epsilon: Added to the eigenvalues of the factors, after the bias correction, and to the
            root of the diagonal. The default is that of the AlgoPerf submissions of Distributed
            Shampoo, whose own 1e-12 amplifies directions that early factors have not seen yet.
            It is in units of squared gradients. 0: pseudo-inverse.
        weight_decay: Decoupled.
        exponent: Power of each factor, in [-1, 0), or None for -1/(2k).
        precondition_frequency: Steps from one refresh of the roots to the next.
        start_preconditioning_step: Step of the first one; None: ``precondition_frequency``.
        statistics: "ema", or "sum" as in AdaGrad.
        bias_correction: Divide every average by 1 - beta^t. A sum has none.
        grafting: Whose norm the step takes: "adam" (|M / (sqrt(v) + grafting_epsilon)|, with a
            second moment of its own), "sgd" (|M|) or "none".
        grafting_beta2: For "adam"; None: ``betas[1]``.
        grafting_epsilon: For "adam"; None: 1e-8.
        max_preconditioner_dim: Sides above get no factor.

    Raises:
        InvalidInputError: An option out of range or without effect.
        UnknownNameError: An unknown option of a group, statistics or grafting.
        UnsupportedError: A parameter that is not dense, real and floating-point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        exponent: float | None = None,
        precondition_frequency: int = 10,
        start_preconditioning_step: int | None = None,
        statistics: Statistics = "ema",
        bias_correction: bool = True,
        grafting: str = "adam",
        grafting_beta2: float | None = None,
        grafting_epsilon: float | None = None,
        max_preconditioner_dim: int = 1024,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
            "exponent": exponent,
            "precondition_frequency": precondition_frequency,
            "start_preconditioning_step": start_preconditioning_step,
            "statistics": statistics,
            "bias_correction": bias_correction,
            "grafting": grafting,
            "grafting_beta2": grafting_beta2,
            "grafting_epsilon": grafting_epsilon,
            "max_preconditioner_dim": max_preconditioner_dim,
        }
        options.check_options(defaults, "")
        options.check_grafting_options(defaults, "")
        self._warned: set[tuple[Tensor, Side]] = set()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_warned", set())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; options that it does not set are those of the optimizer.

        Raises:
            InvalidInputError: An option out of range or without effect.
            UnknownNameError: An unknown option.
            UnsupportedError: A parameter that is not dense, real and floating-point.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise InvalidInputError(
                "A parameter group is a dict with 'params' and, if wanted, options of its own; "
                f"got {type(param_group).__name__}."
            )
        where = f" of parameter group {len(self.param_groups)}"
        super().add_param_group(options.complete_group(param_group, self.defaults, where))
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
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        every = [param for _, params in active for param in params]
        checks.check_gradients(every, self._name)
        with full_precision(param.device.type for param in every):
            for group, params in active:
                if params:
                    self._step_group(group, params)
        return loss

    def operator(self, param: Tensor) -> KroneckerOperator | DiagonalOperator:
        """The preconditioner in use: P with direction = P^(-1/2) M, as held right now.

        The direction is that before grafting, bias correction of M, and weight decay. With the
        inverse roots A_L, A_R of the last refresh (stale, damped, bias-corrected) P is
        A_L^-2 kron A_R^-2, the identity on a side without a factor; where the second moment is a
        diagonal v, P is diag((sqrt(v / b2) + epsilon)^2).

        Args:
            param: A parameter of this optimizer, seen as an m x n matrix.

        Returns:
            An operator on R^{m x n} in float64, on the device of the parameter.

        Raises:
            InvalidInputError: Not a parameter of this optimizer.
            UnsupportedError: There is none yet, or it cannot be resolved; the message says why.
        """
        for group in self.param_groups:
            if any(param is other for other in group["params"]):
                state = self.state.get(param, {})
                return preconditioner.operator(param, self._name(param), group, state)
        raise InvalidInputError(
            f"A tensor of shape {list(param.shape)} is not a parameter of this optimizer. Pass "
            "one of those that it was built with."
        )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads a state, copied and in its own precision, after checking that it fits.

        Raises:
            InvalidInputError: Not a state of Shampoo on parameters of these shapes; nothing was
                changed.
        """
        incoming: StateDict = {}

        def check(_: Optimizer, loaded: StateDict) -> None:
            incoming.update(loaded)
            for param, state, group in self._matched(incoming):
                checks.check_state(state, _state_shapes(param, group), self._name(param))

        def restore(_: Optimizer) -> None:
            for param, state, _group in self._matched(incoming):
                self.state[param] = {key: _copied(value, param) for key, value in state.items()}

        # Torch casts the state to the dtype of the parameter, which would round the statistics of
        # bfloat16 parameters, and shares the rest with the loaded dict: put exact copies instead.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _matched(self, loaded: StateDict) -> Iterable[tuple[Tensor, State, Group]]:
        """Own parameters with their loaded states and groups, where there is a state."""
        pairs = zip(self.param_groups, loaded["param_groups"], strict=False)
        for index, (group, loaded_group) in enumerate(pairs):
            options.check_options(loaded_group, f" of loaded parameter group {index}")
            for param, key in zip(group["params"], loaded_group["params"], strict=False):
                if key in loaded["state"]:
                    yield param, loaded["state"][key], loaded_group

    def _name(self, param: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for position, other in enumerate(group["params"]):
                if other is param:
                    if "param_names" in group:
                        return f"parameter {group['param_names'][position]!r}"
                    shape = list(param.shape)
                    return f"parameter {position} of group {index}, of shape {shape}"
        raise AssertionError("a parameter of this optimizer")

    def _step_group(self, group: Group, params: list[Tensor]) -> None:
        if not math.isfinite(group["lr"]):
            raise InvalidInputError(
                f"lr is {group['lr']} at this step; check the scheduler. Nothing was changed."
            )
        states: list[State] = [self.state[param] for param in params]
        gradients = [_gradient(param) for param in params]
        filtered = _filtered(group, params, states, gradients)
        if group["grafting"] == "adam":
            _update_grafting(group, params, states, gradients)
        if group["weight_decay"] > 0:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for param, state, gradient, average in zip(
            params, states, gradients, filtered, strict=True
        ):
            state["step"] = state.get("step", 0) + 1
            preconditioner.update(param, group, state, gradient)
            if preconditioner.refresh_is_due(group, state["step"]):
                self._refresh(param, group, state)
            _update_parameter(param, group, state, average)

    def _refresh(self, param: Tensor, group: Group, state: State) -> None:
        failures = preconditioner.refresh(param, group, state)
        for side, error in failures.items():
            if (param, side) in self._warned:
                continue
            self._warned.add((param, side))
            held = f"{side}_inverse_root" in state
            kept = "the last good root" if held else "the grafted direction: there is no root yet"
            warnings.warn(
                f"The inverse root of the {side} factor of {self._name(param)} failed at step "
                f"{state['step']}: {error} Going on with {kept}. Later failures of this factor "
                "are not reported.",
                RuntimeWarning,
                stacklevel=2,
            )


def _state_shapes(param: Tensor, group: Group) -> dict[str, tuple[int, ...]]:
    """Every tensor that may be held for a parameter, and its shape."""
    same = dict.fromkeys(("exp_avg", "grafting_second_moment"), tuple(param.shape))
    return {**same, **preconditioner.state_shapes(param, group)}


def _copied(value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device=param.device, dtype=state_dtype(param.dtype), copy=True)


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad.to(state_dtype(param.dtype))


def _buffers(params: list[Tensor], states: list[State], key: str) -> list[Tensor]:
    """The state tensors of the parameters' shapes, zeros at first."""
    for param, state in zip(params, states, strict=True):
        if key not in state:
            dtype = state_dtype(param.dtype)
            state[key] = torch.zeros(param.shape, dtype=dtype, device=param.device)
    return [state[key] for state in states]


def _filtered(
    group: Group, params: list[Tensor], states: list[State], gradients: list[Tensor]
) -> list[Tensor]:
    """The average of the gradient, not yet bias-corrected, or the gradient itself."""
    beta1 = group["betas"][0]
    if beta1 == 0:
        return gradients
    averages = _buffers(params, states, "exp_avg")
    torch._foreach_lerp_(averages, gradients, 1 - beta1)
    return averages


def _update_grafting(
    group: Group, params: list[Tensor], states: list[State], gradients: list[Tensor]
) -> None:
    beta2 = group["grafting_beta2"]
    moments = _buffers(params, states, "grafting_second_moment")
    torch._foreach_mul_(moments, beta2)
    torch._foreach_addcmul_(moments, gradients, gradients, 1 - beta2)


def _grafted(group: Group, state: State, filtered: Tensor) -> Tensor:
    """The direction of the grafted method; that of SGD with "none"."""
    if group["grafting"] != "adam":
        return filtered
    correction = bias_correction(group["grafting_beta2"], state["step"], group["bias_correction"])
    return adam_direction(
        filtered, state["grafting_second_moment"], correction, group["grafting_epsilon"]
    )


def _update_parameter(param: Tensor, group: Group, state: State, filtered: Tensor) -> None:
    """W <- W - lr U, with the bias correction of M in the rate."""
    corrected = bias_correction(group["betas"][0], state["step"], group["bias_correction"])
    rate = -group["lr"] / corrected
    if not preconditioner.is_ready(param, group, state):
        param.add_(_grafted(group, state, filtered), alpha=rate)
        return
    direction = preconditioner.apply(param, group, state, filtered)
    if group["grafting"] == "none":
        param.add_(direction, alpha=rate)
    else:
        scale = graft_scale(direction, _grafted(group, state, filtered))
        param.addcmul_(direction, scale, value=rate)
