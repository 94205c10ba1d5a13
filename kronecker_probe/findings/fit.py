"""What the numbers of one layer say; rules with thresholds, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import pandas as pd

from kronecker_probe.findings.advice import no_worse_directions
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.optimizer_state import LIVE, in_use_finding
from kronecker_probe.findings.staleness import STALE, followed_rule
from kronecker_probe.table.codes import ReasonCode
from kronecker_probe.table.numbers import (
    CLOSE,
    ROUNDING,
    Difference,
    Number,
    dropped_energy,
    listed,
    numbers,
)
from kronecker_probe.table.read import first_shares, label

# Cosines from which on a fit is called good.
GOOD = 0.9
# Truncations that drop a larger share of the energy leave nothing to judge.
TRUNCATED = 0.05
# Independent draws (by their effective number) under which no estimate is trusted.
FEWEST_DRAWS = 30
# Fewer than so many times the data at hand are not worth asking for; where more than so many
# times were needed, the difference is at its threshold.
WORTHWHILE, HOPELESS = 1.3, 10.0
# Best scales outside of this range make an ungrafted step length wrong.
SCALES = (0.5, 2.0)
# How many times the data of a forecast were needed at most where it was put to the test.
FORECAST = 3

PRODUCTS = ("shampoo-squared", "kfac", "shampoo")
# Draws that are the matrix itself and no sample of it.
_EXACT = ("batch-gradient", "trajectory")
_BEST = "the best any Kronecker product can do"
_CORRECTED = "corrected eigenvalues (SOAP, EShampoo)"
# What keeps a good fit of the form from being read as one of the run's preconditioner.
NOT_HELD = "but the optimizer's own P (live) is not it"


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
        self.target = _first(now, "target")
        self.exact = self.target in _EXACT or _has(now, ReasonCode.NOT_INDEPENDENT)
        self.at = self.rows[self.rows["step"] == self.last] if self.stepwise else self.rows
        self.dropped = dropped_energy(self.at)
        self.noise = max(self._sampling_noise(), self.dropped)
        self.cosines = numbers(now, "cosine", self.noise)
        # K-FAC may count fewer draws of its factors than there are of H
        self.n_eff = float(_column(now, "n_eff").max())
        self.n_examples = float(_column(now, "n_examples").min())
        self.is_vector = any(_column(now, side).min() == 1 for side in ("m", "n"))

    def findings(self) -> list[Finding]:
        if not self.cosines:
            return [self._undefined()]
        if self.dropped > TRUNCATED:
            return [self._truncated()]
        if abstained := self._too_few():
            return [abstained]
        checks: list[Callable[[], list[Finding]]] = [self._roots, self._scale]
        if not self.is_vector:  # where the optimum and Shampoo^2 are H itself
            checks = [self._distance, self._beyond, *checks]
        return [finding for check in checks for finding in check()]

    @cached_property
    def live(self) -> Finding | None:
        """That the optimizer's own operator is clearly worse than it could be."""
        return None if self.dropped > TRUNCATED else in_use_finding(self)

    @property
    def products(self) -> list[str]:
        """The rules without a fit whose cosine is known."""
        return [name for name in PRODUCTS if name in self.cosines]

    def best_product(self) -> tuple[str, Number] | None:
        """The best Kronecker product measured and its cosine, where its error is known.

        Where that is not "optimal" itself, its cosine is a lower bound of what a product can do.
        """
        if self.is_vector or self.dropped > TRUNCATED or self._too_few():
            return None
        names = ["optimal"] if "optimal" in self.cosines else PRODUCTS
        known = [(name, self.cosines[name]) for name in names if name in self.cosines]
        known = [one for one in known if one[1].kind == "population" or self.exact]
        return max(known, key=lambda one: one[1].value, default=None)

    def helps(self) -> list[str]:
        """What clearly goes beyond one Kronecker product here."""
        return [_HELP[one.subject] for one in self._beyond() if one.subject in _HELP]

    def _finding(
        self, level: str, subject: str, message: str, advice: str = "", /, **evidence: float
    ) -> Finding:
        return Finding(level, self.name, subject, message, advice, evidence)

    def _sampling_noise(self) -> float:
        """How far off a plug-in cosine may be: what an exact product of so many draws would lose.

        Without that row nothing is known of it. Closed forms and gradients along a run are the
        matrix itself, up to what their truncation drops.
        """
        if self.exact:
            return 0.0
        floor = self.at.loc[self.at["metric"] == "noise_floor", "value"].dropna()
        return max(0.0, 1.0 - float(floor.iloc[-1])) if len(floor) else math.inf

    def _truncated(self) -> Finding:
        return self._finding(
            "abstained",
            "truncated target",
            f"truncation dropped {100 * self.dropped:.2g} % of the energy of this target, and "
            "cosines with what is left say nothing about H",
            "give the window more memory or a higher rank (window_memory of a tracker, memory or "
            "rank of a GradientWindow), or make it shorter",
            dropped=self.dropped,
        )

    def _undefined(self) -> Finding:
        rows = self.now[self.now["metric"] == "cosine"]
        if rows["value"].notna().any():
            message = "the table holds held-out cosines alone, which score factors of half the data"
            advice = "add the estimates 'population' or 'plugin'"
            return self._finding("abstained", "undefined", message, advice)
        why = next(iter(_notes(rows)), "no reason noted")
        advice = "add the estimate 'plugin'" if self.exact else ""
        return self._finding("abstained", "undefined", f"no cosine is defined ({why})", advice)

    def _too_few(self) -> Finding | None:
        if self.exact or math.isnan(self.n_eff) or self.n_eff >= FEWEST_DRAWS:
            return None
        factor = FEWEST_DRAWS / max(self.n_eff, 1.0)  # if it grows with the data
        return self._finding(
            "abstained",
            "too few draws",
            f"the {self.n_examples:.0f} examples count as {self.n_eff:.3g} independent draws, and "
            f"under {FEWEST_DRAWS} no quality number means anything",
            f"measure at least {self._more(factor)} data",
            n_eff=self.n_eff,
        )

    def _more(self, factor: float) -> int:
        """So many times the data, in tens, and not just a few more than there are."""
        return math.ceil(self.n_examples * max(factor, WORTHWHILE) / 10) * 10

    def _distance(self) -> list[Finding]:
        """How far the closest rules are from the best Kronecker product.

        Every rule is judged by its own difference: the largest of several noisy cosines is not
        the closest one.
        """
        top = self.cosines.get("optimal")
        known = {name: self.cosines[name] for name in self.products}
        if top is None or not known:
            return []
        subject = "distance to the optimum"
        gaps = {name: Difference.of(top, one) for name, one in known.items()}
        gaps = {name: gap for name, gap in gaps.items() if gap.kind != "mixed"}
        if not gaps:
            message = f"{_named(known)} cannot be compared with {_BEST}: no two numbers of one kind"
            return [self._finding("abstained", subject, message, self._population())]
        best = max((known[name] for name in gaps), key=lambda one: one.value)
        tied = [name for name in gaps if Difference.of(best, known[name]).low <= ROUNDING]
        leaders = {name: gaps[name] for name in tied}
        if close := {name: gap for name, gap in leaders.items() if gap.high <= CLOSE}:
            return [self._close(subject, close, top)]
        evidence = _evidence(leaders, top)
        if all(gap.low > CLOSE for gap in leaders.values()):
            rules = "rules" if len(leaders) > 1 else "rule"
            message = (
                f"{_named(leaders)}, the closest {rules}, {_are(leaders)} {_each(leaders)} short "
                f"of {_BEST} (cosine {top})"
            )
            advice = "kp.approximate(H, 'optimal') makes that product, which no preset follows"
            return [self._finding("notice", subject, message, advice, **evidence)]
        message = (
            f"how far {_named(leaders)} {_are(leaders)} from {_BEST} is too uncertain to judge "
            f"({_differences(leaders)}; cosine {top})"
        )
        widest = max(leaders.values(), key=lambda gap: gap.high - gap.low)
        return [self._finding("abstained", subject, message, self._settling(widest), **evidence)]

    def _close(self, subject: str, close: Mapping[str, Difference], top: Number) -> Finding:
        """Rules close to the optimum; good where that is itself close to H."""
        if all(gap.low <= ROUNDING and gap.high >= -ROUNDING for gap in close.values()):
            message = f"{_named(close)} {_are(close)} indistinguishable from {_BEST} "
            message += f"({_differences(close)})"
        else:
            message = f"{_named(close)} {_are(close)} within {CLOSE:g} of {_BEST} "
            message += f"({_differences(close)})"
        evidence = _evidence(close, top)
        if top.low >= GOOD:
            message += f", a cosine of {top}"
            if self.live is not None:
                message += f", {NOT_HELD}"
                return self._finding("notice", subject, message, "", **evidence)
            return self._finding("good", subject, message, "", **evidence)
        if top.value >= GOOD:
            message += f", a cosine of {top}, which need not be the {GOOD:g} of a good fit"
            return self._finding("notice", subject, message, "", **evidence)
        message += f", but that is a cosine of only {top}"
        advice = "no rule measured here clearly goes beyond it"
        if helps := self.helps():
            advice = f"to go beyond it: {listed(helps)}"
        return self._finding("notice", subject, message, advice, **evidence)

    def _population(self) -> str:
        """How to come by population estimates."""
        if "kind" in self.now and (self.now["kind"] == "population").any():
            return "measure more data, until all have a population estimate"
        return "add the estimate 'population'"

    def _settling(self, gap: Difference) -> str:
        """The data that would tell the difference from CLOSE, for errors ~ 1/sqrt(N)."""
        if gap.kind == "bracket":
            if self.stepwise:
                return (
                    "a run holds no error of this number but the bracket: kp.compare of the same "
                    "samples with refits=8 gives one"
                )
            return "refits=8 in kp.compare gives a standard error in place of the bracket"
        if gap.kind == "plugin" or not math.isfinite(gap.stderr) or math.isnan(self.n_examples):
            return self._population()
        reach, margin = 2 * gap.stderr, abs(gap.value - CLOSE)
        if reach > CLOSE:  # where the difference comes to lie is not known yet
            return self._forecast((reach / CLOSE) ** 2)
        if reach**2 > HOPELESS * margin**2:
            return (
                f"the difference is at the threshold of {CLOSE}, and more data will not settle it"
            )
        return self._forecast((reach / margin) ** 2)

    def _forecast(self, factor: float) -> str:
        """A range: the error that it extrapolates is an estimate, which the forecast squares."""
        least = self._more(factor)
        return f"{least} to {FORECAST * least} data would settle it"

    def _beyond(self) -> list[Finding]:
        """What leaving the set of single Kronecker products buys."""
        top = self.cosines.get("optimal")
        if top is None:
            return []
        found = []
        gain = self._second_product()
        noise = self._noise()
        if gain >= CLOSE and gain > noise:
            message = (
                f"H is not one Kronecker product: the best stops at cosine {top}, and the best sum "
                f"of two has {gain:.2f} more, but no powers to precondition with"
            )
            found.append(self._finding("notice", "Kronecker rank", message, gain=gain))
        corrected = self.cosines.get("eigen-corrected")
        if corrected is not None:
            extra = Difference.of(corrected, top)
            if extra.low > CLOSE:
                message = (
                    f"correcting the eigenvalues in Shampoo's basis gives {corrected}, "
                    f"{extra} beyond any Kronecker product"
                )
                advice = "the presets SOAP and EShampoo correct them"
                found.append(
                    self._finding("notice", "eigenvalues", message, advice, gain=extra.value)
                )
        return found

    def _second_product(self) -> float:
        """Cosine that a second Kronecker product adds, of the sample matrix."""
        share = first_shares(self.at).get(self.name, math.nan)
        rows = self.at[self.at["metric"] == "singular_value"]
        values = rows.sort_values("index")["value"].to_numpy()
        if math.isnan(share) or len(values) < 2 or values[0] <= 0:
            return 0.0
        return share * (math.hypot(1.0, values[1] / values[0]) - 1.0)

    def _noise(self) -> float:
        """What the plug-in gain of a second product must exceed to be more than sampling noise."""
        if self.exact:
            return self.noise
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
        if LIVE in set(self.now["approximation"]) and followed_rule(self.at) != "shampoo":
            return []  # the run's optimizer has no such exponent
        gap = Difference.of(square, root)
        if gap.low <= STALE:
            return []
        message = (
            f"Shampoo's factors with exponent -1/4 are {gap} below their square "
            f"(cosine {root} against {square})"
        )
        advice = "the preset ShampooSquared has the exponent -1/2 with the trace scale"
        if against := no_worse_directions(self.now):
            message += f", but their steps are no worse: {against}"
            advice = "judge the exponent by the steps, for which this cosine is no measure"
        return [self._finding("notice", "Shampoo's exponent", message, advice, gap=gap.value)]

    def _scale(self) -> list[Finding]:
        """Whether the magnitude is wrong where the direction is right."""
        unknown = self.noise > 0 and not self.exact
        rows = numbers(self.now, "best_scale", math.inf if unknown else self.noise)
        found = []
        for name in ("shampoo-squared", "kfac"):
            number = rows.get(name)
            if number is None or not math.isfinite(number.stderr) or number.value <= 0:
                continue
            if number.low <= SCALES[1] and number.high >= SCALES[0]:
                continue
            message = f"{label(name)} is closest to H when multiplied by {number.value:.3g}"
            found.append(
                self._finding(
                    "notice", "scale", message, "graft its step length, or rescale it",
                    best_scale=number.value,
                )
            )  # fmt: skip
        return found


