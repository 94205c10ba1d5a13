"""Approximation error along a short training run, pinned; and how to pin that of your own model.

A change of the numbers below is a change of what the library measures, or of how the optimizer
trains. To pin a model of yours, copy this file and replace ``train``:

1. Fix all that the run depends on: data, initial weights, order of batches, one thread. Weights
   come from NumPy's RandomState, whose stream never changes, because torch may draw others in
   another version.
2. Measure a fixed probe set at a few steps (``kp.Tracker`` in memory).
3. Give a table per step to ``dataframe_regression`` (pytest-regressions), which keeps it as a CSV
   file beside the test. ``pytest --force-regen`` writes the files anew: read their diff.
4. Choose tolerances by measuring what must not matter, as told at ``TOLERANCES``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from pytest_regressions.dataframe_regression import DataFrameRegressionFixture
from sklearn.datasets import load_digits
from torch import nn

import kronecker_probe as kp

STEPS = 120

# Probed step -> relative tolerance. Largest relative change of any number, over 1 and 2 threads,
# float64 instead of float32, vector instructions off, AVX2 instead of AVX-512, and initial
# weights changed by a factor of 1 +- 1e-7:
#   step 0: 2e-7 (one measurement in float32); step 10: 1e-6 (nine steps of Adam before it);
#   from step 30 on: 2e-3, because the inverse roots of factors of few gradients amplify rounding.
# Five times that or more, so that another machine passes; a wrong formula is off by far more.
TOLERANCES = {0: 1e-5, 10: 1e-5, 30: 1e-2, 60: 1e-2, STEPS: 1e-2}


def train() -> pd.DataFrame:
    """A 64-128-64-10 network on handwritten digits, with Shampoo; returns the tracker's table."""
    random = np.random.RandomState(0)
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    targets = torch.tensor(digits.target)

    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    for layer in model[::2]:
        bound = layer.in_features**-0.5
        for parameter in layer.parameters():
            values = random.uniform(-bound, bound, size=tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(values))

    loss_fn = nn.CrossEntropyLoss()
    optimizer = kp.optim.Shampoo(model.named_parameters(), lr=1e-3)
    probe = inputs[:128], targets[:128]
    tracker = kp.Tracker(model, loss_fn, optimizer=optimizer, every=TOLERANCES, probe=probe)
    for _ in range(STEPS):
        batch = torch.from_numpy(random.permutation(len(inputs))[:128])
        loss_fn(model(inputs[batch]), targets[batch]).backward()
        tracker.step()
        optimizer.step()
        optimizer.zero_grad()
    tracker.finish()
    return tracker.table


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("step", TOLERANCES)
def test_approximation_error_is_what_it_was(
    table: pd.DataFrame, step: int, dataframe_regression: DataFrameRegressionFixture
) -> None:
    plugin = table[(table["kind"] == "plugin") & (table["step"] == step)]
    scores = plugin[plugin["approximation"].notna()]
    wide = scores.pivot(index=["parameter", "approximation"], columns="metric", values="value")
    wide = wide[["cosine", "relative_error"]].dropna(subset="cosine")  # no live operator at first
    wide.index = pd.Index([" ".join(pair) for pair in wide.index], dtype=object)
    dataframe_regression.check(
        wide,
        basename=f"step_{step:03d}",
        default_tolerance={"rtol": TOLERANCES[step], "atol": 0.0},
    )


def test_the_network_learned_something(table: pd.DataFrame) -> None:
    """The pinned numbers are those of training, from a random network to a good one."""
    accuracy = table[table["metric"] == "probe_accuracy"].set_index("step")["value"]
    assert accuracy[0] < 0.2
    assert accuracy[STEPS] > 0.9
