"""One run: its losses, its time, and what the tracker saw."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.errors import KroneckerProbeError
from kronecker_probe.workloads import Workload, load_workload

from .methods import METHODS, matrices

STRETCH = 10  # steps from one refresh to the next, by default


@dataclass(frozen=True)
class Length:
    """How long a workload trains, and how many of its data are probed."""

    steps: int
    probe_size: int


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... that are reported.
        trials: Pairs of settings that are tried for each method.
        window: Batches whose mean loss counts.
        probes: Probed steps of a run, evenly spaced, the last at its end.
        lengths: By workload.
    """

    seeds: int
    trials: int
    window: int
    probes: int
    lengths: dict[str, Length]


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        losses: Of the batches, each before its step; infinite from where it diverged.
        seconds: Of a step.
        probes: The tracker's table; None without one.
    """

    losses: list[float]
    seconds: float
    probes: pd.DataFrame | None

    @property
    def diverged(self) -> bool:
        """Whether it did."""
        return not math.isfinite(self.losses[-1])


def train(
    name: str, method: str, settings: tuple[float, float], seed: int, preset: Preset, probes: int
) -> Run:
    """One training, with ``probes`` probed steps."""
    length = preset.lengths[name]
    workload = load_workload(name, seed)
    torch.set_num_threads(workload.threads or torch.get_num_threads())
    optimizer = METHODS[method].build(workload, *settings)
    tracker = _tracker(workload, optimizer, length, probes) if probes else None
    losses, spent = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a run that diverges
        for step in range(length.steps + 1):
            try:
                if tracker is not None:
                    tracker.step()
                if step == length.steps:
                    break
                before = time.process_time()
                loss = _step(workload, optimizer, step, seed)
            except KroneckerProbeError:
                if step == 0:  # no divergence, but a refusal
                    raise
                break
            if not math.isfinite(loss):
                break
            losses.append(loss)
            spent.append(time.process_time() - before)
    losses += [math.inf] * (length.steps - len(losses))
    return Run(losses, step_seconds(spent), None if tracker is None else tracker.table)


def _tracker(workload: Workload, optimizer: Optimizer, length: Length, probes: int) -> kp.Tracker:
    return kp.Tracker(
        workload.model,
        workload.loss_fn,
        optimizer=optimizer,
        every=[length.steps * k // probes for k in range(1, probes + 1)],
        probe=workload.probe(length.probe_size),  # the same data for all methods and seeds
        target=workload.target,
        layers=matrices(workload.model),
        approximations="identity",
        metrics="cosine",
        estimates="plugin",
        singular_values=0,
    )


def _step(workload: Workload, optimizer: Optimizer, step: int, seed: int) -> float:
    """Train on a batch; its loss before that."""
    inputs, targets = workload.batch(step, workload.batch_size, seed)
    optimizer.zero_grad()
    outputs = workload.model(inputs)
    loss = workload.loss_fn(outputs, targets)
    value = loss.item()
    if not math.isfinite(value):
        return value
    if isinstance(optimizer, optim.KroneckerOptimizer) and _is_hooked(optimizer):
        with optimizer.sampling():
            shares = torch.distributions.Categorical(logits=outputs.detach())
            drawn = shares.sample()  # type: ignore[no-untyped-call]
            workload.loss_fn(outputs, drawn).backward(retain_graph=True)  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value


def _is_hooked(optimizer: optim.KroneckerOptimizer) -> bool:
    return any(group["statistics"].rule == "kfac" for group in optimizer.param_groups)


def step_seconds(spent: Sequence[float]) -> float:
    """Of a step: the median over whole stretches of their mean, the plain mean if there is none."""
    whole = len(spent) // STRETCH * STRETCH
    if not whole:
        return float(np.mean(spent))
    return float(np.median(np.reshape(spent[:whole], (-1, STRETCH)).mean(1)))


def smoothed(losses: Sequence[float], window: int) -> NDArray[np.float64]:
    """Mean of the last ``window`` losses after that many batches and each later one."""
    return np.convolve(losses, np.full(window, 1 / window), "valid")


def steps_to(losses: Sequence[float], window: int, target: float) -> float:
    """Batches until the smoothed loss is at most ``target``; infinite if it never is."""
    reached = np.flatnonzero(smoothed(losses, window) <= target)
    return float(reached[0] + window) if len(reached) else math.inf
