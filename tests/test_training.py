"""A run that was stopped and resumed is the run that was not, to the bit: weights and table."""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, NonFiniteError, RunDirectoryError
from kronecker_probe.optim import Shampoo
from kronecker_probe.tracking import checkpoints as checkpoints_module
from kronecker_probe.tracking.run_directory.checkpoint import load_checkpoint, save_checkpoint
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.training import Progress, Training, TrainingOptions
from kronecker_probe.workloads import Workload
from tests import tiny_training as tiny
from tests.grid import pairwise, some
from tests.tiny_training import OPTIONS, PROBED, STEPS, assert_same_run, make, train

APPROXIMATIONS = 6


@pytest.fixture(scope="module")
def reported() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, reported: list[Progress]) -> RunStore:
    """The run that nothing stopped."""
    return train(tmp_path_factory.mktemp("reference") / "run", reported.append)


def copied(reference: RunStore, tmp_path: Path) -> RunStore:
    shutil.copytree(reference.path, tmp_path / "run")
    return RunStore.open(tmp_path / "run")


def stop_at(step: int, error: BaseException) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step == step:
            raise error

    return report


def checkpoints(store: RunStore) -> list[int]:
    return sorted(int(p.stem.split("-")[1]) for p in store.checkpoints.glob("*.safetensors"))


# ---------------------------------------------------------------- a run


def test_a_run_holds_every_step_of_training_once(
    reference: RunStore, reported: list[Progress]
) -> None:
    table = reference.read()
    losses = table[table["metric"] == "train_loss"]
    assert losses["step"].tolist() == list(range(STEPS))
    assert losses["value"].tolist() == [progress.loss for progress in reported]
    assert [progress.step for progress in reported] == list(range(1, STEPS + 1))
    for metric in ("test_accuracy", "probe_loss", "probe_accuracy"):
        assert table.loc[table["metric"] == metric, "step"].tolist() == PROBED
    keys = ["step", "parameter", "approximation", "metric", "index", "kind"]
    assert not table.duplicated(keys).any()
    scored = table[(table["metric"] == "cosine") & (table["approximation"] != "in-use")]
    scored = scored[scored["kind"] == "plugin"]
    counts = scored.groupby("step").size()
    assert counts.to_dict() == dict.fromkeys(PROBED, APPROXIMATIONS * len(tiny.MEASURED))
    assert reference.status == "done"
    assert reference.record["seed"] == 0


