"""Structured approximations of a second moment, found by name and open to users' own.

In: a ``SecondMoment``, a name with options. Out: an operator.
May import: operators, linalg, table, errors.
"""

from __future__ import annotations

from kronecker_probe.approximations.optimal import kronecker_energy
from kronecker_probe.approximations.registry import (
    ALIASES,
    APPROXIMATIONS,
    DEFAULT_APPROXIMATIONS,
    approximate,
    as_operator,
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
    "as_operator",
    "kronecker_energy",
    "options_of",
    "register_approximation",
    "resolve",
]
