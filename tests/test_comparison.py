"""The comparison of runs made up: its figure, its cells, its page and what the terminal shows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from kronecker_probe.cli import terminal
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.plots.comparison import plot_comparison
from kronecker_probe.report.comparison import Comparison, Timing
from kronecker_probe.report.comparison_page import summarize, write_comparison
from kronecker_probe.tracking.run_directory.store import RunStore
from tests.synthetic_tables import frame, quality

# ---------------------------------------------------------------- the figure


def numbers(layers: int) -> pd.DataFrame:
    """Two runs, a with lr 0.1 and b with lr 0.2; matrices of 3 x 2."""
    rows: list[dict[str, object]] = [
        {"optimizer": name, "step": step, "parameter": None, "metric": "probe_loss", "value": 1.0}
        for name in ("a", "b") for step in (0, 5)
    ]  # fmt: skip
    rows += [
        {"optimizer": name, "step": step, "parameter": f"{k}.weight", "metric": "in_use_cosine",
         "value": 0.1 * k}
        for name in ("a", "b") for step in (0, 5) for k in range(layers)
    ]  # fmt: skip
    rates = {"a": "0.1", "b": "0.2"}
    return pd.DataFrame(
        [{"m": 3, "n": 2, "lr": rates[str(row["optimizer"])]} | row for row in rows]
    )


def title_of(rows: pd.DataFrame, failed: tuple[str, ...] = ()) -> str:
    axes = plot_comparison(rows, failed=failed, figure=Figure())
    return " ".join(axes[0].figure.get_suptitle().split())


def test_few_layers_have_a_panel_each_and_many_share_one() -> None:
    few = plot_comparison(numbers(3), figure=Figure())
    assert [ax.get_title(loc="left") for ax in few[1:]] == [
        f"cosine to H in use: {k}.weight" for k in range(3)
    ]
    many = plot_comparison(numbers(6), figure=Figure())
    assert len(many) == 2
    assert "mean and range of 6 matrices" in many[1].get_title(loc="left")
    lines = {line.get_label().split(",")[0]: line for line in many[1].get_lines()}
    assert lines["a"].get_ydata().tolist() == pytest.approx([0.25, 0.25])
    assert lines["a"].get_color() != lines["b"].get_color()
    assert lines["a"].get_marker() != lines["b"].get_marker()
    with pytest.raises(InvalidInputError, match="no losses"):
        plot_comparison(numbers(2).query("metric == 'in_use_cosine'"), figure=Figure())


def test_the_title_names_the_lowest_loss_and_the_nearest_matrix() -> None:
    table = numbers(2)
    table.loc[(table["optimizer"] == "b") & (table["metric"] == "probe_loss"), "value"] = 0.25
    nearer = (
        (table["optimizer"] == "a") & (table["metric"] == "in_use_cosine") & (table["step"] == 5)
    )
    table.loc[nearer, "value"] = 0.8

    assert title_of(table) == (
        "b ends at the lowest loss (0.25, lr 0.2); a holds the matrix nearest to H, each at its "
        "own weights (mean cosine 0.80 over 2 matrices)"
    )
    losses = table[table["metric"] == "probe_loss"]
    assert title_of(losses) == "b ends at the lowest loss (0.25, lr 0.2)"
    # a run that failed, or stopped before the others, ends nowhere
    assert title_of(losses, ("b",)) == "a ends at the lowest loss (1, lr 0.1)"
    stopped = losses[(losses["optimizer"] == "a") | (losses["step"] == 0)]
    assert title_of(stopped) == "a ends at the lowest loss (1, lr 0.1)"
    assert title_of(losses, ("a", "b")) == "No run came to its end"


def test_vectors_are_no_part_of_a_mean() -> None:
    table = numbers(7)
    nearest = (table["optimizer"] == "a") & (table["parameter"] == "0.weight")
    table.loc[nearest, "value"] = 0.7  # a: 0.7, 0.1 ... 0.6 and b: 0, 0.1 ... 0.6
    vector = table["parameter"].isin(["5.weight", "6.weight"])
    assert "(mean cosine 0.40 over 7 matrices)" in title_of(table)  # (0.7 + 2.1) / 7
    table.loc[vector, "n"] = 1
    assert "(mean cosine 0.34 over 5 matrices)" in title_of(table)  # (0.7 + 1) / 5
    axes = plot_comparison(table, figure=Figure())
    assert len(axes) == 1 + 5  # five matrices have a panel each
    table["n"] = 1
    assert "nearest" not in title_of(table)
    assert "7 layers" in plot_comparison(table, figure=Figure())[1].get_title(loc="left")


def losses_of(runs: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [{"optimizer": name, "step": 10 * place, "parameter": None, "metric": "probe_loss",
          "value": value, "m": None, "n": None, "lr": "1"}
         for name, values in runs.items() for place, value in enumerate(values)]
    )  # fmt: skip


def test_a_run_that_diverges_leaves_the_axis_to_the_others() -> None:
    runs = {"good": [2.3, 1.9, 1.6], "fair": [2.3, 2.4, 2.0], "wild": [2.3, 4.0, 1e11]}
    ax = plot_comparison(losses_of(runs), failed=("wild",), figure=Figure())[0]
    assert ax.get_ylim()[1] == pytest.approx(2 * 2.3)
    assert ax.get_ylim()[0] < 1.6
    assert ax.get_yscale() == "linear"
    assert ax.get_title(loc="left").splitlines() == [
        "loss (pale: training batches)", "wild leaves the axis at step 20 (up to 1e+11)",
    ]  # fmt: skip
    (legend,) = ax.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "good, lr 1", "fair, lr 1", "wild, lr 1 (failed)",
    ]  # fmt: skip
    runs["good"] = [2.3, 0.3, 0.01]
    ax = plot_comparison(losses_of(runs), figure=Figure())[0]
    assert ax.get_yscale() == "log"
    low, high = ax.get_ylim()
    assert 0 < low < 0.01
    assert high == pytest.approx(2 * 2.3)


@pytest.mark.parametrize("runs", [
    {"a": [2.3, 1.9], "b": [2.3, 4.5]},  # below twice the initial loss
    {"a": [0.1, 7.0], "b": [0.1, 9.0]},  # no run stays below it
    {"a": [0.1, 7.0], "c": [0.1]},  # one does that failed
])  # fmt: skip
def test_otherwise_all_losses_are_on_the_axis(runs: dict[str, list[float]]) -> None:
    ax = plot_comparison(losses_of(runs), failed=("c",), figure=Figure())[0]
    assert ax.get_ylim()[1] >= max(max(values) for values in runs.values())
    assert "leaves" not in ax.get_title(loc="left")


# ---------------------------------------------------------------- rates, settings, widths


def stored(directory: Path, runs: dict[str, dict[str, object]]) -> Comparison:
    """Runs made up: optimizer -> its config; each with two layers at step 4."""
    for name, config in runs.items():
        store = RunStore.create(directory / name, config)
        rows = [{"step": 4, "metric": "probe_loss", "value": 123.45678},
                {"step": 4, "metric": "train_loss", "value": 0.98765},
                {"step": 4, "metric": "test_accuracy", "value": 0.87654}]  # fmt: skip
        for layer in ("transformer.blocks.0.attention.query.weight", "head.weight"):
            cosines = {"optimal": 0.98123, "in-use": 0.65432}
            rows += quality(4, layer, cosines)
            rows += [{"step": 4, "parameter": layer, "metric": "in_use_fresh", "value": 0.19}]
        store.write_part(4, frame(rows))
    return Comparison(directory, {name: Timing(1234.56, 10, 1.2345) for name in runs})


@pytest.mark.parametrize("width", [80, 200])
def test_every_cell_is_whole_in_any_width(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    many = "basis.frequency=5, spectrum.epsilon=1e-06, shapes.block_size=512"
    names = ("inverse-free-shampoo", "adagrad-root-free", "shampoo-squared", "kl-soap", "sgd")
    comparison = stored(tmp_path, {
        name: {"lr": 0.0003, "settings": many.split(", ") if name == "kl-soap" else []}
        for name in names
    })  # fmt: skip
    for name, store in comparison.stores().items():
        store.set_status("failed" if name == "sgd" else "interrupted", "the loss is nan at step 5")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(terminal, "console", Console())
    terminal.show_comparison(comparison)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(len(line) for line in lines if not line.startswith(("csv", "png", "html"))) <= width
    assert "…" not in printed
    words = printed.split()
    for cell in ("123.4568", "0.9877", "0.8765", "1234.6", "123.5", "0.0003"):
        assert words.count(cell) == len(names)
    assert words.count("interrupted") == len(names) - 1
    for cell in ("0.654", "0.900", "0.981"):  # rule: sqrt(1 - 0.19)
        assert words.count(cell) == 2 * len(names)
    for name in names:
        assert words.count(name) >= 3
    assert all(one in printed for one in many.split(", "))
    assert "sgd failed: the loss is nan at step 5" in printed


def test_rates_and_settings_are_told_everywhere(tmp_path: Path) -> None:
    config: dict[str, object] = {"lr": None, "settings": ["basis.frequency=5"]}
    comparison = stored(tmp_path, {"soap": config, "old": config, "older": {"lr": 0.5}})
    RunStore.open(tmp_path / "soap").note_rates([0.02, 1e-3])
    summary, _ = write_comparison(comparison)
    cells = [dict(zip(summary.head, row, strict=True)) for row in summary.rows]
    assert [one["lr"] for one in cells] == ["0.02, 0.001", "default", "0.5"]
    assert [one["settings"] for one in cells] == ["basis.frequency=5"] * 2 + ["-"]
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert set(table.loc[table["optimizer"] == "soap", "lr"]) == {"0.02, 0.001"}
    assert set(table.loc[table["optimizer"] == "old", "settings"]) == {"basis.frequency=5"}
    page = (tmp_path / "report.html").read_text()
    assert "<td>0.02, 0.001</td>" in page
    assert "<td>basis.frequency=5</td>" in page
    assert page.count("<td>0.654</td><td>0.900</td><td>0.981</td>") == 6


def test_an_optimizer_without_a_matrix_has_a_row_with_the_ceiling(tmp_path: Path) -> None:
    comparison = stored(tmp_path, {"soap": {}})
    sgd = RunStore.create(tmp_path / "sgd", {})
    sgd.write_part(4, frame(quality(4, "head.weight", {"optimal": 0.75})))
    both = Comparison(tmp_path, {**comparison.timings, "sgd": Timing()})
    layers = summarize(both).layers
    assert layers["head.weight"][1] == ["sgd", "-", "-", "0.750"]
    assert layers["transformer.blocks.0.attention.query.weight"][1] == ["sgd", "-", "-", "-"]
