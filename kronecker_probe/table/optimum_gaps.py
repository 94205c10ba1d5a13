"""How far each Kronecker product is from the best one, with what the sample can tell of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kronecker_probe.table.numbers import ROUNDING, Difference, Number, digits
from kronecker_probe.table.read import NUMBERS, error_told, scores

# Kronecker products without a fit: the ones that the optimum bounds and a reader chooses among
RULES = ("shampoo-squared", "kfac", "shampoo")


@dataclass(frozen=True)
class Gap:
    """How far one approximation falls behind the optimal Kronecker product, at worst.

    Attributes:
        approximation: its name in the table.
        difference: the largest difference in cosine (or in an error) over the rows of the table
            where its size is known, with its error; over all rows where it is known nowhere. Of
            estimates it may be negative: a number that lies above the optimum's.
        parameter: where it is largest.
        step: when it is largest; None for a table of one shot.
        unclear: the parameters where its size is not known at some step.
    """

    approximation: str
    difference: Difference
    parameter: str
    step: int | None
    unclear: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Three decimals, rounded up so that "within" is true, or with the error's own."""
        if self.difference.kind == "plugin":
            return _within(self.worst)
        if self.difference.kind == "population":
            return f"{digits(self.worst)} ± {error_told(self.difference.stderr)}"
        return str(self.difference)

    @property
    def worst(self) -> float:
        """The difference as a number."""
        return self.difference.value

    @property
    def known(self) -> bool:
        """Whether the sample can tell its size: there is a row where it is not too uncertain."""
        return not self.difference.unclear

    @property
    def indistinguishable(self) -> bool:
        """Whether an estimate may lie at the optimum: its error holds 0, and is small."""
        return self.difference.kind != "plugin" and self.known and self.difference.low <= ROUNDING


def gaps(table: pd.DataFrame, metric: str = "cosine") -> list[Gap]:
    """Each Kronecker approximation's worst gap to the optimum, the smallest gap first.

    For the errors, the gap is the error in excess of the optimum's. Undefined values are left
    out; without an optimum there is no gap.
    """
    found, parts = [], _parts(table, metric)
    for name in RULES:
        pair = ("optimal", name) if metric == "cosine" else (name, "optimal")
        between = _differences(parts, *pair)
        if not between:
            continue
        known = {place: one for place, one in between.items() if not one.unclear} or between
        worst = max(known, key=lambda place: known[place].value)
        unclear = dict.fromkeys(place[1] for place, one in between.items() if one.unclear)
        step = worst[0] if "step" in table else None
        found.append(Gap(name, known[worst], worst[1], step, tuple(unclear)))
    return sorted(found, key=lambda gap: gap.worst)


def differences(
    table: pd.DataFrame, first: str, second: str, metric: str = "cosine"
) -> dict[tuple[int, str], Difference]:
    """One approximation's number less another's at each (step, parameter) that has both."""
    return _differences(_parts(table, metric), first, second)


def _parts(table: pd.DataFrame, metric: str) -> list[pd.DataFrame]:
    return [scores(table, metric, column) for column in NUMBERS]


def _differences(
    parts: Sequence[pd.DataFrame], first: str, second: str
) -> dict[tuple[int, str], Difference]:
    if not {first, second} <= set(parts[0]):
        return {}
    both = parts[0][[first, second]].notna().all(axis=1)
    mask = both.to_numpy()
    # (place, the two, value and errors), read at once: one by one it takes minutes of a long run
    cells = np.stack([part[[first, second]].to_numpy()[mask] for part in parts], axis=-1).tolist()
    return {
        (int(place[0]), str(place[1])): Difference.of(*(_number(*one) for one in pair))
        for place, pair in zip(parts[0].index[mask], cells, strict=True)
    }


def _number(value: float, stderr: float, low: float, high: float) -> Number:
    """A number of the table; without any error it is the sample's own."""
    if not math.isnan(stderr):
        return Number(value, stderr, "population")
    if math.isnan(low) or math.isnan(high):
        return Number(value, 0.0, "plugin")
    return Number(value, max(high - value, value - low) / 2, "population", (low, high))


def _within(gap: float) -> str:
    """Three decimals, rounded up, so that "within 0.012" is true."""
    return f"{max(math.ceil(gap * 1000 - 1e-6), 1) / 1000:.3f}"
