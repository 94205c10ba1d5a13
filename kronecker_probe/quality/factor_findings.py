"""What the inside of an optimizer says: its factors and their bases; no torch."""

from __future__ import annotations

import pandas as pd

from kronecker_probe.quality.findings import Finding

# Junk is told of above this share of the directions, from this much more scale than the median's.
# A single direction is what a softmax has by construction: its gradients add up to zero.
JUNK, FEWEST, AMPLIFIED = 0.1, 2, 10.0
# The off-diagonal share from which a basis is far off: of a random one it is near 1.
FAR = 0.5
_SIDES = {0: "left", 1: "right"}


def factor_findings(rows: pd.DataFrame, name: str, last: int) -> list[Finding]:
    """Findings about the factors that the live optimizer holds of one parameter.

    Args:
        rows: Of a run's table, of this parameter.
        name: The parameter.
        last: The step that is judged.
    """
    inside = rows[rows["approximation"].isna() & rows["index"].notna() & rows["value"].notna()]
    found = []
    for side in sorted({int(side) for side in inside["index"]}):
        of = inside[inside["index"] == side]
        found += _junk(of[of["step"] == last], name, side)
        found += _basis(of, name, side, last)
    return found


def _junk(now: pd.DataFrame, name: str, side: int) -> list[Finding]:
    """Directions without a correct digit that epsilon lets grow."""
    rank, share, amplification, epsilon = (
        _number(now, metric)
        for metric in (
            "factor_rank",
            "factor_under_floor",
            "factor_amplification",
            "factor_suggested_epsilon",
        )
    )
    # without a suggestion, epsilon is as large as it has to be already
    if rank is None or share is None or amplification is None or epsilon is None:
        return []
    if not JUNK < share < 1 or amplification < AMPLIFIED:
        return []
    if round(rank * share / (1 - share)) < FEWEST:
        return []
    message = (
        f"{100 * share:.0f} % of the directions of the {_side(side)} factor are below its "
        f"rounding, and epsilon scales them {amplification:.2g} times as much as the median "
        "one"
    )
    evidence = {"share": share, "amplification": amplification, "suggested_epsilon": epsilon}
    advice = (
        f"an epsilon (spectrum.epsilon) of {epsilon:.1e} would not; harmless only where inputs "
    )
    advice += "or outputs are constant"
    return [Finding("notice", name, "junk directions", message, advice, evidence)]


def _basis(rows: pd.DataFrame, name: str, side: int, last: int) -> list[Finding]:
    """A basis that hardly is one of its factor any more."""
    shares = rows[rows["metric"] == "basis_off_diagonal"].set_index("step")["value"].sort_index()
    if last not in shares.index or not shares[last] > FAR:
        return []
    steps = [int(step) for step in shares.index if step <= last]
    good = [step for step in steps if not shares[step] > FAR]
    since = next(step for step in steps if not good or step > good[-1])
    message = (
        f"the basis held of the {_side(side)} factor is far off since step {since} (off-diagonal "
        f"share {shares[last]:.2f})"
    )
    advice = "refresh it more often, or use an adaptive tolerance (basis.tolerance) of .1"
    evidence = {"off_diagonal": float(shares[last]), "since": float(since)}
    return [Finding("warning", name, "held basis", message, advice, evidence)]


def _number(now: pd.DataFrame, metric: str) -> float | None:
    values = now.loc[now["metric"] == metric, "value"]
    return float(values.iloc[-1]) if len(values) else None


def _side(side: int) -> str:
    return _SIDES.get(side, f"dimension-{side}")
