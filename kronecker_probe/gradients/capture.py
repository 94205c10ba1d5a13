"""From a model and a batch to the gradient samples of each parameter."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, NonFiniteError, unknown_name
from kronecker_probe.gradients.assemble import (
    Block,
    Extent,
    FactorBlock,
    block_for,
    joined,
    matrix_shape,
    share_outputs,
)
from kronecker_probe.gradients.batch_checks import (
    Pair,
    check_batch,
    check_outputs,
    not_finite,
    origin_of_nan,
    several_pairs,
)
from kronecker_probe.gradients.coverage import Capture
from kronecker_probe.gradients.layers.base import Call, all_finite, half_range
from kronecker_probe.gradients.losses import LossFunction, ResolvedLoss, resolve_loss
from kronecker_probe.gradients.per_example.gradients import per_sample_gradients
from kronecker_probe.gradients.samples.base import GradientSamples, MatrixSamples
from kronecker_probe.gradients.samples.checks import check_seed
from kronecker_probe.gradients.samples.ownership import owned
from kronecker_probe.gradients.selection import pairs, select
from kronecker_probe.gradients.targets import check_target, n_columns, output_gradients
from kronecker_probe.gradients.tracing.batch_dimension import separate
from kronecker_probe.gradients.tracing.graph import account, pull_back
from kronecker_probe.gradients.tracing.isolation import isolated
from kronecker_probe.gradients.tracing.modes import mode_note
from kronecker_probe.gradients.tracing.record import Recording, recording
from kronecker_probe.linalg.memory import require_memory

__all__ = ["Capture", "capture"]

# Backward passes above which an exact Gauss-Newton deserves a word of warning.
MANY_COLUMNS = 512

BIAS = ("separate", "joint")


def capture(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Pair | Iterable[Pair],
    target: str = "ggn",
    layers: str | Sequence[str] = "*",
    seed: int = 0,
    label_draws: int = 1,
    bias: str = "separate",
    fallback: bool = True,
) -> Capture:
    """Draw the gradients whose second moment is each layer's curvature matrix.

    Model, random generators, ``.grad``, training mode, buffers, hooks and the contents of lists,
    dicts and sets among the attributes are left as they were; the samples share no memory with it.
    Hooks of the model's own run with it, also in a second, small forward pass that checks on
    batches of more than 16 data that these do not mix (``gradients.separation`` says how); not
    where the model writes into tensors of its own, such as a cache.
    Dropout and batch normalization are measured in evaluation mode.

    Linear maps, convolutions, embeddings, attention's projections, normalizations over one
    dimension and biases are measured from their inputs and output gradients, wherever the model
    calls the function that they end in (F.linear and so on), however often, and with whatever
    weights it shares; so are they, and parameters, where they are computed once and added to every
    datum, as a table of positions is. A matrix takes its parameter's layout, shape[0] x the rest:
    out x (in k k) for a convolution, V x D for an embedding, m x 1 for a bias or a normalization.

    Args:
        model: Any module.
        loss_fn: ``loss_fn(outputs, targets)``, a mean or a sum over data. It is recognized by its
            values and gradient, so a lambda will do.
        data: (inputs, targets), data in the first dimension of both; or an iterable of such
            pairs (a DataLoader), see ``gradients.streaming.capture_loader``.
        target: "ggn" (exact Gauss-Newton: columns of the loss-Hessian root pulled back),
            "fisher" (labels sampled from the model) or "empirical-fisher" (the given labels).
        layers: Glob, or several, of parameter names.
        seed: Of the sampled labels.
        label_draws: K sampled labels a datum, for "fisher".
        bias: "separate", or "joint" for one m x (n + 1) matrix [W b] where a module has a weight
            and a bias and both are selected, named "<module>.weight+bias".
        fallback: Whether parameters that are used in any other way are measured by per-sample
            gradients, at a matrix a datum and column; else they are skipped.

    Returns:
        Parameter name to samples. Output gradients are those of l_i, datum i's share of the
        batch loss times N (mean) or 1 (sum); ggn columns weigh 1/N, K label draws 1/(N K).

    Raises:
        InvalidInputError: The batch is empty or malformed, an option is out of range, or no
            parameter can be measured.
        NonFiniteError: NaN or infinity in parameters, loss, outputs, activations or gradients;
            the layer is named.
        UnsupportedError: The loss is none of the supported ones.
        UnknownNameError: Unknown ``target`` or ``bias``, or a glob that matches nothing.
        MemoryBudgetError: The samples would not fit; the message says the GB.
    """
    check_target(target, label_draws)
    seed = check_seed(seed)
    if bias not in BIAS:
        raise unknown_name("bias", bias, BIAS)
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
    if not callable(loss_fn):
        raise InvalidInputError(
            f"loss_fn is {loss_fn!r}; give a function of (outputs, targets), such as "
            "torch.nn.functional.cross_entropy."
        )
    if several_pairs(data):
        from kronecker_probe.gradients.loader import capture_loader

        return capture_loader(
            model, loss_fn, data, target=target, layers=layers, seed=seed,
            label_draws=label_draws, bias=bias, fallback=fallback,
        )  # fmt: skip
    inputs, targets = check_batch(data)
    chosen, skipped = select(model, layers)
    parameters = dict(model.named_parameters())
    if broken := not_finite({name: p for name, p in parameters.items() if p.requires_grad}):
        raise NonFiniteError(broken)
    request = _Request(target, label_draws, seed, bias == "joint", fallback)
    note = mode_note(model)
    with isolated(model):
        # Copies, because a model may write into its inputs, and inference tensors have no graph.
        targets = targets.detach().clone()
        with recording(model, chosen) as record:
            outputs = check_outputs(model(inputs.detach().clone()), len(targets))
        if not bool(torch.isfinite(outputs).all()):
            raise NonFiniteError(origin_of_nan(inputs, parameters, record))
        loss = resolve_loss(loss_fn, outputs, targets)
        batch = _Batch(model, inputs.detach(), targets, outputs, loss)
        found = _measure(batch, record, chosen, request)
        accuracy = loss.accuracy(outputs.detach(), targets)
        del outputs, batch, record  # and with them the graph
        samples = owned(found.samples)
    skipped |= found.skipped
    ordered = {name: reason for name in parameters if (reason := skipped.get(name))}
    if not samples:
        raise InvalidInputError(f"No parameter can be measured. {_reasons(ordered)}")
    return Capture(
        samples, ordered, target, loss.value, accuracy, note, loss.reduction, found.fallback
    )


@dataclass(frozen=True)
class _Request:
    """The options of a capture."""

    target: str
    label_draws: int
    seed: int
    joint: bool
    fallback: bool


@dataclass(frozen=True)
class _Batch:
    """A model's forward pass on a batch."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    outputs: Tensor
    loss: ResolvedLoss

    def columns(self, request: _Request) -> int:
        return n_columns(request.target, self.loss, self.outputs, request.label_draws)

    def cotangents(self, request: _Request) -> Iterable[Tensor]:
        return output_gradients(
            request.target, self.loss, self.outputs.detach(), self.targets, request.label_draws,
            request.seed,
        )  # fmt: skip

    def weights(self, request: _Request) -> Tensor:
        n_examples = self.outputs.shape[0]
        weight = 1.0 / (n_examples * (request.label_draws if request.target == "fisher" else 1))
        return torch.full((n_examples,), weight, dtype=torch.float64, device=self.outputs.device)


