"""What is computed once for all examples, and then broadcast to each: a table of positions.

A look-up ``table(arange(T))`` has an output [T, D] without a batch, but where it is added to
activations [N, T, D], the gradient of the sum holds each example's own. So it does for a parameter
that is added, or expanded over the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kronecker_probe.gradients.layers.base import Call, Form, ProductRule, Read
from kronecker_probe.gradients.layers.modules import ModuleRule
from kronecker_probe.gradients.tracing.record import Recording

# Nodes whose backward moves entries only, and needs nothing that was saved.
_VIEWS = frozenset(
    f"{name}Backward{number}"
    for name, number in (
        ("Unsqueeze", 0), ("Squeeze", 1), ("Slice", 0), ("Select", 0), ("View", 0), ("Alias", 0),
        ("T", 0), ("Transpose", 0), ("Permute", 0),
    )
)  # fmt: skip

Consumers = Mapping[tuple[Any, int], list[tuple[Any, int]]]


def spread(
    record: Recording,
    parameters: Mapping[str, nn.Parameter],
    nodes: Collection[Any],
    n_examples: int,
) -> None:
    """Let the record see where what has no batch gets one.

    A call whose only reader broadcasts its output over the examples is replaced by the call on
    inputs that are expanded so; parameters that are added or expanded directly get a call.
    """
    if n_examples == 1:
        return
    open_ = [k for k, call in enumerate(record.calls) if call.edge and _may_lack(call, n_examples)]
    seen = {read.parameter for call in record.calls for read in call.reads.values()}
    tables = {name: p for name, p in parameters.items() if name not in seen}
    if not open_ and not tables:
        return
    consumers = _consumers(nodes)
    for k in open_:
        record.calls[k] = _expanded(record.calls[k], consumers, n_examples)
    if tables:
        record.calls += _reads(tables, nodes, consumers, n_examples)


def _may_lack(call: Call, n_examples: int) -> bool:
    """Whether the output may be the same for all examples, as [T, D] or [1, T, D]."""
    lead = call.lead
    if isinstance(call.rule, ModuleRule):
        return False
    return len(lead) == len(call.output_shape) - 1 and (len(lead) == 1 or lead[0] != n_examples)


def _consumers(nodes: Collection[Any]) -> Consumers:
    """Output of a node to the nodes that read it, each with the place among its inputs."""
    found: dict[tuple[Any, int], list[tuple[Any, int]]] = {}
    for node in nodes:
        for place, edge in enumerate(node.next_functions):
            found.setdefault(edge, []).append((node, place))
    return found


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor is broadcast over the examples.

    Attributes:
        node: That does it.
        shape: Of its output, [N, ...].
        operand: Shape of what it broadcasts.
        views: Nodes from the tensor to that operand, in their order.
    """

    node: Any
    shape: torch.Size
    operand: torch.Size
    views: tuple[Any, ...]


def _place(
    source: tuple[Any, int], reader: tuple[Any, int], consumers: Consumers, n_examples: int
) -> _Place | None:
    """Follow the only readers from a node's output until it is broadcast; None if it is not."""
    views: list[Any] = []
    while reader[0].name() in _VIEWS:
        views.append(reader[0])
        source = (reader[0], 0)
        readers = consumers.get(source, [])
        if len(readers) != 1:
            return None
        reader = readers[0]
    node, place = reader
    scaled = node.name() == "AddBackward0" and place == 1 and node._saved_alpha != 1
    if node.name() not in ("AddBackward0", "ExpandBackward0") or scaled:
        return None
    before, after = source[0]._input_metadata[source[1]], node._input_metadata[0]
    operand, shape = before.shape, after.shape
    wider = len(operand) < len(shape) or operand[0] == 1
    if before.dtype != after.dtype or not shape or shape[0] != n_examples or not wider:
        return None
    return _Place(node, shape, operand, tuple(views))


def _expanded(call: Call, consumers: Consumers, n_examples: int) -> Call:
    """The call as if its inputs had been expanded over the examples; as it is where they are."""
    assert call.edge is not None
    source = (call.edge.node, call.edge.output_nr)
    readers = consumers.get(source, [])
    place = _place(source, readers[0], consumers, n_examples) if len(readers) == 1 else None
    if place is None or any(view.name() != "UnsqueezeBackward0" for view in place.views):
        return call
    rest = call.x.shape[len(call.lead) :]
    same = place.operand[-1] == call.output_shape[-1] and place.operand[-1] == place.shape[-1]
    if not same or call.x.numel() != math.prod(call.lead) * math.prod(rest):
        return call
    x = call.x.reshape(*place.operand[:-1], *rest).expand(*place.shape[:-1], *rest)
    edge = GradientEdge(place.node, 0)
    return dataclasses.replace(call, x=x, edge=edge, output_shape=place.shape)


def _reads(
    tables: Mapping[str, nn.Parameter],
    nodes: Collection[Any],
    consumers: Consumers,
    n_examples: int,
) -> list[Call]:
    """A call for each time that a parameter is broadcast."""
    names = {id(parameter): name for name, parameter in tables.items()}
    found = []
    for node in nodes:
        parameter = getattr(node, "variable", None)
        name = names.get(id(parameter))
        if parameter is None or name is None:
            continue
        for reader in consumers.get((node, 0), []):
            place = _place((node, 0), reader, consumers, n_examples)
            if place is not None:
                found.append(_read(name, parameter, place))
    return found


def _read(name: str, parameter: Tensor, place: _Place) -> Call:
    return Call(
        rule=_TABLE,
        name=name.rpartition(".")[0] or name,
        options={"operand": place.operand, "views": place.views},
        x=parameter.detach(),
        version=parameter._version,
        edge=GradientEdge(place.node, 0),
        output_shape=place.shape,
        output_dtype=parameter.dtype,
        reads={"weight": Read(name)},
        weight_shape=tuple(parameter.shape),
    )


@final
class TableRule(ProductRule):
    """A parameter broadcast over the examples: G is the gradient of each result, summed to it.

    The options of its calls are ``operand``, the shape of what is broadcast, and ``views``, the
    nodes of the views that lead from the parameter to it.
    """

    arguments = ()

    def problem(self, options: Mapping[str, Any]) -> str:
        return ""

    def n_lead(self, call: Call) -> int:
        return 1

    def width(self, call: Call) -> int:
        return math.prod(call.output_shape[1:])

    def form(self, role: str, call: Call) -> Form:
        return Form.MATRIX

    def output_rows(self, role: str, call: Call, gradient: Tensor) -> Tensor:
        return gradient.flatten(1)

    def input_rows(self, role: str, call: Call) -> Tensor:
        """[N, 1] of ones; the gradient of a sum has no factor."""
        return call.x.new_ones(1).expand(call.output_shape[0], 1)

    def matrices(self, role: str, call: Call, d: Tensor, a: Tensor) -> Tensor:
        shape, operand = call.output_shape, call.options["operand"]
        g = d.reshape(shape)
        missing = len(shape) - len(operand)
        summed = [
            k for k in range(1, len(shape)) if k < missing or operand[k - missing] != shape[k]
        ]
        if summed:
            g = g.sum(summed, keepdim=True)
        g = g.reshape(shape[0], *operand)
        for view in reversed(call.options["views"]):
            g = torch.vmap(view)(g)
        return g


_TABLE = TableRule()
