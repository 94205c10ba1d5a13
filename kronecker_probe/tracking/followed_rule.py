"""Which rule an optimizer's operator would be, if its statistics were fresh and undamped."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.optim.preconditioner import layout_of
from kronecker_probe.optim.shampoo import Shampoo
from kronecker_probe.quality.rows import Row

# P = L^(-2e) kron R^(-2e) for two factors with the power e, by the name of that approximation.
_OF_TWO_FACTORS = {-0.25: "shampoo", -0.5: "shampoo-squared"}


def followed_rule(optimizer: Optimizer, parameter: Tensor) -> str | None:
    """The approximation whose stale and damped form the live operator is; None where unknown.

    Known for the embedded Shampoo with two factors and the exponent -1/4 (its default there) or
    -1/2. With one factor, another exponent or another optimizer there is no fresh operator that
    age alone separates from the live one.
    """
    if not isinstance(optimizer, Shampoo):
        return None
    for group in optimizer.param_groups:
        if any(parameter is other for other in group["params"]):
            layout = layout_of(parameter, group)
            if len(layout.sides) != 2:
                return None
            given = group["exponent"]
            exponent = layout.default_exponent if given is None else given
            found = [name for e, name in _OF_TWO_FACTORS.items() if math.isclose(e, exponent)]
            return found[0] if found else None
    return None


def live_rule_row(parameter: str, rule: str) -> Row:
    """The row that names it."""
    return {
        "parameter": parameter, "metric": "live_rule", "value": math.nan,
        "note": f"live follows {rule}",
    }  # fmt: skip
