"""The tracker: it leaves no trace in the training, and what it stores is what compare says."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    NonFiniteError,
    RunDirectoryError,
    UnknownNameError,
)
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.schedule import make_schedule, spread
from tests.grid import pairwise
from tests.synthetic_tables import COLUMNS
from tests.tiny_training import assert_same_tree

Pair = tuple[Tensor, Tensor]
LAYERS = ["0.weight", "4.weight"]
APPROXIMATIONS = ["optimal", "shampoo-squared", "kfac", "shampoo", "eigen-corrected", "diagonal"]
LOSS = nn.CrossEntropyLoss()
SAME = 1e-12  # the same float64 sums, perhaps in another order


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 3)
    )


def batch(seed: int, size: int = 16) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 5, generator=generator)
    return inputs, torch.randint(3, (size,), generator=generator)


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tracker: kp.Tracker | None,
    steps: range | int,
    log: bool = False,
) -> None:
    """A training loop as a user writes it."""
    for step in range(steps) if isinstance(steps, int) else steps:
        inputs, targets = batch(step)
        loss = LOSS(model(inputs), targets)
        loss.backward()
        if tracker is not None:
            if log:
                tracker.log(train_loss=loss.item())
            tracker.step((inputs, targets))
        optimizer.step()
        optimizer.zero_grad()


def all_say(rows: pd.DataFrame, pattern: str) -> bool:
    """Whether there are rows, and each has a note that matches."""
    return len(rows) > 0 and bool(rows["note"].fillna("").str.contains(pattern).all())


def sampled(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers of the sample matrix itself."""
    return table[table["kind"].fillna("plugin") == "plugin"]


def steps_of(table: pd.DataFrame) -> list[int]:
    return table.loc[table["approximation"].notna(), "step"].drop_duplicates().tolist()


# ---------------------------------------------------------------- no trace

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "shampoo": lambda model: kp.optim.Shampoo(model.parameters(), basis={"frequency": 4}),
    "adam": lambda model: torch.optim.Adam(model.parameters()),
}


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a training step may depend on, or leave behind."""
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (
                module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                module._backward_pre_hooks,
            )
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "target", "measured"),
    pairwise(list(OPTIMIZERS), ["ggn", "fisher", "empirical-fisher"], ["probe", "batch"]),
)
def test_training_is_the_same_to_the_bit(
    tmp_path: Path, name: str, target: str, measured: str
) -> None:
    states = []
    for tracked in (False, True):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = network()
        optimizer = OPTIMIZERS[name](model)
        tracker = None
        if tracked:
            tracker = kp.Tracker(
                model,
                LOSS,
                optimizer=optimizer,
                out=tmp_path / "run",
                every=[0, 1, 5, 6, 17, 29],
                probe=batch(-1) if measured == "probe" else None,
                target=target,
            )
        run(model, optimizer, tracker, 30)
        states.append(everything(model, optimizer))
        if tracker is not None:
            assert steps_of(tracker.table) == [0, 1, 5, 6, 17, 29]
    assert_same_tree(*states)


def test_a_probe_between_backward_and_step_keeps_the_gradients() -> None:
    model = network()
    optimizer = kp.optim.Shampoo(model.parameters())
    LOSS(model(batch(0)[0]), batch(0)[1]).backward()
    before = everything(model, optimizer)
    tracker = kp.Tracker(model, LOSS, optimizer=optimizer, every=1)
    assert tracker.step(batch(0)) is not None
    assert_same_tree(everything(model, optimizer), before)


class Counting(TorchDispatchMode):
    """Counts the tensor operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_off_schedule_it_touches_no_tensor_and_no_file(tmp_path: Path) -> None:
    model = network()
    optimizer = kp.optim.Shampoo(model.parameters())
    tracker = kp.Tracker(
        model, LOSS, optimizer=optimizer, out=tmp_path / "run", every=10, probe=batch(0)
    )
    with Counting() as counting:
        assert tracker.step() is not None
    assert counting.count > 100  # the counter counts
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with Counting() as counting:
        for _ in range(9):
            assert tracker.step(batch(1)) is None
    assert counting.count == 2 * 9  # the two draws of batch() itself, and nothing else
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ---------------------------------------------------------------- what is measured


