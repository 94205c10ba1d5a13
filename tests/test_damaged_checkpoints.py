"""Checkpoints with a right checksum and wrong content: passed over or refused, never trained on."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.tracking.run_directory.checkpoint import load_checkpoint, save_checkpoint
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.training_state import load_training_state
from tests.tiny_training import OPTIONS, assert_same_run, make, train

STOPPED = 8  # after the probe at step 6
OPTIMIZERS = ("shampoo", "adamw", "sgd")


def options(name: str) -> Any:
    momentum = ("momentum=0.9",) if name == "sgd" else ()
    return replace(OPTIONS, optimizer=name, settings=momentum, approximations=("kfac",))


def stop(progress: Any) -> None:
    if progress.step == STOPPED:
        raise KeyboardInterrupt


@pytest.fixture(scope="module", params=OPTIMIZERS)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, RunStore, RunStore]:
    """An optimizer, a run with it, and the same run interrupted, with checkpoints 0, 3 and 6."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = train(folder / "whole", options=options(request.param))
    with pytest.raises(KeyboardInterrupt):
        train(folder / "run", stop, options(request.param), keep_checkpoints="all")
    return request.param, whole, RunStore.open(folder / "run")


def first(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer state of the first parameter."""
    found: dict[str, Any] = state["optimizer"]["state"][0]
    return found


def tensor_key(state: dict[str, Any]) -> str:
    return next(k for k, v in first(state).items() if isinstance(v, torch.Tensor) and v.numel() > 1)


Change = Callable[[dict[str, Any]], object]
PARTS = ("model", "optimizer", "tracker", "generators")
WRONG: tuple[Any, ...] = (None, -1, "text", [], [1], {}, {"a": 1}, torch.ones(2))

# a change to the content -> what is said about it
CHANGES: dict[str, tuple[Change, str]] = {
    "empty state of a parameter": (
        lambda s: s["optimizer"]["state"].update({0: {}}), "optimizer state of 0.weight is missing",
    ),
    "no state of a parameter": (
        lambda s: s["optimizer"]["state"].pop(1), "optimizer state of 0.bias is missing",
    ),
    "no state at all": (lambda s: s["optimizer"]["state"].clear(), "is missing"),
    "state of a parameter beyond": (
        lambda s: s["optimizer"]["state"].update({99: first(s)}), "of parameter 99",
    ),
    "steps_taken -3": (lambda s: s["tracker"].update(steps_taken=-3), "steps_taken"),
    "steps_taken 1e9": (lambda s: s["tracker"].update(steps_taken=10**9), "steps_taken"),
    "steps_taken of another step": (lambda s: s["tracker"].update(steps_taken=3), "steps_taken"),
    "steps_taken is true": (lambda s: s["tracker"].update(steps_taken=True), "steps_taken"),
    "an int8 tensor": (
        lambda s: first(s).update({tensor_key(s): first(s)[tensor_key(s)].to(torch.int8)}), "int8",
    ),
    "a state of another shape": (
        lambda s: first(s).update({tensor_key(s): torch.ones(5, 7)}), r"\[5, 7\]",
    ),
    "an unknown key": (lambda s: first(s).update(other=torch.ones(2)), "other"),
    "a key less": (lambda s: first(s).pop(tensor_key(s)), "0.weight"),
    "another learning rate": (
        lambda s: s["optimizer"]["param_groups"][0].update(lr=7.0), "option lr of.*7.0",
    ),
    "a group less": (lambda s: s["optimizer"]["param_groups"].pop(), "0 parameter groups"),
    "groups of other parameters": (
        lambda s: s["optimizer"]["param_groups"][0]["params"].reverse(), "option params",
    ),
    "a malformed logged row": (
        lambda s: s["tracker"].update(logged=[{"step": 1, "metric": 2, "value": 1.0}]),
        "tracker.logged.0.metric",
    ),
    "a window without a trajectory": (lambda s: s["tracker"].update(more=1), "tracker.more"),
    "a generator's state of another size": (
        lambda s: s["generators"].update(cpu=torch.zeros(3, dtype=torch.uint8)), "generators.cpu",
    ),
    "a generator less": (lambda s: s["generators"].clear(), "generators.cpu is missing"),
    "an unknown part": (lambda s: s.update(other=1), "other"),
}  # fmt: skip
for part in PARTS:
    CHANGES[f"{part} absent"] = (lambda s, part=part: s.pop(part), part)
    for number, wrong in enumerate(WRONG):
        if part == "model" and isinstance(wrong, dict):
            continue  # another model, which is refused
        CHANGES[f"{part} wrong {number}"] = (
            lambda s, part=part, wrong=wrong: s.update({part: wrong}), part,
        )  # fmt: skip


def damaged(store: RunStore, folder: Path, change: Change) -> tuple[Path, Path]:
    """A copy of a run whose last checkpoint holds something else, under a right checksum."""
    shutil.copytree(store.path, folder / "run")
    path = folder / "run" / "checkpoints" / "step-000006.safetensors"
    state = copy.deepcopy(load_checkpoint(path))
    change(state)
    save_checkpoint(path, state)
    return folder / "run", path


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_content_is_passed_over_with_a_warning(
    runs: tuple[str, RunStore, RunStore], tmp_path: Path, name: str
) -> None:
    optimizer, _, store = runs
    change, told = CHANGES[name]
    out, path = damaged(store, tmp_path, change)
    with pytest.warns(RuntimeWarning, match=rf"(?s){path.name}.*{told}.*Going on from an earlier"):
        training = make(out, options(optimizer), resume=True)
    assert training.tracker.steps_taken == 3


@pytest.mark.parametrize(
    "name", ["empty state of a parameter", "steps_taken 1e9", "an int8 tensor"]
)
def test_the_run_then_ends_as_if_nothing_had_happened(
    runs: tuple[str, RunStore, RunStore], tmp_path: Path, name: str
) -> None:
    optimizer, whole, store = runs
    out, _ = damaged(store, tmp_path, CHANGES[name][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_run(train(out, options=options(optimizer), resume=True), whole)


def test_counters_of_another_step(runs: tuple[str, RunStore, RunStore], tmp_path: Path) -> None:
    optimizer, _, store = runs
    if optimizer == "sgd":
        pytest.skip("counts no steps")
    earlier = load_checkpoint(store.checkpoint_path(3))["optimizer"]
    out, _ = damaged(store, tmp_path, lambda s: s.update(optimizer=earlier))
    with pytest.warns(RuntimeWarning, match="optimizer state is that of step 3, not of step 6"):
        make(out, options(optimizer), resume=True)


def test_weights_of_another_dtype_are_refused(
    runs: tuple[str, RunStore, RunStore], tmp_path: Path
) -> None:
    optimizer, _, store = runs
    out, path = damaged(
        store, tmp_path, lambda s: s["model"].update({"0.bias": torch.ones(6, dtype=torch.int8)})
    )
    with pytest.raises(InvalidInputError, match=rf"{path.name}.*0\.bias is of torch\.int8"):
        make(out, options(optimizer), resume=True)


def test_a_directory_in_the_place_of_a_checkpoint(
    runs: tuple[str, RunStore, RunStore], tmp_path: Path
) -> None:
    optimizer, _, store = runs
    shutil.copytree(store.path, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000006.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match=rf"{path.name}: it is a directory"):
        training = make(tmp_path / "run", options(optimizer), resume=True)
    assert training.tracker.steps_taken == 3


# ---------------------------------------------------------------- the file itself


TREES = {
    "no JSON": "{",
    "a number": "3",
    "a list": "[]",
    "nested 10,000 deep": "[" * 10_000 + "]" * 10_000,
    "an unknown entry": '{"__items__": [["model", {"__other__": 1}]]}',
    "an entry of two kinds": '{"__items__": [], "__tuple__": []}',
    "an unknown tensor": '{"__items__": [["model", {"__tensor__": "absent"}]]}',
    "a tensor whose name is a list": '{"__items__": [["model", {"__tensor__": ["w"]}]]}',
    "a complex tensor of one real": '{"__items__": [["model", {"__complex__": "w"}]]}',
    "no pairs": '{"__items__": [["model"]]}',
    "a key that is a list": '{"__items__": [[["model"], 1]]}',
    "a key twice": '{"__items__": [["model", 1], ["model", 2]]}',
    "a tuple of no list": '{"__tuple__": 3}',
}


@pytest.mark.parametrize("kind", TREES)
def test_a_damaged_tree_under_a_right_checksum(tmp_path: Path, kind: str) -> None:
    from kronecker_probe.tracking.run_directory import checkpoint

    path, tensors = tmp_path / "step-000006.safetensors", {"w": torch.ones(3)}
    tree = TREES[kind]
    metadata = {"tree": tree, "checksum": checkpoint._checksum(tree, tensors)}
    safetensors.torch.save_file(tensors, path, metadata)
    for read in (load_checkpoint, load_training_state):
        with pytest.raises(InvalidInputError, match=path.name):
            read(path)
