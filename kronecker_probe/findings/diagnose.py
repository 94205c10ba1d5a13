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
from kronecker_probe.findings.factors import factor_findings
from kronecker_probe.findings.finding import LEVELS, Diagnosis
from kronecker_probe.findings.fit import LayerFindings
from kronecker_probe.findings.optimizer_state import worst_first
from kronecker_probe.findings.refresh_age import age_findings
from kronecker_probe.findings.run import run_findings


def diagnose(scores: Any) -> Diagnosis:
    """What the numbers of a measurement say, and what to do about it.

    Args:
        scores: What ``kp.compare`` returned, or a measurement table (of a run: ``RunStore.read``
            or ``Tracker.table``), with the estimates "population" where there are any.

    Returns:
        The findings, of the last step of each layer; those that the data cannot support are
        "abstained". Which steps those are is in ``at``. "good" is only what is close to the best
        Kronecker product where that is itself close to H, and what the optimizer of a run really
        holds is not clearly worse.

    Raises:
        InvalidInputError: ``scores`` is no such table.
    """
    table = getattr(scores, "table", scores)
    needed = {"metric", "parameter", "approximation", "value"}
    if not isinstance(table, pd.DataFrame) or not needed <= set(table):
        lacks = ""
        if isinstance(table, pd.DataFrame):
            lacks = f" without {', '.join(sorted(needed - set(table)))}"
        raise InvalidInputError(
            f"diagnose got a {type(scores).__name__}{lacks}; give the Scores of kp.compare, or the "
            "measurement table of a run."
        )
    if "index" not in table:  # of singular values, which a table may lack
        table = table.assign(index=math.nan)
    rows = table[(table["metric"] == "cosine") & table["approximation"].notna()]
    layers = [LayerFindings(table, str(name)) for name in rows["parameter"].dropna().unique()]
    found = run_findings(table, layers)
    found += worst_first(layers)
    if "step" in table:
        found += age_findings(table, layers)
    found += [finding for layer in layers for finding in layer.findings()]
    if "step" in table:
        found += factor_findings((one.name, one.rows, one.last) for one in layers)
    order = {level: place for place, level in enumerate(LEVELS)}
    ranked = tuple(sorted(found, key=lambda one: order[one.level]))
    return Diagnosis(ranked, _steps({one.last for one in layers}) if "step" in table else "")


def _steps(last: set[int]) -> str:
    if len(last) < 2:
        return "".join(f"step {step}" for step in last)
    return f"the last step of each layer, {min(last)} to {max(last)}"