def test_training_is_the_plain_loop(reference: RunStore, reported: list[Progress]) -> None:
    """The same loop in ten lines, without tracker, checkpoints and accuracy."""
    workload = tiny.workload()
    optimizer = Shampoo(workload.model.named_parameters(), lr=OPTIONS.lr, basis={"frequency": 2})
    losses = []
    for step in range(STEPS):
        inputs, targets = workload.batch(step, OPTIONS.batch_size, OPTIONS.seed)
        optimizer.zero_grad()
        loss = workload.loss_fn(workload.model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = tiny.last_state(reference)
    tiny.assert_same_tree(dict(workload.model.state_dict()), state["model"])
    tiny.assert_same_tree(optimizer.state_dict(), state["optimizer"])
    tiny.assert_same_tree(torch.get_rng_state(), state["generators"]["cpu"])
    assert losses == [progress.loss for progress in reported]


def test_accuracy_is_that_of_the_test_set(reference: RunStore) -> None:
    workload = tiny.workload()
    assert workload.test is not None
    inputs, targets = workload.test
    workload.model.load_state_dict(tiny.last_state(reference)["model"])
    workload.model.eval()
    expected = np.mean(workload.model(inputs).argmax(1).numpy() == targets.numpy())
    table = reference.read()
    assert table.loc[table["metric"] == "test_accuracy", "value"].iloc[-1] == expected


def test_the_accuracy_reported_is_told_with_its_step(
    reference: RunStore, reported: list[Progress]
) -> None:
    table = reference.read()
    tested = table[table["metric"] == "test_accuracy"].set_index("step")["value"]
    for progress in reported:
        last = max(step for step in PROBED if step < progress.step)
        assert progress.tested_at == last
        assert progress.accuracy == tested[last]


def test_accuracy_with_classes_before_positions(tmp_path: Path) -> None:
    """[N, C, T] outputs, as cross-entropy has them; right in two places of three."""

    class ClassesFirst(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mT

    model = nn.Sequential(nn.Linear(3, 3, bias=False), ClassesFirst())
    model[0].weight.data.copy_(10 * torch.eye(3))
    inputs = torch.eye(3)[[1, 2, 0]]  # classes 1, 2, 0; read the wrong way round, 2, 0, 1
    pair = inputs.repeat(4, 1, 1), torch.tensor([1, 2, 1]).repeat(4, 1)
    options = TrainingOptions(steps=1, batch_size=4, lr=0.0, probes=2)
    run = Training(
        Workload(model, nn.CrossEntropyLoss(), pair, pair), "tokens", tmp_path / "run", options
    )
    run.run()
    assert run.accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("test", ["none", "regression"])
def test_without_labels_there_is_no_accuracy(tmp_path: Path, test: str) -> None:
    inputs, targets = torch.randn(20, 3), torch.randn(20, 2)
    held_out = None if test == "none" else (inputs, targets)
    workload = Workload(nn.Linear(3, 2), nn.MSELoss(), (inputs, targets), held_out)
    options = TrainingOptions(steps=2, batch_size=5, lr=0.01, probes=2)
    seen: list[Progress] = []
    Training(workload, "regression", tmp_path / "run", options).run(seen.append)
    assert all(math.isnan(progress.accuracy) for progress in seen)
    metrics = set(RunStore.open(tmp_path / "run").read()["metric"])
    assert "train_loss" in metrics
    assert not any("accuracy" in metric for metric in metrics)


def test_the_last_checkpoint_or_all_of_them_are_kept(reference: RunStore, tmp_path: Path) -> None:
    assert checkpoints(reference) == [STEPS]
    every = train(tmp_path / "run", keep_checkpoints="all")
    assert checkpoints(every) == PROBED
    assert_same_run(every, reference)


def test_checkpoints_that_were_to_be_kept_outlive_a_resume_that_forgets_to_say_so(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", stop_at(8, KeyboardInterrupt()), keep_checkpoints="all")
    assert checkpoints(train(tmp_path / "run", resume=True)) == [0, 3, 6, STEPS]


def test_files_of_the_user_beside_the_checkpoints_stay(tmp_path: Path) -> None:
    names = ["step-best.safetensors", "step-000003.mine.safetensors", "notes.txt"]

    def put(progress: Progress) -> None:
        if progress.step == 1:
            for name in names:
                (tmp_path / "run" / "checkpoints" / name).write_bytes(b"mine")
        if progress.step == STEPS - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", put)
    store = train(tmp_path / "run", resume=True)
    assert {p.name for p in store.checkpoints.iterdir()} == {*names, "step-000012.safetensors"}
    assert (store.checkpoints / names[0]).read_bytes() == b"mine"


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("step", some(range(1, STEPS + 1), 1, 6, 8, STEPS))
def test_interrupted_and_resumed_is_the_uninterrupted_run(
    reference: RunStore, tmp_path: Path, step: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", stop_at(step, KeyboardInterrupt()))
    store = RunStore.open(tmp_path / "run")
    assert store.status == "interrupted"
    assert str(step) in store.record["reason"]
    assert store.steps() == [probed for probed in PROBED if probed < step]
    torch.manual_seed(99)  # another process has other random numbers
    assert_same_run(train(tmp_path / "run", resume=True), reference)
    assert store.damaged() == {}
    assert checkpoints(store) == [STEPS]


def test_interrupted_again_and_again(reference: RunStore, tmp_path: Path) -> None:
    for step in (2, 3, 4, 8, 12):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", stop_at(step, KeyboardInterrupt()), resume=True)
    assert_same_run(train(tmp_path / "run", resume=True), reference)


@pytest.mark.parametrize("where", ["forward", "measure", "optimizer", "checkpoint", "accuracy"])
def test_interrupted_in_the_middle_of_a_step(
    reference: RunStore, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "run")
    counts = itertools.count()

    def interrupting(call: Callable[..., Any], at: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            if next(counts) == at:
                raise KeyboardInterrupt
            return result

        return wrapped

    match where:
        case "forward":
            monkeypatch.setattr(run.model[1], "forward", interrupting(run.model[1].forward, 10))
        case "measure":
            reading = interrupting(run.tracker._read_optimizers, 2)
            monkeypatch.setattr(run.tracker, "_read_optimizers", reading)
        case "optimizer":
            monkeypatch.setattr(run.optimizer, "step", interrupting(run.optimizer.step, 6))
        case "checkpoint":
            saving = interrupting(save_checkpoint, 2)
            monkeypatch.setattr(checkpoints_module, "save_checkpoint", saving)
        case "accuracy":
            monkeypatch.setattr(run, "_probe_accuracy", interrupting(run._probe_accuracy, 2))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    monkeypatch.undo()
    assert RunStore.open(tmp_path / "run").status == "interrupted"
    store = train(tmp_path / "run", resume=True)
    assert_same_run(store, reference)
    assert checkpoints(store) == [STEPS]


def test_a_finished_run_can_be_resumed_and_does_not_change(
    reference: RunStore, tmp_path: Path
) -> None:
    store = copied(reference, tmp_path)
    before = {p.name: p.read_bytes() for p in store.measurements.iterdir()}
    steps: list[Progress] = []
    assert_same_run(train(store.path, steps.append, resume=True), reference)
    assert steps == []
    assert {p.name: p.read_bytes() for p in store.measurements.iterdir()} == before


def test_resume_starts_a_run_that_is_not_there_yet(reference: RunStore, tmp_path: Path) -> None:
    assert_same_run(train(tmp_path / "new" / "run", resume=True), reference)
    (tmp_path / "empty").mkdir()
    assert_same_run(train(tmp_path / "empty", resume=True), reference)


def test_overwrite_starts_anew(reference: RunStore, tmp_path: Path) -> None:
    other = dataclasses.replace(OPTIONS, lr=0.2, steps=6)
    make(tmp_path / "run", other).run()
    assert_same_run(train(tmp_path / "run", overwrite=True), reference)


def test_an_occupied_directory_is_refused_and_left_alone(
    reference: RunStore, tmp_path: Path
) -> None:
    store = copied(reference, tmp_path)
    with pytest.raises(RunDirectoryError, match=r"--resume.*--overwrite"):
        make(store.path)
    assert_same_run(store, reference)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.06}, r"lr: 0\.05 in the run, 0\.06 now"),
        ({"steps": 13}, "steps"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 13}, "batch_size"),
        ({"probes": 4}, "probes"),
        ({"probe_size": 21}, "probe_size"),
        ({"settings": ("basis.frequency=3",)}, "settings"),
        ({"spacing": "early"}, "spacing"),
        ({"target": "fisher"}, "target"),
        ({"layers": ("0*",)}, r'layers: \["0\.weight", "4\.weight"\] in the run, \["0\*"\] now'),
    ],
)
def test_resume_with_another_option_is_refused_by_name(
    reference: RunStore, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    store = copied(reference, tmp_path)
    with pytest.raises(RunDirectoryError, match=f"options differ.*{named}"):
        make(store.path, dataclasses.replace(OPTIONS, **change), resume=True)
    assert_same_run(RunStore.open(store.path), reference)


# ---------------------------------------------------------------- failed


def test_a_diverged_run_is_failed_and_what_it_measured_is_there(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, lr=1e30)
    run = make(tmp_path / "run", options)
    with pytest.raises(NonFiniteError, match=r"lr=1e\+30|lower the learning rate|layer|Parameter"):
        run.run()
    store = RunStore.open(tmp_path / "run")
    assert store.status == "failed"
    assert store.record["reason"]
    assert store.damaged() == {}
    assert store.steps()
    table = store.read()
    measured = table[(table["metric"] == "cosine") & (table["step"] == 0)]
    measured = measured[measured["kind"] == "plugin"]
    assert measured.loc[measured["approximation"] != "in-use", "value"].notna().all()


def test_weights_that_break_between_probes_stop_the_run_by_name(tmp_path: Path) -> None:
    run = make(tmp_path / "run")

    def spoil(progress: Progress) -> None:
        if progress.step == 5:
            run.model[4].weight.data[0, 0] = math.nan

    with pytest.raises(NonFiniteError, match="the loss is nan at step 5"):
        run.run(spoil)
    store = RunStore.open(tmp_path / "run")
    assert store.status == "failed"
    assert "nan" in store.record["reason"]
    assert store.steps() == [0, 3]
    # the last checkpoint is one from before the accident: the same command goes on from there
    assert train(tmp_path / "run", resume=True).status == "done"


def test_a_probe_that_fails_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    run = make(tmp_path / "run")

    def spoil(progress: Progress) -> None:
        if progress.step == 6:  # the very step that is probed next
            run.model[4].weight.data[0, 0] = math.nan

    with pytest.raises(NonFiniteError):
        run.run(spoil)
    store = RunStore.open(tmp_path / "run")
    assert checkpoints(store) == [3, 6]
    sound = load_checkpoint(store.checkpoint_path(3))["model"]
    assert all(bool(t.isfinite().all()) for t in sound.values())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, "loss"),
        ({"model": nn.Sequential(nn.Conv1d(4, 3, 1))}, "4|measured"),
        ({"test": (torch.randn(9, 5), torch.zeros(9, dtype=torch.long))}, r"test inputs \[4, 5\]"),
        ({"train": (torch.randn(9, 4), torch.full((9,), 3))}, "target|class"),
        ({"train": (torch.full((9, 4), math.nan), torch.zeros(9, dtype=torch.long))}, "NaN"),
    ],
    ids=["loss", "model", "test set", "targets", "inputs"],
)
def test_a_workload_that_cannot_be_measured_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    workload = dataclasses.replace(tiny.workload(), **change)
    with pytest.raises(InvalidInputError, match=told):
        Training(workload, "tiny", tmp_path / "run", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_checkpoints_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"run-\\udcff is no UTF-8 path"):
        make(tmp_path / os.fsdecode(b"run-\xff"))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_cannot_write_one_run(
    spawn: Any, reference: RunStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    holder = spawn(tiny.hold, str(out))
    try:
        while not (out / "held").exists():
            assert holder.is_alive()
            time.sleep(0.01)
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(
                RunDirectoryError, match=rf"\(process {holder.pid} on .+\) is writing to"
            ):
                make(out, **options)
    finally:
        holder.kill()  # a lock goes with its process, however it ends
        holder.join(60)
    (out / "held").unlink()
    assert_same_run(train(out, resume=True), reference)


def test_any_error_is_noted_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the user's own"):
        train(tmp_path / "run", stop_at(4, RuntimeError("the user's own")))
    store = RunStore.open(tmp_path / "run")
    assert store.status == "failed"
    assert store.record["reason"] == "the user's own"


def test_a_disk_that_fails_the_record_too_does_not_hide_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: RunStore, status: str, reason: str | None = None) -> None:
        raise RunDirectoryError("disk full")

    run = make(tmp_path / "run")
    monkeypatch.setattr(RunStore, "set_status", refuse)
    with pytest.raises(KeyboardInterrupt):
        run.run(stop_at(4, KeyboardInterrupt()))


