"""The inside of an optimizer at one step, as text: a row a layer of the report; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kronecker_probe.findings.facts import followed_rule
from kronecker_probe.findings.split import CAUSES, FRESH
from kronecker_probe.table.numbers import digits
from kronecker_probe.table.read import at_step, label

_ABSENT = "–"
# metric -> (column, the worst of both sides, how it is shown)
_FACTORS: dict[str, tuple[str, Callable[[Any], Any], Callable[[float], str]]] = {
    "steps_since_refresh": ("steps since a refresh", max, "{:.0f}".format),
    "basis_off_diagonal": ("basis off the diagonal", max, "{:.2f}".format),
    "factor_rank": ("rank of a factor", min, "{:.0f}".format),
    "factor_under_floor": ("under its floor", max, "{:.0%}".format),
    "factor_amplification": ("amplified", max, "{:.2g}×".format),
    "factor_epsilon": ("epsilon", max, "{:.1e}".format),
    "factor_suggested_epsilon": ("suggested epsilon", max, "{:.1e}".format),
}


@dataclass(frozen=True)
class InsideTable:
    """What an optimizer holds, layer by layer.

    Attributes:
        head: The columns; the first is that of the layers. Without those that are empty.
        rows: The cells of each layer.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def inside_table(table: pd.DataFrame) -> InsideTable | None:
    """The live cosine, the split of its error, and the worst factor of each parameter.

    Args:
        table: Of a run; its last step with quality numbers is told.

    Returns:
        None where the table says nothing of the inside.
    """
    now = at_step(table, None)
    inside = now[now["approximation"].isna() & now["metric"].isin([*CAUSES, *_FACTORS])]
    read = now[now["metric"].isin([*CAUSES, *_FACTORS, "cosine", "in_use_rule"])]
    by_layer = dict(iter(read.groupby("parameter", sort=False)))
    cells = {str(name): _row(by_layer[name]) for name in inside["parameter"].dropna().unique()}
    if not cells:
        return None
    columns = [name for name in next(iter(cells.values())) if _some(cells, name)]
    rows = tuple((name, *(of[column] for column in columns)) for name, of in cells.items())
    return InsideTable(("layer", *columns), rows)


def _some(cells: dict[str, dict[str, str]], column: str) -> bool:
    return any(of[column] != _ABSENT for of in cells.values())


def _row(rows: pd.DataFrame) -> dict[str, str]:
    """The cells of one parameter."""
    values: dict[str, list[float]] = {}
    for metric, value in zip(rows["metric"], rows["value"], strict=True):
        if not math.isnan(value):
            values.setdefault(metric, []).append(float(value))
    found = {"in-use": _cosine(rows), "its rule on H": _rule(rows, values.get(FRESH, []))}
    for metric, cause in CAUSES.items():
        found[f"{cause} costs"] = _shown(values.get(metric, []), max, digits)
    for metric, (column, worst, text) in _FACTORS.items():
        found[column] = _shown(values.get(metric, []), worst, text)
    return found


def _cosine(rows: pd.DataFrame) -> str:
    """Of what is held, on the sample, as the split is."""
    of = rows[(rows["approximation"] == "in-use") & (rows["metric"] == "cosine")]
    of = of[of["kind"].isin(["plugin"]) | of["kind"].isna()]
    return _shown(of["value"].dropna().tolist(), max, digits)


def _rule(rows: pd.DataFrame, errors: list[float]) -> str:
    """The rule's cosine and, where the table has it, its name."""
    value = digits(math.sqrt(max(0.0, 1.0 - errors[-1]))) if errors else ""
    name = followed_rule(rows)
    return " ".join(filter(None, (value, label(name) if name else ""))) or _ABSENT


def _shown(
    values: list[float], worst: Callable[[list[float]], float], text: Callable[[float], str]
) -> str:
    return text(worst(values)) if values else _ABSENT
