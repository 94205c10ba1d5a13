"""What the numbers of all layers together say, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.distance import GOOD, best_product, helps
from kronecker_probe.findings.facts import (
    OPTIMAL,
    LayerFacts,
    asked_for,
    lacks_kfac_factors,
    repeated,
)
from kronecker_probe.findings.finding import Finding

# A loss this many times its first value is a diverged run.
DIVERGED = 3.0
# Layers whose numbers are evidence.
WORST = 3


def run(table: pd.DataFrame, layers: Sequence[LayerFacts], worse: Sequence[str]) -> list[Finding]:
    """All findings about a run as a whole.

    Args:
        table: The measurement.
        layers: The facts of each layer of it that has cosines.
        worse: The layers whose preconditioner in use is clearly behind.
    """
    found = _training(table) + _repeated(table) + _skipped(table)
    if not layers:
        nothing = Finding("abstained", Code.NOTHING_TO_JUDGE, None, remedy=Remedy.MEASURE_COSINE)
        return [*found, nothing]
    return found + _worst(layers, worse) + _named(layers)


def _training(table: pd.DataFrame) -> list[Finding]:
    """A loss that is not finite, or far above where it began."""
    if "step" not in table:
        return []
    for metric in ("train_loss", "probe_loss"):
        rows = table[table["metric"] == metric].sort_values("step")
        values = rows.set_index("step")["value"].astype("float64")
        if values.empty:
            continue
        finite = values[values.map(math.isfinite)]
        after = values.loc[values.index > finite.index[-1]] if len(finite) else values
        if len(after):
            evidence, code = {"since": float(after.index[0])}, Code.LOSS_NOT_FINITE
        elif finite.iloc[0] > 0 and values.iloc[-1] > DIVERGED * finite.iloc[0]:
            evidence = {"first": float(finite.iloc[0]), "last": float(values.iloc[-1])}
            code = Code.LOSS_GREW
        else:
            continue
        remedy, details = Remedy.LOWER_LEARNING_RATE, {"metric": metric}
        return [Finding("warning", code, None, evidence, remedy, details=details)]
    return []


def _repeated(table: pd.DataFrame) -> list[Finding]:
    """Examples that repeat, once for all layers, each at its last step."""
    rows = table[(table["metric"] == "norm") & table["parameter"].notna()]
    if "step" in rows and len(rows):
        rows = rows[rows["step"] == rows.groupby("parameter")["step"].transform("max")]
    counts = {str(name): repeated(of) for name, of in rows.groupby("parameter", sort=False)}
    found = {name: count for name, count in counts.items() if count is not None}
    if not found:
        return []
    most = max(found.values(), key=lambda one: one[0])
    several = len({copies for copies, _ in found.values()}) > 1
    details = {"layers": list(found), "examples": most[1], "differ": several}
    evidence, remedy = {"copies": float(most[0])}, Remedy.MEASURE_ONCE
    return [Finding("notice", Code.REPEATED_EXAMPLES, None, evidence, remedy, details=details)]


def _skipped(table: pd.DataFrame) -> list[Finding]:
    """Parameters without any number, but for those that nobody asked for."""
    rows = asked_for(table[table["metric"] == "skipped"])
    measured = table.loc[table["approximation"].notna(), "parameter"]
    names = rows.loc[~rows["parameter"].isin(measured), "parameter"].dropna().unique().tolist()
    if not names:
        return []
    details = {"layers": [str(name) for name in names]}
    remedy = Remedy.READ_REASONS
    return [Finding("notice", Code.NOT_MEASURED, None, remedy=remedy, details=details)]


def _worst(layers: Sequence[LayerFacts], worse: Sequence[str]) -> list[Finding]:
    """Where one Kronecker product fits worst, in absolute terms."""
    best = {layer.name: best_product(layer) for layer in layers}
    known = [(name, *one) for name, one in best.items() if one is not None]
    if len(known) < 2:  # which one layer's own findings say
        return []
    ranked = sorted(known, key=lambda item: item[2].value)
    if all(number.low >= GOOD for _, _, number in ranked):
        evidence = {name: number.value for name, _, number in ranked[:WORST]}
        details = {"count": len(ranked), "worst": ranked[0], "least": GOOD, "worse": list(worse)}
        level = "notice" if worse else "good"
        return [Finding(level, Code.FORM_FITS, None, evidence, details=details)]
    under = [one for one in ranked if one[2].low < GOOD]
    # a rule's cosine is a lower bound of what the form can do: it proves a good fit, never a bad
    poor = [one for one in under if one[1] == OPTIMAL]
    unknown = [one for one in under if one[1] != OPTIMAL]
    found = []
    for code, remedy, some in (
        (Code.FORM_FITS_WORST, Remedy.GO_BEYOND, poor),
        (Code.OPTIMUM_NOT_MEASURED, Remedy.MEASURE_OPTIMAL, unknown),
    ):
        if some:
            evidence = {name: number.value for name, _, number in some[:WORST]}
            details = {"ranked": some, "shown": WORST, "least": GOOD}
            if some is poor:
                details["helps"] = _helps(layers, list(evidence))
            found.append(Finding("notice", code, None, evidence, remedy, details=details))
    return found


def _helps(layers: Sequence[LayerFacts], names: Sequence[str]) -> Mapping[str, Sequence[Code]]:
    found = {layer.name: helps(layer) for layer in layers if layer.name in names}
    return {name: found[name] for name in names}


def _named(layers: Sequence[LayerFacts]) -> list[Finding]:
    """Vectors, and layers without K-FAC's factors, as an embedding is."""
    found = []
    if names := [one.name for one in layers if one.is_vector and one.cosines]:
        found.append(Finding("notice", Code.VECTORS, None, details={"layers": names}))
    if names := [one.name for one in layers if lacks_kfac_factors(one.now)]:
        found.append(
            Finding("notice", Code.KFAC_UNDEFINED, None, remedy=Remedy.JUDGE_OTHER_RULES,
                    details={"layers": names})
        )  # fmt: skip
    return found
