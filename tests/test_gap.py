"""The gap decomposition: each link against dense matrices, exact sums, and its figure."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.plots.gap import COMPONENTS, gap_headline, plot_gap
from kronecker_probe.quality.metrics.gap import COLUMNS, decompose_gap
from tests import oracle
from tests.cases import Case, factors_case, matrices_case
from tests.test_spectral_metrics import kronecker_exact
from tests.tolerances import SCALAR

RULES = ("optimal", "shampoo-squared", "shampoo", "kfac", "eigen-corrected", "diagonal")


@pytest.fixture(autouse=True)
def _no_windows() -> None:
    mpl.use("Agg")
    pyplot.close("all")


def chain(seed: int = 0) -> dict[str, Case]:
    """A target, true-label draws, batch gradients and older draws of one 4 x 3 layer."""
    target = factors_case("", 30, 4, 3, columns=2, positions=1, seed=seed)
    labels = factors_case("", 30, 4, 3, seed=seed + 1)
    rng = np.random.default_rng(seed)
    batches = labels.G[:, 0][rng.integers(0, 30, (20, 5))].mean(axis=1)
    return {
        "target": target,
        "labels": labels,
        "batches": Case("", matrices=batches),
        "held": factors_case("", 30, 4, 3, seed=seed + 2),
    }


def squared_error(H: np.ndarray, P: np.ndarray) -> float:
    return oracle.best_scale_error(H, P) ** 2


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("rule", RULES)
def test_every_link_is_the_change_of_the_error(rule: str) -> None:
    cases = chain()
    H = cases["target"].H
    links = ["kronecker-limit", "rule", "labels", "batch-gradients", "staleness"]
    operators = [cases["target"].dense("optimal")]
    operators += [cases[key].dense(rule) for key in ("target", "labels")]
    operators += [cases["batches"].dense(rule)] if rule != "kfac" else [None]
    operators += [cases["held"].dense(rule)]
    found = decompose_gap(
        *(case.samples() for case in [cases["target"]]),
        rule,
        labels=cases["labels"].samples(),
        batches=cases["batches"].samples(),
        held=cases["held"].samples(),
    )
    assert tuple(found.table.columns) == COLUMNS
    assert list(found.table["component"]) == links
    reached, before = 0.0, True
    for row, P in zip(found.table.itertuples(), operators, strict=True):
        if P is None:  # K-FAC of batch gradients, which have no factors
            assert math.isnan(row.contribution)
            assert "K-FAC" in row.note
            before = False
            continue
        error = squared_error(H, P)
        assert row.error == pytest.approx(error, abs=SCALAR)
        if before:
            assert row.contribution == pytest.approx(error - reached, abs=SCALAR)
        else:  # a change that is that of both links
            assert math.isnan(row.contribution)
            assert row.note == (
                f"its change of {error - reached:.3g} includes batch-gradients, which is undefined"
            )
        reached, before = error, True
    assert found.total["samples"] == pytest.approx(reached, abs=SCALAR)


def test_a_layer_beyond_memory_leaves_the_others_measured() -> None:
    tokens, d = torch.randint(0, 500_000, (8, 3)), torch.randn(8, 3, 4)
    large = kp.GradientSamples.from_embedding(tokens, d, 500_000)  # 2 TB a left factor
    small = chain()["target"].samples()
    found = decompose_gap({"large": large, "small": small})
    rows = found.table.set_index("parameter")
    assert rows.loc["large", "contribution"].isna().all()
    assert rows.loc["large", "note"].str.contains("GB").all()
    assert math.isnan(found.total["large"])
    assert found.total["small"] == decompose_gap({"small": small}).total["small"]


def test_the_limit_is_the_tail_of_the_kronecker_spectrum() -> None:
    case = chain()["target"]
    spectrum = oracle.kronecker_spectrum(case.H, case.shape)
    tail = float(np.sum(spectrum[1:] ** 2) / np.sum(spectrum**2))
    table = decompose_gap(case.samples(), "shampoo-squared").table
    assert list(table["component"]) == ["kronecker-limit", "rule"]
    assert table["contribution"].iloc[0] == pytest.approx(tail, abs=SCALAR)
    assert table["contribution"].iloc[1] > 0


@given(seed=st.integers(0, 10**6), rule=st.sampled_from(RULES))
def test_contributions_add_up_exactly(seed: int, rule: str) -> None:
    cases = chain(seed)
    held = kp.approximate(cases["held"].operator(), "shampoo")
    found = decompose_gap(
        {"a": cases["target"].samples()},
        rule,
        labels={"a": cases["labels"].samples()},
        batches={"a": cases["batches"].samples()},
        held={"a": held},
    )
    end = kp.best_scale_error(cases["target"].operator(), held) ** 2
    assert found.total["a"] == pytest.approx(end, abs=1e-12)
    assert found.table["contribution"].iloc[0] >= 0
    known = found.table.dropna()
    assert known["contribution"].cumsum().to_numpy() == pytest.approx(known["error"].to_numpy())


def test_one_cause_may_undo_another() -> None:
    """Eigenvalue correction goes beyond the Kronecker limit; fresh factors undo a bad rule."""
    cases = chain()
    rows = decompose_gap(cases["target"].samples(), "eigen-corrected").table
    exact = kp.DenseOperator(torch.tensor(cases["target"].H), (4, 3))
    found = decompose_gap(cases["target"].samples(), "shampoo", held=exact).table
    assert found["contribution"].iloc[-1] < 0
    assert found["error"].iloc[-1] == pytest.approx(0, abs=SCALAR)
    assert rows["error"].iloc[-1] == pytest.approx(
        squared_error(cases["target"].H, cases["target"].dense("eigen-corrected")), abs=SCALAR
    )


def test_a_kronecker_target_has_no_gap() -> None:
    table = decompose_gap(kronecker_exact(4, 3).samples()).table
    assert table["contribution"].abs().max() <= SCALAR


def test_the_same_draws_add_nothing() -> None:
    samples = chain()["target"].samples()
    table = decompose_gap(samples, labels=samples, held=samples).table
    assert table["contribution"].iloc[2:].abs().max() <= SCALAR


def test_a_layer_that_is_not_held_has_no_staleness() -> None:
    cases = chain()
    layers = {"a": cases["target"].samples(), "b": cases["labels"].samples()}
    held = {"b": kp.approximate(cases["held"].operator(), "shampoo")}
    table = decompose_gap(layers, held=held).table
    assert list(table.loc[table["parameter"] == "a", "component"]) == ["kronecker-limit", "rule"]
    assert "staleness" in set(table.loc[table["parameter"] == "b", "component"])


def test_a_zero_target_is_a_note() -> None:
    zero = kp.GradientSamples.from_factors(torch.zeros(3, 4), torch.ones(3, 2))
    found = decompose_gap({"zero": zero})
    assert found.table["contribution"].isna().all()
    assert found.table["note"].str.contains("H = 0").all()
    assert math.isnan(found.total["zero"])
    assert "zero" in repr(found)


def captured(target: str) -> kp.Capture:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    batch = torch.randn(12, 5), torch.randint(0, 3, (12,))
    return kp.capture(model, torch.nn.CrossEntropyLoss(), batch, target=target)


def test_it_reads_a_capture() -> None:
    H, labels = captured("ggn"), captured("empirical-fisher")
    batches = kp.batch_gradients(labels, 4)
    found = decompose_gap(H, "shampoo-squared", labels=labels, batches=batches)
    assert set(found.table["parameter"]) == set(H)
    for name in H:
        P = kp.approximate(kp.SecondMoment(batches[name]), "shampoo-squared")
        end = kp.best_scale_error(kp.SecondMoment(H[name]), P)
        assert found.total[name] == pytest.approx(end**2, abs=1e-12)


def test_batches_of_sampled_labels_add_nothing() -> None:
    """E[gbar gbar^T] = H / B for labels from the model: the same up to scale."""
    F = captured("fisher")
    table = decompose_gap(F, batches=kp.batch_gradients(F, 4)).table
    batch = table.loc[table["component"] == "batch-gradients", "contribution"]
    assert len(batch) == len(F)
    assert batch.abs().max() <= SCALAR


# ---------------------------------------------------------------- bad input


def test_bad_input_is_refused() -> None:
    cases = chain()
    samples, other = cases["target"].samples(), matrices_case("", 5, 3, 4).samples()
    with pytest.raises(InvalidInputError, match="empty target"):
        decompose_gap({})
    with pytest.raises(InvalidInputError, match="type int"):
        decompose_gap(3)
    with pytest.raises(InvalidInputError, match=r"target\['a'\] is a Tensor"):
        decompose_gap({"a": torch.ones(2)})
    with pytest.raises(UnknownNameError, match="'shampoo-squared'"):
        decompose_gap(samples, "shampoo-sqared")
    with pytest.raises(UnknownNameError, match="layer of labels"):
        decompose_gap({"fc1": samples}, labels={"fc2": samples})
    with pytest.raises(InvalidInputError, match=r"batches\['samples'\] is 3 x 4"):
        decompose_gap(samples, batches=other)
    with pytest.raises(InvalidInputError, match="labels= lacks 'b'"):
        decompose_gap({"a": samples, "b": samples}, labels={"a": samples})
    with pytest.raises(InvalidInputError, match="or an operator"):
        decompose_gap({"a": samples}, held={"a": 1.0})


# ---------------------------------------------------------------- the figure


def table(**layers: dict[str, float]) -> pd.DataFrame:
    rows = [
        {"parameter": name, "m": 4, "n": 3, "rule": "shampoo-squared", "component": component,
         "contribution": value, "error": math.nan, "note": None}
        for name, parts in layers.items()
        for component, value in parts.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


MIXED = {
    "fc1": {"kronecker-limit": 0.2, "rule": 0.05, "labels": 0.3, "staleness": -0.1},
    "fc2": {"kronecker-limit": 0.1, "rule": 0.02, "labels": 0.01, "staleness": 0.2},
}


def segments(ax: Axes) -> list[tuple[int, float, float]]:
    """(row, start, width) of every segment with a width."""
    found = []
    for container in ax.containers:
        assert isinstance(container, BarContainer)
        for row, bar in enumerate(container.patches):
            if bar.get_width() != 0:
                found.append((row, bar.get_x(), bar.get_width()))
    return found


def test_bars_stack_from_zero_to_each_side() -> None:
    ax = plot_gap(table(**MIXED))
    for row, parts in enumerate(MIXED.values()):
        own = [(start, width) for r, start, width in segments(ax) if r == row]
        assert sorted(width for _, width in own) == pytest.approx(sorted(parts.values()))
        for sign in (1, -1):
            side = sorted(((s, w) for s, w in own if w * sign > 0), key=lambda p: sign * p[0])
            ends = np.cumsum([0.0, *(w for _, w in side)])
            assert [start for start, _ in side] == pytest.approx(list(ends[:-1]))
    diamonds = next(line for line in ax.lines if line.get_label() == "total")
    assert list(diamonds.get_xdata()) == pytest.approx([0.45, 0.33])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["fc1 (4 × 3)", "fc2 (4 × 3)"]
    low, high = ax.get_xlim()
    assert low < -0.1
    assert high > 0.55


def test_the_legend_names_what_is_drawn() -> None:
    figure = plot_gap(table(**MIXED)).figure
    assert isinstance(figure, Figure)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    drawn = {COMPONENTS[c][0] for c in MIXED["fc1"]}
    assert sorted(texts) == sorted([*drawn, "total"])
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_colours_differ_in_lightness_between_neighbours() -> None:
    """So that a grey print still shows where one segment ends."""
    colors = [mpl.colors.to_rgb(color) for _, color in COMPONENTS.values()]
    light = [0.2126 * r**2.2 + 0.7152 * g**2.2 + 0.0722 * b**2.2 for r, g, b in colors]
    assert min(abs(a - b) for a, b in itertools.pairwise(light)) > 0.08


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (MIXED, ["The label gap", "0.155 of 0.390 (means of 2 layers)", "form: 0.150"]),
        (
            {"a": {"kronecker-limit": 0.4, "rule": 0.1}, "b": {"kronecker-limit": 0.3}},
            ["The limit of the Kronecker form", "0.350 of 0.400 (means", "next, the rule: 0.050"],
        ),
        (
            {"a": {"kronecker-limit": 0.4, "rule": -0.1}},
            ["The limit of the Kronecker form", "0.400 of 0.300;", "nothing else adds to it"],
        ),
        ({"a": {"kronecker-limit": 0.1, "rule": 0.3}}, ["The rule is", "0.300 of 0.400; next"]),
        ({"a": {"kronecker-limit": 0.0, "rule": 0.0}}, ["Nothing adds"]),
        ({"a": {"kronecker-limit": math.nan, "rule": math.nan}}, ["No error", "notes"]),
    ],
    ids=["labels", "limit", "undone", "rule", "exact", "undefined"],
)
def test_the_title_says_what_the_table_says(
    layers: dict[str, dict[str, float]], expected: list[str]
) -> None:
    title = gap_headline(table(**layers))
    for words in expected:
        assert words in title
    drawn = plot_gap(table(**layers)).figure.get_suptitle().replace("\n", " ")
    assert drawn == f"{title} (plug-in numbers, of the sample matrix itself)"


def test_undefined_layers_are_said_to_be() -> None:
    layers = {"a": {"kronecker-limit": math.nan}, "b": {"kronecker-limit": 0.2}}
    ax = plot_gap(table(**layers))
    assert any("undefined" in text.get_text() for text in ax.texts)
    assert [width for _, _, width in segments(ax)] == [0.2]


def test_many_layers_are_cut_and_chosen() -> None:
    layers = {f"layer{i}": {"kronecker-limit": 0.1} for i in range(30)}
    ax = plot_gap(table(**layers))
    assert len(ax.get_yticks()) == 24
    assert "first 24 layers" in ax.figure.get_suptitle().replace("\n", " ")
    chosen = plot_gap(table(**layers), ["layer29", "layer3"])
    shown = [tick.get_text().split(" ")[0] for tick in chosen.get_yticklabels()]
    assert shown == ["layer29", "layer3"]
    with pytest.raises(UnknownNameError, match="'layer3'"):
        plot_gap(table(**layers), ["layr3"])
    with pytest.raises(InvalidInputError, match="empty"):
        plot_gap(table(**layers), [])
    with pytest.raises(InvalidInputError, match="decompose_gap"):
        plot_gap(pd.DataFrame({"metric": ["cosine"]}))


def test_the_figure_is_drawn_where_asked_and_saved(tmp_path: Path) -> None:
    figure, ax = pyplot.subplots()
    assert plot_gap(table(**MIXED), axes=ax) is ax
    assert figure.get_suptitle() == ""
    found = decompose_gap(chain()["target"].samples())
    drawn = found.plot(figure=Figure())
    drawn.figure.savefig(tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 5000
