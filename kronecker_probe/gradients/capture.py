"""From a model and a batch to the gradient samples of each parameter, by module hooks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import pandas as pd
import torch
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, NonFiniteError, unknown_name
from kronecker_probe.gradients.draws import check_draws, n_columns, output_gradients
from kronecker_probe.gradients.isolation import isolated
from kronecker_probe.gradients.layers import describe, is_batch_dependent, is_stochastic, rule_for
from kronecker_probe.gradients.losses import LossFunction, ResolvedLoss, resolve_loss
from kronecker_probe.gradients.recording import Call, Owner, graph_uses, recording
from kronecker_probe.gradients.samples import FactoredSamples
from kronecker_probe.linalg.memory import require_memory


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
        return pd.DataFrame(rows)

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
    Dropout and batch normalization are measured in evaluation mode.

    Args:
        model: Any module; its Linear and Conv2d weights (groups = 1) are measured, every other
            parameter is listed in ``skipped``.
        loss_fn: ``loss_fn(outputs, targets)``: cross-entropy on class indices or MSE, a mean or
            a sum over data. It is recognized by its gradient, so a lambda will do.
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
        NonFiniteError: NaN or infinity in loss, outputs, activations or gradients; the layer is
            named.
        UnsupportedError: The loss is not one of the above.
        UnknownNameError: Unknown ``draws``, or a glob that matches nothing.
        MemoryBudgetError: The samples would not fit; the message says the GB.
    """
    check_draws(draws, label_draws)
    inputs, targets = _check_batch(batch)
    n_data = targets.shape[0]
    owners, skipped = _select(model, layers)
    parameters = dict(model.named_parameters())
    note = _mode_note(model)
    with isolated(model):
        with recording(owners, n_data) as record:
            outputs = _check_outputs(model(inputs), n_data)
        loss = resolve_loss(loss_fn, outputs, targets)
        skipped.update(record.problems)
        calls = {name: c for name, c in record.calls.items() if name not in skipped}
        calls = _differentiable(calls, skipped)
        _check_uses(calls, graph_uses(outputs, {n: parameters[n] for n in calls}), skipped)
        _check_independence(outputs, calls, skipped)
        calls = {name: c for name, c in calls.items() if name not in skipped}
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


def _select(
    model: nn.Module, layers: str | Sequence[str]
) -> tuple[dict[str, list[Owner]], dict[str, str]]:
    """Owners of the parameters to measure, and the reasons for those that are not."""
    names = [name for name, _ in model.named_parameters()]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise unknown_name("layers pattern (no parameter matches)", pattern, names)
    holders: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module_name, local, module))
    owners: dict[str, list[Owner]] = {}
    skipped: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if not parameter.requires_grad:
            skipped[name] = "frozen (requires_grad=False)"
            continue
        reason, found = _owners(holders[id(parameter)])
        if reason:
            skipped[name] = reason
        else:
            owners[name] = found
    return owners, skipped


def _owners(holders: list[tuple[str, str, nn.Module]]) -> tuple[str, list[Owner]]:
    found = []
    for module_name, local, module in holders:
        rule = rule_for(module)
        where = module_name or "the model itself"
        if rule is None:
            return f"no rule for {type(module).__name__} ({where}); Linear and Conv2d have one", []
        if local != "weight":
            return f"a {local} of {type(module).__name__}: only weights are measured", []
        if refusal := rule.refusal(module):
            return refusal, []
        found.append(Owner(module_name, module, rule))
    return "", found


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


def _differentiable(calls: dict[str, list[Call]], skipped: dict[str, str]) -> dict[str, list[Call]]:
    """Drop the parameters without a call, or with a call outside the graph."""
    kept = {}
    for name, made in calls.items():
        if not made:
            skipped[name] = (
                "unused: its layer's forward did not run (for a compiled model, pass the "
                "original module)"
            )
        elif any(call.edge is None for call in made):
            skipped[name] = (
                f"a call of {made[0].owner.name!r} ran without gradient tracking (torch.no_grad() "
                "or reentrant checkpointing)"
            )
        else:
            kept[name] = made
    return kept


def _check_uses(
    calls: dict[str, list[Call]], uses: dict[str, int], skipped: dict[str, str]
) -> None:
    for name, made in calls.items():
        if uses[name] > len(made):
            skipped[name] = (
                f"its weight is read {uses[name]} times and its layers "
                f"({', '.join(sorted({c.owner.name for c in made}))}) ran {len(made)} times: it is "
                "also used outside of them"
            )


def _gradients(
    outputs: Tensor, cotangent: Tensor, calls: Sequence[Call], *, last: bool
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        outputs,
        [call.edge for call in calls if call.edge is not None],
        grad_outputs=cotangent.to(outputs.dtype),
        retain_graph=not last,
        allow_unused=True,
    )


def _check_independence(
    outputs: Tensor, calls: dict[str, list[Call]], skipped: dict[str, str]
) -> None:
    """Pull back a gradient that is zero on every second datum: it must stay zero there.

    It fails where a layer mixes the data of a batch, and where the first dimension of a layer's
    input is not the batch although it has its length.
    """
    flat = [(name, call) for name, made in calls.items() for call in made]
    if not flat:
        return
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator).to(outputs.device)
    cotangent[1::2] = 0
    gradients = _gradients(outputs, cotangent, [call for _, call in flat], last=False)
    reached = dict.fromkeys(calls, False)
    for (name, call), gradient in zip(flat, gradients, strict=True):
        if gradient is None:
            calls[name] = [c for c in calls[name] if c is not call]
            continue
        reached[name] = True
        if bool((gradient[1::2] != 0).any()):
            skipped[name] = (
                f"gradients of different data mix in layer {call.owner.name!r}: its first "
                "dimension is not the batch, or a later layer couples the data"
            )
    for name, any_gradient in reached.items():
        if not any_gradient:
            skipped[name] = "unused: no gradient of the outputs reaches its layer"


def _pull_back(
    calls: dict[str, list[Call]],
    loss: ResolvedLoss,
    outputs: Tensor,
    targets: Tensor,
    draws: str,
    label_draws: int,
    seed: int,
) -> dict[str, FactoredSamples]:
    columns = n_columns(draws, loss, outputs, label_draws)
    flat = [(name, call) for name, made in calls.items() for call in made]
    size = sum(call.output_shape.numel() * call.x.element_size() for _, call in flat)
    require_memory(columns * size, f"{columns} gradient columns a datum", outputs.device)
    collected: list[list[Tensor]] = [[] for _ in flat]
    cotangents = output_gradients(draws, loss, outputs, targets, label_draws, seed)
    for index, cotangent in enumerate(cotangents):
        last = index == columns - 1
        gradients = _gradients(outputs, cotangent, [call for _, call in flat], last=last)
        for store, (_, call), gradient in zip(collected, flat, gradients, strict=True):
            assert gradient is not None
            store.append(call.owner.rule.output_grads(gradient.detach()))
    n_data = outputs.shape[0]
    weight = 1.0 / (n_data * (label_draws if draws == "fisher" else 1))
    weights = torch.full((n_data,), weight, dtype=torch.float64, device=outputs.device)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for store, (name, call) in zip(collected, flat, strict=True):
        call.check()
        a = call.owner.rule.inputs(call.owner.module, call.x)
        d = torch.stack(store, dim=1)
        store.clear()
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
