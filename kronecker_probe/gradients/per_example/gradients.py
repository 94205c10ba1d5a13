"""Per-sample gradients of arbitrary parameters: vmap over examples, or a loop without vmap.

The way for parameters whose modules no rule can factor: recurrent layers, transposed convolutions,
a custom ``x @ W``. It costs a gradient matrix per example and column, and it is exact or refused: a
example alone must give the outputs that it gives in the batch, and the gradients of the examples
must add up to the gradient of the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kronecker_probe.errors import NonFiniteError
from kronecker_probe.gradients.per_example.methods import (
    CoupledError,
    Problem,
    by_loop,
    by_vmap,
    mix,
    run,
)
from kronecker_probe.gradients.tracing.isolation import isolated
from kronecker_probe.linalg.memory import require_memory

_UNUSED = (
    "unused: no gradient of the outputs reaches it (never read, detached, or read under "
    "torch.no_grad() or reentrant activation checkpointing)"
)


class PerSampleGradients(NamedTuple):
    """What :func:`per_sample_gradients` found.

    Attributes:
        gradients: Parameter name to G, [N, C, m, n], in the dtype of the parameter.
        reasons: Parameter name to the reason why it has no exact per-sample gradient.
        way: How they were computed: "vmap", or "loop over examples (...)" with what vmap failed
            with, or both; empty where nothing was.
    """

    gradients: dict[str, Tensor]
    reasons: dict[str, str]
    way: str


def per_sample_gradients(
    model: nn.Module,
    inputs: Tensor,
    cotangents: Iterable[Tensor],
    parameters: Mapping[str, nn.Parameter],
    n_columns: int,
) -> PerSampleGradients:
    """The gradient of <outputs_i, cotangent_ic> in each parameter, for each example i and column c.

    Call it within ``isolated(model)``. Tied weights and modules that are called several times have
    one gradient, the sum over all uses. Hooks on parameters do not act; those on modules do.

    Args:
        model: Maps inputs to one tensor of outputs, the batch in the first dimension of both.
        inputs: [N, ...], of any dtype.
        cotangents: C tensors of the outputs' shape, all examples at once.
        parameters: Name, as ``model.named_parameters()`` gives it, to the parameter.
        n_columns: C.

    Returns:
        G as [N, C, m, n] with m = shape[0] and n = prod(shape[1:]) of the parameter (vectors are
        m x 1, numbers 1 x 1); reasons for the parameters that have none; and the way taken.

    Raises:
        MemoryBudgetError: The gradients would not fit; the message says the GB.
        NonFiniteError: A gradient holds NaN or infinite values; the parameter is named.
    """
    inputs = inputs.detach()
    reasons = {name: "it has no elements" for name, p in parameters.items() if p.numel() == 0}
    wanted = {name: p for name, p in parameters.items() if name not in reasons}
    mixture = _mixture(inputs.shape[0], n_columns, inputs.device)
    with isolated(model):  # each attempt starts from the same state of the model
        leaves = _unhooked(wanted)
        outputs = run(model, leaves, inputs)
        _require_memory(outputs, wanted, n_columns)
        columns = torch.stack([c.to(outputs.dtype) for c in cotangents], dim=1)
        expected, unreached = _batch_gradients(outputs, columns, mixture, {**wanted, **leaves})
    outputs = outputs.detach()  # the graph has served
    reasons |= unreached
    way = ""
    gradients: dict[str, Tensor] = {}
    if expected:
        problem = Problem(
            model, inputs, outputs, columns, {name: wanted[name] for name in expected},
            {name: leaves[name] for name in expected if name in leaves}, expected, mixture,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            gradients, refused, way = _differentiate(problem)
        reasons |= refused
    ordered = {name: reasons[name] for name in parameters if name in reasons}
    return PerSampleGradients(gradients, ordered, way)


def _unhooked(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Fresh leaves for parameters with hooks, which would run and change what they see."""
    hooked = {name: p for name, p in parameters.items() if p._backward_hooks}
    return {name: p.detach().clone().requires_grad_() for name, p in hooked.items()}


def _require_memory(outputs: Tensor, parameters: Mapping[str, Tensor], columns: int) -> None:
    per_column = sum(p.nbytes for p in parameters.values()) + outputs[0].nbytes
    size = outputs.shape[0] * columns * per_column
    of = ", ".join(list(parameters)[:5])
    what = f"Per-sample gradients ({columns} columns per example) of {of}"
    require_memory(size, what, outputs.device)