def test_what_is_stored_is_what_compare_says(tmp_path: Path) -> None:
    model, probe = network(), batch(7)
    tracker = kp.Tracker(model, LOSS, out=tmp_path / "run", every=2, probe=probe, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, optimizer, tracker, 2)
    capture = kp.capture(model, LOSS, probe, layers="*weight", seed=3)
    expected = kp.compare(capture).table
    scores = tracker.step()
    assert scores is not None
    pd.testing.assert_frame_equal(scores.table, expected)
    table = tracker.table
    stored = table[(table["step"] == 2) & table["parameter"].notna()]
    pd.testing.assert_frame_equal(stored.drop(columns="step").reset_index(drop=True), expected)
    about_run = table[(table["step"] == 2) & table["parameter"].isna()].set_index("metric")["value"]
    assert about_run.to_dict() == {
        "probe_loss": capture.loss, "probe_accuracy": capture.accuracy
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_the_table_has_one_schema(tmp_path: Path, kind: str) -> None:
    model = network()
    out = tmp_path / "run" if kind == "disk" else None
    tracker = kp.Tracker(model, LOSS, out=out, every=2, probe=batch(0))
    dtypes = kp.RunStore.create(tmp_path / "other", {}).read().dtypes
    pd.testing.assert_series_equal(tracker.table.dtypes, dtypes)
    assert len(tracker.table) == 0
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), tracker, 3, log=True)
    assert tuple(tracker.table) == COLUMNS
    pd.testing.assert_series_equal(tracker.table.dtypes, dtypes)
    assert tracker.table["step"].is_monotonic_increasing


def test_memory_and_disk_hold_the_same_table(tmp_path: Path) -> None:
    tables = []
    for out in (None, tmp_path / "run"):
        model = network()
        optimizer = kp.optim.Shampoo(model.parameters(), basis={"frequency": 2})
        tracker = kp.Tracker(model, LOSS, optimizer=optimizer, out=out, every=3, probe=batch(0))
        run(model, optimizer, tracker, 7, log=True)
        tracker.finish()
        tables.append(tracker.table)
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_without_out_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = network()
    tracker = kp.Tracker(model, LOSS, every=1)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), tracker, 2)
    tracker.finish(batch(0))
    assert tracker.store is None
    assert steps_of(tracker.table) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_probe_is_measured_whatever_the_batch() -> None:
    model = network()
    with_probe = kp.Tracker(model, LOSS, every=1, probe=batch(0))
    with_batch = kp.Tracker(model, LOSS, every=1)
    for seed in (1, 2, 0):
        with_probe.step(batch(seed))
        with_batch.step(batch(seed))
    tables = [sampled(tracker.table) for tracker in (with_probe, with_batch)]
    norms = [t[(t["metric"] == "norm") & (t["parameter"] == LAYERS[0])]["value"] for t in tables]
    assert norms[0].nunique() == 1  # the weights did not change
    assert norms[1].nunique() == 3
    assert norms[0].iloc[0] == norms[1].iloc[2]


def test_without_probe_and_batch_there_is_nothing_to_measure() -> None:
    tracker = kp.Tracker(network(), LOSS, every=[1])
    tracker.step()  # off schedule, so nothing is missed
    with pytest.raises(InvalidInputError, match=r"Nothing to measure.*probe=.*step 1"):
        tracker.step()
    with pytest.raises(InvalidInputError, match="Nothing to measure"):
        tracker.finish()


@pytest.mark.parametrize(
    ("layers", "measured"),
    [
        ("*", ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]),
        ("0.*", ["0.weight", "0.bias"]),
        (["4.weight"], LAYERS[1:]),
        (["[04].weight", "1.*"], ["0.weight", "1.weight", "1.bias", "4.weight"]),
    ],
)
def test_layers_chooses_parameters_by_glob(layers: Any, measured: list[str]) -> None:
    model = network()
    tracker = kp.Tracker(model, LOSS, every=1, layers=layers)
    tracker.step(batch(0))
    table = tracker.table
    assert table.loc[table["approximation"].notna(), "parameter"].unique().tolist() == measured
    skipped = table[table["metric"] == "skipped"]
    names = {name for name, _ in model.named_parameters()}
    assert set(skipped["parameter"]) == names - set(measured)
    assert layers == "*" or all_say(skipped, "not selected")


