"""Names of layers and rules in a sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from kronecker_probe.table.numbers import listed
from kronecker_probe.table.read import label

# Layers that a sentence names.
NAMED = 3
SIDES = {0: "left", 1: "right"}


def layers(names: Sequence[str], shown: int = NAMED) -> str:
    """The first ones, and how many more there are."""
    first = [str(name) for name in names[:shown]]
    return listed([*first, f"{len(names) - shown} more"] if len(names) > shown else first)


def rules(names: Iterable[str]) -> str:
    """Approximations by the names that figures give them."""
    return listed(label(name) for name in names)


def are(of: Collection[object]) -> str:
    """The verb "is" or "are"."""
    return "are" if len(of) > 1 else "is"


def side(number: int) -> str:
    """Of a factor."""
    return SIDES.get(number, f"dimension-{number}")
