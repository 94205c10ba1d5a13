"""One forward pass with hooks: which calls produced which graph edges, from which inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kronecker_probe.errors import InvalidInputError, NonFiniteError
from kronecker_probe.gradients.layers import LayerRule


@dataclass(frozen=True)
class Owner:
    """A module that holds a weight, and the rule that reads its gradient."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    rule: LayerRule


@dataclass
class Call:
    """One call of a module.

    The gradient edge stands for the output as the module returned it: an in-place activation
    behind the layer rebases the tensor, and not the edge. An output that is a view (Linear on
    shared positions) is copied first, because there it replaces the edge.
    """

    owner: Owner
    x: Tensor
    version: int
    edge: GradientEdge | None
    output_shape: torch.Size
    output_dtype: torch.dtype

    def nbytes(self, columns: int) -> float:
        """Bytes of the call's samples: output gradients, and inputs (unfolded, for a Conv2d)."""
        weight = self.owner.weight
        inputs_per_output = weight[0].numel() / weight.shape[0]
        return self.output_shape.numel() * (columns + inputs_per_output) * self.x.element_size()

    def check(self) -> None:
        """Refuse an input that is not finite, or that was overwritten after the call.

        Raises:
            NonFiniteError: The input holds NaN or infinite values.
            InvalidInputError: The input was changed in place after the layer had read it.
        """
        if not bool(torch.isfinite(self.x).all()):
            raise NonFiniteError(
                f"The input of layer {self.owner.name!r} holds NaN or infinite values; "
                "check the data and the layers before it."
            )
        if self.x._version != self.version:
            raise InvalidInputError(
                f"The input of layer {self.owner.name!r} was changed in place after the layer "
                "had read it; make that operation out of place."
            )


@dataclass
class Recording:
    """The calls of one forward pass, by parameter name."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


@contextmanager
def recording(owners: Mapping[str, list[Owner]], n_data: int) -> Iterator[Recording]:
    """Record every call of the owners' modules while the block runs.

    Args:
        owners: Parameter name to the modules that hold the parameter.
        n_data: N, to check that each input has the batch in front.
    """
    record = Recording()
    handles = []
    for parameter, modules in owners.items():
        record.calls[parameter] = []
        for owner in modules:
            hook = _Hook(record, parameter, owner, n_data)
            handles.append(owner.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


class _Hook:
    def __init__(self, record: Recording, parameter: str, owner: Owner, n_data: int) -> None:
        self.record = record
        self.parameter = parameter
        self.owner = owner
        self.n_data = n_data

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor | None:
        x = args[0] if args else kwargs["input"]
        problem = self._problem(module, x)
        if problem:
            self.record.problems.setdefault(self.parameter, problem)
            return None
        copied = output.clone() if output.requires_grad and output._is_view() else None
        kept = output if copied is None else copied
        edge = get_gradient_edge(kept) if kept.requires_grad else None
        call = Call(self.owner, x.detach(), x._version, edge, output.shape, output.dtype)
        self.record.calls[self.parameter].append(call)
        return copied

    def _problem(self, module: nn.Module, x: Tensor) -> str:
        if module.weight is not self.owner.weight:
            return (
                f"{self.owner.name!r} ran with another weight than its own "
                "(torch.func.functional_call, or a replica of the module)"
            )
        if x.layout != torch.strided:
            return f"its input has layout {x.layout}; only dense tensors are measured"
        return self.owner.rule.batch_problem(module, x, self.n_data)