def test_approximations_and_singular_values_as_asked_for() -> None:
    tracker = kp.Tracker(
        network(), LOSS, every=1, layers=LAYERS, approximations="kfac", singular_values=2
    )
    tracker.step(batch(0))
    table = tracker.table
    assert table["approximation"].dropna().unique().tolist() == ["kfac"]
    assert table.loc[table["metric"] == "singular_value", "index"].tolist() == [0, 1, 0, 1]
    none = kp.Tracker(network(), LOSS, every=1, approximations=[])
    none.step(batch(0))
    assert none.table["approximation"].isna().all()


def test_sampled_labels_follow_the_seed() -> None:
    norms = []
    for seed in (0, 0, 1):
        tracker = kp.Tracker(network(), LOSS, every=1, target="fisher", seed=seed)
        tracker.step(batch(0))
        norms.append(sampled(tracker.table).query("metric == 'norm'")["value"].tolist())
    assert norms[0] == norms[1] != norms[2]


def test_plot_draws_the_trajectory() -> None:
    model = network()
    tracker = kp.Tracker(model, LOSS, every=1, probe=batch(0), layers=LAYERS)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), tracker, 3)
    from matplotlib.figure import Figure

    axes = tracker.plot(figure=Figure())
    assert len(axes) == len(LAYERS)


# ---------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("every", "probed"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (4, [0, 4, 8]),
        (100, [0]),
        ([3, 1], [1, 3]),
        ((0, 7), [0, 7]),
        ({5}, [5]),
        (range(2, 9, 3), [2, 5, 8]),
        (np.array([0, 6]), [0, 6]),
        (lambda step: step in (2, 3), [2, 3]),
    ],
    ids=["1", "4", "100", "list", "tuple", "set", "range", "array", "predicate"],
)
def test_every_is_an_interval_steps_or_a_predicate(
    every: int | Collection[int] | Callable[[int], bool], probed: list[int]
) -> None:
    model = network()
    tracker = kp.Tracker(model, LOSS, every=every)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), tracker, 9)
    assert steps_of(tracker.table) == probed
    assert tracker.steps_taken == 9


@pytest.mark.parametrize(
    "every", [0, -5, True, 2.5, "20", None, [], [-1], [1.5], ["a"], [[1]], np.array([0.5])], ids=str
)
def test_a_bad_every_is_refused_with_its_value(every: Any) -> None:
    with pytest.raises(InvalidInputError, match="every="):
        kp.Tracker(network(), LOSS, every=every)


def test_a_predicate_is_asked_once_a_step() -> None:
    asked: list[int] = []
    schedule = make_schedule(lambda step: bool(asked.append(step)))  # type: ignore[func-returns-value]
    tracker = kp.Tracker(network(), LOSS, every=schedule)
    for _ in range(5):
        tracker.step()
    assert asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("total", "count", "steps"),
    [(12, 5, [0, 3, 6, 9, 12]), (10, 4, [0, 3, 7, 10]), (1, 2, [0, 1]), (3, 21, [0, 1, 2, 3])],
)
def test_spread_is_even_with_both_ends(total: int, count: int, steps: list[int]) -> None:
    assert spread(total, count) == steps
    gaps = np.diff(spread(1000, 21))
    assert set(gaps) == {50}


def test_early_spacing_is_quadratic_with_both_ends() -> None:
    assert spread(100, 6, "early") == [0, 4, 16, 36, 64, 100]
    assert spread(10, 6, "early") == [0, 2, 4, 6, 10]  # 0.4 and 0 are one step
    assert spread(100, 6, "early", 5) == [0, 9, 21, 41, 69, 100]
    assert spread(10, 6, "even", 3) == [0, 5, 7, 9, 10]  # none beyond the end
    assert np.all(np.diff(spread(1000, 21, "early"), n=2) >= -1)  # gaps grow, up to rounding
    with pytest.raises(UnknownNameError, match="Did you mean 'early'"):
        spread(10, 3, "earl")


