"""What the tracker makes of live operators of other optimizers than the embedded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.quality.compare import compare

LOSS = nn.CrossEntropyLoss()
LAYERS = ["0.weight", "2.weight"]
FLOAT32 = 1e-5  # the run holds v in float32

Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def track(make: Make, steps: int = 3) -> tuple[Any, nn.Sequential]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = make(model.parameters())
    tracker = kp.Tracker(
        model, LOSS, optimizer=optimizer, every=1, layers=LAYERS, estimates="plugin"
    )
    for step in range(steps):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        LOSS(model(inputs), targets).backward()
        tracker.step((inputs, targets))
        optimizer.step()
    table = tracker.table
    return table[table["approximation"] == "in-use"], model


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        lambda params: torch.optim.NAdam(params, lr=1e-2),
        lambda params: torch.optim.RMSprop(params, lr=1e-2),
        lambda params: torch.optim.Adagrad(params, lr=1e-2),
        lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=1e-2),
    ],
)
def test_live_rows_are_finite_from_the_first_step_on(make: Make) -> None:
    rows, _ = track(make)
    early, late = rows[rows["step"] == 0], rows[rows["step"] > 0]
    assert early["value"].isna().all()
    assert early["note"].str.contains("yet").all()
    assert len(early) == len(LAYERS)
    assert set(late["step"]) == {1, 2}
    assert set(late["parameter"]) == set(LAYERS)
    assert np.isfinite(late["value"]).all()


def test_the_live_row_scores_what_adamw_divides_by() -> None:
    """The stored cosine is that of diag((sqrt(v_hat) + eps)^2), scored by itself."""

    def make(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.0)  # the model stays as it is

    rows, model = track(make, steps=4)
    samples = kp.capture(model, LOSS, batch(3), layers=LAYERS)
    gradients = []
    for step in range(3):
        model.zero_grad()
        LOSS(model(batch(step)[0]), batch(step)[1]).backward()
        assert isinstance(model[0], nn.Linear)
        assert model[0].weight.grad is not None
        gradients.append(model[0].weight.grad.double().clone())
    moment = sum(0.001 * 0.999 ** (2 - step) * g**2 for step, g in enumerate(gradients))
    corrected = torch.as_tensor(moment) / (1 - 0.999**3)
    own = {"0.weight": {"own": DiagonalOperator((corrected.sqrt() + 1e-8) ** 2)}}
    scores = compare(samples, ["diagonal"], metrics="cosine", estimates="plugin", extra=own).table
    expected = scores[(scores["approximation"] == "own") & (scores["metric"] == "cosine")]
    stored = rows[(rows["step"] == 3) & (rows["parameter"] == "0.weight")]
    stored = stored[stored["metric"] == "cosine"]
    got = stored.set_index("kind")["value"].to_dict()
    wanted = expected.set_index("kind")["value"].to_dict()
    assert len(got) == len(stored) > 0
    assert got == pytest.approx(wanted, rel=FLOAT32)


def test_sgd_has_a_reason_in_place_of_a_number() -> None:
    rows, _ = track(lambda params: torch.optim.SGD(params, lr=1e-2))
    assert rows["value"].isna().all()
    assert rows["note"].str.contains("SGD has no operator").all()
    assert rows.groupby(["step", "parameter"]).size().tolist() == [1] * 6
