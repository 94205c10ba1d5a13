"""Which methods train fastest at equal tuning, and does a better approximation train faster?

A small convolutional network (digits-cnn) and a small GPT (pydoc-gpt) are trained by SGD, AdamW and
every preset of ``kronecker_probe.optim``, all with the same budget:

- Trials: each method gets the same number of pairs of a learning rate and one more setting, drawn
  at random, one in each equal part of the range of either (in the logarithm). The range of the rate
  is 1e-4 to 1 for all. The second setting is 1 - beta2 in .001 to .1 where a method has a beta2,
  else what METHODS says: SGD and AdaGradRootFree their momentum, K-FAC and EK-FAC the damping (a
  tenth to ten times their default), InverseFreeShampoo the rate of its inverse factors, Muon the
  rate of the Adam that has the embeddings, the head and the vectors. All other options are the
  presets' defaults, without weight decay; B of root-free methods is the batch size.
- Choice: all trials run on one seed that is not reported, and the one with the least final loss
  goes on. A loss is that of training batches, each before its step: the mean of the last few.
- Seeds: the chosen pair trains on the reported seeds, each of model, batches and sampled labels.
- Target: the median final loss of AdamW. ``steps`` is the first step at which the loss is at most
  that, infinite ("not reached") where it never is; a run that diverges (a loss, a gradient or a
  factor that is not finite) has an infinite loss from there on. Neither is ever left out: medians
  are over all seeds.
- Seconds: steps times the CPU seconds of a step, forward and backward passes included, the
  tracker's own excluded: the median over stretches of ten steps, the interval of refreshes, of
  their mean.
- Cosine: ``kp.Tracker`` rides along on these seeds, with the workload's own target (the
  Gauss-Newton matrix, for the GPT the Fisher matrix), and scores what the optimizer holds. SGD
  holds nothing; its P is the identity. The number is the median over matrices, probed steps and
  seeds.

K-FAC and EK-FAC take their statistics from labels that are sampled from the model; what is of no
layer of theirs (the GPT's embeddings and norms) has Adam at its default rate.

The table (training.csv) has one number a row: the ``workload``, the ``method``, what was
``measured``, and whatever else varies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from rich.progress import track

from kronecker_probe.cli.analysis import Script

from .figure import draw
from .methods import METHODS, Row
from .runs import Length, Preset, Run, smoothed, steps_to, train
from .tables import NAME, RATES, REFERENCE, sentences

SEARCH_SEED = 1000  # none of those that are reported

PRESETS = {
    "quick": Preset(1, 2, 2, 1, {"digits-cnn": Length(11, 8), "pydoc-gpt": Length(3, 4)}),
    "default": Preset(5, 10, 20, 2, {"digits-cnn": Length(200, 128), "pydoc-gpt": Length(125, 64)}),
}


def places(trials: int) -> list[tuple[float, float]]:
    """Where the trials lie in both ranges, in [0, 1): one in each equal part of either."""
    generator = torch.Generator().manual_seed(SEARCH_SEED)
    drawn = torch.rand(trials, 2, generator=generator).tolist()
    order = torch.randperm(trials, generator=generator).tolist()
    return [
        ((k + u) / trials, (other + v) / trials)
        for k, (other, (u, v)) in enumerate(zip(order, drawn, strict=True))
    ]


def within(place: float, low: float, high: float) -> float:
    """A place in [0, 1) as a value of a logarithmic range."""
    return low * math.pow(high / low, place)


def collect(preset: Preset) -> pd.DataFrame:
    """The table: trials, seeds and probes of both workloads, one number a row."""
    rows: list[Row] = []
    for name in preset.lengths:
        runs: dict[str, list[Run]] = {}
        for method in track(METHODS, description=name):
            shared = {"workload": name, "method": method, "tuned": METHODS[method].tuned}
            trials = list(search(name, method, preset))
            rows += (shared | row for row in trials)
            best = chosen(trials)
            runs[method] = [
                train(name, method, best, seed, preset, preset.probes)
                for seed in range(preset.seeds)
            ]
            given = shared | dict(zip(("lr", "setting"), best, strict=True))
            for seed, run in enumerate(runs[method]):
                rows += (given | {"seed": seed} | row for row in _of_run(run, preset.window))
        finals = [float(smoothed(run.losses, preset.window)[-1]) for run in runs[REFERENCE]]
        target = float(np.median(finals))
        rows.append({"workload": name, "measured": "target", "value": target})
        for method, found in runs.items():
            for seed, run in enumerate(found):
                steps = steps_to(run.losses, preset.window, target)
                row = {"workload": name, "method": method, "seed": seed}
                rows.append(row | {"measured": "steps", "value": steps})
                rows.append(row | {"measured": "seconds", "value": steps * run.seconds})
    return pd.DataFrame(rows)


def search(name: str, method: str, preset: Preset) -> Iterator[Row]:
    """Final losses of the trials."""
    how = METHODS[method]
    for trial, (one, other) in enumerate(places(preset.trials)):
        lr, setting = within(one, *RATES), within(other, how.low, how.high)
        run = train(name, method, (lr, setting), SEARCH_SEED, preset, 0)
        final = smoothed(run.losses, preset.window)[-1]
        yield {"seed": SEARCH_SEED, "trial": trial, "lr": lr, "setting": setting,
               "measured": "trial", "value": float(final)}  # fmt: skip


def chosen(trials: Sequence[Row]) -> tuple[float, float]:
    """Learning rate and second setting of the least final loss; the lowest rate of equal ones."""
    best = min(trials, key=lambda row: (row["value"], row["lr"]))
    return best["lr"], best["setting"]


def _of_run(run: Run, window: int) -> Iterator[Row]:
    yield {"measured": "final_loss", "value": float(smoothed(run.losses, window)[-1])}
    yield {"measured": "step_seconds", "value": run.seconds}
    yield {"measured": "diverged", "value": float(run.diverged)}
    if run.probes is not None:
        probes = run.probes[run.probes["metric"] == "cosine"]
        for _, one in probes.iterrows():
            row = {"step": one["step"], "parameter": one["parameter"]}
            yield row | {"measured": f"cosine_{one['approximation']}", "value": one["value"]}


SCRIPT = Script(NAME, __doc__.splitlines()[0], PRESETS, collect, draw, sentences)
