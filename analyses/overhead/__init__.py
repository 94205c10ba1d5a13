"""What does an optimizer cost beside AdamW, where does the time go, and which knob lowers it?

Distributed Shampoo (arXiv 2309.06497) claims at most 10% over the time of a step at realistic
batches. Here a training step is forward and backward, and these parts of the optimizer's step:

- ``statistics``: of factors, of grafting, and of vectors, which have their diagonal alone;
- ``refresh``: roots or bases;
- ``application``: directions, grafting, writing weights; second moments in a basis, too, as they
  are of rotated gradients;
- ``other``: what the timers leave: checks of gradients, cutting into blocks, bookkeeping.

Optimizers step in turn, with the gradients of one forward and backward pass on weights of their
own. Steps with and without a refresh alternate and are kept apart: with refreshes every F steps a
step takes plain + (refresh - plain) / F on average. Whole trainings without timers inside test
this at one F. AdamW is torch's with foreach; its step is one part, ``update``. Data are random:
times do not depend on them, but for the iterations of roots by products.

The table (overhead.csv) has one number a row: medians of each seed in ms (``step`` "plain" or
"refresh"; "direct" for trainings), and all that is drawn, in percent of AdamW's whole step ("mean",
"direct"). ``block_size`` 0 is none. ``python -m analyses.overhead`` also takes ``--device``
(default: cpu) and ``--threads`` (1).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd
import torch
from rich.progress import track
from torch import nn

from kronecker_probe.cli.analysis import Script
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.tracking.training import torch_device

from .figure import draw
from .steps import (
    ADAMW,
    CYCLE,
    METHODS,
    NAME,
    PROBLEMS,
    Key,
    Row,
    build,
    clock,
    machine,
    posed,
    timed_step,
)
from .tables import USUAL, drawn, sentences


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... of models and data, with all timings.
        sizes: Which of the batch sizes, with that at which knobs are turned.
        blocks: Block sizes.
        intervals: F, with 10 and 100.
        cycles: Steps of each kind that are timed.
        methods: Optimizers.
        device: Of torch.
        threads: Of the CPU.
    """

    seeds: int
    sizes: slice
    blocks: tuple[int, ...]
    intervals: tuple[int, ...]
    cycles: int
    methods: tuple[str, ...] = tuple(METHODS)
    device: str = "cpu"
    threads: int = 1


PRESETS = {
    "quick": Preset(1, slice(1, 3), (128,), (1, 10, 100), 1, ("Shampoo", "Muon")),
    "default": Preset(2, slice(None), (64, 256), (5, 10, 20, 100), 3),
}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: milliseconds of parts and trainings, and percents of AdamW's step."""
    device = torch_device(preset.device)
    torch.set_num_threads(preset.threads)
    rows: list[Row] = []
    cells = [(name, size) for name, one in PROBLEMS.items() for size in one.sizes[preset.sizes]]
    for seed, (name, size) in track(list(itertools.product(range(preset.seeds), cells))):
        shared = {"seed": seed, "model": name, "batch_size": size}
        rows += (shared | row for row in parts(name, size, seed, preset, device))
        if size == PROBLEMS[name].reference:
            rows += (shared | row for row in direct(name, seed, preset, device))
    measured = pd.DataFrame(rows)
    table = pd.concat([measured.assign(unit="ms"), drawn(measured, preset.intervals)])
    return table.assign(machine=machine(device))


def parts(name: str, size: int, seed: int, preset: Preset, device: torch.device) -> Iterator[Row]:
    """Medians of the parts of both kinds of steps, of one model and batch."""
    model, run = posed(name, size, seed, device)
    keys: list[Key] = [(method, 0) for method in (ADAMW, *preset.methods)]
    if size == PROBLEMS[name].reference:
        knobs = [method for method in preset.methods if METHODS[method].knobs]
        keys += itertools.product(knobs, preset.blocks)
    params = {key: [nn.Parameter(p.detach().clone()) for p in model.parameters()] for key in keys}
    optimizers = {key: build(key, params[key], CYCLE) for key in keys}
    found: dict[tuple[Key, str, str], list[float]] = defaultdict(list)
    passes: list[float] = []
    for step in range(1 + CYCLE * preset.cycles):  # the first one makes the state
        passes.append(clock(run, device))
        for key, optimizer in optimizers.items():
            for own, param in zip(params[key], model.parameters(), strict=True):
                own.grad = param.grad
            for part, value in timed_step(optimizer, device).items():
                if step:
                    found[key, "plain" if step % CYCLE else "refresh", part].append(value)
    for key, kind in itertools.product(keys, ("plain", "refresh")):  # one pass for all of them
        found[key, kind, "forward_backward"] = passes[1:]
    for ((method, block), kind, part), values in found.items():
        yield {"optimizer": method, "block_size": block, "step": kind, "measured": part,
               "value": statistics.median(values)}  # fmt: skip


def direct(name: str, seed: int, preset: Preset, device: torch.device) -> Iterator[Row]:
    """Mean steps of whole trainings over an interval, in turn, without timers inside."""
    spent: dict[str, float] = defaultdict(float)
    trainings = {}
    for method in (ADAMW, *preset.methods):
        model, run = posed(name, PROBLEMS[name].reference, seed, device)
        trainings[method] = run, build((method, 0), list(model.parameters()), USUAL).step
    for step in range(1 + USUAL):  # the first refreshes, and so does the last
        for method, calls in trainings.items():
            taken = clock(lambda calls=calls: [call() for call in calls], device)  # type: ignore[misc]
            spent[method] += taken * (step > 0)
    for method, total in spent.items():
        yield {"optimizer": method, "block_size": 0, "interval": USUAL, "step": "direct",
               "measured": "step", "value": total / USUAL}  # fmt: skip


def main() -> None:
    """The script, with a device and a number of threads."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    chosen, others = parser.parse_known_args()
    if chosen.threads < 1:
        parser.error(f"--threads {chosen.threads}: give at least 1")
    try:
        torch_device(chosen.device)
    except InvalidInputError as error:
        parser.error(str(error))
    presets = {name: replace(one, **vars(chosen)) for name, one in PRESETS.items()}
    replace(SCRIPT, presets=presets).main(others)


SCRIPT = Script(NAME, __doc__.splitlines()[0], PRESETS, collect, draw, sentences)