@pytest.mark.parametrize(("total", "count"), [(10, 1), (10, 0), (0, 5), (-1, 5)])
def test_spread_needs_two_probes_and_a_step(total: int, count: int) -> None:
    with pytest.raises(InvalidInputError, match=f"{count} probes over {total} steps"):
        spread(total, count)


# ---------------------------------------------------------------- the optimizer's own operator


def live(table: pd.DataFrame, step: int) -> pd.DataFrame:
    rows = sampled(table)
    return rows[(rows["step"] == step) & (rows["approximation"] == "in-use")]


def test_live_is_absent_before_the_first_refresh_and_then_what_the_optimizer_holds() -> None:
    model, probe = network(), batch(9)
    optimizer = kp.optim.Shampoo(model.parameters(), basis={"frequency": 3, "start": 2})
    tracker = kp.Tracker(model, LOSS, optimizer=optimizer, every=1, probe=probe, layers=LAYERS)
    parameters = dict(model.named_parameters())
    expected: dict[tuple[int, str], tuple[float, float]] = {}
    for step in range(8):
        inputs, targets = batch(step)
        LOSS(model(inputs), targets).backward()
        if step >= 2:
            samples = kp.capture(model, LOSS, probe)
            for name in LAYERS:
                pair = kp.SecondMoment(samples[name]), optimizer.operator(parameters[name])
                expected[step, name] = kp.cosine_similarity(*pair), kp.best_scale_error(*pair)
        tracker.step()
        optimizer.step()
        optimizer.zero_grad()
    for step in range(8):
        rows = live(tracker.table, step)
        assert set(rows["parameter"]) == set(LAYERS)
        if step < 2:
            assert rows["metric"].tolist() == ["cosine"] * 2
            assert rows["value"].isna().all()
            assert all_say(rows, "first refresh is at step 2" if step else "no step was taken")
            continue
        for name in LAYERS:
            found = rows[rows["parameter"] == name].set_index("metric")["value"]
            cosine, error = expected[step, name]
            assert found.to_dict() == pytest.approx(
                {"cosine": cosine, "best_scale_error": error}, rel=SAME
            )
    assert len(expected) == 12
    assert len({round(cosine, 9) for cosine, _ in expected.values()}) > 6  # it moves with the run


def test_live_is_stale_between_refreshes() -> None:
    """The operator is that of the last refresh, while the target is fresh."""
    model = network()
    optimizer = kp.optim.Shampoo(model.parameters(), basis={"frequency": 4})
    held = []
    for step in range(12):
        LOSS(model(batch(step)[0]), batch(step)[1]).backward()
        if step >= 4:
            held.append(optimizer.operator(model[0].weight).to_dense())
        optimizer.step()
        optimizer.zero_grad()
    same = [torch.equal(*pair) for pair in itertools.pairwise(held)]
    assert same == [True, True, True, False, True, True, True]


def test_another_optimizer_has_no_live_operator_and_the_table_says_so() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = kp.Tracker(model, LOSS, optimizer=optimizer, every=1, layers=LAYERS)
    run(model, optimizer, tracker, 2)
    rows = tracker.table[tracker.table["approximation"] == "in-use"]
    assert rows["value"].isna().all()
    assert all_say(rows, r"SGD has no operator\(parameter\)")
    assert rows.groupby(["step", "parameter"]).size().tolist() == [1] * 4


def test_without_an_optimizer_there_is_no_live_row() -> None:
    tracker = kp.Tracker(network(), LOSS, every=1)
    tracker.step(batch(0))
    assert set(tracker.table["approximation"].dropna()) == set(APPROXIMATIONS)


