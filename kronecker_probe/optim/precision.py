"""Matrix products of the statistics in their own precision."""

from __future__ import annotations

from kronecker_probe.linalg.precision import full_precision

__all__ = ["full_precision"]
