"""Numbers of a measurement table with what is known of their errors, and differences; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import pandas as pd

# Differences in cosine below this are not worth a change of method.
CLOSE = 0.02
# Cosines that differ by less are equal up to rounding.
ROUNDING = 1e-6


@final
@dataclass(frozen=True)
class Number:
    """A quality number of one approximation.

    Attributes:
        value: The number.
        stderr: Half of how far off it may be: its standard error; of a bracket, half of its
            reach; of a plug-in number, half of the noise. Infinite where nothing is known.
        kind: "population" or "plugin".
        bracket: (low, high), where that is what is known.
    """

    value: float
    stderr: float
    kind: str
    bracket: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        """The smallest value that is likely."""
        return self.bracket[0] if self.bracket else self.value - 2 * self.stderr

    @property
    def high(self) -> float:
        """The largest value that is likely."""
        return self.bracket[1] if self.bracket else self.value + 2 * self.stderr

    def __str__(self) -> str:
        if self.bracket:
            return f"{digits(self.value)} in {interval(*self.bracket)}"
        if self.kind == "plugin":  # exact without noise that shows
            return digits(self.value) + (" (plug-in)" if _shows(2 * self.stderr) else "")
        if math.isfinite(self.stderr):
            return f"{digits(self.value)} ± {digits(self.stderr)}"
        return f"{digits(self.value)} (population, no error known)"


@final
@dataclass(frozen=True)
class Difference:
    """One number less another, of the same layer.

    Attributes:
        value: The difference, as it is: it may be negative.
        low: The smallest difference that is likely.
        high: The largest one.
        kind: "population", "bracket" where a bracket is among the two, "plugin", or "mixed" for
            numbers of two kinds, whose difference says nothing.
    """

    value: float
    low: float
    high: float
    kind: str

    @staticmethod
    def of(first: Number, second: Number) -> Difference:
        """first - second.

        Two numbers of one sample move together; from a correlation of one half on, the larger of
        their errors bounds that of the difference. A bracket is no error of that sort: there the
        extremes are those of both intervals.
        """
        value = first.value - second.value
        if first.kind != second.kind:
            return Difference(value, -math.inf, math.inf, "mixed")
        if first.bracket or second.bracket:
            return Difference(value, first.low - second.high, first.high - second.low, "bracket")
        reach = 2 * max(first.stderr, second.stderr)
        return Difference(value, value - reach, value + reach, first.kind)

    @property
    def stderr(self) -> float:
        """A quarter of the width of its interval."""
        return (self.high - self.low) / 4

    @property
    def unclear(self) -> bool:
        """Whether it may be nothing and may be worth a change of method: its size is not known."""
        return self.low < 0 and self.high > CLOSE

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return digits(self.value)
        if self.kind == "bracket":
            return f"{digits(self.value)} in {interval(self.low, self.high)}"
        if self.kind == "plugin":
            noise = self.high - self.value
            noisy = f" (plug-in numbers, off by up to {digits(noise)})"
            return digits(self.value) + (noisy if _shows(noise) else "")
        return f"{digits(self.value)} ± {digits(self.stderr)}"


def numbers(rows: Iterable[Mapping[Any, Any]], noise: float) -> dict[str, Number]:
    """The best estimate per approximation: population where it stands, else plug-in.

    Args:
        rows: Of one layer, step and metric.
        noise: How far off a plug-in number may be, counted as two standard errors.
    """
    chosen: dict[str, Number] = {}
    for row in rows:
        if pd.isna(row["value"]):
            continue
        kind = row.get("kind")
        kind = "plugin" if pd.isna(kind) else str(kind)
        name = str(row["approximation"])
        if kind == "population":
            chosen[name] = _estimated(row)
        elif kind == "plugin" and name not in chosen:
            chosen[name] = Number(float(row["value"]), noise / 2, kind)
    return chosen


def _estimated(row: Mapping[Any, Any]) -> Number:
    value = float(row["value"])
    stderr, low, high = (_float(row.get(name)) for name in ("stderr", "low", "high"))
    if not math.isnan(stderr):
        return Number(value, stderr, "population")
    if math.isnan(low) or math.isnan(high):
        return Number(value, math.inf, "population")
    # twice this reaches the farther end: the value need not lie in the middle
    return Number(value, max(high - value, value - low) / 2, "population", (low, high))


def _float(given: Any) -> float:
    return math.nan if given is None or pd.isna(given) else float(given)


def dropped_energy(rows: pd.DataFrame) -> float:
    """The share of the energy that truncation left out of a target; 0 where nothing was.

    Args:
        rows: Of one layer and step.
    """
    of = rows.loc[rows["metric"] == "dropped_energy", "value"].dropna()
    return float(of.iloc[-1]) if len(of) else 0.0


def _shows(noise: float) -> bool:
    return digits(noise) != digits(0.0) if math.isfinite(noise) else True


def digits(value: float) -> str:
    """Three decimals, never "-0.000"."""
    return f"{round(value, 3) + 0.0:.3f}"


def interval(low: float, high: float) -> str:
    """[low, high]."""
    return f"[{digits(low)}, {digits(high)}]"


def listed(names: Iterable[str]) -> str:
    """In a sentence: "a, b and c"."""
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