def test_a_layer_that_the_optimizer_does_not_hold_is_absent_with_the_reason() -> None:
    model = network()
    optimizer = kp.optim.Shampoo(model[0].parameters(), basis={"frequency": 1})
    tracker = kp.Tracker(model, LOSS, optimizer=optimizer, every=[2])
    run(model, optimizer, tracker, 3)
    rows = live(tracker.table, 2).set_index("parameter")
    assert rows.loc["0.weight", "value"].notna().all()
    assert math.isnan(rows.loc["4.weight", "value"])
    assert "no optimizer of the tracker's holds it" in rows.loc["4.weight", "note"]


@pytest.mark.parametrize(
    ("operator", "told"),
    [
        (kp.DiagonalOperator(torch.ones(5, 6)), r"the optimizer sees \(5, 6\)"),
        (torch.eye(30), "returned a Tensor, not an operator"),
    ],
)
def test_an_operator_that_does_not_fit_is_absent_with_the_reason(operator: Any, told: str) -> None:
    class Own(torch.optim.SGD):
        def operator(self, parameter: Tensor) -> Any:
            return operator

    model = network()
    tracker = kp.Tracker(
        model, LOSS, optimizer=Own(model.parameters(), lr=0.1), every=1, layers="0.*"
    )
    tracker.step(batch(0))
    rows = live(tracker.table, 0)
    assert rows["value"].isna().all()
    assert all_say(rows, told)


def test_an_operator_that_fails_does_not_end_the_training() -> None:
    class Own(torch.optim.SGD):
        def operator(self, parameter: Tensor) -> Any:
            raise KeyError("no state yet")

    model = network()
    optimizer = Own(model.parameters(), lr=0.1)
    tracker = kp.Tracker(model, LOSS, optimizer=optimizer, every=1)
    run(model, optimizer, tracker, 2)
    rows = tracker.table[tracker.table["approximation"] == "in-use"]
    assert rows["value"].isna().all()
    assert all_say(rows, "state of Own could not be read: KeyError.*no state yet")


def test_any_optimizer_with_an_operator_can_be_read() -> None:
    mine = kp.DiagonalOperator(torch.rand(6, 5))

    class Own(torch.optim.SGD):
        def operator(self, parameter: Tensor) -> kp.DiagonalOperator:
            return mine

    model = network()
    tracker = kp.Tracker(
        model, LOSS, optimizer=Own(model.parameters(), lr=0.1), every=1, layers="0.weight"
    )
    tracker.step(batch(0))
    H = kp.SecondMoment(kp.capture(model, LOSS, batch(0))["0.weight"])
    found = live(tracker.table, 0).set_index("metric")["value"]
    assert found["cosine"] == pytest.approx(kp.cosine_similarity(H, mine), rel=SAME)


# ---------------------------------------------------------------- logging, the end


def test_logged_numbers_are_stored_with_their_step(tmp_path: Path) -> None:
    model = network()
    tracker = kp.Tracker(model, LOSS, out=tmp_path / "run", every=[0, 4], probe=batch(0))
    for step in range(5):
        tracker.log(train_loss=10.0 + step, lr=torch.tensor(0.5))
        tracker.step()
    tracker.log(train_loss=15)
    table = tracker.table
    losses = table[table["metric"] == "train_loss"]
    assert losses["step"].tolist() == [0, 1, 2, 3, 4]
    assert losses["value"].tolist() == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert losses["parameter"].isna().all()
    assert (table["metric"] == "lr").sum() == 5
    assert {p.name for p in tracker.store.measurements.iterdir()} == {  # type: ignore[union-attr]
        "step-000000.parquet", "step-000004.parquet"
    }  # fmt: skip
    tracker.finish()
    assert tracker.table.query("metric == 'train_loss'")["value"].tolist()[-1] == 15.0


@pytest.mark.parametrize("value", ["high", None, torch.ones(2), [1.0]])
def test_what_is_no_number_cannot_be_logged(value: Any) -> None:
    tracker = kp.Tracker(network(), LOSS)
    with pytest.raises(InvalidInputError, match="train_loss"):
        tracker.log(train_loss=value)
    tracker.step(batch(0))
    assert "train_loss" not in set(tracker.table["metric"])


