"""Which fresh rule a live operator follows, as the tracker's table says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import kronecker_probe as kp

LOSS = nn.CrossEntropyLoss()
LAYERS = ["0.weight", "2.weight"]

Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)


def whole_table(make: Make) -> pd.DataFrame:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = make(model.parameters())
    tracker = kp.Tracker(model, LOSS, optimizer=optimizer, every=1, layers=LAYERS)
    for step in range(3):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        LOSS(model(inputs), targets).backward()
        tracker.step((inputs, targets))
        optimizer.step()
    return tracker.table


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "shampoo"),
        ({"spectrum": {"exponent": -0.25}}, "shampoo"),
        ({"spectrum": {"exponent": -0.5}}, "shampoo-squared"),
        ({"spectrum": {"exponent": -0.125}}, None),
        # one factor with the power -1/2, which is L and neither of the two
        ({"shapes": {"max_dim": 5}}, None),
        ({"shapes": {"block_size": 4}}, None),
        ({"spectrum": {"eigenvalues": "corrected"}}, "eigen-corrected"),
        ({"statistics": {"rule": "whitened"}, "spectrum": {"exponent": -0.5}}, "divergence:q=0"),
    ],
)
def test_the_table_names_the_rule_that_the_live_operator_follows(
    options: dict[str, Any], rule: str | None
) -> None:
    def make(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        return kp.optim.Shampoo(params, lr=1e-2, basis={"frequency": 1}, **options)

    table = whole_table(make)
    rows = table[(table["metric"] == "in_use_rule") & (table["parameter"] == LAYERS[0])]
    whole = rows[rows["block_size"].isna() & rows["rule"].notna()]
    assert set(whole["rule"]) == (set() if rule is None else {rule})
    assert set(whole["step"]) == (set() if rule is None else {1, 2})
    size = options.get("shapes", {}).get("block_size")
    assert set(rows["block_size"].dropna()) == (set() if size is None else {size})


def test_no_rule_is_named_for_another_optimizer() -> None:
    table = whole_table(lambda params: torch.optim.Adam(params, lr=1e-2))
    assert "in_use_rule" not in set(table["metric"])


@pytest.mark.parametrize("exponent", [None, -0.5])
def test_an_undamped_live_operator_is_the_fresh_rule(exponent: float | None) -> None:
    """At its first refresh Shampoo holds the one gradient that the window does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    optimizer = kp.optim.Shampoo(
        model.parameters(), lr=0.0, epsilon=1e-14, basis={"frequency": 1},
        spectrum={"exponent": exponent},
    )  # fmt: skip
    tracker = kp.Tracker(
        model, LOSS, optimizer=optimizer, every=[1], layers=LAYERS[0], target="trajectory",
        window_tolerance=0.0,
    )  # fmt: skip
    inputs, targets = batch(0)
    for _ in range(2):
        optimizer.zero_grad()
        LOSS(model(inputs.double()), targets).backward()
        tracker.step()
        optimizer.step()
    table = tracker.table
    rule = str(table.loc[table["metric"] == "in_use_rule", "rule"].iloc[0])
    values = table[table["metric"] == "cosine"].set_index("approximation")["value"]
    assert values["in-use"] == pytest.approx(values[rule], rel=1e-5)
    other = "shampoo" if rule == "shampoo-squared" else "shampoo-squared"
    assert abs(values["in-use"] - values[other]) > 1e-3
