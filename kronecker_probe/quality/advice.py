"""Advices that compete for one layer, and advice that other numbers contradict; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from kronecker_probe.quality.findings import Finding
from kronecker_probe.table_numbers import digits, listed

# How the names of the metrics begin that compare steps.
_DIRECTION = "direction_cosine"
_MEANS = {
    "distance to the optimum": "power iterations",
    "Kronecker rank": "Kronecker rank 2",
    "eigenvalues": "corrected eigenvalues",
}


def by_gain(found: Sequence[Finding]) -> list[Finding]:
    """The largest gain in cosine first, which says so where advices compete.

    Args:
        found: Of one layer; those with a "gain" among their evidence compete.
    """
    rivals = sorted(
        (one for one in found if "gain" in one.evidence), key=lambda one: -one.evidence["gain"]
    )
    if len(rivals) < 2:
        return list(found)
    first, *others = rivals
    after = listed(f"{_MEANS[one.subject]} (+{one.evidence['gain']:.2f})" for one in others)
    advice = f"{first.advice}: the largest gain here (+{first.evidence['gain']:.2f}), then {after}"
    rest = [one for one in found if "gain" not in one.evidence]
    return [*rest, replace(first, advice=advice), *others]


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
