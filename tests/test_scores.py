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
    failed = {"step": 0, "parameter": "a", "approximation": "in-use", "metric": "cosine",
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
    rows[3] |= {"stderr": None, "interval": "bracket"}
    shown = Scores(frame(rows).drop(columns="step")).shown()
    assert shown.loc[("a", "plugin"), "optimal"] == "0.8800"
    assert shown.loc[("a", "population"), "optimal"] == "0.900 ± 0.010"
    assert shown.loc[("a", "population"), "kfac"] == "0.800 (bracket 0.780 to 0.820)"


def test_metrics_without_estimates_say_that_they_are_of_the_sample() -> None:
    ratio = [dict(row) | {"metric": "trace_ratio"} for row in ROWS if row["kind"] == "plugin"]
    both = Scores(frame([*ROWS, *ratio]).drop(columns="step"))
    remark = "of the sample matrix only (plug-in): trace_ratio"
    assert repr(both).endswith(remark)
    assert remark in both._repr_html_()
    assert "sample matrix only" not in repr(scores("plugin", "population"))
    alone = Scores(frame(ratio).drop(columns="step"))
    assert "0.7800" in repr(alone)  # the metric that was measured, in place of the cosine


def test_the_floor_is_told_beside_plug_in_cosines_only() -> None:
    floor = {"step": 0, "parameter": "a", "metric": "noise_floor", "kind": "population",
             "value": 0.97}  # fmt: skip
    for kinds, there in ((("plugin", "population"), True), (("population",), False)):
        rows = [row for row in ROWS if row["kind"] in kinds]
        shown = Scores(frame([*rows, floor]).drop(columns="step")).shown()
        assert ("noise floor" in shown) == there
