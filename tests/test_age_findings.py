"""Which staleness a run saw, and what it cost, from tables with known ages."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import kronecker_probe as kp
from kronecker_probe.findings.codes import Code, Remedy

Row = dict[str, Any]


def run_of(
    ages: dict[int, int], period: int, costs: dict[int, float] | None = None, layer: str = "fc"
) -> list[Row]:
    """A run with a refresh every ``period`` steps, probed at the steps of ``ages``."""
    rows: list[Row] = []
    for step, age in ages.items():
        row = {"parameter": layer, "step": step, "m": 4, "n": 4}
        rows.append(row | {"metric": "cosine", "approximation": "kfac", "value": 0.9,
                           "kind": "plugin", "target": "trajectory"})  # fmt: skip
        for side in (0, 1):
            rows.append(row | {"metric": "steps_since_refresh", "index": side, "value": age})
            refreshes = step // period
            rows.append(row | {"metric": "refreshes", "index": side, "value": refreshes})
        if costs is not None:
            rows.append(row | {"metric": "in_use_staleness", "value": costs[step]})
    return rows


SEEN = (Code.STALENESS_UNSEEN, Code.STALENESS_COST, Code.STALENESS_FREE)


def findings(rows: list[Row]) -> dict[Code, kp.Finding]:
    columns = ["approximation", "index", "note", "kind", "rule"]
    table = pd.DataFrame(rows)
    found = kp.diagnose(table.reindex(columns=[*table, *(set(columns) - set(table))]))
    return {one.code: one for one in found if one.code in SEEN}


@pytest.mark.parametrize("age", [0, 3])
def test_probes_in_step_with_the_refreshes_see_nothing_of_age(age: int) -> None:
    ages = {step + age: age for step in (20, 40, 80)}
    found = findings(run_of(ages, 10, dict.fromkeys(ages, 0.0)))
    assert set(found) == {Code.STALENESS_UNSEEN}
    one = found[Code.STALENESS_UNSEEN]
    assert one.evidence == {"age": age, "period": 10}
    assert one.remedy == Remedy.PROBE_ELSEWHERE
    assert one.details["layers"] == ["fc"]


def test_layers_that_are_refreshed_in_turn_have_each_their_age() -> None:
    rows = run_of({20: 0, 40: 0, 80: 0}, 10, layer="a") + run_of({20: 3, 40: 3, 80: 3}, 10)
    one = findings(rows)[Code.STALENESS_UNSEEN]
    assert one.details["layers"] == ["a", "fc"]
    assert one.evidence["age"] == 3


def test_a_last_probe_out_of_step_does_not_hide_that_old_ones_were_not_seen() -> None:
    ages = {20: 0, 40: 0, 41: 1}
    assert set(findings(run_of(ages, 10, dict.fromkeys(ages, 0.0)))) == {Code.STALENESS_UNSEEN}


def test_the_oldest_age_alone_is_enough() -> None:
    ages = {29: 9, 49: 9, 89: 9}
    found = findings(run_of(ages, 10, dict.fromkeys(ages, 0.03)))
    assert set(found) == {Code.STALENESS_COST}


def test_a_refresh_in_every_step_leaves_nothing_unseen() -> None:
    ages = {20: 0, 40: 0, 80: 0}
    assert findings(run_of(ages, 1, dict.fromkeys(ages, 0.0))) == {}


def test_tests_that_found_no_refresh_needed_count_as_looks() -> None:
    """Tested every 5 steps, refreshed twice: an age is that since the last test."""
    rows = run_of({10: 0, 40: 0, 80: 0}, 40, {10: 0.0, 40: 0.0, 80: 0.0})
    rows += [{"parameter": "fc", "step": step, "metric": "tests", "index": 0, "value": step // 5}
             for step in (10, 40, 80)]  # fmt: skip
    assert findings(rows)[Code.STALENESS_UNSEEN].evidence["period"] == 5


def test_the_largest_cost_of_age_is_told_with_its_age() -> None:
    first = run_of({11: 1, 25: 5, 39: 9}, 10, {11: 0.0, 25: 0.04, 39: 0.02}, "a")
    second = run_of({11: 1, 25: 5, 39: 9}, 10, {11: -0.1, 25: 0.05, 39: 0.143}, "b")
    one = findings(first + second)[Code.STALENESS_COST]
    assert (one.details["layer"], one.details["step"]) == ("b", 39)
    assert one.remedy == Remedy.REFRESH
    assert one.evidence == {"cost": 0.143, "age": 9.0, "oldest": 9.0}


def test_a_negligible_cost_is_told_up_to_the_oldest_age() -> None:
    one = findings(run_of({11: 1, 27: 7}, 10, {11: 0.0, 27: 0.001}))[Code.STALENESS_FREE]
    assert one.evidence == {"cost": 0.001, "oldest": 7}
    assert one.remedy == Remedy.NO_REFRESH


def test_costs_that_are_within_the_statistics_are_no_costs_of_age() -> None:
    costs = {11: math.nan, 27: math.nan}
    assert findings(run_of({11: 1, 27: 7}, 10, costs)) == {}
    assert set(findings(run_of({20: 0, 40: 0}, 10, {20: math.nan, 40: math.nan}))) == {
        Code.STALENESS_UNSEEN
    }


@pytest.mark.parametrize("every", [4, 3])
def test_of_a_real_run(every: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, targets = torch.randn(40, 5), torch.randint(0, 3, (40,))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = kp.optim.Shampoo(model.parameters(), lr=0.01, basis={"frequency": 4, "start": 4})
    tracker = kp.Tracker(
        model, loss_fn, optimizer=optimizer, probe=(inputs, targets), every=every,
        layers="0.weight", estimates="plugin",
    )  # fmt: skip
    for _ in range(13):
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        tracker.step()
        optimizer.step()
    (code,) = {one.code for one in kp.diagnose(tracker.table)} & set(SEEN)
    assert (code == Code.STALENESS_UNSEEN) == (every == 4)
