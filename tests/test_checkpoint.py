"""Checkpoints: whatever is stored comes back to the bit, or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, RunDirectoryError
from kronecker_probe.optim import Shampoo
from kronecker_probe.tracking.run_directory.checkpoint import load_checkpoint, save_checkpoint
from tests.tiny_training import assert_same_tree

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
STATE: dict[str, Any] = {
    "model": {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.ones(2)},
    "step": 20,
}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bit pattern (NaN payloads, subnormals, -0) in any dtype and shape, strided or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    if not size:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        tensor = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).view(shape)
    return tensor.mT if tensor.ndim >= 2 and draw(st.booleans()) else tensor


KEYS = st.text(max_size=4) | st.integers() | st.sampled_from(["a.b", "a", "b", "", "__metadata__"])
LEAVES = tensors() | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


# ---------------------------------------------------------------- what comes back


@hypothesis.given(state=st.dictionaries(KEYS, TREES, max_size=4))
def test_every_tree_comes_back_to_the_bit(folder: Path, state: dict[str, Any]) -> None:
    path = folder / "step-000020.safetensors"
    save_checkpoint(path, state)
    assert_same_tree(load_checkpoint(path), state)


def test_paths_that_read_the_same_are_different_places(tmp_path: Path) -> None:
    state = {
        "a": {"b.c": torch.tensor(1), "b": {"c": torch.tensor(2)}},
        "a.b": {"c": torch.tensor(3)},
        "": {"x": torch.tensor(4)},
        "x": torch.tensor(5),
        0: torch.tensor(6),
        "0": torch.tensor(7),
        "__metadata__": torch.tensor(8),
    }
    save_checkpoint(tmp_path / "c", state)
    assert_same_tree(load_checkpoint(tmp_path / "c"), state)


def test_model_and_optimizer_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = Shampoo(model.named_parameters(), basis={"frequency": 1})
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
    }
    save_checkpoint(tmp_path / "c", state)
    loaded = load_checkpoint(tmp_path / "c")
    assert_same_tree(loaded, state)
    assert isinstance(next(iter(loaded["optimizer"]["state"])), int)  # keys of a state are numbers
    optimizer.load_state_dict(loaded["optimizer"])


def test_tied_and_expanded_tensors_come_back_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    state = {"a": base, "b": base[1:], "c": base.expand(3, 4), "d": base[::2]}
    save_checkpoint(tmp_path / "c", state)
    loaded = load_checkpoint(tmp_path / "c")
    assert_same_tree(loaded, {name: t.contiguous() for name, t in state.items()})
    loaded["a"].zero_()  # each is a copy of its own
    assert loaded["b"].tolist() == [1.0, 2.0, 3.0]


def test_views_of_complex_numbers_come_back_as_their_values(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    save_checkpoint(tmp_path / "c", {"conj": z.conj(), "imag": z.conj().imag})
    loaded = load_checkpoint(tmp_path / "c")
    assert torch.equal(loaded["conj"], z.conj().resolve_conj())
    assert loaded["imag"].tolist() == [-2.0, 4.0]


def test_a_checkpoint_does_not_change_with_the_model(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    save_checkpoint(tmp_path / "c", {"weight": weight})
    weight.data.zero_()
    loaded = load_checkpoint(tmp_path / "c")["weight"]
    assert loaded.tolist() == [1.0, 1.0]
    assert not loaded.requires_grad


def test_other_programs_read_the_weights_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", STATE)
    plain = safetensors.torch.load_file(tmp_path / "c")
    assert set(plain) == {"model.0.weight", "model.0.bias"}
    assert torch.equal(plain["model.0.weight"], STATE["model"]["0.weight"])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "set"),
        (np.float32(1.0), "float32"),
        (np.ones(2), "ndarray"),
        (lambda: None, "function"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.uint32), "uint32"),
        ({(1, 2): 3}, r"\(1, 2\)"),
        ({None: 3}, "None"),
        ({0.5: 3}, "0.5"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(
    tmp_path: Path, value: Any, named: str
) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, STATE)
    with pytest.raises(InvalidInputError, match=named) as error:
        save_checkpoint(path, {"state": {"odd": value}})
    assert "state.odd" in str(error.value)
    assert_same_tree(load_checkpoint(path), STATE)


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    path = tmp_path / "step-000020.safetensors"
    save_checkpoint(path, STATE)

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunDirectoryError, match=path.name):
        save_checkpoint(path, {"other": 1})
    monkeypatch.undo()
    assert_same_tree(load_checkpoint(path), STATE)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_interrupted_write_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, STATE)

    def interrupt(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", interrupt)
    # a shell starts what it runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, {"other": 1})
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert_same_tree(load_checkpoint(path), STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "c", STATE)


# ---------------------------------------------------------------- damaged and foreign files


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    save_checkpoint(folder / "whole", STATE)
    return (folder / "whole").read_bytes()


def refused_or_the_same(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        loaded = load_checkpoint(path)
    except InvalidInputError as error:
        assert path.name in str(error)  # noqa: PT017
    else:
        assert_same_tree(loaded, STATE)


def test_every_truncation_is_refused(folder: Path, whole: bytes) -> None:
    for length in range(len(whole)):
        (folder / "cut").write_bytes(whole[:length])
        with pytest.raises(InvalidInputError, match="cut"):
            load_checkpoint(folder / "cut")


def test_no_flipped_bit_changes_a_value_unseen(folder: Path, whole: bytes) -> None:
    for position in range(len(whole)):
        for bit in (0, 5):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            refused_or_the_same(folder / "flipped", bytes(flipped))


def test_a_flipped_bit_of_a_weight_is_refused(folder: Path, whole: bytes) -> None:
    (folder / "flipped").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InvalidInputError, match="flipped: its checksum"):
        load_checkpoint(folder / "flipped")


@hypothesis.given(data=st.binary(max_size=64))
def test_no_bytes_at_all_crash_the_reader(folder: Path, data: bytes) -> None:
    (folder / "noise").write_bytes(data)
    with pytest.raises(InvalidInputError, match="noise"):
        load_checkpoint(folder / "noise")


def foreign(name: str, path: Path) -> None:
    makers: dict[str, Callable[[], object]] = {
        "empty": lambda: path.write_bytes(b""),
        "text": lambda: path.write_text("weights, honest"),
        "pickle": lambda: torch.save(STATE, path),
        "weights": lambda: safetensors.torch.save_file({"w": torch.ones(2)}, path),
        "a tree of another format": lambda: safetensors.torch.save_file(
            {"w": torch.ones(2)}, path, {"tree": json.dumps({"a": 1})}
        ),
        "a wrong checksum": lambda: safetensors.torch.save_file(
            {"w": torch.ones(2)}, path, {"tree": "not JSON", "checksum": "0"}
        ),
        "folder": path.mkdir,
    }
    makers[name]()


@pytest.mark.parametrize(
    "name",
    [
        "empty", "text", "pickle", "weights", "a tree of another format", "a wrong checksum",
        "folder",
    ],
)  # fmt: skip
def test_a_foreign_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step-000020.safetensors"
    foreign(name, path)
    with pytest.raises(InvalidInputError, match=path.name):
        load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"no checkpoint.*absent"):
        load_checkpoint(tmp_path / "absent")
