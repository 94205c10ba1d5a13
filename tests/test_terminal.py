"""What the command line prints of a table: every number with its error, inside 80 columns."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest
from rich.console import Console

from kronecker_probe.cli import terminal
from kronecker_probe.cli.terminal import show_table
from kronecker_probe.tracking.training import Progress
from tests.synthetic_tables import APPROXIMATIONS, estimated, frame, quality


def printed(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *,
    asked: bool = False,
) -> list[str]:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(terminal, "console", Console())
    show_table(table, asked=asked)
    return capsys.readouterr().out.splitlines()


def columns(lines: list[str], first: str) -> list[list[str]]:
    return [line.split() for line in lines if line.strip().startswith(first)]


def full() -> list[dict[str, object]]:
    """Seven approximations; the optimum as a bracket, a noise floor for one of two layers."""
    cosines = {name: 0.95 - 0.011 * i for i, name in enumerate(APPROXIMATIONS)}
    rows = estimated("0.weight", cosines, stderr=0.008) + estimated("1", cosines, stderr=0.008)
    for row in rows:
        if row["kind"] == "population" and row["approximation"] == "optimal":
            row |= {"stderr": None, "interval": "bracket"}
        if row["kind"] == "population" and row["parameter"] == "1":
            row |= {"value": math.nan, "stderr": None, "low": None, "high": None, "note": "few"}
    floor = {"step": 0, "parameter": "0.weight", "metric": "noise_floor", "kind": "population"}
    return [*rows, floor | {"value": 0.971}]


def test_every_number_stands_with_its_error_and_the_floor_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(frame(full()), monkeypatch, capsys)
    table = [line for line in lines if not line.startswith("- ")]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    assert "population and plug-in numbers" in lines[0]
    (population,) = columns(lines, "population")  # one layer abstains
    at = lines.index(next(line for line in lines if line.startswith("population")))
    assert population[1:] == [f"{0.95 - 0.011 * i:.3f}" for i in range(7)]
    assert lines[at + 1].split() == ["[.934,", *["±.008"] * 6]
    assert lines[at + 2].split() == [".966]b"]
    plugin = columns(lines, "plug-in")
    for row, floor in zip(plugin, ("0.971", "-"), strict=True):
        assert row[1:] == [*(f"{0.93 - 0.011 * i:.3f}" for i in range(7)), floor]
    assert any("standard error" in line for line in table)
    assert any("bracket" in line for line in table)


def test_every_metric_asked_for_has_a_table_and_the_cosine_is_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = quality(0, "a", {"optimal": 0.9, "kfac": 0.8})
    usual = printed(frame(rows), monkeypatch, capsys)
    assert len([line for line in usual if " at step 0: " in line]) == 1
    asked = printed(frame(rows), monkeypatch, capsys, asked=True)
    assert len([line for line in asked if " at step 0: " in line]) == 4
    other = [row | {"metric": "trace_ratio"} for row in rows if row["metric"] == "best_scale"]
    lines = printed(frame(other), monkeypatch, capsys)
    assert lines[0].strip() == "Trace ratio Tr P / Tr H at step 0: plug-in numbers; ggn, N = 512"
    assert columns(lines, "a ") == [["a", "0.900", "0.800"]]
    assert any(line.startswith("of the sample matrix only: this metric has no") for line in lines)
    assert not [line for line in asked if "sample matrix only" in line]


def test_held_out_numbers_alone_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = quality(0, "a", {"optimal": 0.9, "kfac": 0.8})
    lines = printed(frame([row | {"kind": "held-out"} for row in rows]), monkeypatch, capsys)
    assert lines[0].strip() == "Cosine to H at step 0: held-out numbers; ggn, N = 512"
    assert columns(lines, "a ") == [["a", "0.900", "0.800"]]


def test_progress_without_a_terminal_is_a_plain_line_every_tenth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "console", Console(force_terminal=False))
    with terminal.progress_shown(35) as show:
        for step in range(1, 36):
            show(Progress(step, 1 / step, *((math.nan, None) if step < 9 else (0.5, 8))))
    out, err = capsys.readouterr()
    assert out == ""
    steps = [int(n) for n in re.findall(r"^step (\d+) of 35, loss ", err, re.MULTILINE)]
    assert steps == [1, 4, 7, 11, 14, 18, 21, 25, 28, 32, 35]
    assert len(err.splitlines()) == len(steps)
    assert "test accuracy -, " in err
    assert "test accuracy 0.500 (step 8), " in err


def test_the_title_names_target_label_draws_and_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cosines = {"optimal": 0.9, "kfac": 0.8}
    rows = quality(4, "a", cosines, target="fisher", n_columns=2, n_examples=200)
    lines = printed(frame(rows), monkeypatch, capsys)
    assert lines[0] == "Cosine to H at step 4: plug-in numbers; fisher, 2 label draws, N = 200"
    rows += quality(4, "b", cosines, target="fisher", n_columns=1, n_examples=50)
    lines = printed(frame(rows), monkeypatch, capsys)
    assert " ".join(lines[0].split() + lines[1].split()).endswith(
        "; fisher, 1 to 2 label draws, N = 50 to 200"
    )


def test_the_floor_stands_beside_plug_in_numbers_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert any("floor" in line for line in printed(frame(full()), monkeypatch, capsys))
    population = [row for row in full() if row["kind"] == "population"]
    assert not any("floor" in line for line in printed(frame(population), monkeypatch, capsys))


def test_what_is_undefined_in_every_layer_has_a_reason_and_no_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = quality(0, "a", {"optimal": 0.9, "in-use": math.nan})
    rows += quality(0, "b", {"optimal": 0.8, "in-use": math.nan})
    for row in rows:
        if row["approximation"] == "in-use":
            row["note"] = "SGD holds no preconditioner"
    lines = printed(frame(rows), monkeypatch, capsys)
    assert columns(lines, "a ") == [["a", "0.900"]]
    told = [line for line in lines if "SGD holds" in line]
    assert told == ["in use: undefined in every layer: SGD holds no preconditioner"]
    rows[-1] |= {"metric": "cosine", "value": 0.3}  # of one layer it is known
    rows = [row for row in rows if row is rows[-1] or row["parameter"] == "a"]
    lines = printed(frame(rows), monkeypatch, capsys)
    assert columns(lines, "a ") == [["a", "0.900", "-"]]


def test_the_numerical_error_of_a_plug_in_number_is_no_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"step": 0, "parameter": "a", "approximation": "kfac", "metric": "kl_divergence"}
    for kind, told in (("plugin", ["a", "280.608"]), ("population", ["a", "280.608"])):
        rows = [row | {"kind": kind, "value": 280.608, "stderr": 0.0}]
        lines = printed(frame(rows), monkeypatch, capsys)
        assert columns(lines, "a ") == [told]
        assert any("±" in line for line in lines) == (kind == "population")
    tiny = [row | {"kind": "plugin", "value": -7e-15}]
    assert columns(printed(frame(tiny), monkeypatch, capsys), "a ") == [["a", "0.000"]]


def test_probes_are_named_before_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_probes([0, 1, 4])
    assert capsys.readouterr().err == "probes at steps 0, 1, 4 (3)\n"


def test_a_run_ends_with_at_most_five_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number, held in enumerate((0.2, 0.1, 0.5)):
        cosines = {"optimal": 0.95, "kfac": 0.94, "in-use": held}
        rows += quality(0, f"layer{number}", cosines, target="trajectory")
    lines = printed(frame(rows), monkeypatch, capsys)
    told = lines[lines.index("Findings") + 1 :]
    assert told[0].startswith("- layer1: the optimizer's own P has a cosine of 0.100")
    assert told[0].endswith("(and 1 more: layer0).")
    assert len([line for line in told if line.startswith("- ")]) == len(told) <= 5
    more = [
        {"step": 0, "metric": "skipped", "parameter": "x", "note": "no gradient"},
        {"step": 0, "metric": "train_loss", "value": 1.0},
        {"step": 0, "parameter": "layer0", "metric": "best_scale", "approximation": "kfac",
         "kind": "plugin", "value": 40.0, "target": "trajectory"},
        {"step": 9, "metric": "train_loss", "value": 50.0},
        {"step": 0, "parameter": "layer2", "metric": "cosine", "approximation": "eigen-corrected",
         "kind": "plugin", "value": 0.99, "target": "trajectory"},
        {"step": 0, "parameter": "layer2", "metric": "cosine", "approximation": "shampoo-squared",
         "kind": "plugin", "value": 0.6, "target": "trajectory"},
    ]  # fmt: skip
    rows = [row for row in rows if row.get("metric") != "best_scale"]
    lines = printed(frame([*rows, *more]), monkeypatch, capsys)
    told = lines[lines.index("Findings") + 1 :]
    assert len([line for line in told if line.startswith("- ")]) == 5
    assert told[0].startswith("- the train loss went from 1 to 50")
    assert "more: kp.diagnose, or the report" in told[5]


def test_a_table_without_steps_has_findings_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = frame(quality(0, "a", {"optimal": 0.95, "kfac": 0.94})).drop(columns="step")
    lines = printed(rows, monkeypatch, capsys)
    (told,) = lines[lines.index("Findings") + 1 :]
    assert told.startswith("- a: how far K-FAC is from the best Kronecker product")
