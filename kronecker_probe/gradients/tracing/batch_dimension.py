"""Which rows of a call belong to which example, and whether the examples of a batch stay apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronecker_probe.errors import NonFiniteError
from kronecker_probe.gradients.layers.base import Call, Layout, all_finite, layouts
from kronecker_probe.gradients.tracing.graph import Uses, account, pull_back
from kronecker_probe.gradients.tracing.record import recording

# Examples of the small forward pass that stands for the whole batch, and the batch from which on.
PART = 16
SMALLEST_PART = 8

# Powers of two by which output gradients are scaled, far from underflow in single precision.
_POWERS = 64

Candidates = list[list[Layout]]  # for each call


@dataclass(frozen=True)
class Separation:
    """Where the examples lie in each call.

    Attributes:
        layouts: Of the calls whose rows belong to one example each.
    """

    layouts: Mapping[Call, Layout]

    def problem(self, uses: Uses, n_examples: int) -> str:
        """Why the examples are not apart in a parameter's calls; empty if they are."""
        for call, _ in uses:
            if call in self.layouts:
                continue
            if not layouts(call.lead, n_examples):
                return (
                    f"layer {call.name!r} gives {list(call.output_shape)} for a batch of "
                    f"{n_examples} examples: no dimension is the batch"
                )
            return (
                f"gradients of different examples mix in layer {call.name!r}: no dimension is the "
                "batch, or a later layer couples the examples"
            )
        return ""


def separate(
    model: nn.Module,
    inputs: Tensor,
    outputs: Tensor,
    exact: Mapping[str, Uses],
    parameters: Mapping[str, nn.Parameter],
    *,
    once: bool,
) -> Separation:
    """Find the batch in every call by what its rows do as single examples' output gradients change.

    If the output gradients of the examples are scaled by different powers of two, then so must be
    their rows in every call, to the bit; or rows must vanish with the output gradients of their
    example. Every pair of examples is distinguished. A batch of more than 2 SMALLEST_PART is
    tested on a forward pass of a random part, about a tenth and at most PART examples, which must
    also reproduce the outputs of the whole up to rounding (sqrt(eps) of the largest). This can miss
    a coupling among other examples than those, or one that changes no output by that much. Where
    the part differs in any way, or a second pass would spoil the graph (``once``: the model writes
    into tensors of its own), the whole batch is tested.
    """
    calls = list(dict.fromkeys(call for made in exact.values() for call, _ in made))
    n_examples = outputs.shape[0]
    if n_examples == 1:
        # a call without rows, as of an expert without examples, has no example
        whole = {call: math.prod(call.lead) for call in calls}
        return Separation({call: Layout(1, rows) for call, rows in whole.items() if rows})
    possible = [layouts(call.lead, n_examples) for call in calls]
    if n_examples > 2 * SMALLEST_PART and not once:
        found = _by_a_part(model, inputs, outputs, exact, parameters, possible)
        if found is not None:
            return Separation(_first(calls, found))
    return Separation(_first(calls, _apart(outputs, calls, possible)))


def _first(calls: Sequence[Call], found: Candidates) -> dict[Call, Layout]:
    return {call: left[0] for call, left in zip(calls, found, strict=True) if left}


