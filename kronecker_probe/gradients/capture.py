"""From a model and a batch to the gradient samples of each parameter, by module hooks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import pandas as pd
import torch
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, NonFiniteError, unknown_name
from kronecker_probe.gradients.draws import check_draws, n_columns, output_gradients
from kronecker_probe.gradients.graph import Calls, exact_calls, pull_back
from kronecker_probe.gradients.isolation import isolated
from kronecker_probe.gradients.layers import describe, is_batch_dependent, is_stochastic
from kronecker_probe.gradients.losses import LossFunction, ResolvedLoss, resolve_loss
from kronecker_probe.gradients.recording import recording
from kronecker_probe.gradients.samples import FactoredSamples
from kronecker_probe.gradients.selection import select
from kronecker_probe.linalg.memory import require_memory

# Backward passes above which an exact Gauss-Newton deserves a word of warning.
MANY_COLUMNS = 512


@final
@dataclass(frozen=True)
class Capture(Mapping[str, FactoredSamples]):
    """Gradient samples by parameter name, and what was not measured.

    Attributes:
        samples: Parameter name to its samples.
        skipped: Parameter name to the reason why it is not measured.
        draws: "ggn", "fisher" or "empirical-fisher".
        loss: The loss of the batch.
        accuracy: Share of correct labels; None for regression.
        note: How the batch was measured where that differs from training, or "".
    """

    samples: Mapping[str, FactoredSamples]
    skipped: Mapping[str, str]
    draws: str
    loss: float
    accuracy: float | None
    note: str

    def __getitem__(self, name: str) -> FactoredSamples:
        if name in self.samples:
            return self.samples[name]
        if name in self.skipped:
            raise KeyError(f"{name!r} was skipped: {self.skipped[name]}")
        raise KeyError(str(unknown_name("parameter", name, self.samples)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def coverage(self) -> pd.DataFrame:
        """One row a parameter: measured or skipped, and why."""
        rows = [
            {"parameter": name, "status": "measured", "shape": f"{s.shape[0]} x {s.shape[1]}",
             "n_data": s.n_data, "n_columns": s.n_columns, "n_positions": s.n_positions,
             "reason": self.note}
            for name, s in self.samples.items()
        ]  # fmt: skip
        rows += [
            {"parameter": name, "status": "skipped", "reason": reason}
            for name, reason in self.skipped.items()
        ]
        counts = ("n_data", "n_columns", "n_positions")
        return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64"))

    def _repr_html_(self) -> str:
        return self.coverage.to_html(index=False)


def capture(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Tensor, Tensor],
    draws: str = "ggn",
    layers: str | Sequence[str] = "*",
    seed: int = 0,
    label_draws: int = 1,
) -> Capture:
    """Draw the gradients whose second moment is each layer's curvature matrix.

    Model, random generators, ``.grad``, training mode, buffers and hooks are left as they were.
    Hooks of the model's own run with it.
    Dropout and batch normalization are measured in evaluation mode.

    Args:
        model: Any module; its Linear and Conv2d weights (groups = 1) are measured, every other
            parameter is listed in ``skipped``.
        loss_fn: ``loss_fn(outputs, targets)``: cross-entropy on class indices or MSE, a mean or
            a sum over data. It is recognized by its values and gradient, so a lambda will do.
        batch: (inputs, targets), data in the first dimension of both.
        draws: "ggn" (exact Gauss-Newton: columns of the loss-Hessian root pulled back),
            "fisher" (labels sampled from the model) or "empirical-fisher" (the given labels).
        layers: Glob, or several, of parameter names.
        seed: Of the sampled labels.
        label_draws: K sampled labels a datum, for "fisher".

    Returns:
        Parameter name to samples. Output gradients are those of l_i, datum i's share of the
        batch loss times N (mean) or 1 (sum); ggn columns weigh 1/N, K label draws 1/(N K).

    Raises:
        InvalidInputError: The batch is empty or malformed, or no parameter can be measured.
        NonFiniteError: NaN or infinity in parameters, loss, outputs, activations or gradients;
            the layer is named.
        UnsupportedError: The loss is not one of the above.
        UnknownNameError: Unknown ``draws``, or a glob that matches nothing.
        MemoryBudgetError: The samples would not fit; the message says the GB.
    """
    check_draws(draws, label_draws)
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
    inputs, targets = _check_batch(batch)
    n_data = targets.shape[0]
    owners, skipped = select(model, layers)
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if broken := _not_finite(trained):
        raise NonFiniteError(broken)
    note = _mode_note(model)
    with isolated(model):
        # Copies, because a model may write into its inputs, and inference tensors have no graph.
        targets = targets.detach().clone()
        with recording(owners, n_data) as record:
            outputs = _check_outputs(model(inputs.detach().clone()), n_data)
        skipped.update(record.problems)
        calls = {name: made for name, made in record.calls.items() if name not in skipped}
        if not bool(torch.isfinite(outputs).all()):
            raise NonFiniteError(_origin_of_nan(inputs, parameters, calls))
        loss = resolve_loss(loss_fn, outputs, targets)
        calls, inexact = exact_calls(outputs, calls, {name: parameters[name] for name in calls})
        skipped.update(inexact)
        if not calls:
            raise InvalidInputError(f"No parameter can be measured. {_reasons(skipped)}")
        samples = _pull_back(calls, loss, outputs, targets, draws, label_draws, seed)
    accuracy = loss.accuracy(outputs.detach(), targets)
    ordered = {name: reason for name in parameters if (reason := skipped.get(name))}
    return Capture(samples, ordered, draws, loss.value, accuracy, note)


def _check_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InvalidInputError(
            f"batch is a {type(batch).__name__}; give a pair (inputs, targets) of tensors."
        )
    inputs, targets = batch
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise InvalidInputError(
            f"batch holds {type(inputs).__name__} and {type(targets).__name__}; "
            "inputs and targets must be tensors (wrap a model with other arguments)."
        )
    if targets.ndim == 0 or inputs.ndim == 0 or len(inputs) != len(targets):
        raise InvalidInputError(
            f"inputs {list(inputs.shape)} and targets {list(targets.shape)} must have the same "
            "number of data in their first dimension."
        )
    if len(targets) == 0:
        raise InvalidInputError("The batch is empty; give at least one datum.")
    return inputs, targets


def _mode_note(model: nn.Module) -> str:
    active = [
        f"{describe(module)} at {name or 'the root'}"
        for name, module in model.named_modules()
        if module.training and (is_stochastic(module) or is_batch_dependent(module))
    ]
    return f"measured in eval mode: {', '.join(active)}" if active else ""


def _check_outputs(outputs: object, n_data: int) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise InvalidInputError(
            f"The model returned a {type(outputs).__name__}; wrap it so that it returns the "
            "tensor of outputs (logits) alone."
        )
    if outputs.ndim == 0 or outputs.shape[0] != n_data:
        raise InvalidInputError(
            f"The model returned {list(outputs.shape)} for {n_data} data; the first dimension "
            "must be the batch (do not flatten positions into it)."
        )
    if not outputs.requires_grad:
        raise InvalidInputError(
            "The outputs depend on no parameter that requires a gradient: everything is frozen, "
            "or the forward pass runs under torch.no_grad()."
        )
    return outputs


def _origin_of_nan(inputs: Tensor, parameters: Mapping[str, Tensor], calls: Calls) -> str:
    """Where NaN or infinity in the outputs come from, as far back as can be told."""
    if not bool(torch.isfinite(inputs).all()):
        bad = int((~torch.isfinite(inputs)).sum())
        return f"The inputs of the batch hold {bad} NaN or infinite values; remove those data."
    if broken := _not_finite(parameters):
        return broken
    for made in calls.values():
        for call in made:
            call.check()
    return (
        "The model's outputs hold NaN or infinite values, from finite inputs and parameters; "
        "check the last layers, and the range of half precision."
    )


def _not_finite(parameters: Mapping[str, Tensor]) -> str:
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            return f"Parameter {name!r} holds NaN or infinite values; go back to a checkpoint."
    return ""


def _pull_back(
    calls: Calls,
    loss: ResolvedLoss,
    outputs: Tensor,
    targets: Tensor,
    draws: str,
    label_draws: int,
    seed: int,
) -> dict[str, FactoredSamples]:
    columns = n_columns(draws, loss, outputs, label_draws)
    flat = [(name, call) for name, made in calls.items() for call in made]
    size = sum(call.nbytes(columns) for _, call in flat)
    require_memory(size, f"The samples ({columns} gradient columns a datum)", outputs.device)
    if draws == "ggn" and columns > MANY_COLUMNS:
        warnings.warn(
            f"draws='ggn' takes {columns} backward passes here, one for each output of a datum; "
            "draws='fisher' takes one a label draw.",
            UserWarning,
            stacklevel=3,
        )
    collected: list[Tensor] = []
    cotangents = output_gradients(draws, loss, outputs, targets, label_draws, seed)
    for index, cotangent in enumerate(cotangents):
        last = index == columns - 1
        gradients = pull_back(outputs, cotangent, [call for _, call in flat], last=last)
        for place, ((_, call), gradient) in enumerate(zip(flat, gradients, strict=True)):
            d = call.owner.rule.output_grads(gradient)
            if index == 0:  # one block for all columns, so that none exists twice
                collected.append(d.new_empty(d.shape[0], columns, *d.shape[1:]))
            collected[place][:, index] = d
    n_data = outputs.shape[0]
    weight = 1.0 / (n_data * (label_draws if draws == "fisher" else 1))
    weights = torch.full((n_data,), weight, dtype=torch.float64, device=outputs.device)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for d, (name, call) in zip(collected, flat, strict=True):
        call.check()
        a = call.owner.rule.inputs(call.owner.module, call.x)
        if not bool(torch.isfinite(d).all()):
            raise NonFiniteError(
                f"The output gradients of layer {call.owner.name!r} hold NaN or infinite values; "
                "check the weights, and the range of half precision."
            )
        parts.setdefault(name, []).append((d, a))
    return {name: _join(found, weights) for name, found in parts.items()}


def _join(parts: list[tuple[Tensor, Tensor]], weights: Tensor) -> FactoredSamples:
    """The calls of one parameter, as shared positions of one layer: G_i is their sum."""
    if len(parts) == 1:
        return FactoredSamples(*parts[0], weights)
    d = torch.cat([d for d, _ in parts], dim=2)
    a = torch.cat([a for _, a in parts], dim=1)
    return FactoredSamples(d, a, weights)


def _reasons(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:10]) + "."
