"""Part "training" of ``root_free``: an equal search for every method, and what it found."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .methods import METHODS, SEARCH_SEED, Preset, Row, trained, workload_of

RATES = (1e-4, 1.0)  # the range of the search
POINTS = 20  # of a loss curve


def rates(trials: int) -> list[float]:
    """The learning rates of the search, the same for every method."""
    low, high = (math.log(rate) for rate in RATES)
    drawn = torch.rand(trials, generator=torch.Generator().manual_seed(SEARCH_SEED))
    places = [(k + float(u)) / trials for k, u in enumerate(drawn)]
    return [math.exp(low + (high - low) * place) for place in places]


def measure_training(name: str, method: str, preset: Preset) -> Iterator[Row]:
    """The search, and the loss curves of its best rate.

    Args:
        name: The workload.
        method: One of ``METHODS``.
        preset: How much.
    """
    steps = preset.steps[name]
    shared = {"workload": name, "method": method}
    found = []
    for lr in rates(preset.trials):
        final = list(curve(name, method, lr, SEARCH_SEED, (steps,)))
        found.append((final[0][1], lr))
        yield shared | {"seed": SEARCH_SEED, "measured": "trial", "lr": lr, "value": final[0][1]}
    best = min(found)[1]
    at = (*range(0, steps, max(1, steps // POINTS)), steps)
    for seed in range(preset.seeds):
        for step, loss in curve(name, method, best, seed, at):
            row = {"seed": seed, "measured": "loss", "lr": best, "step": step, "value": loss}
            yield shared | row


def curve(
    name: str, method: str, lr: float, seed: int, at: tuple[int, ...]
) -> Iterator[tuple[int, float]]:
    """Training loss at some steps."""
    workload = workload_of(name, seed)
    named = list(workload.model.named_parameters())
    optimizer = METHODS[method].build(named, lr, workload.batch_size)
    return trained(workload, optimizer, seed, at)
