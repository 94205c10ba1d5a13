"""The analysis of training speed: its rules on tables and runs made up here, then a short run."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from analyses import training
from analyses.training import methods as methods
from analyses.training import runs as runs
from analyses.training import tables as tables
from analyses.training.runs import Length, Preset
from kronecker_probe import optim
from kronecker_probe.cli.app import app
from kronecker_probe.workloads import load_workload

pytestmark = pytest.mark.figures

# means of a few float64 numbers
ROUNDING = 1e-12
SHORT = Preset(1, 1, 3, 2, {"digits-cnn": Length(8, 6), "pydoc-gpt": Length(4, 2)})
FINITE = st.floats(0.1, 10.0)


def test_every_preset_is_a_method() -> None:
    named = {build.__name__ for build in (*optim.PRESETS.values(), *optim.MODEL_PRESETS.values())}
    assert set(methods.METHODS) == named | {"SGD", "AdamW"}
    looks = {(how.color, how.marker) for how in methods.METHODS.values()}
    assert len(looks) == len(methods.METHODS)


@pytest.mark.parametrize("trials", [1, 3, 10])
def test_each_part_of_either_range_has_one_trial(trials: int) -> None:
    for column in zip(*training.places(trials), strict=True):
        assert sorted(math.floor(place * trials) for place in column) == list(range(trials))


def test_places_are_even_in_the_logarithm() -> None:
    assert training.within(0.0, 1e-4, 1.0) == 1e-4
    assert training.within(0.5, 1e-4, 1.0) == pytest.approx(1e-2, rel=ROUNDING)
    assert training.within(0.25, 0.003, 0.3) == pytest.approx(0.003 * math.sqrt(10), rel=ROUNDING)


@given(st.lists(FINITE, min_size=5, max_size=30), st.integers(1, 5), FINITE, st.integers(0, 8))
def test_steps_to_the_target_are_the_first_whose_window_is_as_low(
    losses: list[float], window: int, target: float, lost: int
) -> None:
    losses = losses[: len(losses) - lost] + [math.inf] * min(lost, len(losses))
    means = {t: sum(losses[t - window : t]) / window for t in range(window, len(losses) + 1)}
    if any(abs(mean - target) < 1e-9 for mean in means.values()):
        return  # rounding decides
    expected = next((t for t, mean in means.items() if mean <= target), math.inf)
    assert runs.steps_to(losses, window, target) == expected
    assert runs.smoothed(losses, window) == pytest.approx(list(means.values()), rel=1e-9)


def test_a_step_costs_its_share_of_refreshes_but_not_a_hiccup() -> None:
    stretch = [0.1] * 9 + [1.1]
    assert runs.step_seconds(stretch * 3) == pytest.approx(0.2)
    assert runs.step_seconds([*stretch, *[9.0] * 10, *stretch]) == pytest.approx(0.2)
    assert runs.step_seconds([0.1, 0.3]) == pytest.approx(0.2)


def test_the_trial_of_the_least_final_loss_is_chosen() -> None:
    def trial(lr: float, value: float) -> dict[str, Any]:
        return {"lr": lr, "setting": 10 * lr, "value": value}

    assert training.chosen([trial(1e-3, 2.0), trial(1e-2, 0.5), trial(1e-1, math.inf)]) == (
        1e-2,
        0.1,
    )
    assert training.chosen([trial(1e-1, 0.5), trial(1e-2, 0.5)])[0] == 1e-2
    assert training.chosen([trial(1e-1, math.inf), trial(1e-2, math.inf)])[0] == 1e-2


def made_up(steps: dict[str, list[float]], cosine: dict[str, float]) -> pd.DataFrame:
    """A table of one workload; a step takes .1 s, and a loss is the steps or 1000."""
    rows: list[dict[str, Any]] = []
    for method, each in steps.items():
        shared = {"workload": "w", "method": method, "lr": 0.1, "tuned": "q", "setting": 0.25}
        measured = "cosine_identity" if method == "SGD" else "cosine_in_use"
        rows += (
            shared | {"trial": k, "seed": 1000, "lr": 10.0**-k, "measured": "trial", "value": v}
            for k, v in enumerate((math.inf, 0.5, 0.7))
        )
        for seed, value in enumerate(each):
            numbers = {
                "steps": value,
                "seconds": value * 0.1,
                "final_loss": min(value, 1000.0),
                "step_seconds": 0.1,
                "diverged": 0.0,
                measured: cosine[method],
            }
            rows += (
                shared | {"seed": seed, "measured": name, "value": number}
                | ({"step": 5, "parameter": "a"} if name == measured else {})
                for name, number in numbers.items()
            )  # fmt: skip
    rows.append({"workload": "w", "measured": "target", "value": 0.25})
    return pd.DataFrame(rows)


STEPS = {
    "AdamW": [30.0, 28.0, math.inf],
    "SOAP": [10.0, 40.0, 20.0],
    "SGD": [math.inf, 5.0, math.inf],
    "Muon": [31.0, 33.0, 32.0],
    "KFAC": [math.inf] * 3,
    "Shampoo": [25.0, 26.0, 27.0],
}
CLOSER_IS_FASTER = {"SOAP": 0.9, "Shampoo": 0.8, "AdamW": 0.7, "Muon": 0.6, "SGD": 0.3, "KFAC": 0.2}


def test_runs_that_miss_the_target_stay_in_the_median() -> None:
    over = tables.summary(made_up(STEPS, CLOSER_IS_FASTER)).loc["w"]
    assert list(over.index[:4]) == ["SOAP", "Shampoo", "AdamW", "Muon"]
    assert over["steps"].to_dict() == {
        "SOAP": 20, "Shampoo": 26, "AdamW": 30, "Muon": 32, "SGD": math.inf, "KFAC": math.inf,
    }  # fmt: skip
    assert over.loc["SOAP", ["least", "most"]].tolist() == [10, 40]
    assert over.loc["AdamW", "most"] == math.inf
    assert over.loc["Muon", "seconds"] == pytest.approx(3.2)
    assert over.loc["SGD", "cosine"] == 0.3


def test_the_conclusion_follows_the_table() -> None:
    title, methods, search = training.sentences(made_up(STEPS, CLOSER_IS_FASTER))
    assert "w SOAP, 20 steps and 2 s (AdamW: 30 and 3 s; 2 of 6 methods never)" in title
    assert "with faster training on w (rank correlation -0.99" in title
    assert "AdamW 30 (28 to not reached), 3.00 s" in methods
    assert "KFAC not reached, - s, loss 1e+03, cosine 0.20, at lr 0.1 and q 0.25" in methods
    assert "diverged AdamW 1, SOAP 1" in search
    assert "18 reported runs 0" in search
    against = {name: 1 - value for name, value in CLOSER_IS_FASTER.items()}
    assert "with slower training on w" in training.sentences(made_up(STEPS, against))[0]
    unrelated = {"SOAP": 0.5, "Shampoo": 0.2, "AdamW": 0.6, "Muon": 0.1, "SGD": 0.55, "KFAC": 0.3}
    assert "with no faster or slower" in training.sentences(made_up(STEPS, unrelated))[0]


def test_ties_of_what_is_not_reached_count_as_ties() -> None:
    over = pd.DataFrame({"cosine": [0.1, 0.2, 0.3, 0.4], "steps": [1.0, 2.0, math.inf, math.inf]})
    ranks = [1, 2, 3.5, 3.5]
    expected = np.corrcoef([1, 2, 3, 4], ranks)[0, 1]
    assert tables.correlation(over, "steps")[0] == pytest.approx(expected, rel=ROUNDING)


def test_losses_are_those_of_a_plain_loop() -> None:
    run = runs.train("digits-cnn", "AdamW", (1e-3, 0.02), 3, SHORT, 2)
    workload = load_workload("digits-cnn", 3)
    model = workload.model
    plain = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    losses = []
    for step in range(8):
        inputs, targets = workload.batch(step, 64, 3)
        plain.zero_grad()
        loss = workload.loss_fn(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        plain.step()
        losses.append(loss.item())
    assert run.losses == pytest.approx(losses, rel=1e-5)  # float32
    assert not run.diverged
    assert run.probes is not None
    assert set(run.probes["step"]) == {4, 8}


@pytest.mark.parametrize("method", ["SOAP", "EKFAC"])
def test_the_tracker_leaves_the_run_as_it_is(method: str) -> None:
    alone, tracked = (runs.train("digits-cnn", method, (1e-3, 0.1), 0, SHORT, n) for n in (0, 2))
    assert alone.losses == tracked.losses
    assert alone.probes is None


def test_only_k_fac_draws_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = torch.distributions.Categorical

    def counted(**options: Any) -> Any:
        drawn.append(options)
        return original(**options)

    monkeypatch.setattr(torch.distributions, "Categorical", counted)
    runs.train("digits-cnn", "SOAP", (1e-3, 0.1), 0, SHORT, 0)
    assert not drawn
    runs.train("digits-cnn", "KFAC", (1e-3, 1.0), 0, SHORT, 0)
    assert len(drawn) == 8


@pytest.mark.parametrize(("method", "setting"), [("SGD", 0.1), ("SOAP", 0.05), ("KFAC", 0.02)])
def test_a_run_that_diverges_is_infinite_from_there_on(method: str, setting: float) -> None:
    run = runs.train("digits-cnn", method, (1e18, setting), 0, SHORT, 2)
    assert run.diverged
    assert len(run.losses) == 8
    first = run.losses.index(math.inf)
    assert 0 < first < 8
    assert all(math.isinf(loss) for loss in run.losses[first:])
    assert math.isfinite(run.seconds)


def test_muon_has_the_hidden_matrices_alone() -> None:
    def hidden(name: str) -> list[str]:
        model = load_workload(name).model
        found, others = methods.split_for_muon(model)
        assert len(found) + len(others) == len(list(model.parameters()))
        return [one for one, _ in found]

    assert hidden("digits-cnn") == ["0.weight", "2.weight"]
    inner = [f"blocks.{k}.{part}.weight" for k in (0, 1) for part in ("qkv", "out", "up", "down")]
    assert hidden("pydoc-gpt") == inner


def test_the_figure_holds_what_the_table_says(tmp_path: Path) -> None:
    table = made_up(STEPS, CLOSER_IS_FASTER)
    figure = training.draw(table)
    assert len(figure.axes) == 3
    assert re.sub(r"\s+", " ", figure.get_suptitle()) == training.sentences(table)[0]
    first = figure.axes[0]
    assert [tick.get_text() for tick in first.get_yticklabels()][:2] == ["SOAP", "Shampoo"]
    marks = np.concatenate([line.get_xdata() for line in first.lines if line.get_marker() != "|"])
    finite = [value for each in STEPS.values() for value in each if math.isfinite(value)]
    assert set(finite) <= set(marks)
    lost = [x for line in first.lines if line.get_marker() == 5 for x in line.get_xdata()]
    assert len(lost) == sum(math.isinf(value) for each in STEPS.values() for value in each)
    assert min(lost) > max(finite)
    named = {text.get_text() for text in figure.axes[2].texts}
    assert set(STEPS) <= named
    training.SCRIPT.save(figure, tmp_path / "training")
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_the_command_line_knows_it() -> None:
    told = CliRunner().invoke(app, ["analyze", "nothing-of-that-name"])
    assert told.exit_code != 0
    assert "training" in told.output


@pytest.mark.slow
def test_a_short_run_has_everything() -> None:
    preset = training.PRESETS["quick"]
    table = training.collect(preset)
    assert set(table["workload"]) == {"digits-cnn", "pydoc-gpt"}
    trials = table[table["measured"] == "trial"]
    budget = trials.groupby(["workload", "method"])["lr"].agg(tuple)
    assert len(budget) == 2 * len(methods.METHODS)
    assert budget.nunique() == 1
    assert len(budget.iloc[0]) == preset.trials
    reported = table[table["measured"] == "final_loss"]
    assert set(reported["seed"]) == set(range(preset.seeds))
    best = trials.sort_values("value").groupby(["workload", "method"])["lr"].first()
    assert reported.groupby(["workload", "method"])["lr"].first().equals(best)
    target = table[table["measured"] == "target"].set_index("workload")["value"]
    own = reported[reported["method"] == "AdamW"].groupby("workload")["value"].median()
    assert target.to_dict() == own.to_dict()
    steps = table[table["measured"] == "steps"].set_index(["workload", "method"])["value"]
    for key, final in reported.set_index(["workload", "method"])["value"].items():
        longest = preset.lengths[key[0]].steps
        assert steps[key] >= preset.window
        assert final > target[key[0]] or steps[key] <= longest
    probes = table[table["measured"] == "cosine_in_use"]
    assert set(probes["method"]) == set(methods.METHODS)
    assert np.isfinite(tables.cosines(table).xs("SGD", level="method")).all()
    title = re.sub(r"\s+", " ", training.draw(table).get_suptitle())
    assert title == training.sentences(table)[0]


def test_the_index_says_what_the_kept_table_says() -> None:
    figures = Path(__file__).parents[1] / "figures"
    index = (figures / "README.md").read_text("utf-8")
    for sentence in training.SCRIPT.sentences(pd.read_csv(figures / "training.csv")):
        assert sentence.rstrip(".") in index
