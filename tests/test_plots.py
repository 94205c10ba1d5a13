"""Figures show the table's numbers, and their titles say what the table says."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from sklearn.isotonic import IsotonicRegression

from kronecker_probe import plots
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.findings.codes import Code
from kronecker_probe.findings.diagnose import diagnose
from kronecker_probe.findings.headlines import headline, spectrum_headline, training_headline
from kronecker_probe.plots.panels import STYLES, apart, style
from kronecker_probe.table.optimum_gaps import gaps
from kronecker_probe.table.read import (
    LABELS,
    first_shares,
    label,
    last_step,
    ordered,
    scores,
    steps_told,
)
from tests.synthetic_tables import (
    APPROXIMATIONS,
    estimated,
    frame,
    probe,
    quality,
    run_table,
    spectrum,
    training,
)

ROOT = Path(__file__).parents[1]
LAYERS = ["0.weight", "2.weight", "4.weight"]
STEPS = list(range(0, 400, 20))
NAN = math.nan


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return run_table(LAYERS, STEPS)


def cosines(table: pd.DataFrame) -> dict[tuple[int, str, str], float]:
    """(step, parameter, approximation) -> cosine, row by row."""
    found = {}
    for step, parameter, approximation, metric, number in table[
        ["step", "parameter", "approximation", "metric", "value"]
    ].itertuples(index=False):
        if metric == "cosine":
            assert (step, parameter, approximation) not in found
            found[step, parameter, approximation] = number
    return found


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def title(axes: np.ndarray) -> str:
    return " ".join(axes[0].figure.get_suptitle().split())


# ---------------------------------------------------------------- titles


def test_titles_show_errors_and_claim_nothing_within_them() -> None:
    cosines = {"optimal": 0.93, "shampoo-squared": 0.934, "kfac": 0.92, "eigen-corrected": 0.95}
    rows = estimated("a", cosines, stderr=0.008)
    assert headline(frame(rows)) == (
        "Shampoo² is indistinguishable from the optimum (difference -0.004 ± 0.008) (population "
        "estimates)"
    )
    above = headline(frame(estimated("a", {"optimal": 0.9, "kfac": 0.93}, stderr=0.008)))
    assert "indistinguishable" in above
    assert "(difference -0.030 ± 0.008)" in above
    plugin = frame([row for row in rows if row["kind"] == "plugin"])
    assert "indistinguishable" not in headline(plugin)  # the sample's own numbers have no error


def bracketed(layer: str, optimal: tuple[float, float], rule: tuple[float, float],
              step: int = 0) -> list[dict[str, object]]:  # fmt: skip
    """The optimum and Shampoo² as brackets, each with its value in the middle."""
    middles = {"optimal": sum(optimal) / 2, "shampoo-squared": sum(rule) / 2}
    rows = [row for row in estimated(layer, middles, 0.01, step) if row["kind"] == "population"]
    for row, (low, high) in zip(rows, (optimal, rule), strict=True):
        row |= {"stderr": None, "low": low, "high": high, "note": "bracket: held-out to in-sample"}
    return rows


def test_titles_refuse_what_diagnose_refuses() -> None:
    table = frame(bracketed("a", (0.62, 0.78), (0.61, 0.758)))
    (refused,) = [one for one in diagnose(table) if one.code == Code.UNCERTAIN]
    assert refused.level == "abstained"
    assert headline(table) == (
        "How far Shampoo² is from the optimum is too uncertain to judge (difference "
        f"{refused.details['gaps']['shampoo-squared']}) (population estimates)"
    )


def test_a_headline_claims_no_layer_in_which_the_sample_cannot_tell() -> None:
    clear = [row for row in estimated("b", {"optimal": 0.9, "shampoo-squared": 0.86}, 0.004)
             if row["kind"] == "population"]  # fmt: skip
    table = frame(bracketed("a", (0.62, 0.78), (0.61, 0.758)) + clear)
    assert headline(table) == (
        "Shampoo² is within 0.040 ± 0.004 of the optimum, but 1 of 2 layers are too uncertain to "
        "judge (a) (population estimates)"
    )


def test_a_headline_that_holds_in_no_layer_throughout_says_only_that() -> None:
    """Each of two layers is told at one of two steps, and at the other it is not."""
    rows = []
    for layer, clear in (("a", 0), ("b", 4)):
        for step in (0, 4):
            error = 0.004 if step == clear else 0.03
            rows += estimated(layer, {"optimal": 0.9, "shampoo-squared": 0.89}, error, step)
    assert headline(frame(rows)) == (
        "How far Shampoo² stays from the optimum is too uncertain to judge at some steps of each "
        "of 2 layers (population estimates)"
    )


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.floats(-0.1, 0.3), st.floats(1e-4, 0.1))
def test_a_gap_is_told_with_its_error_or_not_at_all(gap: float, stderr: float) -> None:
    table = frame(estimated("a", {"optimal": 0.6, "kfac": 0.6 - gap}, stderr))
    unclear = gap - 2 * stderr < 0 and gap + 2 * stderr > 0.02
    edge = min(abs(gap - 2 * stderr), abs(gap + 2 * stderr - 0.02)) < 1e-9
    hypothesis.assume(not edge)
    assert ("too uncertain" in headline(table)) == unclear
    assert "±" in headline(table)
    level = {one.level for one in diagnose(table) if one.subject == "distance to the optimum"}
    assert not unclear or level == {"abstained"}


def test_vectors_are_counted_and_drawn_only_where_asked_for() -> None:
    rows = quality(0, "w", {"optimal": 0.9, "kfac": 0.8})
    for name, narrow in (("bias", {"n": 1}), ("scale", {"m": 1})):
        rows += quality(0, name, {"optimal": 1.0, "kfac": 0.3}, **narrow)
        rows += [row | narrow for row in spectrum(0, name, [1.0], 1.0)]
    table = frame(rows + spectrum(0, "w", [3.0, 1.0], 4.0))
    remark = "2 vectors left out, where the optimal Kronecker product is H"
    assert headline(table) == "K-FAC is within 0.100 of the optimum"
    for plot in (plots.plot_trajectory, plots.plot_ladder, plots.plot_spectrum):
        axes = plot(table, figure=Figure())
        assert [ax.get_title(loc="left").split()[0] for ax in axes] == ["w"]
        assert title(axes).endswith(remark)
        asked = plot(table, parameters=["bias", "w"], figure=Figure())
        assert [ax.get_title(loc="left").split()[0] for ax in asked] == ["bias", "w"]
        assert "left out" not in title(asked)
    alone = table[table["parameter"] == "bias"]  # with nothing else there is nothing to leave out
    assert len(plots.plot_ladder(alone, figure=Figure())) == 1


@pytest.mark.parametrize(
    ("undefined", "steps"), [([4], [4]), ([0], [0]), ([0, 2], [0, 2]), ([0, 2, 4], [0, 2, 4])]
)
def test_findings_say_at_which_steps_cosines_are_undefined(
    undefined: list[int], steps: list[int]
) -> None:
    rows = []
    for step in (0, 2, 4):
        note = {"note": "H = 0"} if step in undefined else {}
        rows += quality(step, "a", {"optimal": NAN if note else 0.9}, **note)
    (one,) = diagnose(frame(rows))
    assert one.code == (Code.UNDEFINED if 4 in undefined else Code.UNDEFINED_AT_STEPS)
    assert (one.details["at"], one.details["reason"]) == (steps, "H = 0")


@hypothesis.given(st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 30)))
def test_steps_told_name_no_step_that_is_not_meant(some: set[int], others: set[int]) -> None:
    told = steps_told(some, some | others)
    numbers = [int(number) for number in re.findall(r"\d+", told)]
    if "every" in told:
        assert some == some | others
    elif " of " in told:
        assert numbers == [len(some), len(some | others), min(some), max(some)]
    elif " to " in told:
        low, high = numbers
        assert {step for step in some | others if low <= step <= high} == some
    else:
        assert set(numbers) == some


def test_held_out_numbers_alone_are_shown_and_named() -> None:
    rows = [row | {"kind": "held-out"} for row in quality(0, "a", {"optimal": 0.9, "kfac": 0.8})]
    assert headline(frame(rows)) == ("K-FAC is within 0.100 of the optimum (held-out estimates)")
    assert scores(frame(rows)).loc[(0, "a"), "kfac"] == 0.8


def test_panels_keep_the_order_of_the_layers() -> None:
    shuffled = run_table(["z", "a", "m"], [0, 20])
    for plot in (plots.plot_trajectory, plots.plot_ladder, plots.plot_spectrum):
        panels = plot(shuffled, figure=Figure())
        assert [ax.get_title(loc="left").split()[0] for ax in panels] == ["z", "a", "m"]


def test_headline_numbers_are_the_worst_over_layers_and_steps(table: pd.DataFrame) -> None:
    value = cosines(table)

    def gap(step: int, layer: str, name: str) -> float:
        return value[step, layer, "optimal"] - value[step, layer, name]

    places = [(step, layer) for step in STEPS[::4] for layer in LAYERS]
    part = table[table["step"].isin(STEPS[::4])]
    closest = max(gap(*place, "shampoo-squared") for place in places)
    farthest, where = max((gap(*place, "shampoo"), place) for place in places)
    expected = (
        f"Shampoo² stays within {math.ceil(closest * 1000) / 1000:.3f} of the optimum in "
        f"every layer; Shampoo differs by up to {farthest:.3f} "
        f"({where[1]}, step {where[0]})"
    )
    assert headline(part) == expected


@hypothesis.given(st.lists(st.floats(0, 0.5), min_size=1, max_size=5))
def test_within_is_never_less_than_the_gap(differences: list[float]) -> None:
    rows = [
        row
        for step, difference in enumerate(differences)
        for row in quality(step, "a", {"optimal": 0.9, "kfac": 0.9 - difference})
    ]
    told = float(re.search(r"within (\d\.\d+)", headline(frame(rows)))[1])  # type: ignore[index]
    worst = max(0.9 - (0.9 - difference) for difference in differences)
    assert worst - 1e-8 <= told <= worst + 0.001


def test_headline_says_where_values_are_undefined() -> None:
    rows = quality(0, "a", {"optimal": 0.9, "kfac": 0.8}) + quality(
        0, "b", {"optimal": NAN, "kfac": NAN}
    )
    assert headline(frame(rows)) == (
        "K-FAC is within 0.100 of the optimum in every layer where it is defined"
    )
    assert headline(frame(rows[-8:])).startswith("No cosine similarity to H is defined")


@pytest.mark.parametrize("metric", ["relative_error", "best_scale_error"])
def test_for_errors_the_gap_is_the_excess_over_the_optimum(metric: str) -> None:
    rows = quality(0, "a", {"optimal": 0.8, "kfac": 0.6})
    table = frame([row for row in rows if row["metric"] == metric])
    found = {row["approximation"]: row["value"] for row in rows if row["metric"] == metric}
    (only,) = gaps(table, metric)
    assert only.worst == pytest.approx(found["kfac"] - found["optimal"])
    assert (only.approximation, only.parameter, only.step) == ("kfac", "a", 0)


def test_best_scale_headline_names_the_farthest_from_one() -> None:
    scales = [(0, "kfac", 1.02), (1, "kfac", 1.04), (0, "shampoo", 3.0), (1, "shampoo", 4.5)]
    rows = [
        {"step": s, "parameter": "a", "approximation": name, "metric": "best_scale", "value": c}
        for s, name, c in scales
    ]
    text = headline(frame(rows), "best_scale")
    assert text.startswith("Shampoo is farthest from its best scale: c = 3.000 to 4.500")


def test_two_values_for_one_place_are_refused_by_place() -> None:
    rows = quality(3, "a", {"kfac": 0.9}) + quality(3, "a", {"kfac": 0.8}, target="fisher")
    with pytest.raises(InvalidInputError, match="step 3, parameter a, approximation kfac"):
        scores(frame(rows))


def test_shares_are_the_first_singular_value_over_the_norm() -> None:
    rows = spectrum(0, "a", [3.0, 1.0], 4.0) + spectrum(0, "zero", [0.0, 0.0], 0.0)
    rows += [row for row in spectrum(0, "no norm", [3.0], 1.0) if row["metric"] != "norm"]
    assert first_shares(frame(rows)) == {"a": 0.75}
    assert spectrum_headline(frame(rows)) == (
        "One Kronecker product holds 56% of the sample matrix's squared norm in a"
    )
    two = frame(spectrum(0, "a", [3.0], 4.0) + spectrum(0, "b", [1.0], 1.0))
    assert spectrum_headline(two) == (
        "One Kronecker product holds 56% (a) to 100% of the sample matrix's squared norm, layer "
        "by layer"
    )


def test_training_headline_prefers_held_out_accuracy() -> None:
    logged = [
        (0, "train_loss", 2.3),
        (100, "train_loss", 0.4131),
        (100, "train_accuracy", 0.99),
        (100, "probe_accuracy", 0.98),
        (0, "test_accuracy", 0.1),
        (100, "test_accuracy", 0.925),
    ]
    rows = [{"step": step, "metric": metric, "value": number} for step, metric, number in logged]
    assert training_headline(frame(rows)) == (
        "Training loss falls from 2.3 to 0.413 by step 100; "
        "test accuracy rises from 10.0% to 92.5% by step 100"
    )
    once = frame([{"step": 5, "metric": "probe_loss", "value": 0.5}])
    assert training_headline(once) == "Loss on the probe set is 0.5 at step 5"


# ---------------------------------------------------------------- trajectory


def test_trajectory_draws_the_numbers_of_the_table(table: pd.DataFrame) -> None:
    value = cosines(table)
    axes = plots.plot_trajectory(table, figure=Figure())
    assert len(axes) == len(LAYERS)
    for ax, layer in zip(axes, LAYERS, strict=True):
        assert ax.get_title(loc="left").startswith(layer + " (6")
        lines = {line.get_label(): line for line in ax.lines}
        assert set(lines) == {LABELS[name] for name in APPROXIMATIONS}
        for name in APPROXIMATIONS:
            line = lines[LABELS[name]]
            assert line.get_color() == STYLES[name].color
            assert list(line.get_xdata()) == STEPS
            for step in (0, 180, 380):
                drawn = line.get_ydata()[STEPS.index(step)]
                np.testing.assert_equal(drawn, value[step, layer, name])
    assert title(axes) == headline(table)


def test_the_live_line_starts_with_its_first_value_and_is_marked_there(table: pd.DataFrame) -> None:
    ax = plots.plot_trajectory(table, ["0.weight"], figure=Figure())[0]
    (live,) = [line for line in ax.lines if line.get_label().startswith("in use")]
    drawn = np.isfinite(live.get_ydata())
    assert STEPS[int(np.argmax(drawn))] == 20
    assert live.get_markevery()
    assert all(drawn[live.get_markevery()])


def test_lines_of_late_or_rare_values_have_markers() -> None:
    rows = [row for s in range(40) for row in quality(s, "a", {"optimal": 0.9, "kfac": 0.8})]
    rows += quality(39, "a", {"in-use": 0.7})
    ax = plots.plot_trajectory(frame(rows), figure=Figure())[0]
    (live,) = [line for line in ax.lines if line.get_label().startswith("in use")]
    assert np.isfinite(live.get_ydata()[live.get_markevery()]).any()


def test_a_diagonal_far_below_is_named_and_not_hidden(table: pd.DataFrame) -> None:
    value = cosines(table)
    axes = plots.plot_trajectory(table, figure=Figure())
    for ax, layer in zip(axes, LAYERS, strict=True):
        last = value[380, layer, "diagonal"]
        assert last < ax.get_ylim()[0]
        (name,) = [one for one in ax.texts if one.get_text() == f"diagonal ↓ {last:.3f}"]
        assert not isinstance(name, Annotation)  # which is not drawn for a point out of view
        assert name.get_position()[0] > 1  # beside the lines, not on them
        shown = [value[s, layer, a] for s in STEPS[1::6] for a in APPROXIMATIONS if a != "diagonal"]
        assert ax.get_ylim()[0] < min(shown) < max(shown) < ax.get_ylim()[1]


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_labels_at_the_lines_do_not_overlap(layers: int) -> None:
    figure = Figure()
    axes = plots.plot_trajectory(run_table([f"{i}.w" for i in range(layers)], STEPS), figure=figure)
    figure.draw_without_rendering()
    for ax in axes:
        labels = list(ax.texts)
        names = {text.get_text().split(" ↓")[0] for text in labels}
        assert names == {LABELS[name].split(" (")[0] for name in APPROXIMATIONS}
        boxes = sorted(
            (mpl.text.Text.get_window_extent(text) for text in labels), key=lambda box: box.y0
        )
        for below, above in itertools.pairwise(boxes):
            assert above.y0 > below.y0 + 0.6 * below.height  # ascenders and descenders may touch
        assert not figure.legends


def test_beyond_six_panels_one_legend_names_the_lines() -> None:
    figure = Figure()
    axes = plots.plot_trajectory(run_table([f"l{i}" for i in range(14)], [0, 20]), figure=figure)
    assert len(axes) == 14
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        LABELS[name] for name in APPROXIMATIONS
    ]
    columns = {round(ax.get_subplotspec().get_position(figure).x0, 3) for ax in axes}
    assert len(columns) == 4


def test_many_layers_are_cut_and_the_title_says_so() -> None:
    layers = [f"l{i}" for i in range(30)]
    table = frame(
        [row for name in layers for row in quality(0, name, {"optimal": 0.9, "kfac": 0.8})]
    )
    axes = plots.plot_trajectory(table, figure=Figure())
    assert len(axes) == 12
    assert title(axes).endswith("(the first 12 of 30 layers are drawn)")
    first = table[table["parameter"].isin(layers[:24])]
    assert len(plots.plot_trajectory(first, figure=Figure())) == 24
    asked = plots.plot_trajectory(table, layers[::-1], figure=Figure())
    assert [ax.get_title(loc="left").split()[0] for ax in asked] == layers[::-1]


def test_undefined_layers_say_so() -> None:
    rows = quality(0, "a", {"optimal": NAN, "kfac": NAN}) + quality(
        0, "b", {"optimal": 0.9, "kfac": 0.8}
    )
    axes = plots.plot_trajectory(frame(rows), figure=Figure())
    assert texts(axes[0]) == ["undefined"]
    assert len(axes[1].lines) == 2
    ladder = plots.plot_ladder(frame(rows), figure=Figure())
    assert texts(ladder[0]) == ["undefined", "undefined"]
    assert texts(ladder[1]) == ["0.900", "0.800"]


def test_errors_over_a_decade_get_a_log_scale() -> None:
    rows = quality(0, "a", {"optimal": 0.9, "shampoo": 0.8})
    rows = [row | {"value": 40.0} if row["approximation"] == "shampoo" else row for row in rows]
    for plot in (plots.plot_trajectory, plots.plot_ladder):
        ax = plot(frame(rows), metric="relative_error", figure=Figure())[0]
        assert "log" in (ax.get_yscale(), ax.get_xscale())
        ax = plot(frame(rows), metric="best_scale_error", figure=Figure())[0]
        ax.figure.draw_without_rendering()
    assert plots.plot_trajectory(frame(quality(0, "a", {"kfac": 0.5})), figure=Figure())[0].lines


def run_of_estimates() -> pd.DataFrame:
    """Two layers at three steps; in "b" the estimate of K-FAC abstains at step 2."""
    rows = []
    for step in (0, 2, 4):
        for layer in ("a", "b"):
            rows += estimated(layer, {"optimal": 0.93, "kfac": 0.9}, stderr=0.01, step=step)
            if layer == "b" and step == 2:
                rows[-1] |= {"value": NAN, "stderr": None, "low": None, "high": None}
    return frame(rows)


def test_whiskers_are_the_intervals_and_a_layer_without_them_says_why() -> None:
    axes = plots.plot_trajectory(run_of_estimates(), figure=Figure())
    whiskers = [
        segment.round(9).tolist() for part in axes[0].collections
        if isinstance(part, LineCollection) for segment in part.get_segments()
    ]  # fmt: skip
    assert sorted(whiskers) == sorted(
        [[step, low], [step, high]]
        for step in (0, 2, 4)
        for low, high in ((0.91, 0.95), (0.88, 0.92))
    )
    assert axes[0].get_ylim()[0] < 0.88 < 0.95 < axes[0].get_ylim()[1]  # all in view
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles == ["a (64 × 128)", "b (64 × 128)\n(plug-in: estimates abstain at step 2)"]
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), 0.91)  # plug-in at every step
    segments = [s for part in axes[1].collections if isinstance(part, LineCollection)
                for s in part.get_segments()]  # fmt: skip
    assert not np.isfinite(np.array([s[:, 1] for s in segments if len(s)])).any()
    assert "plug-in numbers in b" in title(axes)


def test_of_many_lines_the_optimum_and_the_closest_rule_have_whiskers() -> None:
    cosines = {"optimal": 0.93, "shampoo": 0.8, "kfac": 0.9, "diagonal": 0.7, "eigen-corrected": 1}
    table = frame(estimated("a", cosines, stderr=0.01))
    (ax,) = plots.plot_trajectory(table, figure=Figure())
    drawn = [part for part in ax.collections if isinstance(part, LineCollection)]
    assert [part.get_segments()[0][:, 1].round(9).tolist() for part in drawn] == [
        [0.91, 0.95], [0.88, 0.92],
    ]  # fmt: skip
    assert ax.get_ylim()[1] <= 1.02  # the interval of the corrected one, beyond 1, is not drawn


def test_an_interval_beyond_one_is_in_view_and_nothing_else_is() -> None:
    for stderr, top in ((0.06, 1.05), (0.03, None)):
        (ax,) = plots.plot_trajectory(
            frame(estimated("a", {"optimal": 0.95, "kfac": 0.5}, stderr)), figure=Figure()
        )
        assert ax.get_ylim()[1] == 1.02 if top is None else ax.get_ylim()[1] > top


def test_markers_of_neighbouring_steps_do_not_lie_on_each_other() -> None:
    steps = [0, 10, 20, 30, 40, 41]
    rows = [row for s in steps for row in quality(s, "a", {"optimal": 0.9, "kfac": 0.8})]
    (ax,) = plots.plot_trajectory(frame(rows), figure=Figure())
    for line in ax.lines:
        assert [steps[place] for place in line.get_markevery()] == [0, 10, 20, 30, 41]


def test_values_below_the_panel_stand_where_no_line_is() -> None:
    cosines = {"optimal": 0.9, "kfac": 0.88, "diagonal": 0.2}
    rows = [row for s in STEPS for i in range(7) for row in quality(s, f"l{i}", cosines)]
    figure = Figure()
    axes = plots.plot_trajectory(frame(rows), figure=figure)
    figure.draw_without_rendering()
    for ax in axes:
        (text,) = [one for one in ax.texts if "↓" in one.get_text()]
        top = text.get_window_extent().y1
        others = [line for line in ax.lines if line.get_label() != "diagonal"]
        lowest = min(float(np.nanmin(np.asarray(line.get_ydata()))) for line in others)
        assert top < ax.transData.transform((0, lowest))[1]


def test_bars_of_the_ladder_are_the_intervals() -> None:
    (ax,) = plots.plot_ladder(run_of_estimates(), parameters=["a"], figure=Figure())
    bars = [part.get_segments()[0].round(9).tolist() for part in ax.collections]
    assert bars == [[[0.91, 0.0], [0.95, 0.0]], [[0.88, 1.0], [0.92, 1.0]]]


def test_bars_that_are_far_wider_than_the_values_are_cut() -> None:
    rows = estimated("a", {"optimal": 0.93, "kfac": 0.9}, stderr=5.0)
    (ax,) = plots.plot_ladder(frame(rows), figure=Figure())
    low, high = ax.get_xlim()
    assert 0.8 < low < 0.9 < 0.93 < high < 1.0


# ---------------------------------------------------------------- ladder


@pytest.mark.parametrize(("metric", "descending"), [("cosine", True), ("relative_error", False)])
def test_ladder_lists_the_best_first(table: pd.DataFrame, metric: str, descending: bool) -> None:
    axes = plots.plot_ladder(table, 200, metric, figure=Figure())
    at_200 = table[(table["step"] == 200) & (table["metric"] == metric)]
    for ax, layer in zip(axes, LAYERS, strict=True):
        rows = at_200[at_200["parameter"] == layer].sort_values("value", ascending=not descending)
        names = [LABELS[name].split(" (")[0] for name in rows["approximation"]]
        assert [tick.get_text() for tick in ax.get_yticklabels()] == names
        assert texts(ax) == [f"{number:.3f}" for number in rows["value"]]
        top = ax.get_ylim()
        assert top[0] > top[1]  # the first rung is the uppermost
    if metric == "cosine":
        assert title(axes) == "At step 200: " + headline(table[table["step"] == 200])


def test_an_arrowhead_stands_for_a_rung_beyond_the_edge() -> None:
    row = {"optimal": 0.9, "shampoo": 0.7, "diagonal": 0.1}
    (ax,) = plots.plot_ladder(frame(quality(0, "a", row)), figure=Figure())
    edge = ax.get_xlim()[0]
    assert 0.5 < edge < 0.7
    (head,) = [line for line in ax.lines if line.get_marker() == "<"]
    assert (list(head.get_xdata()), list(head.get_ydata())) == ([edge], [2])
    assert texts(ax) == ["0.900", "0.700", "0.100"]


def test_ladder_takes_the_last_step_or_one_shot(table: pd.DataFrame) -> None:
    last = plots.plot_ladder(table, figure=Figure())
    assert title(last).startswith("At step 380: ")
    one_shot = table[table["step"] == 380].drop(columns="step")
    axes = plots.plot_ladder(one_shot, figure=Figure())
    assert [texts(ax) for ax in axes] == [texts(ax) for ax in last]
    assert title(axes) == headline(one_shot)


def test_ladder_of_a_step_that_was_not_probed_names_the_nearest(table: pd.DataFrame) -> None:
    with pytest.raises(InvalidInputError, match=r"205.*nearest probed step is 200"):
        plots.plot_ladder(table, 205, figure=Figure())
    with pytest.raises(InvalidInputError, match="no 'step' column"):
        plots.plot_ladder(table.drop(columns="step"), 20, figure=Figure())


# ---------------------------------------------------------------- spectrum


def test_spectrum_is_relative_and_states_the_first_share() -> None:
    rows = spectrum(0, "a", [4.0, 2.0, 1.0, 0.0], 5.0) + spectrum(0, "b", [9.0], 9.0)
    axes = plots.plot_spectrum(frame(rows), figure=Figure())
    (line,) = axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 3]
    np.testing.assert_allclose(line.get_ydata(), [1.0, 0.5, 0.25], rtol=1e-15)
    assert axes[0].get_yscale() == "log"
    assert texts(axes[0]) == ["σ₁/‖H‖, sample: 0.800"]
    assert texts(axes[1]) == ["σ₁/‖H‖, sample: 1.000"]
    assert axes[0].get_ylim() == axes[1].get_ylim()


def test_spectrum_keeps_the_order_of_layers_and_takes_the_last_step(table: pd.DataFrame) -> None:
    axes = plots.plot_spectrum(table, figure=Figure())
    assert [ax.get_title(loc="left").split()[0] for ax in axes] == LAYERS
    assert title(axes).startswith("At step 380: One Kronecker product holds")
    assert title(axes).endswith("(drawn: plug-in numbers, of the sample matrix itself)")
    # in the made-up run, as in theory, the share is the cosine of the optimum
    assert f": {cosines(table)[380, '2.weight', 'optimal']:.3f}" in texts(axes[1])[0]


def test_spectrum_headline_is_of_h_where_that_is_known() -> None:
    rows = spectrum(0, "a", [0.58, 0.3], 1.0)
    known = rows + estimated("a", {"optimal": 0.741}, stderr=0.02, less=0.161)
    assert spectrum_headline(frame(known)) == (
        "One Kronecker product holds an estimated 55% (49 to 61%) of ‖H‖² in a"
    )
    (ax,) = plots.plot_spectrum(frame(known), figure=Figure())
    assert texts(ax) == ["σ₁/‖H‖, sample: 0.580\npopulation: 0.741 ± 0.020"]
    both = known + spectrum(0, "b", [0.5, 0.3], 1.0)  # of one layer nothing is known of H
    assert spectrum_headline(frame(both)) == (
        "One Kronecker product holds 25% (b) to 34% of the sample matrix's squared norm, layer "
        "by layer"
    )


def test_spectrum_of_a_zero_target_says_so() -> None:
    axes = plots.plot_spectrum(frame(spectrum(0, "a", [0.0, 0.0], 0.0)), figure=Figure())
    assert texts(axes[0]) == ["undefined (H = 0)"]
    with pytest.raises(InvalidInputError, match="singular values"):
        plots.plot_spectrum(frame(quality(0, "a", {"kfac": 0.5})), figure=Figure())


# ---------------------------------------------------------------- training


def test_training_draws_what_was_logged_and_marks_probed_steps(table: pd.DataFrame) -> None:
    loss, accuracy = plots.plot_training(table, figure=Figure())
    lines = {line.get_label(): line for line in loss.lines}
    assert set(lines) == {"training loss", "probe set loss", "probed step"}
    assert list(lines["training loss"].get_xdata()) == list(range(381))
    assert list(lines["probed step"].get_xdata()) == STEPS
    logged = table[table["metric"] == "train_loss"]["value"]
    assert lines["training loss"].get_ydata().sum() == pytest.approx(logged.sum())
    assert {line.get_label() for line in accuracy.lines} == {
        "training accuracy", "probe set accuracy", "probed step",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "scale", "from_zero"),
    [([2.0, 0.5], "linear", True), ([2.0, 0.01], "log", False), ([0.5, -3.0], "linear", False)],
)
def test_losses_are_all_in_view(losses: list[float], scale: str, from_zero: bool) -> None:
    rows = [{"step": s, "metric": "train_loss", "value": v} for s, v in enumerate(losses)]
    (ax,) = plots.plot_training(frame(rows), figure=Figure())
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert low <= min(losses) < max(losses) <= high
    assert (low == 0) == from_zero


def test_training_without_accuracy_is_one_panel_and_without_loss_an_error() -> None:
    assert len(plots.plot_training(frame(training([0, 1], accuracy=False)), figure=Figure())) == 1
    with pytest.raises(InvalidInputError, match="no losses"):
        plots.plot_training(frame(quality(0, "a", {"kfac": 0.9})), figure=Figure())


# ---------------------------------------------------------------- what all figures share


def test_styles_differ_in_colour_marker_and_line() -> None:
    assert {*STYLES, "divergence"} == set(LABELS)  # the family has a style for each order
    usual = [STYLES[name] for name in APPROXIMATIONS]
    for field in ("color", "marker"):
        assert len({getattr(style, field) for style in usual}) == len(usual)
    dashed = [style.line for style in usual if style.line != "-"]
    assert len(set(dashed)) == len(usual) - 2  # the optimum and Shampoo² are both solid
    for fields in (("color", "marker"), ("color", "line")):  # of all, one of the two differs
        looks = [tuple(getattr(style, field) for field in fields) for style in STYLES.values()]
        assert len(set(looks)) == len(STYLES)


def test_options_have_a_style_and_a_name_of_their_own() -> None:
    specs = ["optimal:rank=2", "optimal:rank=3", "divergence:q=0.25", "shampoo:block_size=8"]
    looks = {(one.color, one.marker, one.line) for one in map(style, specs)}
    assert len(looks) == len(specs)
    assert [label(spec) for spec in specs] == [
        "optimal Kronecker, rank=2", "optimal Kronecker, rank=3", "divergence, q=0.25",
        "Shampoo, block_size=8",
    ]  # fmt: skip
    assert label("divergence:q=0") == "KL"
    mixed = ["kfac", "optimal:rank=2", "mine", "optimal"]
    assert ordered(mixed) == ["optimal", "optimal:rank=2", "kfac", "mine"]


def test_an_approximation_of_your_own_is_drawn_under_its_name() -> None:
    table = frame(quality(0, "a", {"optimal": 0.9, "kl": 0.85}))
    axes = plots.plot_ladder(table, figure=Figure())
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["optimal Kronecker", "kl"]


@pytest.mark.parametrize("layers", [1, 7])
def test_a_dollar_in_a_name_is_a_dollar(layers: int) -> None:
    names = [f"{number}$\\frac$.w" for number in range(layers)]
    rows = [row for name in names for row in quality(0, name, {"optimal": 0.9, "$\\bad$": 0.8})]
    rows += [row for name in names for row in spectrum(0, name, [1.0], 1.0)]
    for plot in (plots.plot_trajectory, plots.plot_ladder, plots.plot_spectrum):
        figure = Figure()
        plot(frame(rows), figure=figure)
        figure.draw_without_rendering()  # raises where it is read as a formula


def test_given_axes_are_drawn_into_and_counted(table: pd.DataFrame) -> None:
    figure = Figure()
    given_axes = figure.subplots(1, 3)
    drawn = plots.plot_trajectory(table, axes=given_axes)
    assert list(drawn) == list(given_axes)
    assert all(ax.lines for ax in given_axes)
    assert figure.get_suptitle() == ""  # the figure around them is the caller's
    with pytest.raises(InvalidInputError, match="2 Axes, but there are 3 panels"):
        plots.plot_ladder(table, axes=Figure().subplots(1, 2))
    single = Figure().subplots()
    assert plots.plot_spectrum(table, parameters="0.weight", axes=single)[0] is single


def test_without_a_figure_pyplot_shows_it_and_settings_stay() -> None:
    table = probe(0, ["a"])
    settings = dict(mpl.rcParams)
    before = pyplot.get_fignums()
    axes = plots.plot_ladder(table)
    (number,) = set(pyplot.get_fignums()) - set(before)
    assert pyplot.figure(number) is axes[0].figure
    pyplot.close(number)
    plots.plot_trajectory(table, figure=Figure())
    assert pyplot.get_fignums() == before
    assert dict(mpl.rcParams) == settings


@pytest.mark.parametrize("plot", [plots.plot_trajectory, plots.plot_ladder])
def test_unknown_names_suggest_the_nearest(table: pd.DataFrame, plot: object) -> None:
    with pytest.raises(UnknownNameError, match=r"'0.wieght'.*'0.weight'"):
        plot(table, parameters=["0.wieght"], figure=Figure())  # type: ignore[operator]
    with pytest.raises(UnknownNameError, match=r"'cosin'.*'cosine'"):
        plot(table, metric="cosin", figure=Figure())  # type: ignore[operator]
    with pytest.raises(InvalidInputError, match="empty"):
        plot(table, parameters=[], figure=Figure())  # type: ignore[operator]


def test_trajectory_needs_steps_and_values(table: pd.DataFrame) -> None:
    with pytest.raises(InvalidInputError, match="plot_ladder"):
        plots.plot_trajectory(table.drop(columns="step"), figure=Figure())
    for plot in (plots.plot_trajectory, plots.plot_ladder):
        with pytest.raises(InvalidInputError, match="no values of metric 'cosine'"):
            plot(frame(training([0, 1])), figure=Figure())
    assert last_step(table) == 380
    assert last_step(table.drop(columns="step")) is None


@hypothesis.given(
    positions=st.lists(st.floats(0, 1), min_size=1, max_size=8).map(sorted),
    gap=st.floats(0.01, 0.2),
)
def test_labels_move_apart_as_little_as_possible(positions: list[float], gap: float) -> None:
    moved = apart(positions, gap)
    assert all(b - a >= gap - 1e-12 for a, b in itertools.pairwise(moved))
    ranks = np.arange(len(positions))
    reference = IsotonicRegression().fit_transform(ranks, np.array(positions) - ranks * gap)
    np.testing.assert_allclose(moved, reference + ranks * gap, atol=1e-6)


def test_figures_need_no_torch() -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'safetensors'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import kronecker_probe as kp\n"
        "from matplotlib.figure import Figure\n"
        "from tests.synthetic_tables import probe\n"
        "kp.plots.plot_trajectory(probe(0, ['a']), figure=Figure())\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_titles_say_what_truncation_left_out() -> None:
    rows = quality(0, "a", {"optimal": 0.93, "shampoo-squared": 0.928}, target="trajectory")
    assert "truncated" not in headline(frame(rows))
    dropped = {"step": 0, "parameter": "a", "metric": "dropped_energy", "value": 0.41}
    assert "truncated by up to 41% of their energy" in headline(frame([*rows, dropped]))
