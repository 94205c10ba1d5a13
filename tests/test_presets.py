"""The presets by name: what they are made of, and that their defaults train."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.datasets import load_digits

from kronecker_probe import optim
from tests.optimizer_cases import PRESETS


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_the_defaults_train(name: str, scale: float) -> None:
    """Ten digits, 80 steps; never much above the loss of the start, and below it in the end.

    The second scale is that of the inputs: factors are 1e4 times smaller, which neither an absolute
    epsilon nor units of 1 / G may turn into huge steps (what can be learned from them is little).
    """
    digits = load_digits()
    inputs = scale * torch.tensor(digits.data / 16, dtype=torch.float32)
    targets = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = PRESETS[name](model.parameters())
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(80):
            batch = torch.randint(len(inputs), (64,))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    start = sum(losses[:5]) / 5
    assert max(losses) < 1.1 * start
    if scale == 1.0:
        assert sum(losses[-5:]) / 5 < 0.99 * start


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_one_engine_with_sections(name: str) -> None:
    param = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = PRESETS[name]([param], lr=0.5, weight_decay=0.25, failures=7)
    assert type(optimizer) is optim.KroneckerOptimizer
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], optimizer.allowed_failures) == (0.5, 0.25, 7)
    changed = PRESETS[name]([param], shapes={"block_size": 7}).param_groups[0]["shapes"]
    assert changed == group["shapes"].replace(block_size=7)  # the preset's own other fields stay
    whole = PRESETS[name]([param], shapes=optim.Shapes(block_size=9)).param_groups[0]["shapes"]
    assert whole == optim.Shapes(block_size=9)
    same = PRESETS[name]([param], shapes=None, basis=None).param_groups[0]
    assert (same["shapes"], same["basis"]) == (group["shapes"], group["basis"])
    assert PRESETS[name]([param], betas=(0.1, 0.2)).param_groups[0]["betas"] == (0.1, 0.2)
