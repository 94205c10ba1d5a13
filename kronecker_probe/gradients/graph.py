"""Which recorded calls stand for the whole gradient of a weight, read off the autograd graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronecker_probe.errors import NonFiniteError
from kronecker_probe.gradients.recording import Call

# The node of a reentrant activation checkpoint, which torch.autograd.grad cannot pass.
_REENTRANT = "CheckpointFunctionBackward"

Calls = dict[str, list[Call]]


def exact_calls(
    outputs: Tensor, recorded: Calls, weights: Mapping[str, nn.Parameter]
) -> tuple[Calls, dict[str, str]]:
    """Keep the parameters whose gradient is exactly sum over calls of d^T a, datum by datum.

    Args:
        outputs: What the model returned, [N, ...].
        recorded: Parameter name to all calls of its modules.
        weights: Parameter name to the parameter.

    Returns:
        The calls that reach the outputs, of the parameters to keep; and the reasons for the rest.

    Raises:
        NonFiniteError: A gradient is NaN; the layer is named.
    """
    graph = _walk(outputs, weights)
    kept: Calls = {}
    skipped: dict[str, str] = {}
    for name, made in recorded.items():
        reached = [call for call in made if call.edge and call.edge.node in graph.nodes]
        if reason := _reason(made, reached, graph, graph.uses[name]):
            skipped[name] = reason
        else:
            kept[name] = reached
    mixed = _mixed(outputs, kept)
    return {name: made for name, made in kept.items() if name not in mixed}, skipped | mixed


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
    """Nodes below the outputs, those below a reentrant checkpoint, and reads of each weight."""

    nodes: set[Any]
    behind_reentrant: set[Any]
    uses: dict[str, int]


def _walk(outputs: Tensor, weights: Mapping[str, nn.Parameter]) -> _Graph:
    names = {id(weight): name for name, weight in weights.items()}
    uses = dict.fromkeys(weights, 0)
    nodes = _below([outputs.grad_fn])
    for node in nodes:
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if id(variable) in names:
                uses[names[id(variable)]] += 1
    checkpoints = [node for node in nodes if node.name() == _REENTRANT]
    behind = _below([child for node in checkpoints for child, _ in node.next_functions])
    return _Graph(nodes, behind, uses)


def _below(roots: Sequence[Any]) -> set[Any]:
    seen: set[Any] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return seen


def _reason(made: Sequence[Call], reached: Sequence[Call], graph: _Graph, uses: int) -> str:
    """Why the calls ``made`` are not the whole gradient of their weight; empty if they are."""
    if not made:
        if uses:
            return "its weight is read outside of its layer, whose forward did not run"
        return "unused: its layer's forward did not run"
    name = made[0].owner.name
    if any(call.edge is None for call in made):
        return (
            f"a call of {name!r} ran without gradient tracking (torch.no_grad() or reentrant "
            "activation checkpointing; use_reentrant=False is measured)"
        )
    if any(call.edge and call.edge.node in graph.behind_reentrant for call in reached):
        return (
            f"the gradient of {name!r} passes through reentrant activation checkpointing "
            "(use_reentrant=False is measured)"
        )
    if uses != len(reached):
        layers = ", ".join(sorted({call.owner.name for call in made}))
        return (
            f"its weight is read {uses} times and its layers ({layers}) account for "
            f"{len(reached)}: it is also used outside of them"
        )
    return "" if reached else "unused: no gradient of the outputs reaches its layer"


def _mixed(outputs: Tensor, calls: Calls) -> dict[str, str]:
    """Pull back gradients that are zero on half of the data: they must stay zero there.

    It fails where a layer mixes the data of a batch, and where the first dimension of a layer's
    input is not the batch although it has its length. The halves are random, because couplings
    have periods (groups of data, windows); both are tried, because they have directions.
    """
    flat = [(name, call) for name, made in calls.items() for call in made]
    n_data = outputs.shape[0]
    if not flat or n_data == 1:
        return {}
    generator = torch.Generator("cpu").manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, device="cpu").to(outputs.device)
    half = torch.rand(n_data, generator=generator, device="cpu") < 0.5
    half[0], half[1] = True, False
    mixed = {}
    for zeroed in (half.to(outputs.device), ~half.to(outputs.device)):
        masked = cotangent.clone()
        masked[zeroed] = 0
        gradients = pull_back(outputs, masked, [call for _, call in flat], last=False)
        for (name, call), gradient in zip(flat, gradients, strict=True):
            foreign = gradient[zeroed]
            if bool(foreign.isnan().any()):
                raise NonFiniteError(
                    f"The gradient in the output of layer {call.owner.name!r} is NaN; check the "
                    "layers behind it for a root or a division at zero."
                )
            if bool((foreign != 0).any()):
                mixed[name] = (
                    f"gradients of different data mix in layer {call.owner.name!r}: its first "
                    "dimension is not the batch, or a later layer couples the data"
                )
    return mixed