def _mixture(n_examples: int, n_columns: int, device: torch.device) -> Tensor:
    """Random weights of the columns: sums of Gauss-Newton columns may vanish by symmetry."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(
        n_examples, n_columns, generator=generator, device="cpu", dtype=torch.float64
    )
    return drawn.to(device)


def _batch_gradients(
    outputs: Tensor, cotangents: Tensor, mixture: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Gradients of <outputs, mixed cotangents> in one pass, and what they do not reach."""
    if not outputs.requires_grad or not parameters:
        return {}, dict.fromkeys(parameters, _UNUSED)
    cotangent = mix(cotangents, mixture)

    def pull(names: Iterable[str]) -> dict[str, Tensor | None]:
        chosen = {name: parameters[name] for name in names}
        gradients = torch.autograd.grad(
            outputs, list(chosen.values()), cotangent, retain_graph=True, allow_unused=True
        )
        return dict(zip(chosen, gradients, strict=True))

    failed: dict[str, str] = {}
    try:
        found = pull(parameters)
    except RuntimeError:  # some lie before an operation that has no gradient
        found = {}
        for name in parameters:
            try:
                found |= pull([name])
            except RuntimeError as error:
                failed[name] = f"its gradient fails: {_first_line(error)}"
    reached = {name: g.detach().to_dense() for name, g in found.items() if g is not None}
    return reached, failed | {name: _UNUSED for name in found if name not in reached}


def _differentiate(problem: Problem) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """By vmap if every operation of the model has a rule, else example by example."""
    way = "vmap"
    try:
        gradients, failure = _try_vmap(problem)
        if failure:
            way = f"loop over examples (vmap fails with {failure})"
            gradients = by_loop(problem)
        refused = _doubts(problem, gradients)
        if refused and not failure:  # the loop reads the parameters themselves
            way = f"vmap; loop over examples for {', '.join(refused)}"
            gradients = {name: G for name, G in gradients.items() if name not in refused}
            again = by_loop(problem.part(refused))
            refused = _doubts(problem, again)
            gradients |= again
    except CoupledError:
        return {}, dict.fromkeys(problem.parameters, _coupling(problem)), ""
    except (torch.OutOfMemoryError, NonFiniteError):
        raise
    except Exception as error:  # the model's own, of any kind
        reason = f"the model does not run on one example alone ({_first_line(error)})"
        return {}, dict.fromkeys(problem.parameters, reason), ""
    return {name: G for name, G in gradients.items() if name not in refused}, refused, way


def _doubts(problem: Problem, gradients: Mapping[str, Tensor]) -> dict[str, str]:
    """Those that cannot be right, and why."""
    doubts = {name: _doubt(problem, name, G) for name, G in gradients.items()}
    return {name: doubt for name, doubt in doubts.items() if doubt}


def _try_vmap(problem: Problem) -> tuple[dict[str, Tensor], str]:
    """The gradients, or why not; a traceback kept beyond this would keep half of them alive."""
    try:
        return by_vmap(problem), ""
    except CoupledError:
        raise
    except Exception as error:  # what has no rule raises in its own way
        return {}, _first_line(error)


def _coupling(problem: Problem) -> str:
    """Why an example alone gives other outputs than in the batch."""
    with isolated(problem.model), torch.no_grad():
        again = [run(problem.model, {}, problem.inputs) for _ in range(2)][1]
    if not torch.equal(again, problem.outputs):
        return (
            "the model gives other outputs at a second call (random numbers in evaluation mode, or "
            "a state that changes)"
        )
    return (
        "an example alone gives other outputs than in the batch: the model couples the examples, "
        "or the first dimension of its inputs is not the batch"
    )


def _doubt(problem: Problem, name: str, gradients: Tensor) -> str:
    """Why the gradients of a parameter cannot be right; empty if they add up to the batch's."""
    total = torch.zeros(gradients.shape[2:], dtype=torch.float64, device=gradients.device)
    size = 0.0
    for G, w in zip(gradients, problem.mixture, strict=True):
        weighted = w[:, None, None] * G.double()
        total += weighted.sum(0)
        size += float(weighted.square().sum())
    if not bool(torch.isfinite(total).all()):
        raise NonFiniteError(
            f"The per-sample gradients of parameter {name!r} hold NaN or infinite values; check "
            "the weights, and the range of half precision."
        )
    expected = problem.expected[name].double().reshape(total.shape)
    scale = size**0.5 + float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(total - expected))
    if error <= problem.tolerance * scale + problem.noise:
        return ""
    return (
        "its per-sample gradients do not add up to the gradient of the batch: the model couples "
        "the examples, or keeps what it computes from the parameter for one batch"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
