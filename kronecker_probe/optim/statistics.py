"""Second-moment statistics of the gradient: Kronecker factors and diagonals."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kronecker_probe.optim.shapes import Side

Statistics = Literal["ema", "sum"]


def update_factor(
    factor: Tensor, gradient: Tensor, side: Side, statistics: Statistics, beta2: float
) -> None:
    """Adds G G^T (left) or G^T G (right) to a factor in place, in one matrix product.

    Args:
        factor: [m, m] or [n, n].
        gradient: G, [m, n], in the dtype of the factor.
        side: Which of the two.
        statistics: "ema": beta2 A + (1 - beta2) G G^T; "sum": A + G G^T.
        beta2: Of the EMA.
    """
    keep, weight = _weights(statistics, beta2)
    rows = gradient if side == "left" else gradient.T
    factor.addmm_(rows, rows.T, beta=keep, alpha=weight)


def update_diagonal(
    second_moment: Tensor, gradient: Tensor, statistics: Statistics, beta2: float
) -> None:
    """Adds the squared entries of a gradient in place, by the same rule."""
    keep, weight = _weights(statistics, beta2)
    second_moment.mul_(keep).addcmul_(gradient, gradient, value=weight)


def bias_correction(beta: float, step: int, enabled: bool = True) -> float:
    """1 - beta^t, the weight that an EMA started at zero holds after t steps."""
    return 1.0 - beta**step if enabled else 1.0


def statistics_correction(
    statistics: Statistics, beta2: float, step: int, enabled: bool = True
) -> float:
    """What the statistics are divided by; a sum starts at zero for good and needs none."""
    return bias_correction(beta2, step, enabled and statistics == "ema")


def _weights(statistics: Statistics, beta2: float) -> tuple[float, float]:
    return (beta2, 1.0 - beta2) if statistics == "ema" else (1.0, 1.0)
