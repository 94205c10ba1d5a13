"""Second moments of mini-batch mean gradients at fixed weights, from per-example samples."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.gradients.coverage import Capture
from kronecker_probe.gradients.samples.base import (
    EmbeddingSamples,
    FactoredSamples,
    GradientSamples,
    MatrixSamples,
)
from kronecker_probe.gradients.samples.checks import check_count, check_seed
from kronecker_probe.linalg.gram import chunk_rows
from kronecker_probe.linalg.memory import require_memory

BATCH_GRADIENT = "batch-gradient"

Captured = TypeVar("Captured", GradientSamples, Capture)


def batch_gradients(
    samples: Captured,
    batch_size: int,
    batches: int | None = None,
    seed: int = 0,
    replacement: bool = True,
) -> Captured:
    """The samples whose second moment is E[gbar gbar^T], gbar the mean gradient of a mini-batch.

    With g one example's gradient, mu = E[g] and c = 1/B (batches with replacement) or
    (N - B) / (B (N - 1)) (without, as in an epoch of a loader),

        E[gbar gbar^T] = c E[g g^T] + (1 - c) mu mu^T.

    ``batches=None`` gives this exactly, from the N samples and mu, without forming any batch. For
    sampled labels ("fisher") mu is zero at every input, so that the result is the same samples
    with 1/B of their weight, whatever ``replacement`` says (Morwani et al., arXiv 2406.17748); for
    given labels ("empirical-fisher"), and for samples of your own, mu is their mean.

    A number of ``batches`` forms so many from the samples at hand, sampled labels included: with B
    near N times the labels per example, the mean of these labels shows. Examples are chosen in
    proportion to their weights. A loss that normalizes by the batch, by class weights or by the
    labels that it does not ignore, does so over all N here.

    Args:
        samples: ``kp.capture`` of "empirical-fisher" or "fisher", or samples with one column per
            example.
        batch_size: B.
        batches: How many to form; None for the exact expectation.
        seed: Of the batches, the same for all parameters of a capture.
        replacement: Choose the examples of a batch with replacement.

    Returns:
        Samples, or a capture of target "batch-gradient" whose note says which batches, in factors
        or as matrices, whichever take less memory. Batches weigh 1/batches each. Neither they
        (they share the examples) nor the N + 1 samples of the expectation are ``independent``.

    Raises:
        InvalidInputError: A size out of range, unequal weights without replacement, or weights
            that are all zero.
        UnsupportedError: Samples that are no gradients of single examples: Gauss-Newton columns,
            batch gradients, gradients along a run.
        MemoryBudgetError: The result would not fit.
    """
    check_count("batch_size", batch_size)
    seed = check_seed(seed)
    if batches is not None:
        check_count("batches", batches)
    if isinstance(samples, GradientSamples):
        if samples.n_columns > 1:
            raise UnsupportedError(
                f"The samples have {samples.n_columns} columns per example, which are no gradients "
                "of a label; give one column, or the whole result of kp.capture(target='fisher')."
            )
        return _of(samples, _Batches(samples, batch_size, batches, seed, replacement), False)
    return _of_capture(samples, batch_size, batches, seed, replacement)


def _of_capture(
    samples: Capture, batch_size: int, batches: int | None, seed: int, replacement: bool
) -> Capture:
    if not isinstance(samples, Capture):
        raise InvalidInputError(
            f"batch_gradients got a {type(samples).__name__}; give GradientSamples or the result "
            "of kp.capture."
        )
    if samples.target not in ("fisher", "empirical-fisher"):
        raise UnsupportedError(
            f"batch_gradients needs gradients of single examples, and target={samples.target!r} "
            "gives none; capture with target='empirical-fisher' (true labels) or 'fisher' (sampled "
            "ones)."
        )
    formed: _Batches | None = None
    found: dict[str, GradientSamples] = {}
    for name, one in samples.items():
        formed = formed or _Batches(one, batch_size, batches, seed, replacement)
        found[name] = _of(one, formed, samples.target == "fisher")
    how = "with" if replacement else "without"
    which = "exact expectation" if batches is None else f"{batches} batches"
    note = f"batches of {batch_size} {how} replacement from {samples.target} samples, {which}"
    note = f"{samples.note}; {note}" if samples.note else note
    return dataclasses.replace(samples, samples=found, target=BATCH_GRADIENT, note=note)


@dataclass(frozen=True)
class _Members:
    """Which example, and which of its columns, each place of each batch holds; [M, B]."""

    examples: Tensor
    columns: Tensor


class _Batches:
    """How batches are drawn from N weighted examples, the same for all parameters."""

    def __init__(
        self, samples: GradientSamples, size: int, batches: int | None, seed: int, replacement: bool
    ) -> None:
        weights, count = samples.weights.cpu(), samples.n_examples
        if not samples.independent:
            raise UnsupportedError(
                "batch_gradients needs independent samples of single examples; these are a closed "
                "form or gradients along a run."
            )
        total = float(weights.sum())
        if total <= 0:
            raise InvalidInputError("All weights are zero; give at least one example a weight.")
        if not replacement and size > count:
            raise InvalidInputError(
                f"batch_size={size} without replacement from {count} examples; give at most "
                f"{count}."
            )
        if not replacement and not bool((weights == weights[0]).all()):
            raise InvalidInputError(
                "The examples have unequal weights, which batches without replacement cannot "
                "follow; use replacement=True."
            )
        self.size = size
        self.shares = weights / total
        self.noise_share = 1.0 / size  # c
        if not replacement and count > 1:
            self.noise_share = (count - size) / (size * (count - 1))
        self.members = None
        if batches is not None:
            self.members = self._draw(batches, samples.n_columns, seed, replacement)

    def _draw(self, batches: int, columns: int, seed: int, replacement: bool) -> _Members:
        shape, count = (batches, self.size), len(self.shares)
        require_memory(32 * math.prod(shape), f"{batches} batches", self.shares.device)
        generator = torch.Generator().manual_seed(seed)
        if replacement:
            places = math.prod(shape)
            examples = torch.multinomial(self.shares, places, replacement=True, generator=generator)
        else:
            orders = (torch.randperm(count, generator=generator) for _ in range(batches))
            examples = torch.cat([order[: self.size] for order in orders])
        return _Members(examples.view(shape), torch.randint(columns, shape, generator=generator))


def _of(samples: GradientSamples, batches: _Batches, zero_mean: bool) -> GradientSamples:
    if batches.members is not None:
        found = _drawn(samples, batches.members)
        found.independent = False  # they share the examples: their spread is not that of new ones
        return found
    shares = batches.shares.to(samples.device)
    if zero_mean:
        weights = shares / (batches.size * samples.n_columns)
        return samples.with_tensors(samples.tensors, weights)
    first = torch.zeros(samples.n_examples, dtype=torch.long, device=samples.device)
    mean = _as_samples(_weighted_sum(samples, shares, first), samples)
    of_examples = samples.with_tensors(samples.tensors, batches.noise_share * shares)
    found = GradientSamples.stack([of_examples, mean], [1.0, 1.0 - batches.noise_share])
    found.independent = False
    return found


def _weighted_sum(samples: GradientSamples, shares: Tensor, columns: Tensor) -> Tensor:
    """sum_i p_i G_ic with one column c for each example, float64 [m, n]."""
    m, n = samples.shape
    total = torch.zeros(m, n, dtype=torch.float64, device=samples.device)
    factored = isinstance(samples, FactoredSamples)
    width = (samples.n_positions or 0) * (m + n) if factored else samples.n_columns * m * n
    step = chunk_rows(width)
    for start in range(0, samples.n_examples, step):
        part = slice(start, min(start + step, samples.n_examples))
        places = torch.arange(part.start, part.stop, device=samples.device)
        if isinstance(samples, FactoredSamples):
            d = samples.output_grads[places, columns[part]].double()
            d = (shares[part, None, None] * d).flatten(0, 1)
            total.addmm_(d.T, samples.inputs[part].double().flatten(0, 1))
        else:
            chosen = samples.matrices(part.start, part.stop)[places - start, columns[part]]
            total += torch.einsum("k,kmn->mn", shares[part], chosen)
    return total


def _dtype(samples: GradientSamples) -> torch.dtype:
    """Of the gradients, at least float32."""
    held = next(tensor.dtype for tensor in samples.tensors if tensor.dtype.is_floating_point)
    return torch.promote_types(held, torch.float32)


def _as_samples(mean: Tensor, samples: GradientSamples) -> GradientSamples:
    """mu as one sample: factored where all samples then take less memory than as matrices."""
    dtype = _dtype(samples)
    weight = torch.ones(1, dtype=torch.float64, device=mean.device)
    if isinstance(samples, FactoredSamples):
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        rounding = torch.finfo(torch.float64).eps * max(mean.shape)
        rank = max(1, int((values > rounding * values[0]).sum()))
        if max(samples.n_positions, rank) * sum(mean.shape) <= mean.numel():
            root = values[:rank].sqrt()
            d, a = (left[:, :rank] * root).T, root[:, None] * right[:rank]
            return FactoredSamples(d[None, None].to(dtype), a[None].to(dtype), weight)
    return MatrixSamples(mean[None, None].to(dtype), weight)


def _drawn(samples: GradientSamples, members: _Members) -> GradientSamples:
    """The mean gradients of the batches, weight 1/M each."""
    examples, columns = members.examples.to(samples.device), members.columns.to(samples.device)
    (count, size), (m, n) = examples.shape, samples.shape
    weights = torch.full((count,), 1.0 / count, dtype=torch.float64, device=samples.device)
    dtype = _dtype(samples)
    positions = size * (samples.n_slots or 0)
    width = n + 1 if isinstance(samples, EmbeddingSamples) else m + n
    factored = 0 < positions * width <= m * n
    elements = positions * width if factored else m * n
    what = f"{count} mean gradients of batches of {size}"
    require_memory(count * elements * dtype.itemsize, what, samples.device)
    if isinstance(samples, EmbeddingSamples) and factored:
        d = samples.output_grads[examples, columns].flatten(1, 2) / size
        tokens = samples.tokens[examples].flatten(1, 2)
        return EmbeddingSamples(tokens, d[:, None], samples.vocabulary, weights)
    if isinstance(samples, FactoredSamples) and factored:
        d = samples.output_grads[examples, columns].flatten(1, 2) / size
        return FactoredSamples(d[:, None], samples.inputs[examples].flatten(1, 2), weights)
    values = torch.empty(count, 1, m, n, dtype=dtype, device=samples.device)
    shares = torch.full((size,), 1.0 / size, dtype=torch.float64, device=samples.device)
    for batch in range(count):
        values[batch, 0] = _weighted_sum(samples.subset(examples[batch]), shares, columns[batch])
    return MatrixSamples(values, weights)
