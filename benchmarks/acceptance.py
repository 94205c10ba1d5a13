"""What the table of ``estimate_coverage`` must show, checked cell by cell.

For closed forms the bias of the population estimate is at most the largest of .01, a tenth of the
plug-in's and a third of the standard error wherever the median N_eff is 50 or more, and its 95%
interval covers the truth in 87 to 100% of the repetitions that gave one, at every N; or it
abstains there. For fitted approximations, at N >= 128, the bias is at most a third of the
plug-in's, or a bracket is given that holds the truth as often as an interval must.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

CLOSED = frozenset({"shampoo-squared", "kfac", "left-only", "right-only", "kfac-reduce", "tkfac"})
# where this share of the repetitions gives no number, the cell abstains
ABSTAINS = 0.9
LEAST_COVERAGE = 0.87
MIN_N_EFF, MIN_N = 50, 128
CLOSED_BIAS = 0.01
# a fitted one's bias over its limit by less than this many errors of the mean is not called a fail
NOISE = 2.0

PASS, FAIL, UNDECIDED, ABSTAINED, FREE = "pass", "FAIL", "undecided", "abstains", "-"


def check(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts: columns rule, limit, bias_verdict and coverage_verdict beside each cell.

    Args:
        table: The columns of ``estimate_coverage.summarize``.
    """
    cells = table[table["kind"] == "population"].copy()
    closed = cells["approximation"].isin(CLOSED)
    cells["rule"] = closed.map({True: "closed", False: "fitted"})
    found = [
        (_closed(cell) if cell["rule"] == "closed" else _fitted(cell))
        for _, cell in cells.iterrows()
    ]
    verdicts = ["limit", "bias_verdict", "coverage_verdict"]
    return cells.assign(**dict(zip(verdicts, zip(*found, strict=True), strict=True)))


def _closed(cell: pd.Series) -> tuple[float, str, str]:
    limit = max(CLOSED_BIAS, abs(cell["plugin_bias"]) / 10, cell["stderr"] / 3)
    if cell["abstained"] >= ABSTAINS:
        return limit, ABSTAINED, ABSTAINED
    covered = PASS if cell["coverage"] >= LEAST_COVERAGE else FAIL
    if cell["n_eff"] < MIN_N_EFF:
        return limit, FREE, covered
    return limit, PASS if abs(cell["bias"]) <= limit else FAIL, covered


def _fitted(cell: pd.Series) -> tuple[float, str, str]:
    limit = abs(cell["plugin_bias"]) / 3
    if cell["abstained"] >= ABSTAINS:
        return limit, ABSTAINED, FREE
    if cell["n"] < MIN_N:
        return limit, FREE, FREE
    if cell["bracketed"] > 0.5:
        return limit, FREE, PASS if cell["coverage"] >= LEAST_COVERAGE else FAIL
    if abs(cell["bias"]) <= limit:
        return limit, PASS, FREE
    near = abs(cell["bias"]) - NOISE * cell["bias_error"] <= limit
    return limit, UNDECIDED if near else FAIL, FREE


def report(table: pd.DataFrame) -> Iterator[str]:
    """Counts of the verdicts, then every cell that fails, by name."""
    cells = check(table)
    yield "\nCriteria (closed forms: bias and coverage; fitted: a third of the plug-in's bias)"
    for (rule, metric), part in cells.groupby(["rule", "metric"], sort=False):
        for what in ("bias", "coverage"):
            counts = part[f"{what}_verdict"].value_counts()
            counts = counts.drop(FREE, errors="ignore")
            if len(counts):
                words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
                yield f"  {rule}, {metric}, {what}: {words}"
    for what in ("bias", "coverage"):
        for _, cell in cells[cells[f"{what}_verdict"].isin([FAIL, UNDECIDED])].iterrows():
            yield f"  {cell[f'{what}_verdict']} {what}: {_words(cell)}"
    yield _verdict(cells)


def _words(cell: pd.Series) -> str:
    return (
        f"{cell['population']}, N = {cell['n']}, {cell['approximation']}, {cell['metric']}: "
        f"bias {cell['bias']:+.4f} +- {cell['bias_error']:.4f} (limit {cell['limit']:.4f}; plug-in "
        f"{cell['plugin_bias']:+.4f}), coverage {cell['coverage']:.2f}, standard error over sd "
        f"{cell['stderr_over_sd']:.2f}, abstains {cell['abstained']:.2f}, N_eff {cell['n_eff']:.0f}"
    )


def _verdict(cells: pd.DataFrame) -> str:
    failed = (cells[["bias_verdict", "coverage_verdict"]] == FAIL).any(axis=1)
    if not failed.any():
        return f"All of {len(cells)} cells meet the criteria."
    return f"{failed.sum()} of {len(cells)} cells fail."
