"""Which recorded calls stand for the whole gradient of a parameter, read off the autograd graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronecker_probe.gradients.layers.base import Call
from kronecker_probe.gradients.tracing.broadcast import spread
from kronecker_probe.gradients.tracing.record import Recording
from kronecker_probe.table.codes import Reason, ReasonCode

# The node of a reentrant activation checkpoint, which torch.autograd.grad cannot pass.
_REENTRANT = "CheckpointFunctionBackward"

Uses = list[tuple[Call, str]]  # a call, and the parameter's role in it


@dataclass
class Accounting:
    """What the graph says about each parameter.

    Attributes:
        exact: Parameter name to the calls whose gradients add up to its own.
        unaccounted: To why the recorded calls are not its whole gradient.
        absent: To why it has no gradient that could be measured at all.
    """

    exact: dict[str, Uses]
    unaccounted: dict[str, str]
    absent: dict[str, str]


def account(
    outputs: Tensor | Sequence[Tensor],
    record: Recording,
    parameters: Mapping[str, nn.Parameter],
    inputs: Collection[Any] = (),
) -> Accounting:
    """Sort the parameters by whether their recorded calls are all that the outputs depend on.

    Only the nodes of the graph are read, so that it may have been backpropagated already.

    Args:
        outputs: What the model returned, [N, ...]; or several tensors that depend on all its
            results, such as the loss, with nothing assumed about their batch.
        record: The calls of that forward pass; see ``broadcast.spread`` for what is changed.
        parameters: Parameter name to the parameter.
        inputs: Nodes that the forward pass started from, and below which it read nothing.
    """
    nodes = _below(
        [one.grad_fn for one in ((outputs,) if isinstance(outputs, Tensor) else outputs)], inputs
    )
    if isinstance(outputs, Tensor) and outputs.ndim:
        spread(record, parameters, nodes, outputs.shape[0])
    recorded = record.by_parameter()
    graph = _walk(nodes, parameters, recorded)
    result = Accounting({}, {}, {})
    for name in parameters:
        made = recorded.get(name, [])
        reached = [use for use in made if use[0].edge and use[0].edge.node in graph.nodes]
        if reason := _absence(made, reached, graph, graph.reads[name]):
            result.absent[name] = Reason(reason, ReasonCode.NO_GRADIENT)
        elif name in record.problems:
            result.unaccounted[name] = record.problems[name]
        elif reason := _unaccounted(name, reached, graph):
            result.unaccounted[name] = reason
        else:
            result.exact[name] = reached
    return result


def pull_back(
    outputs: Tensor, cotangent: Tensor, calls: Sequence[Call], *, last: bool
) -> list[Tensor]:
    """Gradients of <outputs, cotangent> in each call's output; the graph is freed if ``last``."""
    gradients = torch.autograd.grad(
        outputs,
        [call.edge for call in calls if call.edge is not None],
        grad_outputs=cotangent.to(outputs.dtype),
        retain_graph=not last,
        allow_unused=True,
    )
    return [
        # A custom backward may answer None for zero.
        torch.zeros(call.output_shape, dtype=call.output_dtype, device=call.x.device)
        if gradient is None
        else gradient.detach()
        for call, gradient in zip(calls, gradients, strict=True)
    ]


@dataclass
class _Graph:
    """Nodes below the outputs, those below a reentrant checkpoint, and who reads what.

    Attributes:
        nodes: All nodes below the outputs.
        reentrant: Whether there are reentrant checkpoints among them.
        behind_reentrant: Those below a reentrant checkpoint.
        reads: Edges into each parameter.
        sliced: Edges into each output of the recorded slices' nodes.
        origins: Node of a recorded slice to the parameter that it reads; None if it reads
            anything else, such as another slice.
    """

    nodes: set[Any]
    reentrant: bool
    behind_reentrant: set[Any]
    reads: Counter[str]
    sliced: Counter[tuple[Any, int]]
    origins: Mapping[Any, str | None]


def _walk(
    nodes: set[Any], parameters: Mapping[str, nn.Parameter], recorded: Mapping[str, Uses]
) -> _Graph:
    names = {id(parameter): name for name, parameter in parameters.items()}

    def read(node: Any) -> str | None:
        """The parameter whose gradient the node accumulates."""
        return names.get(id(getattr(node, "variable", None)))

    slices = {
        view[0]
        for made in recorded.values()
        for call, role in made
        if (view := call.reads[role].view) is not None
    }
    reads: Counter[str] = Counter()
    sliced: Counter[tuple[Any, int]] = Counter()
    for node in nodes:
        for following, output in node.next_functions:
            name = read(following)
            if name is not None:
                reads[name] += 1
            elif following in slices:
                sliced[following, output] += 1
    checkpoints = [node for node in nodes if node.name() == _REENTRANT]
    behind = _below([child for node in checkpoints for child, _ in node.next_functions])
    origins = {
        node: read(node.next_functions[0][0]) if len(node.next_functions) == 1 else None
        for node in slices
    }
    return _Graph(nodes, bool(checkpoints), behind, reads, sliced, origins)


def _below(roots: Sequence[Any], ends: Collection[Any] = ()) -> set[Any]:
    """The roots and the nodes below them, as far as those at which it ends."""
    seen: set[Any] = set(ends)
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return seen.difference(ends)


def _absence(made: Uses, reached: Uses, graph: _Graph, reads: int) -> str:
    """Why the outputs have no gradient in a parameter that could be measured; empty if they do."""
    layers = ", ".join(sorted({call.name for call, _ in made}))
    untracked = any(call.edge is None for call, _ in made)
    # beside calls that are tracked, one under no_grad is a constant; a checkpoint's is not
    if untracked and (graph.reentrant or not reads):
        return (
            f"a call of {layers!r} ran without gradient tracking (torch.no_grad() or reentrant "
            "activation checkpointing; use_reentrant=False is measured)"
        )
    if any(call.edge and call.edge.node in graph.behind_reentrant for call, _ in reached):
        return (
            f"the gradient of {layers!r} passes through reentrant activation checkpointing "
            "(use_reentrant=False is measured)"
        )
    if reads:
        return ""
    if made:
        return "unused: no gradient of the outputs reaches its layer"
    return "unused: the forward pass does not read it, or reads it without gradient tracking"


def _unaccounted(name: str, reached: Uses, graph: _Graph) -> str:
    """Why the calls are not the whole gradient of a parameter; empty if they are."""
    views = [view for call, role in reached if (view := call.reads[role].view) is not None]
    counted = Counter(views)
    edges = (call.reads[role].edges for call, role in reached if call.reads[role].view is None)
    whole = sum(edges) + len({node for node, _ in views})
    nodes = {node for node, _ in views}
    # each slice must come straight from the parameter (what it passes on the way may have other
    # readers), and have no other reader itself
    direct = all(graph.origins[node] == name for node in nodes)
    alone = all(counted[key] == n for key, n in graph.sliced.items() if key[0] in nodes)
    if graph.reads[name] == whole and direct and alone:
        return ""
    if not reached:
        return "it is read by operations that have no rule"
    layers = ", ".join(sorted({call.name for call, _ in reached}))
    if graph.reads[name] == whole:
        return f"its layers ({layers}) read a part of it that is also used in other operations"
    return (
        f"it is read {graph.reads[name]} times and its layers ({layers}) account for {whole}: it "
        "is also used in operations that have no rule"
    )
