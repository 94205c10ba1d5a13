"""What the covering set promises, and that a failing check is not lost among those that hold."""

from __future__ import annotations

from itertools import combinations

import pytest

from tests.cases import CASES
from tests.grid import Checks, _properties, covering


def test_the_covering_set_holds_every_case_and_every_pair_of_properties() -> None:
    runs = [(case, route) for case in CASES for route in case.routes]
    chosen = covering(runs)
    kept = [(case, route) for case, route in runs if (str(case), route) in chosen]
    assert {str(case) for case, _ in kept} == {str(case) for case in CASES}

    def pairs(some: list) -> set:
        return {frozenset(p) for run in some for p in combinations(_properties(*run), 2)}

    assert pairs(kept) == pairs(runs)
    assert len(kept) < len(runs) / 2


def test_checks_run_to_the_end_and_raise_all_that_fail() -> None:
    ran = []

    def differ(number: int) -> None:
        ran.append(number)
        assert number != 1
        assert number != 3, "three"

    def all_of_them() -> None:
        with Checks() as check:
            for number in range(4):
                check(f"number {number}", differ, number)

    with pytest.raises(ExceptionGroup, match="2 of 4 checks fail") as caught:
        all_of_them()
    assert ran == [0, 1, 2, 3]
    assert caught.value.exceptions[1].__notes__ == ["in differ of number 3"]
