"""Findings with evidence and advice, read off a measurement table; no torch.

Every statement is about a difference between two numbers of one layer, and is made only where
that difference stands clear of its own uncertainty. Otherwise the finding abstains and says how
many data would settle it.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.quality.findings import LEVELS, Diagnosis, Finding
from kronecker_probe.quality.layer_findings import LayerFindings

# A loss this many times its first value is a diverged run.
DIVERGED = 3.0


def diagnose(scores: Any) -> Diagnosis:
    """What the numbers of a measurement say, and what to do about it.

    Args:
        scores: What ``kp.compare`` returned, or a measurement table (of a run: ``RunStore.read``
            or ``Tracker.table``), with the estimates "population" where there are any.

    Returns:
        The findings; those that the data cannot support are "abstained".

    Raises:
        InvalidInputError: ``scores`` is no such table.
    """
    table = getattr(scores, "table", scores)
    needed = {"metric", "parameter", "approximation", "value"}
    if not isinstance(table, pd.DataFrame) or not needed <= set(table):
        raise InvalidInputError(
            f"diagnose got a {type(scores).__name__}; give the Scores of kp.compare, or the "
            "measurement table of a run."
        )
    if "index" not in table:  # of singular values, which a table may lack
        table = table.assign(index=math.nan)
    found = _training(table)
    rows = table[(table["metric"] == "cosine") & table["approximation"].notna()]
    for name in rows["parameter"].dropna().unique():
        found += LayerFindings(table, str(name)).findings()
    found += _skipped(table)
    order = {level: place for place, level in enumerate(LEVELS)}
    return Diagnosis(tuple(sorted(found, key=lambda one: order[one.level])))


def _training(table: pd.DataFrame) -> list[Finding]:
    """A loss that is not finite, or far above where it began."""
    if "step" not in table:
        return []
    for metric in ("train_loss", "probe_loss"):
        values = table[table["metric"] == metric].sort_values("step")["value"].to_numpy()
        if len(values) < 2:
            continue
        if not math.isfinite(values[-1]) or values[-1] > DIVERGED * max(values[0], 1e-12):
            message = (
                f"the {metric.replace('_', ' ')} went from {values[0]:.3g} to {values[-1]:.3g}"
            )
            advice = "the run diverged: lower the learning rate before reading anything else"
            evidence = {"first": float(values[0]), "last": float(values[-1])}
            return [Finding("warning", None, "divergence", message, advice, evidence)]
    return []


def _skipped(table: pd.DataFrame) -> list[Finding]:
    rows = table[table["metric"] == "skipped"]
    if "note" in rows:  # what nobody asked for is no news
        rows = rows[~rows["note"].astype("string").fillna("").str.startswith("not selected")]
    measured = table.loc[table["approximation"].notna(), "parameter"]
    skipped = rows.loc[~rows["parameter"].isin(measured), "parameter"].dropna().unique()
    if not len(skipped):
        return []
    shown = ", ".join(str(name) for name in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    message = f"{len(skipped)} parameters were not measured ({shown})"
    return [Finding("notice", None, "coverage", message, "their notes say why")]
