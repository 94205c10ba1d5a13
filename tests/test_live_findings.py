"""What is found of the preconditioner in use, from tables with known answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import kronecker_probe as kp
from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.optim.presets import PRESETS

Row = dict[str, Any]
STEP = 9
OWN = "in-use"
PRODUCTS = {"optimal": 0.95, "shampoo-squared": 0.945}
# 1 - .3^2 = .91, of which .1 is the best product's own (1 - .95^2 = .0975)
LIVE = 0.3
SPLITS = {
    "rule": {"in_use_fresh": 0.6975, "in_use_statistics": 0.2, "in_use_damping": 0.01,
             "in_use_staleness": 0.0025},
    "blocks": {"in_use_fresh": 0.1, "in_use_blocking": 0.5, "in_use_statistics": 0.3,
               "in_use_damping": 0.01, "in_use_staleness": 0.0},
    "statistics": {"in_use_fresh": 0.1, "in_use_statistics": 0.6, "in_use_damping": 0.2,
                   "in_use_staleness": 0.01},
    "damping": {"in_use_fresh": 0.1, "in_use_statistics": 0.21, "in_use_damping": 0.6,
                "in_use_staleness": 0.0},
    "staleness": {"in_use_fresh": 0.1, "in_use_statistics": 0.31, "in_use_damping": -0.1,
            "in_use_staleness": 0.6},
}  # fmt: skip


def rows_of(
    cosines: Mapping[str, float], layer: str = "fc", kind: str = "population", **more: Any
) -> list[Row]:
    row = {"parameter": layer, "metric": "cosine", "kind": kind, "m": 8, "n": 6, "step": STEP,
           "stderr": 0.002 if kind == "population" else math.nan, "n_examples": 256, "n_eff": 200.0,
           "target": "ggn"} | more  # fmt: skip
    return [row | {"approximation": name, "value": value} for name, value in cosines.items()]


def inside(values: Mapping[str, float], layer: str = "fc", **more: Any) -> list[Row]:
    row = {"parameter": layer, "step": STEP, "m": 8, "n": 6} | more
    return [row | {"metric": metric, "value": value} for metric, value in values.items()]


def follows(rule: str, layer: str = "fc") -> Row:
    return {"parameter": layer, "step": STEP, "metric": "in_use_rule", "value": math.nan,
            "rule": rule}  # fmt: skip


def diagnose(rows: Sequence[Row]) -> kp.Diagnosis:
    columns = ["approximation", "index", "note", "kind", "rule"]
    table = pd.DataFrame(rows)
    return kp.diagnose(table.reindex(columns=[*table, *(set(columns) - set(table))]))


def own(rows: Sequence[Row]) -> list[kp.Finding]:
    """The findings about what is held."""
    return [one for one in diagnose(rows) if one.code.startswith(OWN)]


def both(held: float = LIVE, layer: str = "fc", **more: Any) -> list[Row]:
    """Population and plug-in numbers, of which the split is one of the latter."""
    return rows_of(PRODUCTS | {"in-use": held}, layer, **more) + rows_of(
        PRODUCTS | {"in-use": held}, layer, "plugin", **more
    )


def test_what_is_far_below_the_best_product_is_told_without_a_rule() -> None:
    (one,) = own(both(0.041))
    assert (one.level, one.code) == ("warning", Code.IN_USE_UNEXPLAINED)
    assert one.remedy == Remedy.TARGET_TRAJECTORY
    assert one.evidence == pytest.approx({"gap": 0.909, "in-use": 0.041})
    assert one.details["short"].than == "optimal"


@pytest.mark.parametrize(("held", "level"), [(0.3, "warning"), (0.6, "notice"), (0.93, None)])
def test_how_far_it_is_decides_the_level(held: float, level: str | None) -> None:
    assert [one.level for one in own(both(held))] == ([level] if level else [])


def test_nothing_is_good_where_the_live_operator_is_far() -> None:
    rows = both(0.041) + both(0.94, "other")
    found = diagnose(rows)
    of_layer = {one.parameter: one for one in found if one.subject == "distance to the optimum"}
    assert (of_layer["fc"].level, of_layer["fc"].code) == ("notice", Code.CLOSE_NOT_IN_USE)
    assert of_layer["other"].level == "good"
    run = next(one for one in found if one.subject == "worst approximated layers")
    assert (run.level, run.code, run.details["worse"]) == ("notice", Code.FORM_FITS, ["fc"])
    assert not [one for one in found if one.level == "good" and one.parameter != "other"]
    fine = diagnose(both(0.94) + both(0.94, "other"))
    assert {one.level for one in fine} == {"good"}


def test_the_worst_layer_comes_first() -> None:
    held = {"a": 0.4, "b": 0.1, "c": 0.2, "d": 0.94}
    found = own([row for layer, value in held.items() for row in both(value, layer)])
    assert [one.parameter for one in found] == ["b", "c", "a"]
    lines = str(diagnose([row for layer, value in held.items() for row in both(value, layer)]))
    assert lines.splitlines()[1].startswith("[warning] b: ")


CODES = {
    "rule": (Code.IN_USE_RULE, Remedy.ANOTHER_RULE),
    "blocks": (Code.IN_USE_BLOCKS, Remedy.LARGER_BLOCKS),
    "statistics": (Code.IN_USE_STATISTICS, Remedy.OTHER_STATISTICS),
    "damping": (Code.IN_USE_DAMPING, Remedy.LOWER_EPSILON),
    "staleness": (Code.IN_USE_STALENESS, Remedy.REFRESH),
}


@pytest.mark.parametrize("cause", list(SPLITS))
def test_the_dominant_cause_is_named_with_its_size_and_its_option(cause: str) -> None:
    split = SPLITS[cause]
    assert math.fsum(split.values()) == pytest.approx(1 - LIVE**2)
    (one,) = own([*both(), *inside(split)])
    metric = max(split, key=lambda name: split[name])
    # of the rule only what it adds to the error of the best product, 1 - .95^2
    size = split[metric] - (0.0975 if metric == "in_use_fresh" else 0.0)
    assert (one.code, one.remedy) == CODES[cause]
    assert one.evidence[metric] == pytest.approx(size)
    assert one.details["split"].total == pytest.approx(0.91)
    assert cause != "rule" or one.details["preset"][::2] == ("shampoo-squared", "ShampooSquared")
    assert one.level == ("notice" if cause == "statistics" else "warning")


def test_a_split_with_an_unknown_part_names_no_cause() -> None:
    split = dict(SPLITS["damping"])
    rows = [*both(), *inside(split)]
    for row in rows:
        if row["metric"] == "in_use_fresh":
            row["value"] = math.nan
    (one,) = own(rows)
    assert one.code == Code.IN_USE_UNEXPLAINED


def test_subjects_differ_by_cause_so_that_alike_layers_are_alike() -> None:
    rows = [row for name, split in SPLITS.items() for row in (*both(layer=name),
            *inside(split, name))]  # fmt: skip
    found = own(rows)
    assert len({one.subject for one in found}) == len(SPLITS)


def test_the_rule_is_dominant_only_beyond_the_best_product() -> None:
    """.5 of .55 is what no product could do without, and blocks are what can be changed."""
    cosines = {"optimal": 0.7, "in-use": 0.5}
    rows = rows_of(cosines) + rows_of(cosines, kind="plugin")
    split = {"in_use_fresh": 0.55, "in_use_blocking": 0.2}
    (one,) = own([*rows, *inside(split)])
    assert one.code == Code.IN_USE_BLOCKS
    assert one.evidence["in_use_blocking"] == pytest.approx(0.2)
    assert one.evidence["in_use_fresh"] == pytest.approx(0.04)


def test_no_preset_is_named_that_fits_no_better() -> None:
    rows = rows_of(
        {"optimal": 0.95, "shampoo": 0.6, "in-use": 0.3}, kind="plugin", target="trajectory"
    )
    rows += inside(
        {"in_use_fresh": 0.64, "in_use_damping": 0.27}
    )  # its rule has .6, as Shampoo has
    (one,) = own(rows)
    assert (one.remedy, one.details["preset"]) == (Remedy.ANOTHER_RULE, None)


def test_statistics_of_kfac_and_of_the_trajectory() -> None:
    rows = [*both(), *inside(SPLITS["statistics"])]
    (plain,) = own(rows)
    assert plain.remedy == Remedy.OTHER_STATISTICS
    assert "target='trajectory' scores it" in plain.advice
    assert "sampling()" not in plain.advice
    (kfac,) = own([*rows, follows("kfac")])
    assert "optimizer.sampling()" in kfac.advice
    (run,) = own([row | {"target": "trajectory"} for row in rows])
    assert run.advice == "betas[1] sets how far back they reach"


def test_the_staleness_of_bases_within_the_statistics_is_known() -> None:
    split = SPLITS["statistics"] | {"in_use_staleness": math.nan}
    (one,) = own([*both(), *inside(split)])
    assert one.details["split"].with_staleness
    assert one.evidence["in_use_statistics"] == pytest.approx(0.6)


def test_a_side_without_a_factor_is_said() -> None:
    rows = both() + inside({"factor_rank": 4.0}, index=1)
    (one,) = own(rows)
    assert (one.code, one.remedy) == (Code.IN_USE_BLOCKS, Remedy.BOTH_SIDES)
    assert one.details["side"] == 1
    (one,) = own([*rows, *inside({"factor_rank": 4.0}, index=0)])
    assert one.code == Code.IN_USE_UNEXPLAINED


def test_without_an_optimum_its_own_rule_judges() -> None:
    rows = rows_of({"diagonal": 0.2, "in-use": 0.5}, kind="plugin")
    rows += inside({"in_use_fresh": 0.19, "in_use_damping": 0.56})
    (one,) = own([*rows, follows("shampoo")])
    assert one.code == Code.IN_USE_DAMPING
    assert (one.details["short"].than, one.details["rule"]) == ("own", "shampoo")
    assert one.details["short"].better.value == pytest.approx(0.9)
    assert one.evidence == pytest.approx({"gap": 0.4, "in-use": 0.5, "in_use_damping": 0.56})
    close = rows_of({"diagonal": 0.2, "in-use": 0.89}, kind="plugin")
    assert own([*close, *inside({"in_use_fresh": 0.19, "in_use_damping": 0.018})]) == []


def test_a_known_rule_that_is_held_as_it_is_costs_what_the_rule_costs() -> None:
    """No split, as of a run of an older version: live is Shampoo, which is .2 below."""
    cosines = PRODUCTS | {"shampoo": 0.75, "in-use": 0.74}
    (one,) = own([*rows_of(cosines), *rows_of(cosines, kind="plugin"), follows("shampoo")])
    assert (one.code, one.details["rule"]) == (Code.IN_USE_RULE, "shampoo")
    assert one.details["preset"][2] == "ShampooSquared"


def test_plug_in_numbers_of_few_draws_are_judged_beyond_their_noise() -> None:
    def rows(held: float, floor: float | None) -> list[Row]:
        made = rows_of(PRODUCTS | {"in-use": held}, kind="plugin", n_eff=12.0)
        told = [inside({"noise_floor": floor})[0]] if floor else []
        return made + told

    assert own(rows(0.1, None))
    assert own(rows(0.8, None)) == []  # nobody knows what .15 of a sample's cosine mean
    assert own(rows(0.8, 0.97))
    assert own(rows(0.8, 0.86)) == []
    found = {one.subject for one in diagnose(rows(0.1, None))}
    assert "too few gradient samples" in found


def test_vectors_have_no_best_product_to_be_below() -> None:
    assert own(both(m=8, n=1)) == []


def test_an_undefined_live_operator_is_not_judged() -> None:
    rows = [row | {"note": "SGD holds no preconditioner"} for row in both(math.nan)]
    assert own(rows) == []


# ---------------------------------------------------------------- real runs


def run_of(name: str, **options: Any) -> kp.Diagnosis:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs = torch.randn(160, 12) * torch.linspace(0.2, 2.0, 12)
    targets = torch.randint(0, 4, (160,))
    loss_fn = nn.CrossEntropyLoss()
    make = torch.optim.AdamW if name == "torch" else PRESETS[name]
    optimizer = make(model.parameters(), lr=0.01, **options)
    tracker = kp.Tracker(
        model, loss_fn, optimizer=optimizer, probe=(inputs, targets), every=[12], layers="0.weight"
    )
    for step in range(13):
        batch = inputs[12 * step : 12 * step + 12], targets[12 * step : 12 * step + 12]
        optimizer.zero_grad()
        loss_fn(model(batch[0]), batch[1]).backward()
        tracker.step(batch)
        optimizer.step()
    return kp.diagnose(tracker.table)


@pytest.mark.parametrize(
    ("name", "options", "code", "remedy"),
    [
        ("shampoo", {"shapes": {"block_size": 4}}, *CODES["blocks"]),
        ("shampoo-squared", {"epsilon": 30.0}, *CODES["damping"]),
        ("soap", {"shapes": {"max_dim": 13}}, Code.IN_USE_BLOCKS, Remedy.BOTH_SIDES),
        ("inverse-free-shampoo", {}, Code.IN_USE_UNEXPLAINED, Remedy.TARGET_TRAJECTORY),
        ("torch", {}, Code.IN_USE_UNEXPLAINED, Remedy.TARGET_TRAJECTORY),
    ],
)
def test_of_real_optimizers(name: str, options: dict[str, Any], code: Code, remedy: Remedy) -> None:
    found = run_of(name, **options)
    (one,) = [one for one in found if one.code.startswith(OWN)]
    assert (one.code, one.remedy) == (code, remedy)
    assert one.parameter == "0.weight"
    assert not [one for one in found if one.level == "good"]
