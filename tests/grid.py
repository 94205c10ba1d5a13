"""One test a case and route: a covering set of them by default, the full grid with ``-m grid``.

The cases differ in form, columns, weights, shape and rank, and each has its routes. The covering
set holds every case once, and every pair of their properties, routes included, that the grid has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any, TypeVar

import numpy as np
import pytest

from tests.cases import CASES, Case

Property = tuple[str, object]
Key = TypeVar("Key")


class Checks:
    """Checks of one case that all run; those that fail are raised together at the end of ``with``.

    ``check(what, function, *arguments)`` runs one of them.
    """

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.count = 0

    def __enter__(self) -> Checks:
        return self

    def __call__(self, what: str, function: Callable[..., None], *arguments: Any) -> None:
        self.count += 1
        try:
            function(*arguments)
        except Exception as error:
            error.add_note(f"in {function.__name__} of {what}")
            self.failures.append(error)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.failures:
            message = f"{len(self.failures)} of {self.count} checks fail"
            raise ExceptionGroup(message, self.failures)


def _properties(case: Case, route: str) -> list[Property]:
    m, n = case.shape
    rank = np.linalg.matrix_rank(case.H)
    weights = case.given_weights
    return [
        ("form", "matrices" if not case.factored else "shared" if case.shared else "unshared"),
        ("columns", case.G.shape[1] > 1),
        ("weights", "even" if weights is None else "zeros" if (weights == 0).any() else "any"),
        ("shape", "row" if m == 1 else "column" if n == 1 else "matrix"),
        ("taller", m > n),
        ("size", "dense" if len(case.H) <= 20 else "larger"),
        ("examples", "one" if len(case.G) == 1 else "few" if len(case.G) <= m * n else "many"),
        ("full rank", rank == m * n),
        ("route", route),
    ]


def covering(runs: Sequence[tuple[Case, str]]) -> set[tuple[str, str]]:
    """Names and routes of a greedy choice that holds every case and every pair of properties."""
    pairs = {}
    # of equally good ones the first is chosen: routes take turns in being that
    for place in sorted(range(len(runs)), key=lambda place: place % 4):
        case, route = runs[place]
        properties = _properties(case, route)
        key = (str(case), route)
        pairs[key] = {frozenset(pair) for pair in combinations(properties, 2)} | {str(case)}
    return _chosen(pairs)


def _chosen(held: dict[Key, set[Any]]) -> set[Key]:
    """Keys that together hold all that any key holds."""
    missing = set().union(*held.values())
    chosen = set()
    while missing:
        best = max(held, key=lambda key: len(held[key] & missing))
        chosen.add(best)
        missing -= held[best]
    return chosen


def on_every_route(cases: Iterable[Case] = CASES) -> pytest.MarkDecorator:
    """``case`` and ``route``: those of the covering set unmarked, the others ``grid``."""
    runs = [(case, route) for case in cases for route in case.routes]
    default = covering(runs)
    found = [
        pytest.param(case, route, marks=_marks((str(case), route) in default), id=f"{case}-{route}")
        for case, route in runs
    ]
    return pytest.mark.parametrize(("case", "route"), found)


def on_every_case(cases: Sequence[Case] = CASES) -> pytest.MarkDecorator:
    """``case``: those that hold every pair of properties unmarked, the others ``grid``."""
    held = {str(case): set(combinations(_properties(case, "any"), 2)) for case in cases}
    default = _chosen(held)
    found = [pytest.param(case, marks=_marks(str(case) in default), id=str(case)) for case in cases]
    return pytest.mark.parametrize("case", found)


def _marks(by_default: bool) -> Any:
    return () if by_default else pytest.mark.grid


def pairwise(*axes: Sequence[Any], alone: bool = False) -> list[Any]:
    """All combinations of one value an axis; by default only so many that every pair occurs.

    With ``alone``, so many that every value occurs.
    """
    runs = list(product(*(range(len(axis)) for axis in axes)))
    # of equally good ones the first is chosen: the values of the last axis take turns
    runs.sort(key=lambda run: (run[-1] + run[0]) % len(axes[-1]))
    together = 1 if alone else 2
    held = {run: set(combinations(enumerate(run), together)) for run in runs}
    default = _chosen(held)
    found = []
    for run in runs:
        values = [axis[place] for axis, place in zip(axes, run, strict=True)]
        name = "-".join(map(str, values))
        found.append(pytest.param(*values, marks=_marks(run in default), id=name))
    return found


def some(values: Iterable[Any], *default: Any) -> list[Any]:
    """All of the values, but by default only those."""
    return [
        value if value in default else pytest.param(value, marks=pytest.mark.grid)
        for value in values
    ]
