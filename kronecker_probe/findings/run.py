"""What the numbers of all layers together say; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.fit import GOOD, NOT_HELD, LayerFindings
from kronecker_probe.table.codes import ReasonCode
from kronecker_probe.table.numbers import Number, listed
from kronecker_probe.table.read import label

# A loss this many times its first value is a diverged run.
DIVERGED = 3.0
# Layers that a sentence names.
NAMED = 3


def run_findings(table: pd.DataFrame, layers: Sequence[LayerFindings]) -> list[Finding]:
    """All of them.

    Args:
        table: The measurement.
        layers: What is known of each layer of it that has cosines.
    """
    found = _training(table) + _copies(table) + _skipped(table)
    if not layers:
        message = "the table holds no cosine of an approximation, so that no quality is judged"
        advice = "measure 'cosine' of at least one layer"
        return [*found, Finding("abstained", None, "nothing to judge", message, advice)]
    return found + _worst(layers) + _vectors(layers) + _without_factors(layers)


def _training(table: pd.DataFrame) -> list[Finding]:
    """A loss that is not finite, or far above where it began."""
    if "step" not in table:
        return []
    advice = "the run diverged: lower the learning rate before reading anything else"
    for metric in ("train_loss", "probe_loss"):
        rows = table[table["metric"] == metric].sort_values("step")
        if rows.empty:
            continue
        steps, values = rows["step"].tolist(), rows["value"].astype("float64").tolist()
        loss = metric.replace("_", " ")
        finite = [place for place, value in enumerate(values) if math.isfinite(value)]
        since = finite[-1] + 1 if finite else 0
        if since < len(values):
            message = f"the {loss} is not finite from step {steps[since]} on"
            evidence = {"since": float(steps[since])}
            return [Finding("warning", None, "divergence", message, advice, evidence)]
        first, last = values[finite[0]], values[-1]
        if first > 0 and last > DIVERGED * first:
            message = f"the {loss} went from {first:.3g} to {last:.3g}"
            evidence = {"first": first, "last": last}
            return [Finding("warning", None, "divergence", message, advice, evidence)]
    return []


def _copies(table: pd.DataFrame) -> list[Finding]:
    """Data that repeat, told once for all layers, each at its last step."""
    rows = table[(table["metric"] == "norm") & table["parameter"].notna()]
    if "copies" not in rows or rows.empty:
        return []
    if "step" in rows:
        rows = rows[rows["step"] == rows.groupby("parameter")["step"].transform("max")]
    repeated = rows[rows["copies"].notna()]
    columns = (repeated[name] for name in ("parameter", "copies", "n_examples"))
    found = [(str(name), int(copies), int(of)) for name, copies, of in zip(*columns, strict=True)]
    if not found:
        return []
    names = list(dict.fromkeys(name for name, _, _ in found))
    _, copies, count = max(found, key=lambda one: one[1])
    upto = "up to " if len({one for _, one, _ in found}) > 1 else ""
    message = (
        f"in {_shown(names)}, {upto}{copies} of {count} data have the same gradients as another"
    )
    advice = (
        "if they are copies of it, measure each once: as independent draws they make the standard "
        "errors too small"
    )
    return [Finding("notice", None, "copies", message, advice, {"copies": float(copies)})]


def _skipped(table: pd.DataFrame) -> list[Finding]:
    rows = table[table["metric"] == "skipped"]
    if "reason" in rows:  # what nobody asked for is no news
        rows = rows[~rows["reason"].eq(ReasonCode.NOT_SELECTED).fillna(False)]
    measured = table.loc[table["approximation"].notna(), "parameter"]
    skipped = rows.loc[~rows["parameter"].isin(measured), "parameter"].dropna().unique()
    if not len(skipped):
        return []
    parameters = "parameter was" if len(skipped) == 1 else "parameters were"
    shown = ", ".join(str(name) for name in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    message = f"{len(skipped)} {parameters} not measured ({shown})"
    return [Finding("notice", None, "coverage", message, "their notes say why")]


def _worst(layers: Sequence[LayerFindings]) -> list[Finding]:
    """Where one Kronecker product fits worst, in absolute terms."""
    found = {one.name: best for one in layers if (best := one.best_product()) is not None}
    if len(found) < 2:  # which one layer's own findings say
        return []
    ranked = sorted(
        ((name, rule, number) for name, (rule, number) in found.items()),
        key=lambda item: item[2].value,
    )
    subject = "worst approximated layers"
    if all(number.low >= GOOD for _, _, number in ranked):
        name, _, number = ranked[0]
        evidence = {name: number.value for name, _, number in ranked[:NAMED]}
        message = (
            f"the Kronecker form fits all {len(found)} layers that can be judged with a cosine of "
            f"at least {GOOD:g}, {name} worst ({number})"
        )
        if held := [one.name for one in layers if one.live is not None]:
            message += f", {NOT_HELD} at {_shown(held)}"
        return [Finding("notice" if held else "good", None, subject, message, "", evidence)]
    under = [one for one in ranked if one[2].low < GOOD]
    # a rule's cosine is a lower bound of what the form can do: it proves a good fit, never a bad
    poor = [(name, number) for name, rule, number in under if rule == "optimal"]
    unknown = [one for one in under if one[1] != "optimal"]
    return _fits_worst(subject, poor, layers) + _optimum_unknown(unknown)


def _fits_worst(
    subject: str, poor: Sequence[tuple[str, Number]], layers: Sequence[LayerFindings]
) -> list[Finding]:
    """The layers whose best product is measured and not clearly good, the worst first."""
    if not poor:
        return []
    evidence = {name: number.value for name, number in poor[:NAMED]}
    message = f"the Kronecker form fits worst at: {_ranking(poor[:NAMED])}"
    if len(poor) > NAMED:
        message += f", and {len(poor) - NAMED} more may lie under {GOOD:g}"
    shown = [name for name, _ in poor[:NAMED]]
    helps = {one.name: one.helps() for one in layers if one.name in shown}
    return [Finding("notice", None, subject, message, _remedies(shown, helps), evidence)]


def _optimum_unknown(unknown: Sequence[tuple[str, str, Number]]) -> list[Finding]:
    """Layers with a poor rule whose optimum was not measured."""
    if not unknown:
        return []
    places = [f"{label(rule)} at {name} (cosine {number})" for name, rule, number in unknown]
    more = f", and {len(places) - NAMED} more" if len(places) > NAMED else ""
    message = (
        f"of the rules measured the best may lie under {GOOD:g}: "
        f"{', then '.join(places[:NAMED])}{more}; how well any Kronecker product fits was not "
        "measured"
    )
    evidence = {name: number.value for name, _, number in unknown[:NAMED]}
    return [Finding("notice", None, "optimum not measured", message, "measure 'optimal'", evidence)]


def _remedies(names: Sequence[str], helps: Mapping[str, Sequence[str]]) -> str:
    """What goes beyond one Kronecker product, and where nothing does."""
    means = dict.fromkeys(what for name in names for what in helps[name])
    parts = [
        f"{what} would add to {listed(n for n in names if what in helps[n])}" for what in means
    ]
    if none := [name for name in names if not helps[name]]:
        parts.append(f"no rule measured clearly goes beyond it at {listed(none)}")
    return ", ".join(parts)


def _ranking(numbers: Sequence[tuple[str, Number]]) -> str:
    return ", then ".join(f"{name} (cosine {number})" for name, number in numbers)


def _vectors(layers: Sequence[LayerFindings]) -> list[Finding]:
    names = [one.name for one in layers if one.is_vector and one.cosines]
    if not names:
        return []
    are = "are vectors" if len(names) > 1 else "is a vector"
    message = (
        f"{_shown(names)} {are}, where the optimal product and Shampoo² are H itself, and their "
        "cosine of 1 says nothing"
    )
    return [Finding("notice", None, "vectors", message)]


def _without_factors(layers: Sequence[LayerFindings]) -> list[Finding]:
    """Layers whose draws carry no inputs and output gradients, as those of an embedding."""
    names = [one.name for one in layers if _lacks_factors(one.now)]
    if not names:
        return []
    message = (
        f"K-FAC is not defined for {_shown(names)}, whose draws hold no layer inputs: those of "
        "an embedding are tokens, and others were given or kept as matrices"
    )
    advice = "judge Shampoo² or the optimal product there, which need the gradients alone"
    return [Finding("notice", None, "no factors", message, advice)]


def _lacks_factors(rows: pd.DataFrame) -> bool:
    return "reason" in rows and bool((rows["reason"] == ReasonCode.NO_FACTORS).any())


def _shown(names: Sequence[object]) -> str:
    shown = [str(name) for name in names[:NAMED]]
    return listed([*shown, f"{len(names) - NAMED} more"] if len(names) > NAMED else shown)
