"""Which rule an optimizer's operator would be, if its statistics were fresh and undamped."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.optim import KroneckerOptimizer
from kronecker_probe.quality.rows import Row


def followed_rule(optimizer: Optimizer, parameter: Tensor) -> str | None:
    """The approximation whose stale and damped form the live operator is; None where unknown.

    Known for the embedded optimizers, of parameters that are not cut into blocks. Of others there
    is no fresh operator that age alone separates from the live one.
    """
    return optimizer.rule(parameter) if isinstance(optimizer, KroneckerOptimizer) else None


def in_use_rule_row(parameter: str, rule: str) -> Row:
    """The row that names it."""
    return {
        "parameter": parameter, "metric": "in_use_rule", "value": math.nan,
        "note": f"live follows {rule}",
    }  # fmt: skip
