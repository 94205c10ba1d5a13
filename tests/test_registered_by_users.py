"""Optimizer-state readers and workloads that a user adds from outside of the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.tracking.optimizer_state import registry
from kronecker_probe.tracking.training import Training, TrainingOptions
from kronecker_probe.workloads import WORKLOADS, load_workload

LOSS = nn.CrossEntropyLoss()


class RowAdaGrad(torch.optim.Optimizer):
    """AdaGrad with one second moment per row of a matrix, as a user would write it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                total = self.state[p].setdefault("rows", torch.zeros(len(p)))
                total += p.grad.reshape(len(p), -1).square().sum(1)
                p -= group["lr"] * p.grad / total.sqrt().reshape(-1, *[1] * (p.ndim - 1))


class Derived(RowAdaGrad):
    """Takes the same step."""


class OwnStep(RowAdaGrad):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        return


def row_adagrad(optimizer: RowAdaGrad, parameter: Tensor) -> kp.KroneckerOperator:
    """P = diag(sum of squares per row) kron I."""
    rows = optimizer.state[parameter].get("rows")
    if rows is None:
        raise kp.errors.UnsupportedError("no step was taken yet")
    n = parameter[0].numel()
    return kp.KroneckerOperator(torch.diag(rows.double()), torch.eye(n, dtype=torch.float64))


@pytest.fixture
def registered() -> Iterator[None]:
    readers, workloads = dict(registry._READERS), dict(WORKLOADS)
    yield
    for known, before in ((registry._READERS, readers), (WORKLOADS, workloads)):
        known.clear()
        known.update(before)


def tracked(kind: type[RowAdaGrad]) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = kind(model.parameters())
    tracker = kp.Tracker(model, LOSS, optimizer=optimizer, every=1, approximations="kfac")
    for _ in range(2):
        inputs, labels = torch.randn(16, 4), torch.randint(3, (16,))
        optimizer.zero_grad()
        LOSS(model(inputs), labels).backward()
        tracker.step((inputs, labels))
        optimizer.step()
    table = tracker.table
    return table[(table["approximation"] == "in-use") & (table["metric"] == "cosine")]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", [RowAdaGrad, Derived])
def test_the_state_of_the_users_optimizer_is_scored(kind: type[RowAdaGrad]) -> None:
    assert kp.register_optimizer_state(RowAdaGrad)(row_adagrad) is row_adagrad
    rows = tracked(kind)
    before, after = (rows[rows["step"] == step] for step in (0, 1))
    assert before["value"].isna().all()
    assert after.loc[after["kind"] == "plugin", "value"].between(0.05, 1).all()
    assert set(after["parameter"]) == {"0.weight", "2.weight"}


@pytest.mark.usefixtures("registered")
def test_a_class_with_a_step_of_its_own_is_not_read() -> None:
    kp.register_optimizer_state(RowAdaGrad)(row_adagrad)
    assert tracked(OwnStep)["value"].isna().all()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("reader", "told"),
    [
        (lambda optimizer, parameter: torch.ones(2), "RowAdaGrad returned a Tensor"),
        (lambda optimizer, parameter: 1 / 0, "could not be read: ZeroDivisionError"),
        (lambda optimizer, parameter: kp.DiagonalOperator(torch.ones(2, 2)), "the layer is"),
    ],
)
def test_a_reader_that_fails_does_not_end_the_training(reader: Any, told: str) -> None:
    kp.register_optimizer_state(RowAdaGrad)(reader)
    rows = tracked(RowAdaGrad)
    assert rows["value"].isna().all()
    assert rows["note"].str.contains(told).all()


@pytest.mark.usefixtures("registered")
def test_a_function_may_say_which_optimizers_are_read() -> None:
    kp.register_optimizer_state(lambda optimizer, parameter: "rows" in optimizer.state[parameter])(
        row_adagrad
    )
    rows = tracked(OwnStep)
    assert rows["value"].isna().all()
    assert tracked(RowAdaGrad)["value"].notna().any()


@pytest.mark.usefixtures("registered")
def test_a_second_reader_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="Adam has a reader"):
        kp.register_optimizer_state(torch.optim.Adam)
    for given in ((), ("adam",)):
        with pytest.raises(InvalidInputError, match="give a class"):
            kp.register_optimizer_state(*given)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="RowAdaGrad is a int; decorate a function"):
        kp.register_optimizer_state(RowAdaGrad)(3)  # type: ignore[type-var]


def tiny(seed: int) -> kp.Workload:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, 4, generator=generator)
    return kp.Workload(nn.Linear(4, 3), LOSS, (inputs, inputs[:, :3].argmax(1)), batch_size=10)


@pytest.mark.usefixtures("registered")
def test_a_workload_of_the_users_is_trained_by_name(tmp_path: Path) -> None:
    assert kp.register_workload("tiny")(tiny) is tiny
    assert "tiny" in WORKLOADS
    options = TrainingOptions(steps=2, batch_size=10, lr=0.1, probes=2, approximations=("kfac",))
    tracker = Training(load_workload("tiny"), "tiny", tmp_path / "run", options).run()
    assert tracker.table["step"].max() == 2
    assert kp.RunStore.open(tmp_path / "run").config["workload"] == "tiny"
    with pytest.raises(UnknownNameError, match=r"Did you mean 'tiny'\?"):
        load_workload("tinyy")


@pytest.mark.usefixtures("registered")
def test_names_of_workloads_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="'digits-mlp' already"):
        kp.register_workload("digits-mlp")
    for name in ("", "../up", "a/b", "a:b", "-x", 3):
        with pytest.raises(InvalidInputError, match="cannot be named"):
            kp.register_workload(name)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="is a int; decorate a function"):
        kp.register_workload("number")(3)  # type: ignore[type-var]