def test_finish_measures_the_last_state_once_and_marks_the_run(tmp_path: Path) -> None:
    model = network()
    tracker = kp.Tracker(model, LOSS, out=tmp_path / "run", every=2, probe=batch(0))
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), tracker, 3)
    assert RunStore.open(tmp_path / "run").status == "running"
    tracker.finish()
    assert RunStore.open(tmp_path / "run").status == "done"
    assert steps_of(tracker.table) == [0, 2, 3]
    before = tracker.table
    tracker.finish()
    pd.testing.assert_frame_equal(tracker.table, before)


def test_measure_works_off_schedule_and_only_once() -> None:
    tracker = kp.Tracker(network(), LOSS, every=[100], probe=batch(0))
    tracker.step()
    assert tracker.measure() is not None
    assert tracker.measure() is None
    assert steps_of(tracker.table) == [1]


# ---------------------------------------------------------------- the run directory


def started(out: Path, **options: Any) -> kp.Tracker:
    return kp.Tracker(network(), LOSS, **{"out": out, "every": 1, "probe": batch(0)} | options)


def test_an_occupied_directory_is_refused_with_the_remedies(tmp_path: Path) -> None:
    started(tmp_path / "run").step()
    before = RunStore.open(tmp_path / "run").read()
    with pytest.raises(RunDirectoryError, match=r"another run.*--resume.*--overwrite"):
        started(tmp_path / "run")
    pd.testing.assert_frame_equal(RunStore.open(tmp_path / "run").read(), before)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RunDirectoryError, match="holds no run"):
            started(tmp_path / "notes", **options)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


def test_overwrite_deletes_what_was_measured(tmp_path: Path) -> None:
    first = started(tmp_path / "run")
    for _ in range(3):
        first.step()
    second = started(tmp_path / "run", overwrite=True)
    assert len(second.table) == 0
    second.step()
    assert steps_of(second.table) == [0]


def test_resume_measures_only_what_is_not_there(tmp_path: Path) -> None:
    """A loop that starts again from its first step, and one that starts from its checkpoint."""
    first = started(tmp_path / "run")
    first.log(train_loss=1.0)
    first.step()
    first.step()
    before = first.table
    again = started(tmp_path / "run", resume=True)
    again.log(train_loss=-1.0)  # of a step that is stored: the first run's word counts
    assert again.step() is None
    assert again.step() is None
    pd.testing.assert_frame_equal(again.table, before)
    assert again.step() is not None
    late = started(tmp_path / "run", resume=True, start=3)
    late.step()
    assert steps_of(late.table) == [0, 1, 2, 3]
    assert late.table.query("metric == 'train_loss'")["value"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target", "fisher"),
        ("layers", "0.*"),
        ("approximations", ["optimal"]),
        ("seed", 1),
        ("singular_values", 3),
        ("config", {"lr": 0.2}),
    ],
)
def test_resume_with_another_option_is_refused_by_name(
    tmp_path: Path, option: str, value: Any
) -> None:
    started(tmp_path / "run", config={"lr": 0.1}).step()
    with pytest.raises(RunDirectoryError, match="lr" if option == "config" else option):
        started(tmp_path / "run", resume=True, **({"config": {"lr": 0.1}} | {option: value}))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"target": "ggm"}, UnknownNameError, "Did you mean 'ggn'"),
        ({"approximations": ["kfac", "optimum"]}, UnknownNameError, "Did you mean 'optimal'"),
        ({"layers": "0.wieght"}, UnknownNameError, "Did you mean '0.weight'"),
        ({"layers": []}, InvalidInputError, "layers is empty"),
        ({"singular_values": -1}, InvalidInputError, "singular_values=-1"),
        ({"start": -1}, InvalidInputError, "start=-1"),
        ({"resume": True, "overwrite": True}, InvalidInputError, "choose one"),
        ({"config": {"model": network()}}, InvalidInputError, "'model'"),
    ],
)
def test_a_bad_option_is_refused_before_the_directory_is_touched(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        started(tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_resume_and_overwrite_need_a_directory(option: str) -> None:
    with pytest.raises(InvalidInputError, match="give out="):
        kp.Tracker(network(), LOSS, **{option: True})


def test_a_model_that_takes_its_shapes_from_the_first_batch() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3))
    tracker = kp.Tracker(model, LOSS, every=1, layers="0.weight")
    model(batch(0)[0])
    assert tracker.step(batch(0)) is not None


