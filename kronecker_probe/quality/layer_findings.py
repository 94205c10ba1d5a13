"""What the numbers of one layer say; rules with thresholds, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kronecker_probe.quality.findings import Finding
from kronecker_probe.tables import first_shares, label

# Differences in cosine below this are not worth a change of method.
CLOSE = 0.02
# A preconditioner behind its own fresh factors by more than this is stale.
STALE = 0.05
# Independent draws (by their effective number) under which no estimate is trusted.
FEWEST_DRAWS = 30
# Best scales outside of this range make an ungrafted step length wrong.
SCALES = (0.5, 2.0)

_PRODUCTS = ("shampoo-squared", "kfac", "shampoo")
# Draws that are the matrix itself and no sample of it.
_EXACT = ("batch-gradient", "trajectory")


@dataclass(frozen=True)
class _Number:
    """A cosine with its standard error; ``kind`` says which estimate it is."""

    value: float
    stderr: float
    kind: str

    def __str__(self) -> str:
        if self.kind == "population" and math.isfinite(self.stderr):
            return f"{self.value:.3f} ± {self.stderr:.3f}"
        return f"{self.value:.3f} ({self.kind})"


class LayerFindings:
    """The numbers of one parameter at the last step where it was measured, and what they say."""

    def __init__(self, table: pd.DataFrame, name: str) -> None:
        self.name = name
        self.rows = table[table["parameter"] == name]
        self.stepwise = "step" in table
        quality = self.rows[self.rows["approximation"].notna()]
        self.last = int(quality["step"].max()) if self.stepwise else 0
        now = quality[quality["step"] == self.last] if self.stepwise else quality
        self.now = now
        self.draws = _first(now, "draws")
        self.noise = self._sampling_noise()
        self.cosines = _numbers(now, "cosine", self.noise)
        self.n_eff = _least(now, "n_eff")
        self.n_data = _least(now, "n_data")

    def findings(self) -> list[Finding]:
        if not self.cosines:
            return [self._undefined()]
        checks: list[Callable[[], list[Finding]]] = [
            self._distance, self._beyond, self._roots, self._scale, self._staleness,
        ]  # fmt: skip
        if abstained := self._too_few():
            checks, found = [self._staleness], [abstained]
        else:
            found = []
        return found + [finding for check in checks for finding in check()]

    def _finding(
        self, level: str, subject: str, message: str, advice: str = "", /, **evidence: float
    ) -> Finding:
        return Finding(level, self.name, subject, message, advice, evidence)

    def _sampling_noise(self) -> float:
        """How far off a plug-in cosine may be: what an exact product of so many draws would lose.

        Without that row nothing is known of it. Closed forms and gradients along a run are the
        matrix itself.
        """
        if self.draws in _EXACT:
            return 0.0
        at = self.rows[self.rows["step"] == self.last] if self.stepwise else self.rows
        floor = at.loc[at["metric"] == "noise_floor", "value"].dropna()
        return max(0.0, 1.0 - float(floor.iloc[-1])) if len(floor) else math.inf

    def _undefined(self) -> Finding:
        notes = self.now["note"].dropna().tolist() if "note" in self.now else []
        why = str(notes[0]) if notes else "no reason noted"
        return self._finding("abstained", "undefined", f"no cosine is defined ({why})")

    def _too_few(self) -> Finding | None:
        if self.draws in _EXACT or math.isnan(self.n_eff) or self.n_eff >= FEWEST_DRAWS:
            return None
        return self._finding(
            "abstained",
            "too few draws",
            f"the {self.n_data:.0f} data count as {self.n_eff:.0f} independent draws, and under "
            f"{FEWEST_DRAWS} no quality number means anything",
            f"measure at least {self._enough():.0f} data",
            n_eff=self.n_eff,
        )

    def _enough(self) -> float:
        """Data at which the effective number of draws would reach the least, if it grows alike."""
        return math.ceil(self.n_data * FEWEST_DRAWS / max(self.n_eff, 1.0))

    def _distance(self) -> list[Finding]:
        """How far the closest rule is from the best Kronecker product."""
        top = self.cosines.get("optimal")
        known = {name: self.cosines[name] for name in _PRODUCTS if name in self.cosines}
        if top is None or not known:
            return []
        name = max(known, key=lambda one: known[one].value)
        gap, error = _difference(top, known[name])
        subject, best = "distance to the optimum", "the best that any Kronecker product can do"
        evidence = {"gap": gap, "stderr": error, "optimal": top.value}
        shown = f"{max(gap, 0.001):.3f}{_plus_minus(error)}"
        if gap + 2 * error <= CLOSE:
            message = f"{label(name)} is within {shown} of {best} (cosine {top})"
            return [self._finding("good", subject, message, "", **evidence)]
        if gap - 2 * error > CLOSE:
            message = f"{label(name)}, the closest rule, is {shown} short of {best} (cosine {top})"
            advice = "a few power iterations on the factors would recover it"
            return [self._finding("notice", subject, message, advice, **evidence)]
        message = f"how far {label(name)} is from {best} is too uncertain to judge (cosine {top})"
        return [self._finding("abstained", subject, message, self._settling(error), **evidence)]

    def _settling(self, error: float) -> str:
        """The data that bring two standard errors under CLOSE, for errors ~ 1/sqrt(N)."""
        if not math.isfinite(error) or math.isnan(self.n_data):
            return "measure more data, until both have a population estimate"
        needed = self.n_data * max(1.0, (2 * error / CLOSE) ** 2)
        return f"about {math.ceil(needed / 10) * 10} data would settle it"

    def _beyond(self) -> list[Finding]:
        """What leaving the set of single Kronecker products buys."""
        top = self.cosines.get("optimal")
        if top is None:
            return []
        found = []
        gain = self._second_product()
        noise = self._noise()
        if gain >= CLOSE and gain > noise:
            message = f"one Kronecker product stops at cosine {top}"
            advice = f"a better preconditioner needs Kronecker rank 2 (+{gain:.2f})"
            found.append(self._finding("notice", "Kronecker rank", message, advice, gain=gain))
        corrected = self.cosines.get("eigen-corrected")
        if corrected is not None:
            extra, error = _difference(corrected, top)
            if extra - 2 * error > CLOSE:
                message = (
                    f"correcting the eigenvalues in Shampoo's basis gives {corrected}, "
                    f"{extra:.3f}{_plus_minus(error)} beyond any Kronecker product"
                )
                advice = "prefer an eigenvalue-corrected method (SOAP, EShampoo)"
                found.append(self._finding("notice", "eigenvalues", message, advice, gain=extra))
        return found

    def _second_product(self) -> float:
        """Cosine that a second Kronecker product adds, of the sample matrix."""
        at = self.rows[self.rows["step"] == self.last] if self.stepwise else self.rows
        share = first_shares(at).get(self.name, math.nan)
        values = at.loc[at["metric"] == "singular_value"].sort_values("index")["value"].to_numpy()
        if math.isnan(share) or len(values) < 2 or values[0] <= 0:
            return 0.0
        return share * (math.hypot(1.0, values[1] / values[0]) - 1.0)

    def _noise(self) -> float:
        """What the plug-in gain of a second product must exceed to be more than sampling noise."""
        if self.draws in _EXACT:
            return 0.0
        kinds = _by_kind(self.now, "cosine", "optimal")
        if not {"plugin", "population"} <= kinds.keys():
            return math.inf
        error = self.cosines["optimal"].stderr
        return max(self.noise, abs(kinds["plugin"] - kinds["population"]), 2 * error)

    def _roots(self) -> list[Finding]:
        """Whether the exponent of Shampoo costs accuracy."""
        square, root = (self.cosines.get(name) for name in ("shampoo-squared", "shampoo"))
        if square is None or root is None:
            return []
        gap, error = _difference(square, root)
        if gap - 2 * error <= STALE:
            return []
        return [
            self._finding(
                "notice",
                "exponent",
                f"Shampoo's factors with exponent -1/4 are {gap:.3f}{_plus_minus(error)} below "
                f"their square (cosine {root} against {square})",
                "use exponent -1/2 with the trace scale to follow H",
                gap=gap,
            )
        ]

    def _scale(self) -> list[Finding]:
        """Whether the magnitude is wrong where the direction is right."""
        rows = _numbers(self.now, "best_scale", math.inf if self.noise else 0.0)
        found = []
        for name in ("shampoo-squared", "kfac"):
            number = rows.get(name)
            if number is None or not math.isfinite(number.stderr) or number.value <= 0:
                continue
            slack = 2 * number.stderr
            if number.value - slack <= SCALES[1] and number.value + slack >= SCALES[0]:
                continue
            message = f"{label(name)} is closest to H when multiplied by {number.value:.3g}"
            found.append(
                self._finding(
                    "notice", "scale", message, "graft its step length, or rescale it",
                    best_scale=number.value,
                )
            )  # fmt: skip
        return found

    def _staleness(self) -> list[Finding]:
        """Whether what the optimizer holds is behind the same rule on fresh statistics."""
        if "live" not in set(self.now["approximation"].dropna()) or not self.stepwise:
            return []
        lag = self._lag()
        if lag.empty or math.isnan(lag.iloc[-1]):
            return []
        last = float(lag.iloc[-1])
        if last <= STALE:
            return []
        steps = lag.index.tolist()
        late = [step for step in steps if not lag[step] > STALE]
        since = next(step for step in steps if not late or step > late[-1])
        evidence = {"lag": last, "since": float(since)}
        if self.draws == "trajectory":  # fresh factors of the same gradients: age and damping
            message = f"the live factors lag by {last:.2f} since step {since}"
            advice = (
                "refresh about twice as often, or use an adaptive tolerance of .1; where the "
                "gradients vanish, lower epsilon"
            )
            return [self._finding("warning", "staleness", message, advice, **evidence)]
        message = (
            f"the live factors are {last:.2f} from fresh ones of this target since step {since}: "
            "batches, labels, averaging, damping and age together"
        )
        advice = "draws='trajectory' shows age and damping alone"
        return [self._finding("notice", "live factors", message, advice, **evidence)]

    def _lag(self) -> pd.Series[Any]:
        """Cosine of the fresh Shampoo minus that of the live operator, a value a step."""
        rows = self.rows[(self.rows["metric"] == "cosine") & self.rows["value"].notna()]
        if "kind" in rows:  # the live operator is scored on the sample, so both are plug-in
            rows = rows[rows["kind"].isin(["plugin"])]
        live = rows[rows["approximation"] == "live"].set_index("step")["value"]
        fresh = rows[rows["approximation"] == "shampoo"].set_index("step")["value"]
        return (fresh - live).dropna().sort_index()


def _numbers(rows: pd.DataFrame, metric: str, noise: float) -> dict[str, _Number]:
    """The best estimate of a metric an approximation: population where it stands, else plug-in.

    Args:
        rows: Of one layer and step.
        metric: Which.
        noise: How far off a plug-in number may be, counted as two standard errors.
    """
    chosen: dict[str, _Number] = {}
    of = rows[(rows["metric"] == metric) & rows["value"].notna()]
    for row in of.to_dict("records"):
        kind = row.get("kind")
        kind = "plugin" if pd.isna(kind) else str(kind)
        if kind not in ("plugin", "population"):
            continue
        error = _error(row) if kind == "population" else noise / 2
        name = str(row["approximation"])
        if name not in chosen or kind == "population":
            chosen[name] = _Number(float(row["value"]), error, kind)
    return chosen


def _error(row: dict[Any, Any]) -> float:
    """Its standard error; of a bracket, half of its width, so that two of them span it."""
    stderr, low, high = (row.get(name) for name in ("stderr", "low", "high"))
    if stderr is not None and not pd.isna(stderr):
        return float(stderr)
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return math.nan
    return (float(high) - float(low)) / 2


def _by_kind(rows: pd.DataFrame, metric: str, approximation: str) -> dict[str, float]:
    of = rows[(rows["metric"] == metric) & (rows["approximation"] == approximation)]
    of = of[of["value"].notna()]
    if "kind" not in of:
        return {}
    return {str(kind): float(value) for kind, value in zip(of["kind"], of["value"], strict=True)}


def _difference(first: _Number, second: _Number) -> tuple[float, float]:
    """first - second and its standard error, taken as the larger of the two.

    Two cosines of one sample move together; from a correlation of one half on, the larger of
    their errors bounds that of the difference.

    Numbers of different kinds are not comparable; their difference is infinitely uncertain.
    """
    gap = first.value - second.value
    if first.kind != second.kind:
        return gap, math.inf
    errors = (first.stderr, second.stderr)
    return gap, math.inf if any(map(math.isnan, errors)) else max(errors)


def _first(rows: pd.DataFrame, column: str) -> str:
    values = rows[column].dropna() if column in rows else pd.Series(dtype=str)
    return str(values.iloc[0]) if len(values) else ""


def _least(rows: pd.DataFrame, column: str) -> float:
    values = rows[column].dropna() if column in rows else pd.Series(dtype=float)
    return float(values.min()) if len(values) else math.nan


def _plus_minus(error: float) -> str:
    return f" ± {error:.3f}" if 0 < error < math.inf else ""
