"""How far what an optimizer holds is behind the rule that it follows; no torch."""

from __future__ import annotations

from typing import Any, final

import pandas as pd

from kronecker_probe.findings.finding import Finding
from kronecker_probe.table.read import label

# A preconditioner behind its own fresh factors by more than this is stale.
STALE = 0.05


def followed_rule(rows: pd.DataFrame) -> str:
    """The approximation that the live operator follows; empty if unknown.

    Args:
        rows: Of one parameter and step.
    """
    if "rule" not in rows:
        return ""
    whole = rows[(rows["metric"] == "in_use_rule") & rows["rule"].notna()]
    if "block_size" in rows:
        whole = whole[whole["block_size"].isna()]
    return str(whole["rule"].iloc[-1]) if len(whole) else ""


@final
class Staleness:
    """The lag of one parameter's live operator behind the same rule on fresh statistics.

    Only against the rule that the optimizer follows is a difference one of age and damping;
    where the table does not name it, nothing is said.

    Args:
        parameter: Whose.
        rows: Of it, at all steps.
        last: The step that is judged.
        noise: How far off the cosines may be.
    """

    def __init__(self, parameter: str, rows: pd.DataFrame, last: int, noise: float) -> None:
        self.parameter = parameter
        self.rows = rows
        self.last = last
        self.limit = STALE + noise

    def findings(self, draws: str) -> list[Finding]:
        """One, or none.

        Args:
            draws: What the target is made of.
        """
        rule = followed_rule(self.rows[self.rows["step"] == self.last])
        if not rule:
            return []
        lag = self._lag(rule)
        if lag.empty or not lag.iloc[-1] > self.limit:
            return []
        last, steps = float(lag.iloc[-1]), lag.index.tolist()
        late = [step for step in steps if not lag[step] > self.limit]
        since = next(step for step in steps if not late or step > late[-1])
        evidence = {"lag": last, "since": float(since)}
        if draws == "trajectory":  # fresh factors of the same gradients: age and damping
            message = (
                f"the live factors lag by {last:.2f} behind fresh {label(rule)} since step {since}"
            )
            advice = (
                "refresh about twice as often, or use an adaptive tolerance of .1; where the "
                "gradients vanish, lower epsilon"
            )
            return [Finding("warning", self.parameter, "staleness", message, advice, evidence)]
        message = (
            f"the live factors are {last:.2f} from fresh {label(rule)} of this target since step "
            f"{since}: batches, labels, averaging, damping and age together"
        )
        advice = "target='trajectory' shows age and damping alone"
        return [Finding("notice", self.parameter, "live factors", message, advice, evidence)]

    def _lag(self, rule: str) -> pd.Series[Any]:
        """Cosine of the fresh rule minus that of the live operator, a value a step."""
        rows = self.rows[(self.rows["metric"] == "cosine") & self.rows["value"].notna()]
        if "kind" in rows:  # the live operator is scored on the sample, so both are plug-in
            rows = rows[rows["kind"].isin(["plugin"])]
        live = rows[rows["approximation"] == "in-use"].set_index("step")["value"]
        fresh = rows[rows["approximation"] == rule].set_index("step")["value"]
        return (fresh - live).dropna().sort_index()
