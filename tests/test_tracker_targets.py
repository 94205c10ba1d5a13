"""The tracker's targets beyond plain captures: batch gradients and the run's own gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
    NonFiniteError,
    RunDirectoryError,
)
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.training import Progress
from tests.grid import some
from tests.tiny_training import OPTIONS, STEPS, assert_same_run, assert_same_tree, make, train

LOSS = nn.CrossEntropyLoss()
LAYERS = ["0.weight", "2.weight"]
APPROXIMATIONS = ["optimal", "shampoo-squared", "shampoo"]
# The same float64 sums in the same order.
SAME = 1e-12

TARGETS: dict[str, dict[str, Any]] = {
    "trajectory": {"target": "trajectory", "window": 3},
    "average": {"target": "trajectory", "window": 3, "decay": 0.9},
    "low rank": {"target": "trajectory", "window": 3, "window_memory": 3 * 4 * (15 * 3 + 24)},
    "batches": {"target": "batch-gradient", "target_batch_size": 4},
    "labels": {"target": "fisher", "label_draws": 3},
}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 8), nn.Dropout(0.4), nn.Linear(8, 3))


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 7, generator=generator)
    return inputs, torch.randint(3, (size,), generator=generator)


def shampoo(model: nn.Module) -> kp.optim.KroneckerOptimizer:
    return kp.optim.Shampoo(model.named_parameters(), basis={"frequency": 2})


def tracked(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> kp.Tracker:
    options = {"every": [0, 2, 5], "probe": batch(99), "layers": LAYERS} | options
    return kp.Tracker(model, LOSS, optimizer=optimizer, approximations=APPROXIMATIONS, **options)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, *watchers: Any, steps: int = 6) -> None:
    for step in range(steps):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        LOSS(model(inputs), targets).backward()
        for watcher in watchers:
            watcher()
        optimizer.step()


@pytest.mark.parametrize("target", TARGETS)
def test_training_is_the_same_to_the_bit(target: str) -> None:
    states = []
    for options in (None, TARGETS[target]):
        model = network()
        optimizer = shampoo(model)
        torch.manual_seed(7)
        watchers = [] if options is None else [tracked(model, optimizer, **options).step]
        run(model, optimizer, *watchers)
        gradients = [p.grad for p in model.parameters()]
        states.append([model.state_dict(), optimizer.state_dict(), gradients, torch.rand(3)])
    assert_same_tree(*({str(i): part for i, part in enumerate(state)} for state in states))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_trajectory_is_scored_as_a_window_of_its_own(decay: float | None) -> None:
    model = network()
    optimizer = shampoo(model)
    tracker = tracked(
        model, optimizer, target="trajectory", window=3, decay=decay, window_tolerance=0.0
    )
    window = kp.GradientWindow(model, size=3, decay=decay, layers=LAYERS)
    parameters = dict(model.named_parameters())
    expected: dict[int, dict[tuple[str, str], float]] = {}

    def score() -> None:
        window.update()
        step = tracker.steps_taken
        expected[step] = {}
        for name, samples in window.samples().items():
            H = kp.SecondMoment(samples)
            for approximation in APPROXIMATIONS:
                P = kp.approximate(H, approximation)
                expected[step][name, approximation] = kp.cosine_similarity(H, P)
            if step >= 2:
                P = optimizer.operator(parameters[name])
                expected[step][name, "in-use"] = kp.cosine_similarity(H, P)

    run(model, optimizer, score, tracker.step)
    table = tracker.table
    scored = table[(table["metric"] == "cosine") & table["value"].notna()]
    assert set(scored["step"]) == {0, 2, 5}
    assert set(scored["target"].dropna()) == {"trajectory"}
    for step, rows in scored.groupby("step"):
        rows = rows[rows["kind"].isna() | (rows["kind"] == "plugin")]
        found = rows.set_index(["parameter", "approximation"])["value"].to_dict()
        assert found == pytest.approx(expected[int(step)], rel=SAME)
    for metric in ("truncated_weight", "truncated_energy", "dropped_energy"):
        last = table[(table["metric"] == metric) & (table["step"] == 5)]
        values = last.set_index("parameter")["value"].to_dict()
        assert values == pytest.approx(getattr(window, metric), rel=SAME)
    truncated = table[(table["metric"] == "truncated_weight") & (table["step"] == 5)]["value"]
    assert truncated.tolist() == pytest.approx([3 if decay is None else 0.9**3 - 0.9**6] * 2)


def test_a_tolerance_drops_no_more_than_that_and_says_how_much() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"target": "trajectory", "window": 3, "every": [5]}
    exact = tracked(model, optimizer, window_tolerance=0.0, **options)
    loose = tracked(model, optimizer, window_tolerance=0.3, **options)
    window = kp.GradientWindow(model, size=3, layers=LAYERS)
    run(model, optimizer, exact.step, loose.step, window.update)
    table = loose.table.set_index("parameter")
    dropped = table.loc[table["metric"] == "dropped_energy", "value"]
    assert len(dropped) == len(LAYERS)  # of the table and the target, one tells it
    told = table.loc[table["approximation"] == "optimal", "note"].str
    assert told.contains("sum of the last 3 gradients; truncation to rank").all()
    samples = window.samples()
    for name in LAYERS:
        values = torch.linalg.svdvals(samples[name].matrices()[:, 0]).square().sum(dim=0)
        kept = int(table.loc[name, "n_positions"].dropna().iloc[0])
        assert float(values[kept:].sum() / values.sum()) == pytest.approx(dropped[name], rel=1e-5)
        assert dropped[name] <= 0.3 < dropped[name] + float(values[kept - 1] / values.sum())
    assert set(exact.table.query("metric == 'dropped_energy'")["value"]) == {0.0}


def test_the_probe_of_a_trajectory_gives_its_loss_and_may_be_missing() -> None:
    model = network()
    optimizer = shampoo(model)
    with_probe = tracked(model, optimizer, target="trajectory")
    without = tracked(model, optimizer, target="trajectory", probe=None)
    plain = tracked(model, optimizer, target="ggn")
    run(model, optimizer, with_probe.step, without.step, plain.step)
    with_probe.finish()
    without.finish()
    plain.finish()

    def of_probe(tracker: kp.Tracker) -> list[float]:
        table = tracker.table
        return table.loc[table["metric"].str.startswith("probe_"), "value"].tolist()

    assert of_probe(with_probe) == of_probe(plain)
    assert len(of_probe(plain)) == 8
    assert of_probe(without) == []
    assert set(without.table["step"]) == {0, 2, 5, 6}


def test_batch_gradients_are_those_of_the_probe() -> None:
    model = network().double()
    probe = batch(99)[0].double(), batch(99)[1]
    tracker = tracked(model, shampoo(model), probe=probe, **TARGETS["batches"])
    scores = tracker.step()
    assert scores is not None
    drawn = kp.capture(model, LOSS, probe, target="empirical-fisher", layers=LAYERS)
    expected = kp.compare(kp.batch_gradients(drawn, 4), APPROXIMATIONS, estimates="plugin").table
    pd.testing.assert_frame_equal(scores.table, expected)
    assert set(scores.table["target"].dropna()) == {"batch-gradient"}
    assert scores.table["note"].str.contains("batches of 4").any()


def test_sampled_labels_are_drawn_as_often_as_asked() -> None:
    model = network()
    tracker = tracked(model, shampoo(model), **TARGETS["labels"])
    tracker.step()
    assert set(tracker.table["n_columns"].dropna()) == {3}


def test_what_was_not_recorded_is_skipped_with_the_reason() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    tracker = tracked(model, shampoo(model), target="trajectory")
    run(model, torch.optim.SGD(model[0].parameters(), lr=0.1), tracker.step, steps=1)
    skipped = tracker.table.query("metric == 'skipped'").set_index("parameter")["note"].to_dict()
    assert "frozen" in skipped["0.bias"]
    assert "not selected" in skipped["2.bias"]
    assert set(skipped) == {"0.bias", "2.bias"}


def test_a_bad_gradient_ends_the_tracking_with_its_name() -> None:
    model = network()
    tracker = tracked(model, shampoo(model), target="trajectory")
    model[2].weight.grad = torch.full_like(model[2].weight, torch.nan)
    with pytest.raises(NonFiniteError, match=r"'2.weight'"):
        tracker.step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_draws": 2}, "labels are sampled only by 'fisher'"),
        ({"target": "trajectory", "label_draws": 2}, "labels are sampled only by 'fisher'"),
        ({"target": "fisher", "label_draws": 0}, "label_draws=0"),
        ({"target": "batch-gradient"}, "needs it"),
        ({"target": "batch-gradient", "target_batch_size": 0}, "batch_size=0"),
        ({"target_batch_size": 8}, "target_batch_size=8 with target='ggn'"),
        ({"window": 8}, "window=8 with target='ggn'"),
        ({"decay": 0.9}, "decay=0.9 with target='ggn'"),
        ({"window_memory": "1GB"}, "window_memory='1GB' with target='ggn'"),
        ({"window_tolerance": 0.1}, "window_tolerance=0.1 with target='ggn'"),
        ({"target": "trajectory", "window_tolerance": 1.0}, "window_tolerance=1.0"),
        ({"target": "trajectory", "window": 0}, "size=0"),
        ({"target": "trajectory", "decay": 2.0}, "decay=2.0"),
        ({"target": "trajectory", "window_memory": "much"}, "memory='much'"),
        ({"target": "trajectories"}, "Did you mean 'trajectory'"),
    ],
)
def test_bad_options_touch_no_directory(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    model = network()
    with pytest.raises(InvalidInputError, match=said):
        tracked(model, shampoo(model), out=tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_does_not_fit_touches_no_directory(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(MemoryBudgetError, match="size="):
        tracked(
            model, shampoo(model), out=tmp_path / "run", target="trajectory", window_memory="1kB"
        )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- runs


TRAJECTORY = dataclasses.replace(OPTIONS, target="trajectory", window=4, decay=0.8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return train(tmp_path_factory.mktemp("run") / "whole", options=TRAJECTORY)


@pytest.mark.parametrize("last", some([1, 2, 4, 7, 11, STEPS], 2, 7, STEPS))
def test_a_resumed_run_is_the_same_to_the_bit(
    reference: RunStore, tmp_path: Path, last: int
) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", stop, options=TRAJECTORY)
    assert_same_run(train(tmp_path / "run", options=TRAJECTORY, resume=True), reference)


def test_the_record_holds_the_options_that_matter(reference: RunStore, tmp_path: Path) -> None:
    assert reference.config["target"] == "trajectory"
    assert (reference.config["window"], reference.config["decay"]) == (4, 0.8)
    assert "target_batch_size" not in reference.config
    plain = train(tmp_path / "plain")
    assert plain.config["target"] == "ggn"
    assert not {"label_draws", "target_batch_size", "window", "decay"} & plain.config.keys()
    batches = train(
        tmp_path / "batches", options=dataclasses.replace(OPTIONS, target="batch-gradient")
    )
    assert batches.config["target_batch_size"] == OPTIONS.batch_size


@pytest.mark.parametrize("change", [{"window": 5}, {"decay": None}, {"target": "ggn"}])
def test_another_window_is_another_run(reference: RunStore, change: dict[str, Any]) -> None:
    if "target" in change:
        change = change | {"window": None, "decay": None}
    with pytest.raises(RunDirectoryError, match=next(iter(change))):
        make(reference.path, dataclasses.replace(TRAJECTORY, **change), resume=True)


def test_a_tracker_state_without_a_window_is_refused() -> None:
    model = network()
    plain = tracked(model, shampoo(model))
    tracker = tracked(model, shampoo(model), target="trajectory")
    with pytest.raises(InvalidInputError, match="no window"):
        tracker.load_state_dict(plain.state_dict())
