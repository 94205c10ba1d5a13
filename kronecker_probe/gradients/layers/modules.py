"""Layer rules for module classes of the user's own, which read a weight in a way of their own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.layers.base import Call, Form, ProductRule, matrix_shape

# Of each parameter: (delta, a), or G itself.
RuleSamples: TypeAlias = Mapping[str, Tensor | tuple[Tensor, Tensor]]
LayerRule: TypeAlias = Callable[[Any, tuple[Any, ...], Tensor], RuleSamples]


def register_layer_rule(kind: type[nn.Module]) -> Callable[[LayerRule], LayerRule]:
    """Register how the gradient samples of a module class follow from its inputs and its output.

    The decorated function gets the module, the tuple of its positional inputs, and the gradient of
    its output, all of N examples in the first dimension. It returns, by the name that the module
    gives a parameter of its own, that parameter's gradient samples: either factors (delta, a) with
    G_i = sum_t delta_it a_it^T, of shapes [N, m] and [N, n] or [N, T, m] and [N, T, n], where the
    m x n matrix is the parameter's shape[0] x the rest and a depends on the inputs alone; or G
    itself, [N, *parameter.shape]. ``kp.capture``, the tracker and K-FAC then measure modules of
    this class (and of subclasses without a rule of their own) like the built-in ones.

    Each capture checks every rule by autograd: the samples must add up to the gradient of the
    batch, and those of an example must vanish with its output gradient.

    Args:
        kind: The class. A module must return one tensor, with the batch in front. A parameter that
            the rule leaves out is measured by per-sample gradients.

    Raises:
        InvalidInputError: No class of modules, or one that has a rule already.

    Example:
        >>> @kp.register_layer_rule(ScaledLinear)  # doctest: +SKIP
        ... def scaled_linear(module, inputs, output_grad):
        ...     (x,) = inputs
        ...     return {"weight": (module.scale * output_grad, x)}
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InvalidInputError(
            f"register_layer_rule got {kind!r}; give a class of modules, a subclass of nn.Module."
        )
    if kind in MODULE_RULES:
        raise InvalidInputError(
            f"{kind.__name__} has a layer rule already, {MODULE_RULES[kind].function!r}; register "
            "one rule per class."
        )

    def register(function: LayerRule) -> LayerRule:
        MODULE_RULES[kind] = ModuleRule(kind, function)
        return function

    return register


def module_rule(module: nn.Module) -> ModuleRule | None:
    """The rule of a module's class, or of the nearest base class that has one."""
    if not MODULE_RULES:
        return None
    return next((MODULE_RULES[k] for k in type(module).__mro__ if k in MODULE_RULES), None)


