"""The engine: facts of each layer, findings by subject, and the words for them; no torch.

Every statement is about a difference between two numbers of one layer, and is made only where that
difference stands clear of its own uncertainty (``gates``). Otherwise the finding abstains and says
how many examples would settle it.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.findings.distance import beyond, distance, exponent, scale
from kronecker_probe.findings.factors import factors
from kronecker_probe.findings.facts import LayerFacts
from kronecker_probe.findings.finding import LEVELS, Diagnosis, Finding
from kronecker_probe.findings.gates import judged, undefined_steps
from kronecker_probe.findings.in_use import in_use, worst_first
from kronecker_probe.findings.run import run
from kronecker_probe.findings.staleness import staleness
from kronecker_probe.findings.words.phrase import phrased


def diagnose(scores: Any) -> Diagnosis:
    """What the numbers of a measurement say, and what to do about it.

    Args:
        scores: What ``kp.compare`` returned, or a measurement table (of a run: ``RunStore.read``
            or ``Tracker.table``), with the estimates "population" where there are any.

    Returns:
        The findings, of the last step of each layer; those that the data cannot support are
        "abstained". Which steps those are is in ``at``. "good" is only what is close to the best
        Kronecker product where that is itself close to H, and where the preconditioner in use is
        not clearly worse.

    Raises:
        InvalidInputError: ``scores`` is no such table.
    """
    table = _table(scores)
    rows = table[(table["metric"] == "cosine") & table["approximation"].notna()]
    of_layer = dict(iter(table.groupby("parameter", sort=False)))
    names = rows["parameter"].dropna().unique()
    layers = [LayerFacts(of_layer[name], str(name)) for name in names]
    held = {layer.name: in_use(layer) for layer in layers}
    found = run(table, layers, [name for name, one in held.items() if one is not None])
    found += worst_first(held.values()) + staleness(layers)
    found += [one for layer in layers for one in _of_layer(layer, held[layer.name] is not None)]
    found += factors(layers)
    ranked = sorted(found, key=lambda one: LEVELS.index(one.level))
    at = _steps({one.last for one in layers}) if "step" in table else ""
    return Diagnosis(tuple(phrased(one) for one in ranked), at)


def _of_layer(layer: LayerFacts, in_use_is_worse: bool) -> list[Finding]:
    if abstained := judged(layer):
        return [abstained]
    return [
        *distance(layer, in_use_is_worse),
        *beyond(layer),
        *exponent(layer),
        *scale(layer),
        *undefined_steps(layer),
    ]


def _table(scores: Any) -> pd.DataFrame:
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
    # the index of singular values may be lacking
    table = table if "index" in table else table.assign(index=math.nan)
    # plain objects and floats: in tables of some hundred rows they are several times as fast
    texts = [name for name in table if isinstance(table[name].dtype, pd.StringDtype)]
    counts = [name for name in table if isinstance(table[name].dtype, pd.Int64Dtype)]
    return table.astype(dict.fromkeys(texts, object) | dict.fromkeys(counts, "float64"))


def _steps(last: set[int]) -> str:
    if len(last) < 2:
        return "".join(f"step {step}" for step in last)
    return f"the last step of each layer, {min(last)} to {max(last)}"
