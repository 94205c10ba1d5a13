"""A user's layer rule against autograd: its samples must add up to the gradient of the batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.assemble import Extent, block_for
from kronecker_probe.gradients.layers.base import matrix_shape
from kronecker_probe.gradients.layers.modules import ModuleRule
from kronecker_probe.gradients.tracing.graph import Uses, pull_back


def check_module_rules(
    outputs: Tensor, exact: Mapping[str, Uses], chosen: Mapping[str, nn.Parameter]
) -> dict[str, str]:
    """Which parameters a user's layer rule leaves out, and why.

    The rules are checked by autograd, at random output gradients of either half of the examples.

    Raises:
        InvalidInputError: Samples that a rule gives are not those of the parameter; it is named.
    """
    gaps: dict[str, str] = {}
    ruled: dict[str, Uses] = {}
    for name, uses in exact.items():
        rules = [(call.rule, call, role) for call, role in uses]
        found = [rule.gap(role, call) for rule, call, role in rules if isinstance(rule, ModuleRule)]
        if any(found):
            gaps[name] = next(filter(None, found))
        elif found:
            ruled[name] = uses
    if not ruled:
        return gaps
    generator = torch.Generator("cpu").manual_seed(3)
    cotangent = torch.randn(outputs.shape, generator=generator, device="cpu").to(outputs)
    odd = torch.arange(len(outputs), device=outputs.device) % 2 == 1
    for silent in (odd, ~odd):
        masked = cotangent.clone()
        masked[silent] = 0
        for name, uses in ruled.items():
            _check_sum(outputs, masked, silent, name, uses, chosen[name])
    return gaps


def _check_sum(
    outputs: Tensor, cotangent: Tensor, silent: Tensor, name: str, uses: Uses, parameter: Tensor
) -> None:
    """Whether the samples add up to the gradient of <outputs, cotangent>, without silent ones."""
    calls = list(dict.fromkeys(call for call, _ in uses))
    gradients = pull_back(outputs, cotangent, calls, last=False)
    (expected,) = torch.autograd.grad(outputs, parameter, cotangent, retain_graph=True)
    block = block_for(uses, matrix_shape(parameter), Extent(len(outputs), 1))
    block.add(0, dict(zip(calls, gradients, strict=True)))
    samples = block.samples(torch.ones(len(outputs), dtype=torch.float64, device=outputs.device))
    total = torch.zeros(samples.shape, dtype=torch.float64, device=outputs.device)
    square = stray = 0.0
    for i in range(samples.n_examples):
        g = samples.matrices(i, i + 1)[0, 0]
        total += g
        square += float(g.square().sum())
        stray = max(stray, float(g.abs().max()) if silent[i] else 0.0)
    size = square**0.5 + float(torch.linalg.vector_norm(expected.double()))
    error = float(torch.linalg.vector_norm(total - expected.double().view(total.shape)))
    eps = max(torch.finfo(kind).eps for kind in (expected.dtype, outputs.dtype))
    if stray > 0 or not error <= eps ** (2 / 3) * size:
        rule = next(call.rule for call, _ in uses if isinstance(call.rule, ModuleRule))
        what = "the sample of an example changes with the output gradients of others"
        if not stray:
            what = f"they add up to the gradient of the batch only up to {error / size:.2g} of it"
        raise InvalidInputError(
            f"The layer rule of {rule.kind.__name__} gives wrong samples of {name!r}: {what}. "
            "Correct the function that kp.register_layer_rule got."
        )
