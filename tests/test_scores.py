"""Scores: which kind of estimate a wide table shows, and how its cells read."""

from __future__ import annotations

import pytest

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.quality.scores import Scores
from tests.synthetic_tables import estimated, frame

ROWS = estimated("a", {"optimal": 0.9, "kfac": 0.8}, stderr=0.01)


def scores(*kinds: str) -> Scores:
    rows = [row for row in ROWS if row["kind"] in kinds]
    return Scores(frame(rows).drop(columns="step"))


def test_pivot_takes_plugin_or_else_the_kind_there_is() -> None:
    assert scores("plugin", "population").pivot().loc["a", "kfac"] == pytest.approx(0.78)
    assert scores("population").pivot().loc["a"].to_dict() == {"optimal": 0.9, "kfac": 0.8}


def test_pivot_skips_a_kind_of_rows_without_values() -> None:
    failed = {"step": 0, "parameter": "a", "approximation": "live", "metric": "cosine",
              "kind": "plugin", "note": "not yet"}  # fmt: skip
    population = [row for row in ROWS if row["kind"] == "population"]
    table = frame([failed, *population]).drop(columns="step")
    assert Scores(table).pivot().loc["a", "kfac"] == 0.8


def test_pivot_of_an_absent_kind_names_those_there() -> None:
    with pytest.raises(InvalidInputError, match=r"'cosine' of kind 'plugin', only population"):
        scores("population").pivot(kind="plugin")
    with pytest.raises(InvalidInputError, match="only plugin, population"):
        scores("plugin", "population").pivot(kind="held-out")


def test_cells_tell_a_standard_error_from_a_bracket_and_from_none() -> None:
    rows = [dict(row) for row in ROWS]
    rows[3] |= {"stderr": None, "note": "bracket: held-out to in-sample"}
    shown = Scores(frame(rows).drop(columns="step")).shown()
    assert shown.loc[("a", "plugin"), "optimal"] == "0.8800"
    assert shown.loc[("a", "population"), "optimal"] == "0.900 ± 0.010"
    assert shown.loc[("a", "population"), "kfac"] == "0.800 (bracket 0.780 to 0.820)"
