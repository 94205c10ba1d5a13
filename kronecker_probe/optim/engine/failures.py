"""Refreshes that failed: told once, and not tolerated for ever."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import final

from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.engine.stack import Failed


@final
class FailureLog:
    """Warns of a factor's first failure, and stops after too many in a row.

    Args:
        name_of: The name of a parameter in messages.
    """

    def __init__(self, name_of: Callable[[Tensor], str]) -> None:
        self._name_of = name_of
        self._warned: set[tuple[int, int, int, int]] = set()

    def note(self, failures: Iterable[Failed], step: int, allowed: int) -> None:
        """Take in the failures of a step.

        Args:
            failures: Factors that were not refreshed.
            step: Of their parameters.
            allowed: Failures in a row that are tolerated.

        Raises:
            InvalidInputError: More than those.
        """
        for failed in failures:
            name = self._name_of(failed.param)
            message = f"No {failed.what} of factor {failed.side} of {name} was found at step {step}"
            if failed.count > allowed:
                raise InvalidInputError(
                    f"{message}, {failed.count} times in a row. Raise spectrum.epsilon, or lower "
                    "the learning rate. No weight was changed."
                )
            if failed.key not in self._warned:
                self._warned.add(failed.key)
                warnings.warn(
                    f"{message}: going on with the last good one, or the grafted direction.",
                    RuntimeWarning,
                    stacklevel=6,  # the caller's step, below two wrappers of torch
                )
