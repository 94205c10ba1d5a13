"""The analyses of batches, labels and H_Ada, at reduced length: tables obey the theorems."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from analyses import adagrad_view, batch_and_labels
from kronecker_probe.cli.analysis import Script

pytestmark = pytest.mark.figures

FIGURES = Path(__file__).parents[1] / "figures"
LAYERS = ["0.weight", "2.weight", "4.weight"]
# float32 samples, cosines stored with six decimals
SAME = 2e-6


@pytest.fixture(scope="module")
def batches() -> pd.DataFrame:
    preset = batch_and_labels.Preset(1, (0, 5), (1, 16, 4096), (1,), 64, 48, 2)
    return batch_and_labels.collect(preset)


@pytest.fixture(scope="module")
def along() -> pd.DataFrame:
    return adagrad_view.collect(adagrad_view.Preset(1, (10, 30), 48))


def test_sampled_labels_do_not_see_the_batch_size(batches: pd.DataFrame) -> None:
    exact = batches[(batches["how"] == "exact") & (batches["labels"] == "sampled")]
    spread = exact.groupby(["step", "parameter"])["cosine"].agg(lambda c: c.max() - c.min())
    assert len(spread) == 2 * len(LAYERS)
    assert spread.max() < SAME


def test_true_labels_lose_where_the_mean_gradient_takes_over(batches: pd.DataFrame) -> None:
    lost = batch_and_labels.losses(batches)["true"].xs(4096, level="batch_size")
    assert (lost > 0.05).all()
    # at 4096 H is mu mu^T but for a 4096th: nearly a product of rank one, which H_GN is not
    assert batches["cosine"].between(0, 1 + SAME).all()


def test_nothing_beats_the_optimal_product(batches: pd.DataFrame) -> None:
    best = batches[batches["how"] == "best"].set_index(["step", "parameter"])["cosine"]
    others = batches[batches["how"] != "best"].set_index(["step", "parameter"])["cosine"]
    assert (others <= best.reindex(others.index) + SAME).all()


def test_one_fresh_draw_of_the_whole_run_is_what_the_optimizer_holds(along: pd.DataFrame) -> None:
    """Every step is in the window, and the roots are refreshed at the measured steps."""
    ada = along[along["target"] == "ada"].set_index(["step", "parameter", "approximation"])
    live, fresh = (ada["cosine"].unstack()[name] for name in ("in-use", "shampoo"))
    assert (live - fresh).abs().max() < 1e-3
    between = along[along["approximation"] == adagrad_view.OTHER]
    assert len(between) == 2 * len(LAYERS)
    assert between["target"].isna().all()


@pytest.mark.parametrize(
    ("script", "table"),
    [(batch_and_labels.SCRIPT, "batches"), (adagrad_view.SCRIPT, "along")],
    ids=["batch_and_labels", "adagrad_view"],
)
def test_the_figure_has_a_panel_a_layer_and_says_the_conclusion(
    script: Script, table: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rows = request.getfixturevalue(table)
    figure = script.draw(rows)
    assert len(figure.axes) % len(LAYERS) == 0
    (sentence,) = script.sentences(rows)
    assert re.sub(r"\s+", " ", figure.get_suptitle()) == sentence
    script.save(figure, tmp_path / script.name)
    assert (tmp_path / f"{script.name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", [batch_and_labels.SCRIPT, adagrad_view.SCRIPT])
def test_the_index_says_what_the_kept_table_says(script: Script) -> None:
    (sentence,) = script.sentences(pd.read_csv(FIGURES / f"{script.name}.csv"))
    assert sentence in (FIGURES / "README.md").read_text("utf-8")