@final
class ModuleRule(ProductRule):
    """A user's rule for a class of modules; a call's roles are the names of its own parameters.

    The options of a call are the ``module``, its ``inputs``, and ``factors``: of each role the a
    [N, T, n] that the rule gives at an output gradient of zero, or None for G itself.
    """

    arguments = ("module", "input")

    def __init__(self, kind: type[nn.Module], function: LayerRule) -> None:
        self.kind = kind
        self.function = function

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        module, *given = args
        bound = inspect.signature(module.forward).bind(*given, **kwargs)
        tensors = [x for x in tree_leaves(bound.args) if isinstance(x, Tensor)]
        floating = [x for x in tensors if x.is_floating_point()]
        return {
            "module": module,
            "inputs": bound.args,
            "input": next(iter(floating or tensors), None),
            "keywords": tuple(bound.kwargs),
        }

    def problem(self, options: Mapping[str, Any]) -> str:
        name = self.kind.__name__
        if not isinstance(options["output"], Tensor):
            return f"{name}, which has a layer rule, returned a {type(options['output']).__name__}"
        if options["input"] is None or options["keywords"]:
            return f"{name}, which has a layer rule, got no tensor, or arguments by keyword only"
        if torch._C._functorch.is_functorch_wrapped_tensor(options["input"]):
            return "its layer runs inside a torch.func transform"
        return ""

    def options(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """Those that a call keeps, with inputs that are detached."""
        inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in bound["inputs"])
        return {"module": bound["module"], "inputs": inputs, "factors": {}}

    def options_of(self, options: Mapping[str, Any], part: slice) -> Mapping[str, Any]:
        count = len(next(x for x in options["inputs"] if isinstance(x, Tensor)))
        inputs = tuple(
            x[part] if isinstance(x, Tensor) and x.ndim and len(x) == count else x
            for x in options["inputs"]
        )
        return {**options, "inputs": inputs, "factors": {}}

    def gap(self, role: str, call: Call) -> str:
        """Why the rule does not measure a parameter; empty if it does."""
        if role in self._factors(call):
            return ""
        return f"the layer rule of {self.kind.__name__} gives no samples of {role!r}"

    def n_lead(self, call: Call) -> int:
        return 1

    def width(self, call: Call) -> int:
        return math.prod(call.output_shape[1:])

    def inner_positions(self, role: str, call: Call) -> int:
        factors = self._factors(call)[role]
        return 1 if factors is None else factors.shape[1]

    def form(self, role: str, call: Call) -> Form:
        return Form.MATRIX if self._factors(call)[role] is None else Form.FACTORS

    def output_rows(self, role: str, call: Call, gradient: Tensor) -> Tensor:
        a = self._factors(call)[role]
        if a is None:
            return gradient.flatten(1)
        found = self._samples(call, gradient)[role]
        if not isinstance(found, tuple) or not torch.equal(found[1], a):
            raise self._error(
                f"gives inputs a of {role!r} that change with the output gradient; return G itself"
            )
        return found[0]

    def input_rows(self, role: str, call: Call) -> Tensor:
        a = self._factors(call)[role]
        return call.x.new_ones(call.output_shape[0], 1) if a is None else a

    def matrices(self, role: str, call: Call, d: Tensor, a: Tensor) -> Tensor:
        if self._factors(call)[role] is not None:
            return super().matrices(role, call, d, a)
        gradient = d.reshape(call.output_shape).to(call.output_dtype)
        found = self._samples(call, gradient)[role]
        assert isinstance(found, Tensor)
        return found

    def _factors(self, call: Call) -> dict[str, Tensor | None]:
        """a [N, T, n] of each parameter, or None where G itself is given."""
        known: dict[str, Tensor | None] = call.options["factors"]
        if not known:
            zero = torch.zeros(call.output_shape, dtype=call.output_dtype, device=call.x.device)
            for role, found in self._samples(call, zero).items():
                known[role] = found[1] if isinstance(found, tuple) else None
        return known

    def _samples(self, call: Call, gradient: Tensor) -> RuleSamples:
        """What the user's function returns, checked: (delta [N, T, m], a [N, T, n]) or G."""
        module, inputs = call.options["module"], call.options["inputs"]
        with torch.no_grad():
            given = self.function(module, inputs, gradient.reshape(call.output_shape))
        own = dict(module.named_parameters(recurse=False))
        if not isinstance(given, Mapping) or not given.keys() <= own.keys():
            what = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
            raise self._error(f"returned {what}; return a dict by parameter name: {', '.join(own)}")
        return {role: self._checked(role, own[role], given[role], call) for role in given}

    def _checked(
        self, role: str, parameter: Tensor, given: object, call: Call
    ) -> Tensor | tuple[Tensor, Tensor]:
        count, (m, n) = call.output_shape[0], matrix_shape(parameter)
        parts = given if isinstance(given, tuple) else (given,)
        tensors = [x for x in parts if isinstance(x, Tensor)]
        if isinstance(given, Tensor) and given.shape == (count, *parameter.shape):
            return given.reshape(count, m, n)
        if len(parts) == len(tensors) == 2:
            d, a = (x[:, None] if x.ndim == 2 else x for x in tensors)
            alike = d.ndim == a.ndim == 3 and d.shape[:2] == a.shape[:2]
            if alike and (len(d), d.shape[2], a.shape[2]) == (count, m, n):
                return d, a
        got = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in parts]
        raise self._error(
            f"gives {role!r} as {got}; give (delta, a) of [{count}, T, {m}] and [{count}, T, {n}], "
            f"or G of {[count, *parameter.shape]}"
        )

    def _error(self, what: str) -> InvalidInputError:
        return InvalidInputError(f"The layer rule of {self.kind.__name__} {what}.")


MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}