@dataclass
class _Found:
    """Samples, and reasons."""

    samples: dict[str, GradientSamples]
    fallback: dict[str, str]
    skipped: dict[str, str]


def _measure(
    batch: _Batch, record: Recording, chosen: Mapping[str, nn.Parameter], request: _Request
) -> _Found:
    """From layer inputs and output gradients what is exact, the rest by per-sample gradients."""
    accounting = account(batch.outputs, record, chosen)
    exact, inexact, skipped = accounting.exact, accounting.unaccounted, accounting.absent
    n_examples = batch.outputs.shape[0]
    separation = separate(
        batch.model, batch.inputs, batch.outputs, exact, chosen, once=record.wrote
    )
    for call, layout in separation.layouts.items():
        call.layout = layout
    inexact |= {
        name: problem
        for name, uses in exact.items()
        if (problem := separation.problem(uses, n_examples))
    }
    extent = Extent(n_examples, batch.columns(request))
    blocks = {
        name: block_for(uses, matrix_shape(chosen[name]), extent)
        for name, uses in exact.items()
        if name not in inexact
    }
    joint = pairs(chosen) if request.joint else {}
    whole = _join_calls(blocks, joint)
    share_outputs(blocks)
    rest = {name: chosen[name] for name in chosen if name in inexact}
    if not request.fallback:
        skipped, rest = skipped | inexact, {}
    _require(blocks, rest, extent, batch.outputs.device)
    _pull_back(batch, blocks, record, request)
    weights = batch.weights(request)
    samples = {name: block.samples(weights) for name, block in blocks.items()}
    del blocks
    fallback: dict[str, str] = {}
    if rest:
        result = per_sample_gradients(
            batch.model, batch.inputs, batch.cotangents(request), rest, extent.columns
        )
        samples |= {name: MatrixSamples(G, weights) for name, G in result.gradients.items()}
        fallback = {name: f"{inexact[name]} ({result.way})" for name in result.gradients}
        skipped |= {name: f"{inexact[name]}; {why}" for name, why in result.reasons.items()}
    return _joined(_Found(samples, fallback, skipped), chosen, joint, whole)


