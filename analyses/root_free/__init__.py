"""What changes when adaptive methods drop the square root?

A root-free method divides by the estimate of the curvature H itself, not by its root (Lin et al.,
2024, arXiv 2402.03496). Four measurements:

- ``training``: a network with two convolutions learns ten digits, and a small GPT learns text, by
  methods with the root and without it. Each gets the same learning rates, one drawn at random in
  each equal part of the range 1e-4 to 1 (in the logarithm) and tried on a seed of its own; the one
  with the least final loss then trains on the other seeds. Everything else is the same: a momentum
  of .9, statistics that decay by .99, no weight decay. The GPT's loss is that of a fixed sample.
- ``batch``: at fixed weights, the mean of the second moment s that the optimizer holds, for batches
  of B data drawn with replacement. s averages B g^2, with g the mean gradient of the batch. At
  labels sampled from the model its expectation is diag(H_GN) for every B; without the factor B it
  is that over B. At true labels the mean gradient mu enters: B E[g^2] = E[g_1^2] + (B - 1) mu^2.
- ``invariance``: weights w = D v are trained as v, from the same start and on the same batches. The
  number is the distance of D v from the run that trains w itself, relative to how far that got.
  D is a random diagonal matrix for diagonal methods, and a Kronecker product of two for factored
  ones. What a method holds at the start is mapped as well, so that nothing but its rule matters.
- ``precision``: the GPT by InverseFreeShampoo with its whole state in bfloat16, and by Shampoo and
  RootFreeShampoo with inverse roots and inverses computed in it (``root_free/precision.py``).

The table (root_free.csv) has one number a row: a ``part``, the ``workload``, the ``method``, what
was ``measured`` (distances and residuals as their log10), and whatever else the part varies.
"""

from __future__ import annotations

import pandas as pd
from rich.progress import track

from kronecker_probe.cli.analysis import Script

from .batch import SCALINGS, batches
from .coordinates import COMPARED, invariance
from .figure import draw
from .methods import CNN, GPT, METHODS, SEARCH_SEED, Preset, Row
from .precision import measure_precision
from .sentences import sentences
from .tables import best_rates, by_precision, changes, curves, distances, second_moments
from .training import RATES, measure_training, rates

NAME = "root_free"

__all__ = [
    "CNN",
    "COMPARED",
    "GPT",
    "METHODS",
    "RATES",
    "SCALINGS",
    "SCRIPT",
    "SEARCH_SEED",
    "Preset",
    "best_rates",
    "by_precision",
    "changes",
    "collect",
    "curves",
    "distances",
    "rates",
    "second_moments",
]

PRESETS = {
    "quick": Preset(
        seeds=1,
        trials=4,
        steps={CNN: 40, GPT: 16},
        sizes=(1, 16, 256),
        draws=200,
        data=256,
        compared=30,
        dampings=(1e-2, 1e-3, 1e-6),
    ),
    "default": Preset(
        seeds=3,
        trials=12,
        steps={CNN: 200, GPT: 150},
        sizes=(1, 4, 16, 64, 256),
        draws=400,
        data=512,
        compared=30,
        dampings=(1e-2, 1e-3, 1e-4, 1e-6),
    ),
}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: all four parts, one number a row."""
    rows: list[Row] = []
    for workload in (CNN, GPT):
        for method in track(METHODS, description=f"training of {workload}"):
            rows += (
                {"part": "training"} | row for row in measure_training(workload, method, preset)
            )
    for seed in track(range(preset.seeds), description="batch sizes and coordinates"):
        shared = {"workload": CNN, "seed": seed}
        for part, measure in (("batch", batches), ("invariance", invariance)):
            rows += ({"part": part} | shared | row for row in measure(seed, preset))
    found = best_rates(pd.DataFrame(rows), GPT)
    runs = track(measure_precision(found, preset), description="precision", total=None)
    rows += ({"part": "precision"} | row for row in runs)
    return pd.DataFrame(rows)


SCRIPT = Script(NAME, __doc__.splitlines()[0], PRESETS, collect, draw, sentences)
