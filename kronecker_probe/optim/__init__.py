"""The embedded optimizers."""

from __future__ import annotations

from kronecker_probe.optim.shampoo import Shampoo

__all__ = ["Shampoo"]
