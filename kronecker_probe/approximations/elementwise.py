"""The diagonal of H."""

from __future__ import annotations

from kronecker_probe.operators.diagonal import DiagonalOperator
from kronecker_probe.operators.second_moment import SecondMoment


def diagonal(target: SecondMoment) -> DiagonalOperator:
    """E[G o G], what Adam and AdaGrad hold."""
    return DiagonalOperator(target.diagonal())
