"""When to probe."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection

from kronecker_probe.errors import InvalidInputError, unknown_name

Schedule = Callable[[int], bool]
SPACINGS = {"even": 1, "early": 2}


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


def spread(total: int, count: int, spacing: str = "even", offset: int = 0) -> list[int]:
    """``count`` steps from 0 to ``total``, both ends included; fewer where they coincide.

    Args:
        total: Optimizer steps of the run.
        count: How many to probe.
        spacing: "even", or "early" for steps total (i / (count - 1))^2, denser at the start,
            where curvature changes fastest.
        offset: Steps by which all but the two ends are moved, so that they do not coincide with
            refreshes; none is moved beyond the last step.

    Raises:
        InvalidInputError: Fewer than 2 probes, no steps, or a negative offset.
        UnknownNameError: No such spacing.
    """
    if count < 2 or total < 1:
        raise InvalidInputError(
            f"{count} probes over {total} steps; at least 2 probes and 1 step are needed."
        )
    if offset < 0:
        raise InvalidInputError(f"An offset of {offset} steps; it must be at least 0.")
    if spacing not in SPACINGS:
        raise unknown_name("spacing", spacing, SPACINGS)
    power = SPACINGS[spacing]
    steps = sorted({round(total * (i / (count - 1)) ** power) for i in range(count)})
    return sorted({0, total, *(min(step + offset, total) for step in steps[1:-1])})
