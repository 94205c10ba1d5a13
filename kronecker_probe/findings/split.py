"""The squared error of the preconditioner in use, split into its causes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

FRESH, BLOCKING, STATISTICS, DAMPING, STALENESS = (
    f"in_use_{name}" for name in ("fresh", "blocking", "statistics", "damping", "staleness")
)
# Each with its name, in the order in which they are told apart.
CAUSES = {
    FRESH: "its rule",
    BLOCKING: "its blocks",
    STATISTICS: "its statistics",
    DAMPING: "its damping",
    STALENESS: "its staleness",
}


@dataclass(frozen=True)
class Split:
    """The squared error 1 - cos^2 of the preconditioner in use, cause by cause.

    Attributes:
        parts: Cause -> what it adds, as far as that is known; of the rule only what it adds to
            the error of the best product, where that is known. Empty without a split.
        total: The whole error; NaN without a split.
        rule: The cosine of the rule on the gradient samples of H; NaN if unknown.
        with_staleness: Whether the part of the statistics includes that of stale bases.
    """

    parts: Mapping[str, float]
    total: float
    rule: float
    with_staleness: bool = False

    @staticmethod
    def of(rows: Iterable[Mapping[str, Any]], optimum: float) -> Split:
        """The split that the table holds.

        Args:
            rows: Of one parameter and step, with metric and value.
            optimum: The plug-in cosine of the best product; NaN if unknown.
        """
        parts = {str(row["metric"]): float(row["value"]) for row in rows if row["metric"] in CAUSES}
        unknown = {metric for metric, value in parts.items() if math.isnan(value)}
        known = {metric: value for metric, value in parts.items() if metric not in unknown}
        error = known.get(FRESH, math.nan)
        if unknown - {STALENESS}:  # a part that is not known would be taken for none
            known = {}
        parts = dict(known)
        if FRESH in parts and not math.isnan(optimum):
            parts[FRESH] = error - (1.0 - optimum**2)
        total = math.fsum(known.values()) if known else math.nan
        rule = math.sqrt(max(0.0, 1.0 - error)) if not math.isnan(error) else math.nan
        return Split(parts, total, rule, STATISTICS in known and STALENESS in unknown)

    def without(self, cause: str) -> Split:
        """Leaving one of the causes out of consideration."""
        return replace(self, parts={k: v for k, v in self.parts.items() if k != cause})

    def dominant(self) -> tuple[str, float]:
        """The cause that adds most, and how much; "" without a split."""
        cause = max(self.parts, key=lambda one: self.parts[one], default="")
        return cause, self.parts.get(cause, 0.0)
