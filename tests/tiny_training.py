"""A run small enough to be killed at every moment, with all that a resumed run must put back.

Dropout draws random numbers, batch normalization keeps buffers, the optimizer has momentum and
refreshes its roots at steps that are not probed: a run that lost any of these would end elsewhere.
"""

from __future__ import annotations

import builtins
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kronecker_probe.tracking.run_directory.checkpoint import load_checkpoint
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.training import Progress, Training, TrainingOptions
from kronecker_probe.workloads import Workload

STEPS = 12
PROBED = [0, 3, 6, 9, 12]
OPTIONS = TrainingOptions(
    steps=STEPS,
    batch_size=12,
    lr=0.05,
    settings=("basis.frequency=2",),
    probes=5,
    probe_size=20,
    layers=("0.weight", "4.weight"),
)
MEASURED = ("0.weight", "4.weight")


def workload(seed: int = 0) -> Workload:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(60, 4, generator=generator)
    targets = (inputs @ torch.randn(4, 3, generator=generator)).argmax(dim=1)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)
    )
    test = inputs[40:], targets[40:]
    return Workload(model, nn.CrossEntropyLoss(), (inputs[:40], targets[:40]), test)


def make(out: Path, options: TrainingOptions = OPTIONS, **more: Any) -> Training:
    """The training as a new process would set it up."""
    return Training(workload(options.seed), "tiny", out, options, **more)


def train(
    out: Path,
    report: Callable[[Progress], None] = lambda progress: None,
    options: TrainingOptions = OPTIONS,
    **more: Any,
) -> RunStore:
    make(out, options, **more).run(report)
    return RunStore.open(out)


def last_state(store: RunStore) -> dict[str, Any]:
    """The checkpoint of the last step: weights, buffers, optimizer, generators."""
    return load_checkpoint(store.checkpoint_path(STEPS))


def assert_same_tree(left: Any, right: Any, where: str = "") -> None:
    """Equality to the bit of nested dicts, lists and tensors; NaN equals NaN."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same_tree(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_same_tree(*pair, f"{where}[{number}]")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert left.shape == right.shape, where
        bytes_of = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        assert torch.equal(*bytes_of), where
    else:
        assert left == right or (left != left and right != right), where


def assert_same_run(store: RunStore, reference: RunStore) -> None:
    """The same table, row by row and bit by bit, and the same state at the end."""
    pd.testing.assert_frame_equal(store.read(), reference.read(), check_exact=True)
    assert store.steps() == reference.steps()
    assert_same_tree(last_state(store), last_state(reference))
    assert store.status == "done"


# ---------------------------------------------------------------- in a process to be killed


def train_and_die(out: str, event: int) -> None:
    """Train with ``--resume`` and kill this process at the given event on disk, if it comes.

    An event is a write to a new file (killed with half of it written), an fsync, a rename or a
    deletion (killed right before and right after it).
    """
    torch.set_num_threads(1)
    left = event

    def happens() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            happens()
            result = call(*arguments, **options)
            happens()
            return result

        return wrapped

    class Halves:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> None:
            half = len(data) // 2
            self.file.write(data[:half])
            self.file.flush()
            happens()
            self.file.write(data[half:])

    opened = builtins.open

    def halving(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        file = opened(path, mode, *more, **options)
        return Halves(file) if mode == "wb" and str(path).startswith(out) else file

    builtins.open = halving  # type: ignore[assignment]
    os.fsync = around(os.fsync)
    os.replace = around(os.replace)
    os.unlink = around(os.unlink)
    train(Path(out), resume=True)


def train_to_the_end(out: str) -> None:
    """Train with ``--resume``; killed from outside at any time, or not."""
    torch.set_num_threads(1)
    train(Path(out), resume=True)


def hold(out: str) -> None:
    """Open a run for writing and keep it until killed."""
    run = make(Path(out), resume=True)
    (Path(out) / "held").touch()
    time.sleep(600)
    run.run()
