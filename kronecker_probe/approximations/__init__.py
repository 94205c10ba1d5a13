"""Structured approximations of a second moment, found by name; users register their own.

In: a ``SecondMoment`` and a spec. Out: an operator.
May import: ``operators``, ``linalg``, ``gradients.samples``, ``table`` and ``errors``.
"""

from __future__ import annotations

from kronecker_probe.approximations.optimal import kronecker_energy
from kronecker_probe.approximations.registry import (
    ALIASES,
    APPROXIMATIONS,
    DEFAULT_APPROXIMATIONS,
    approximate,
    options_of,
    register_approximation,
    resolve,
)
from kronecker_probe.table.specs import Spec

__all__ = [
    "ALIASES",
    "APPROXIMATIONS",
    "DEFAULT_APPROXIMATIONS",
    "Spec",
    "approximate",
    "kronecker_energy",
    "options_of",
    "register_approximation",
    "resolve",
]
