"""Advice that other numbers contradict; no torch."""

from __future__ import annotations

import pandas as pd

from kronecker_probe.table.numbers import digits, listed

# How the names of the metrics begin that compare steps.
_DIRECTION = "direction_cosine"


def no_worse_directions(rows: pd.DataFrame) -> str:
    """The direction cosines in which Shampoo equals its square or is ahead of it.

    Args:
        rows: Of one layer and step.
    """
    rows = rows[rows["metric"].str.startswith(_DIRECTION) & rows["value"].notna()]
    found = []
    for metric, of in rows.groupby("metric", sort=False):
        values = {str(a): float(x) for a, x in zip(of["approximation"], of["value"], strict=True)}
        if {"shampoo", "shampoo-squared"} <= values.keys():
            root, square = values["shampoo"], values["shampoo-squared"]
            if root >= square:
                options = str(metric).removeprefix(_DIRECTION).lstrip(":")
                shown = f"direction cosine {digits(root)} against {digits(square)}"
                found.append(f"{shown} ({options})" if options else shown)
    return listed(found) if found else ""