def _join_calls(blocks: dict[str, Block], joint: Mapping[str, str]) -> set[str]:
    """Let weights whose every call adds their bias carry it along; returns those weights."""
    whole = set()
    for weight, bias in joint.items():
        one, other = blocks.get(weight), blocks.get(bias)
        if not isinstance(one, FactorBlock) or other is None:
            continue
        alike = [
            {(call, call.reads[role].rows) for call, role in block.uses} for block in (one, other)
        ]
        if alike[0] == alike[1]:
            one.bias = True
            del blocks[bias]
            whole.add(weight)
    return whole


def _joined(
    found: _Found,
    chosen: Mapping[str, nn.Parameter],
    joint: Mapping[str, str],
    whole: set[str],
) -> _Found:
    """The samples in the order of the model, weight and bias as one where that is asked for."""
    samples: dict[str, GradientSamples] = {}
    fallback: dict[str, str] = {}
    taken = set()
    for name in chosen:
        other = joint.get(name, "")
        title = f"{name}+bias"
        if name in whole:
            samples[title] = found.samples[name]
        elif name in found.samples and other in found.samples:
            samples[title] = joined(found.samples[name], found.samples[other])
            reasons = [found.fallback[one] for one in (name, other) if one in found.fallback]
            if reasons:
                fallback[title] = reasons[0]
            taken.add(other)
        elif name in found.samples and name not in taken:
            samples[name] = found.samples[name]
            if name in found.fallback:
                fallback[name] = found.fallback[name]
    return _Found(samples, fallback, found.skipped)


def _require(
    blocks: Mapping[str, Block],
    rest: Mapping[str, nn.Parameter],
    extent: Extent,
    device: torch.device,
) -> None:
    sizes = {name: float(block.nbytes + block.workspace) for name, block in blocks.items()}
    sizes |= {
        name: float(extent.n_examples * extent.columns * p.nbytes) for name, p in rest.items()
    }
    if sizes:
        largest = max(sizes, key=lambda name: sizes[name])
        what = (
            f"The samples ({extent.columns} gradient columns a datum; {largest!r} alone takes "
            f"{sizes[largest] / 1e9:.2f} GB, and layers= can leave it out)"
        )
        require_memory(sum(sizes.values()), what, device)


def _pull_back(
    batch: _Batch, blocks: Mapping[str, Block], record: Recording, request: _Request
) -> None:
    """One backward pass a column, into the blocks."""
    used = {call for block in blocks.values() for call, _ in block.uses}
    calls = [call for call in record.calls if call in used]
    for call in calls:
        call.check()
    if not calls:
        return
    columns = batch.columns(request)
    if request.target == "ggn" and columns > MANY_COLUMNS:
        warnings.warn(
            f"target='ggn' takes {columns} backward passes here, one for each output of a datum; "
            "target='fisher' takes one a label draw.",
            UserWarning,
            stacklevel=4,
        )
    for index, cotangent in enumerate(batch.cotangents(request)):
        pulled = pull_back(batch.outputs, cotangent, calls, last=index == columns - 1)
        gradients = dict(zip(calls, pulled, strict=True))
        _check_gradients(gradients)
        for block in blocks.values():
            block.add(index, gradients)


def _check_gradients(gradients: Mapping[Call, Tensor]) -> None:
    for call, gradient in reversed(list(gradients.items())):  # the last layer is where it came from
        if not all_finite(gradient):
            raise NonFiniteError(
                f"The output gradients of layer {call.name!r} hold NaN or infinite values; "
                f"check the weights behind it{half_range(gradient.dtype)}."
            )


def _reasons(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:10]) + "."
