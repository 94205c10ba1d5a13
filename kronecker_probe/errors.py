"""Errors and warnings. Each message names the layer or option, the value seen, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KroneckerProbeError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        code: The reason (``kronecker_probe.table.codes.ReasonCode``) of a number that is undefined
            because of the error.
    """

    code: str = "undefined"


class InvalidInputError(KroneckerProbeError, ValueError):
    """An argument, a batch or a tensor that cannot be measured as given."""


class NonFiniteError(InvalidInputError):
    """A NaN or an infinity where a finite number is needed."""

    code = "not-finite"


class UnknownNameError(InvalidInputError):
    """A name that is not in a registry."""


class UnsupportedError(InvalidInputError):
    """A valid request that has no exact treatment here."""

    code = "unsupported"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class MemoryBudgetError(KroneckerProbeError, MemoryError):
    """A computation that would need more memory than the machine has."""

    code = "memory"


class RunDirectoryError(KroneckerProbeError, OSError):
    """A run directory that is missing, foreign, occupied or not writable."""


class UndefinedMetricWarning(RuntimeWarning):
    """A quality number that is undefined, returned as NaN (for example when H = 0)."""


def unknown_name(kind: str, name: object, options: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not among ``options``, with the nearest one suggested."""
    known = sorted(options)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")
