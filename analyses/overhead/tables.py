"""From times of steps to shares of a step, and what to conclude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from kronecker_probe.table.numbers import listed

from .steps import ADAMW, LIMIT, METHODS, PARTS, PROBLEMS, Problem

USUAL, RARE = 10, 100  # F: the default, and what is drawn beside it

SETTING = ["seed", "model", "batch_size", "optimizer", "block_size"]


def amortized(measured: pd.DataFrame, interval: float) -> pd.DataFrame:
    """Mean milliseconds with a refresh every so many steps: a row a setting, a column a part."""
    rows = measured[measured["step"].isin(["plain", "refresh"])]
    wide: Any = rows.set_index([*SETTING, "measured", "step"])["value"].unstack("step")
    mean: Any = wide["plain"] + (wide["refresh"] - wide["plain"]) / interval
    return mean.unstack("measured")  # type: ignore[no-any-return]


def shares(milliseconds: pd.DataFrame) -> pd.DataFrame:
    """Parts in percent of AdamW's whole step at the same batch, and the "overhead" over it."""
    total: Any = milliseconds.sum(axis=1)
    adamw = total.xs((ADAMW, 0), level=("optimizer", "block_size"))
    unit = adamw.reindex(total.index.droplevel(["optimizer", "block_size"])).to_numpy()
    wide: pd.DataFrame = milliseconds.div(unit, axis=0).assign(overhead=total / unit - 1) * 100
    return wide


def drawn(measured: pd.DataFrame, intervals: Sequence[int]) -> pd.DataFrame:
    """What the figure shows, in percent, as rows of the table."""
    rows = measured[measured["step"] == "direct"]
    whole = rows.set_index([*SETTING, "measured"])["value"].unstack("measured")
    found = [shares(amortized(measured, F)).assign(interval=F, step="mean") for F in intervals]
    found.append(shares(whole)[["overhead"]].assign(interval=USUAL, step="direct"))
    wide = pd.concat(found).reset_index()
    long = wide.melt([*SETTING, "interval", "step"], var_name="measured")
    batches = long["model"].map({name: one.reference for name, one in PROBLEMS.items()})
    knob = long["batch_size"].eq(batches) & long["block_size"].eq(0)
    shown = long[knob | long["interval"].isin([USUAL, RARE])]
    return shown.dropna(subset="value").assign(unit="percent")


def percents(table: pd.DataFrame, step: str = "mean") -> Any:
    """Medians of the seeds, by model, optimizer, block size, F, what was measured, and batch."""
    rows = table[(table["unit"] == "percent") & (table["step"] == step)]
    keys = ["model", "optimizer", "block_size", "interval", "measured", "batch_size"]
    return rows.groupby(keys)["value"].median()


def holds_from(overheads: pd.Series) -> int | None:
    """The batch size from which on the overhead is at most 10%; None where that is none."""
    within = (overheads.sort_index(ascending=False) <= LIMIT).cummin()
    return int(within[within].index.min()) if within.any() else None


def turned(found: Any, name: str, problem: Problem) -> tuple[float, str, float, float]:
    """Overheads of an optimizer: as it is; the knob that lowers it most, with it; blocks and F."""
    over = found[name].xs(("overhead", problem.reference), level=("measured", "batch_size"))
    knobs = {f"F = {F:g}": value for F, value in over[0].items()}
    blocks = {b: over[b, USUAL] for b in over.index.unique("block_size") if b}
    knobs |= {f"block_size {b}": value for b, value in blocks.items()}
    best = min(knobs, key=lambda knob: knobs[knob])
    return over[0, USUAL], best, knobs[best], over[min(blocks, key=lambda b: blocks[b]), RARE]


def sentences(table: pd.DataFrame) -> tuple[str, ...]:
    """What to conclude: the 10% and the best knobs (the title); parts and knobs; the check."""
    found, check = percents(table), percents(table, "direct")
    ratio = (100 + check) / (100 + found.reindex(check.index))
    claims, best, told = [], [], []
    for model, problem in PROBLEMS.items():
        one, short = found[model], model.split()[0]
        claims.append(f"{short} (batches of {problem.unit}): {_claim(one)}")
        usual, knob, value, _ = turned(one, "Shampoo", problem)
        best.append(f"{knob} ({short}: {usual:.0f}% to {value:.0f}%)")
        inside = "; ".join(_of_parts(one, name, problem) for name in methods_of(one))
        told.append(f"{model}, batch {problem.reference}: {inside}")
    return (
        f"At most {LIMIT:.0f}% over AdamW's step, with F = {USUAL}: {'; '.join(claims)}. The "
        f"single knob that lowers Shampoo's overhead most: {', '.join(best)}",
        *told,
        f"Steps of trainings at F = {USUAL} without timers inside, relative to AdamW's, are "
        f"{ratio.min():.2f} to {ratio.max():.2f} of what the parts add up to",
    )


def _claim(found: Any) -> str:
    curves = {name: found[name, 0, USUAL, "overhead"] for name in methods_of(found)}
    starts = {name: holds_from(curve) for name, curve in curves.items()}
    told = [
        f"{listed(name for name in starts if starts[name] == start)} from {start} on"
        for start in sorted({start for start in starts.values() if start})
    ]
    above = [name for name, start in starts.items() if not start]
    if above:
        last = curves[above[0]].index.max()
        values = ", ".join(f"{name} {curves[name][last]:.0f}%" for name in above)
        told.append(f"not up to {last} ({values})")
    return ", ".join(told)


def _of_parts(found: Any, name: str, problem: Problem) -> str:
    one = found[name, 0, USUAL].xs(problem.reference, level="batch_size")
    text = f"{name} {one['overhead']:.0f}% ("
    text += ", ".join(f"{part} {one[part]:.0f}" for part in PARTS) + ")"
    if METHODS[name].knobs:
        _, knob, value, both = turned(found, name, problem)
        text += f", {value:.0f}% with {knob}, {both:.0f}% with blocks and F = {RARE}"
    return text


def methods_of(found: Any, *, knobs: bool = False) -> list[str]:
    known = found.index.unique("optimizer")
    return [name for name, one in METHODS.items() if name in known and one.knobs >= knobs]