def _by_kind(rows: pd.DataFrame, metric: str, approximation: str) -> dict[str, float]:
    of = rows[(rows["metric"] == metric) & (rows["approximation"] == approximation)]
    of = of[of["value"].notna()]
    if "kind" not in of:
        return {}
    return {str(kind): float(value) for kind, value in zip(of["kind"], of["value"], strict=True)}


_HELP = {"eigenvalues": _CORRECTED}


def _named(rules: Mapping[str, Any]) -> str:
    return listed(label(name) for name in rules)


def _are(rules: Mapping[str, Any]) -> str:
    return "are" if len(rules) > 1 else "is"


def _each(gaps: Mapping[str, Difference]) -> str:
    return listed(str(gap) for gap in gaps.values())


def _differences(gaps: Mapping[str, Difference]) -> str:
    return f"difference{'s' if len(gaps) > 1 else ''} {_each(gaps)}"


def _evidence(gaps: Mapping[str, Difference], top: Number) -> dict[str, float]:
    """Of the first rule named."""
    first = next(iter(gaps.values()))
    return {"gap": first.value, "stderr": first.stderr, "optimal": top.value}


def _first(rows: pd.DataFrame, column: str) -> str:
    values = rows[column].dropna() if column in rows else pd.Series(dtype=str)
    return str(values.iloc[0]) if len(values) else ""


def _column(rows: pd.DataFrame, column: str) -> pd.Series[float]:
    values = rows[column].dropna() if column in rows else pd.Series(dtype=float)
    return values.astype("float64")


def _has(rows: pd.DataFrame, code: ReasonCode) -> bool:
    return "reason" in rows and bool((rows["reason"] == code).any())


def _notes(rows: pd.DataFrame) -> list[str]:
    return [str(note) for note in rows["note"].dropna()] if "note" in rows else []