def test_a_failed_write_loses_nothing_that_was_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = started(tmp_path / "run")
    tracker.log(train_loss=1.0)
    tracker.step()

    def full(*arguments: object) -> None:
        raise RunDirectoryError("disk full")

    tracker.log(train_loss=2.0)
    monkeypatch.setattr(RunStore, "write_part", full)
    with pytest.raises(RunDirectoryError):
        tracker.step()
    monkeypatch.undo()
    assert steps_of(tracker.table) == [0]
    tracker.step()
    assert steps_of(tracker.table) == [0, 1]
    assert tracker.table.query("metric == 'train_loss'")["value"].tolist() == [1.0, 2.0]


def test_where_it_stands_goes_through_a_checkpoint(tmp_path: Path) -> None:
    first = started(tmp_path / "run", every=[0, 4])
    for step in range(3):
        first.log(train_loss=step)
        first.step()
    state = json.loads(json.dumps(first.state_dict()))
    first.log(train_loss=99.0)  # after the checkpoint: lost with the process, and logged again
    second = started(tmp_path / "run", every=[0, 4], resume=True)
    second.load_state_dict(state)
    assert second.steps_taken == 3
    for step in range(3, 5):
        second.log(train_loss=step)
        second.step()
    losses = second.table.query("metric == 'train_loss'")
    assert losses["step"].tolist() == losses["value"].tolist() == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- trouble


@pytest.mark.parametrize("place", ["0.weight", "1.running_var", "4.bias", "inputs"])
def test_nan_in_mid_training_stops_by_name_and_earlier_parts_stay(
    tmp_path: Path, place: str
) -> None:
    model = network()
    tracker = kp.Tracker(model, LOSS, out=tmp_path / "run", every=1)
    run(model, torch.optim.SGD(model.parameters(), lr=0.1), tracker, 3)
    before = tracker.table
    inputs, targets = batch(3)
    if place == "inputs":
        inputs[0, 0] = math.inf
    else:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        tensors[place].data.view(-1)[0] = math.nan
    named = {"1.running_var": "outputs|4", "inputs": "inputs"}.get(place, place)
    with pytest.raises(NonFiniteError, match=named):
        tracker.step((inputs, targets))
    store = RunStore.open(tmp_path / "run")
    assert store.steps() == [0, 1, 2]
    pd.testing.assert_frame_equal(store.read(), before)
    assert tracker.steps_taken == 3


def test_a_failed_probe_leaves_the_model_as_it_was() -> None:
    model = network()
    optimizer = kp.optim.Shampoo(model.parameters())
    LOSS(model(batch(0)[0]), batch(0)[1]).backward()
    tracker = kp.Tracker(model, LOSS, optimizer=optimizer, every=1)
    before = everything(model, optimizer)
    with pytest.raises(InvalidInputError, match="empty"):
        tracker.step((torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(InvalidInputError):
        tracker.step((torch.zeros(4, 5), torch.full((4,), 17)))
    assert_same_tree(everything(model, optimizer), before)


def test_a_dead_layer_is_undefined_and_not_perfect() -> None:
    model = network()
    model[4].weight.data.zero_()  # so that no gradient reaches the layer below
    tracker = kp.Tracker(model, LOSS, every=1)
    tracker.step(batch(0))
    rows = tracker.table[(tracker.table["parameter"] == "0.weight")]
    cosines = rows[rows["metric"] == "cosine"]
    assert len(cosines) == 2 * len(APPROXIMATIONS)  # plug-in and population
    assert cosines["value"].isna().all()
    assert all_say(cosines, "^H = 0")


def test_a_tracker_says_what_it_has_probed(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = kp.Tracker(model, LOSS, every=2, probe=batch(0), out=tmp_path / "run")
    assert "none yet" in repr(tracker)
    run(model, optimizer, tracker, 3)
    assert "steps probed: 0, 2" in repr(tracker)
    assert str(tmp_path / "run") in repr(tracker)
