"""One forward pass under a torch function mode: which calls read parameters, and from what input.

Functions are watched, and not modules: nn.Linear, attention's projections, a tied output layer
written as F.linear(h, table.weight) and a module with a forward of its own all end in the same
few functions. What else reads a parameter is found by
:mod:`kronecker_probe.gradients.tracing.graph`.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kronecker_probe.gradients.layers import RULES
from kronecker_probe.gradients.layers.base import Call, Read, Rule
from kronecker_probe.gradients.layers.modules import ModuleRule, module_rule
from kronecker_probe.gradients.tracing.held_state import held_tensors

ROLES = ("weight", "bias")


@dataclass
class Recording:
    """The calls of one forward pass, in their order, and reads that have no exact rule.

    Attributes:
        calls: All calls that read one of the parameters.
        problems: Parameter name to why one of its calls was not recorded.
        wrote: Whether the pass wrote into tensors of the model, as into a cache, so that another
            one would overwrite what this one's graph has saved.
    """

    calls: list[Call] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    wrote: bool = False

    def by_parameter(self) -> dict[str, list[tuple[Call, str]]]:
        """Parameter name to its calls, each with the parameter's role."""
        found: dict[str, list[tuple[Call, str]]] = {}
        for call in self.calls:
            for role, read in call.reads.items():
                found.setdefault(read.parameter, []).append((call, role))
        return found


@contextmanager
def recording(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[Recording]:
    """Record every call of a function with a rule that reads one of the parameters.

    Args:
        model: Gives the name of a layer that is the whole model.
        parameters: Those to look for, by name.
    """
    record = Recording()
    held = [
        (tensor, tensor._version) for tensor in held_tensors(model) if not tensor.is_inference()
    ]
    recorder = Recorder(record, parameters, type(model).__name__)
    with recorder, recorder.watching(model):
        yield record
    record.wrote = any(tensor._version != version for tensor, version in held)


class Recorder(TorchFunctionMode):
    """Appends the calls that read parameters to a recording, as long as it is entered.

    Args:
        record: To append to.
        parameters: Those to look for, by name.
        model: Name of a layer that is the whole model.
    """

    def __init__(
        self, record: Recording, parameters: Mapping[str, nn.Parameter], model: str
    ) -> None:
        super().__init__()
        self.record = record
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.model = model
        self.open: list[tuple[int, list[Any]]] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """With hooks on the modules whose class has a rule of the user's own."""
        handles = []
        ruled = [(module, rule) for module in model.modules() if (rule := module_rule(module))]
        for module, rule in ruled:
            reads = {
                role: name
                for role, parameter in module.named_parameters(recurse=False)
                if (name := self.names.get(id(parameter))) is not None
            }
            if reads:
                handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(
                        partial(self._leave, rule, reads), with_kwargs=True, prepend=True
                    ),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.open.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nodes = [x.grad_fn for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.open.append((len(self.record.calls), nodes))

    def _leave(
        self,
        rule: ModuleRule,
        reads: Mapping[str, str],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Put one call of the module in place of the calls of functions that it is made of."""
        first, nodes = self.open.pop()
        inside = self.record.calls[first:]
        del self.record.calls[first:]
        for call in inside:
            rest = {
                r: read for r, read in call.reads.items() if read.parameter not in reads.values()
            }
            if rest:
                self.record.calls.append(replace(call, reads=rest))
        problem = rule.problem(bound := rule.bind((module, *args), kwargs) | {"output": output})
        if problem:
            for name in reads.values():
                self.record.problems.setdefault(name, problem)
            return output
        output, edge = _edge(output)
        x = bound["input"]
        counts = _edges_between(edge, nodes, self.names)
        self.record.calls.append(
            Call(
                rule=rule,
                name=self._layer(next(iter(reads.values()))),
                options=rule.options(bound),
                x=x.detach(),
                version=x._version,
                edge=edge,
                output_shape=output.shape,
                output_dtype=output.dtype,
                reads={role: Read(name, edges=counts[name]) for role, name in reads.items()},
            )
        )
        return output

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {} if kwargs is None else kwargs
        if func is F.multi_head_attention_forward:
            with self:  # its projections are calls like any other
                return _unguarded(func)(*args, **given)
        output = func(*args, **given)
        rule = RULES.get(func)
        return output if rule is None else self._seen(rule, rule.bind(args, given), output)

    def _seen(self, rule: Rule, options: dict[str, Any], output: Tensor) -> Tensor:
        reads = {
            role: read
            for role in ROLES
            if isinstance(argument := options.get(role), Tensor)
            and (read := self._read(argument)) is not None
        }
        if not reads:
            return output
        x = options["input"]
        problem = _problem(x) or rule.problem(options)
        if problem:
            for read in reads.values():
                self.record.problems.setdefault(read.parameter, problem)
            return output
        output, edge = _edge(output)
        weight = options.get("weight")
        self.record.calls.append(
            Call(
                rule=rule,
                name=self._layer(next(iter(reads.values())).parameter),
                options={key: value for key, value in options.items() if key not in _DROPPED},
                x=x.detach(),
                version=x._version,
                edge=edge,
                output_shape=output.shape,
                output_dtype=output.dtype,
                reads=reads,
                weight_shape=tuple(weight.shape) if isinstance(weight, Tensor) else (),
            )
        )
        return output

    def _read(self, argument: Tensor) -> Read | None:
        name = self.names.get(id(argument))
        if name is not None:
            return Read(name)
        base = argument._base
        name = None if base is None else self.names.get(id(base))
        if base is None or name is None or argument.grad_fn is None:
            return None
        rows = _rows(argument, base)
        return None if rows is None else Read(name, rows, (argument.grad_fn, argument.output_nr))

    def _layer(self, parameter: str) -> str:
        return parameter.rpartition(".")[0] or self.model


_DROPPED = ("input", "weight", "bias")


def _edges_between(
    edge: GradientEdge | None, inputs: list[Any], names: Mapping[int, str]
) -> Counter[str]:
    """Edges into each parameter from the nodes above the inputs and below an output."""
    counts: Counter[str] = Counter()
    seen = set(inputs)
    stack: list[Any] = [] if edge is None else [edge.node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            name = names.get(id(getattr(following, "variable", None)))
            if name is None:
                stack.append(following)
            else:
                counts[name] += 1
    return counts


def _rows(view: Tensor, base: Tensor) -> tuple[int, int] | None:
    """Which rows of ``base`` the view is; None if it is anything else."""
    if view.shape[1:] != base.shape[1:] or view.stride() != base.stride() or not view.numel():
        return None
    offset = int(view.storage_offset()) - int(base.storage_offset())
    first, rest = divmod(offset, base.stride(0))
    return None if rest else (first, first + view.shape[0])


def _problem(x: Tensor) -> str:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "its layer runs inside a torch.func transform"
    if x.layout != torch.strided:
        return f"its input has layout {x.layout}"
    return ""


def _edge(output: Tensor) -> tuple[Tensor, GradientEdge | None]:
    """The output to hand on, and its place in the graph.

    An in-place operation on a view replaces the view's own node, but not that of its base: F.linear
    on shared positions returns a whole view of a matrix product.
    """
    if not output.requires_grad:
        return output, None
    base = output._base
    if base is None:
        return output, get_gradient_edge(output)
    whole = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    if whole and base.requires_grad:
        return output, get_gradient_edge(base)
    copied = output.clone()
    return copied, get_gradient_edge(copied)


def _unguarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same Python function of torch without its hand-over to modes, which would never end."""
    assert isinstance(function, types.FunctionType)
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