def test_the_status_while_it_runs(tmp_path: Path) -> None:
    statuses: list[str] = []
    out = tmp_path / "run"
    store = train(out, lambda progress: statuses.append(RunStore.open(out).status))
    assert set(statuses) == {"running"}
    assert store.status == "done"
    assert store.record["reason"] is None


# ---------------------------------------------------------------- damaged files


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(("step", "keep"), pairwise(PROBED, ["last", "all"], alone=True))
def test_a_damaged_part_is_measured_again(
    reference: RunStore, tmp_path: Path, step: int, keep: str
) -> None:
    train(tmp_path / "run", keep_checkpoints=keep)
    store = RunStore.open(tmp_path / "run")
    damage(store.part_path(step))
    seen: list[Progress] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(store.path, seen.append, resume=True, keep_checkpoints=keep)
    assert_same_run(RunStore.open(store.path), reference)
    from_start = keep == "last" and step < STEPS  # its one checkpoint is too late
    assert len(seen) == (STEPS if from_start else STEPS - step)
    assert any("from step 0" in str(w.message) for w in told) == from_start


@pytest.mark.parametrize("stop", some([5, 8], 5))
def test_the_last_part_of_an_interrupted_run_is_measured_again(
    reference: RunStore, tmp_path: Path, stop: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", stop_at(stop, KeyboardInterrupt()))
    store = RunStore.open(tmp_path / "run")
    damage(store.part_path(store.steps()[-1]))
    assert_same_run(train(store.path, resume=True), reference)


@pytest.mark.filterwarnings("ignore:No checkpoint from before step 9")
@pytest.mark.parametrize(
    ("how", "keep"),
    pairwise(["truncated", "a flipped bit", "foreign", "not a run's"], ["last", "all"], alone=True),
)
def test_a_damaged_checkpoint_falls_back_without_measuring_again(
    reference: RunStore, tmp_path: Path, keep: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", stop_at(8, KeyboardInterrupt()), keep_checkpoints=keep)
    store = RunStore.open(tmp_path / "run")
    path = store.checkpoint_path(checkpoints(store)[-1])
    match how:
        case "truncated":
            damage(path)
        case "a flipped bit":
            data = bytearray(path.read_bytes())
            data[-9] ^= 4
            path.write_bytes(data)
        case "foreign":
            path.write_bytes(b"\x00not a checkpoint")
        case _:
            save_checkpoint(path, {"weights": torch.ones(2)})
    before = {p.name: p.stat().st_mtime_ns for p in store.measurements.iterdir()}
    measured: list[int] = []
    write = RunStore.write_part

    def noted(self: RunStore, step: int, frame: pd.DataFrame) -> Path:
        measured.append(step)
        return write(self, step, frame)

    monkeypatch.setattr(RunStore, "write_part", noted)
    with pytest.warns(RuntimeWarning, match=str(path.name)):
        run = make(store.path, resume=True, keep_checkpoints=keep)
    assert run.tracker.steps_taken == (3 if keep == "all" else 0)
    run.run()
    assert measured == [9, 12]
    assert {name: before[name] for name in before} == {
        p.name: p.stat().st_mtime_ns for p in store.measurements.iterdir() if p.name in before
    }
    assert_same_run(RunStore.open(store.path), reference)


def test_no_checkpoint_at_all_starts_from_step_0(reference: RunStore, tmp_path: Path) -> None:
    store = copied(reference, tmp_path)
    shutil.rmtree(store.checkpoints)
    store.checkpoints.mkdir()
    with pytest.warns(RuntimeWarning, match="from step 0"):
        run = make(store.path, resume=True)
    run.run()
    assert_same_run(RunStore.open(store.path), reference)


def test_a_checkpoint_of_another_model_is_refused(reference: RunStore, tmp_path: Path) -> None:
    store = copied(reference, tmp_path)
    wider = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.ReLU(), nn.Linear(7, 3))
    other = dataclasses.replace(tiny.workload(), model=wider)
    with pytest.raises(InvalidInputError, match="of another model"):
        Training(other, "tiny", store.path, OPTIONS, resume=True)


# ---------------------------------------------------------------- killed


@pytest.fixture(scope="module")
def spawn() -> Any:
    """Processes that start from one that has imported torch already, with no state of this one."""
    context = multiprocessing.get_context("forkserver")
    # torch imports its compiler with the first optimizer, which would take a second each time
    context.set_forkserver_preload(["torch._dynamo", "tests.tiny_training"])

    def start(target: Callable[..., None], *arguments: Any) -> Any:
        process = context.Process(target=target, args=arguments)
        process.start()
        return process

    return start


def kill_at(spawn: Any, out: Path, event: int) -> bool:
    """Whether the process was killed at this event; False if it finished before."""
    process = spawn(tiny.train_and_die, str(out), event)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def check_killed(out: Path, reference: RunStore) -> None:
    """What a killed run left is whole, and resuming it gives the run that was not killed."""
    expected = reference.read()
    if (out / "run.json").exists():
        store = RunStore.open(out)
        assert store.damaged() == {}
        assert store.status in ("running", "done")
        kept = store.read()
        whole = expected[expected["step"].isin(store.steps())]
        scored = kept[kept["parameter"].notna()]
        pd.testing.assert_frame_equal(
            scored.reset_index(drop=True),
            whole[whole["parameter"].notna()].reset_index(drop=True),
        )
    store = train(out, resume=True)
    assert_same_run(store, reference)
    left = {p.name for p in (store.path, *store.path.iterdir()) if p.name.endswith(".tmp")}
    assert left == set()
    assert checkpoints(store) == [STEPS]


# a write, its fsync, its rename: of run.json, checkpoints and parts, first, middle and last
@pytest.mark.parametrize("event", some([0, 6, 9, 14, 23, 38, 55, 70], 6, 23, 55))
def test_killed_while_writing(spawn: Any, reference: RunStore, tmp_path: Path, event: int) -> None:
    assert kill_at(spawn, tmp_path / "run", event)
    check_killed(tmp_path / "run", reference)


@pytest.mark.slow
def test_killed_at_every_event_on_disk(spawn: Any, reference: RunStore, tmp_path: Path) -> None:
    for event in itertools.count():
        out = tmp_path / f"run-{event}"
        if not kill_at(spawn, out, event):
            break
        check_killed(out, reference)
    assert event > 50


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    spawn: Any, reference: RunStore, tmp_path: Path, kills: int
) -> None:
    seed = np.random.SeedSequence().entropy  # other moments in every run of the tests
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    out = tmp_path / "run"
    for _ in range(kills):
        process = spawn(tiny.train_to_the_end, str(out))
        while not (out / "run.json").exists():
            time.sleep(0.01)
        process.join(float(rng.uniform(0, 0.4)))
        process.kill()
        process.join(60)
        store = RunStore.open(out)
        assert store.damaged() == {}
        if store.status == "done":
            assert_same_run(store, reference)
            shutil.rmtree(out)
    assert_same_run(train(out, resume=True), reference)