def _by_a_part(
    model: nn.Module,
    inputs: Tensor,
    outputs: Tensor,
    exact: Mapping[str, Uses],
    parameters: Mapping[str, nn.Parameter],
    possible: Candidates,
) -> Candidates | None:
    """The layouts that pass on a part of the batch; None if the part leaves any doubt."""
    size = min(PART, max(SMALLEST_PART, outputs.shape[0] // 8))
    index = _draw(outputs.shape[0], size, inputs.device)
    chosen = {name: parameters[name] for name in exact}
    try:
        with recording(model, chosen) as record:
            part = model(inputs[index].clone())
        if not _same_outputs(part, outputs, index):
            return None
        uses = account(part, record, chosen).exact
    except Exception:  # the whole batch decides, and raises if the fault is not the part's
        return None
    if {name: len(made) for name, made in uses.items()} != {
        name: len(made) for name, made in exact.items()
    }:
        return None
    pairs = {
        call: twin
        for name, made in exact.items()
        for (call, _), (twin, _) in zip(made, uses[name], strict=True)
    }
    if any(call.rule is not twin.rule for call, twin in pairs.items()):
        return None
    fitting = [
        [layout for layout in candidates if layout.fits(math.prod(twin.lead), size)]
        for candidates, twin in zip(possible, pairs.values(), strict=True)
    ]
    try:
        found = _apart(part, list(pairs.values()), fitting)
    except NonFiniteError:
        return None
    # rows that do not grow with the batch belong to no example, and only others leave a doubt
    doubt = any(fits and not left for fits, left in zip(fitting, found, strict=True))
    return None if doubt else found


def _apart(outputs: Tensor, calls: Sequence[Call], possible: Candidates) -> Candidates:
    """The layouts under which each example's rows depend on its own output gradients alone.

    Scaled output gradients decide for all pairs of examples in two or three passes. What they
    refuse may have been refused for rounding (underflow, or kernels that add in no fixed order),
    and is tested again with zeros.
    """
    if not calls:
        return []
    generator = torch.Generator("cpu").manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, device="cpu").to(outputs.device)
    found = _by_scales(outputs, cotangent, calls, possible)
    open_ = [k for k, left in enumerate(found) if possible[k] and not left]
    if open_:
        asked = [calls[k] for k in open_]
        again = _by_zeros(outputs, cotangent, asked, [possible[k] for k in open_])
        for k, left in zip(open_, again, strict=True):
            found[k] = left
    return found


def _by_scales(
    outputs: Tensor, cotangent: Tensor, calls: Sequence[Call], possible: Candidates
) -> Candidates:
    """Layouts whose rows scale exactly as the output gradients of their example do.

    Powers of two commute with rounding. Examples k and l get different powers in one of the passes,
    in which k's rows would show what they get from l.
    """
    plain = _gradients(outputs, cotangent, calls)
    index, rest = torch.arange(len(outputs), device=outputs.device), len(outputs) - 1
    while rest:
        scales = torch.ldexp(torch.ones(len(outputs), device=outputs.device), -(index % _POWERS))
        shape = (len(outputs), *[1] * (outputs.ndim - 1))
        scaled = _gradients(outputs, cotangent * scales.view(shape), calls)
        possible = [
            [one for one in candidates if call.scales_as(g, with_scales, one, scales)]
            for call, g, with_scales, candidates in zip(calls, plain, scaled, possible, strict=True)
        ]
        index, rest = index // _POWERS, rest // _POWERS
    return possible


def _by_zeros(
    outputs: Tensor, cotangent: Tensor, calls: Sequence[Call], possible: Candidates
) -> Candidates:
    """Layouts whose rows are exactly zero where the output gradients of their example are.

    The examples are split by each bit of their index, which parts every pair once, and either half
    is set to zero, because couplings have directions.
    """
    index = torch.arange(len(outputs), device=outputs.device)
    for bit in range((len(outputs) - 1).bit_length()):
        half = (index >> bit) % 2 == 1
        for zeroed in (half, ~half):
            if not any(possible):
                return possible
            masked = cotangent.clone()
            masked[zeroed] = 0
            possible = [
                [one for one in left if not bool(call.rows_of(g, one, zeroed).count_nonzero())]
                for call, g, left in zip(
                    calls, _gradients(outputs, masked, calls), possible, strict=True
                )
            ]
    return possible


def _gradients(outputs: Tensor, cotangent: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """Gradients in each call's output.

    Raises:
        NonFiniteError: One is NaN.
    """
    gradients = pull_back(outputs, cotangent, calls, last=False)
    for call, gradient in zip(calls, gradients, strict=True):
        if not all_finite(gradient) and bool(gradient.isnan().any()):
            raise NonFiniteError(
                f"The gradient in the output of layer {call.name!r} is NaN; check the "
                "layers behind it for a root or a division at zero."
            )
    return gradients


def _draw(n_examples: int, size: int, device: torch.device) -> Tensor:
    """A random part of the batch, in its order."""
    generator = torch.Generator("cpu").manual_seed(1)
    shuffled = torch.randperm(n_examples, generator=generator, device="cpu")
    return shuffled[:size].sort().values.to(device)


def _same_outputs(part: object, outputs: Tensor, index: Tensor) -> bool:
    if not isinstance(part, Tensor) or part.shape != (len(index), *outputs.shape[1:]):
        return False
    expected = outputs.detach()[index].double()
    slack = math.sqrt(torch.finfo(outputs.dtype).eps) * float(expected.abs().max())
    return float((part.detach().double() - expected).abs().max()) <= slack
