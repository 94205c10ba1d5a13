"""When to probe."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection

from kronecker_probe.errors import InvalidInputError

Schedule = Callable[[int], bool]


def make_schedule(every: int | Collection[int] | Schedule) -> Schedule:
    """A predicate on the number of optimizer steps taken.

    Args:
        every: An interval in steps (0 is always probed), the steps themselves, or a predicate.

    Raises:
        InvalidInputError: An interval below 1, no steps, or something else.
    """
    if callable(every):
        return every
    if isinstance(every, bool) or not isinstance(every, (int, Collection)):
        raise InvalidInputError(
            f"every={every!r}; give an interval in steps, a list of steps, or a function of the "
            "step."
        )
    if isinstance(every, int):
        if every < 1:
            raise InvalidInputError(f"every={every}; the interval must be at least 1 step.")
        return lambda step: step % every == 0
    try:
        steps = frozenset(operator.index(step) for step in every)  # NumPy's integers too
    except TypeError:
        steps = frozenset()
    if not steps or min(steps) < 0:
        raise InvalidInputError(f"every={every!r}; the steps must be integers >= 0, at least one.")
    return steps.__contains__


def spread(total: int, count: int) -> list[int]:
    """``count`` steps from 0 to ``total``, evenly spread, both ends included.

    Raises:
        InvalidInputError: Fewer than 2 probes, or no steps.
    """
    if count < 2 or total < 1:
        raise InvalidInputError(
            f"{count} probes over {total} steps; at least 2 probes and 1 step are needed."
        )
    return sorted({round(i * total / (count - 1)) for i in range(count)})
