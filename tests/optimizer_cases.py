"""Problems, models and comparisons that the tests of the optimizers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kronecker_probe import optim

Build = Callable[..., optim.KroneckerOptimizer]

PRESETS: dict[str, Build] = dict(optim.PRESETS)
SHAPES = {
    "matrix": (5, 4),
    "vector": (6,),
    "convolution": (3, 2, 2, 2),
    "row": (1, 4),
    "column": (4, 1),
    "scalar": (),
}


class Problem:
    """sum_i log cosh((K w - c_t)_i), with other targets c_t in each step."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = shape
        size = int(np.prod(shape))
        self.K = rng.standard_normal((3 * size, size)) / math.sqrt(3 * size)
        self.w = rng.standard_normal(size)
        self.targets = rng.standard_normal((50, 3 * size))

    def gradient(self, w: np.ndarray, t: int) -> np.ndarray:
        return self.K.T @ np.tanh(self.K @ w - self.targets[t])

    def loss(self, param: torch.Tensor, t: int) -> torch.Tensor:
        K = torch.tensor(self.K).to(param.dtype)
        x = K @ param.reshape(-1) - torch.tensor(self.targets[t]).to(param.dtype)
        return (x + torch.nn.functional.softplus(-2 * x)).sum()

    def parameter(self, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.tensor(self.w.reshape(self.shape)).to(dtype))


def step_of(
    gradients: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float64,
    preset: Build = optim.Shampoo,
    **options: Any,
) -> tuple[torch.Tensor, optim.KroneckerOptimizer, torch.nn.Parameter]:
    """The change of a zero parameter, over lr = 1, by the last of some gradients."""
    param = torch.nn.Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer = preset([param], lr=1.0, **options)
    for gradient in gradients:
        before = param.detach().clone()
        param.grad = gradient.to(dtype)
        optimizer.step()
    return param.detach() - before, optimizer, param


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Linear(6, 1)
    ).to(dtype)


def train(model: torch.nn.Module, optimizer: Any, start: int, stop: int) -> None:
    dtype = next(model.parameters()).dtype
    for t in range(start, stop):
        inputs = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(t)).to(dtype)
        optimizer.zero_grad()
        (model(inputs) - inputs.sum((1, 2, 3))[:, None]).square().mean().backward()
        optimizer.step()


def assert_equal_states(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert state.keys() == second["state"][key].keys()
        for name, value in state.items():
            other = second["state"][key][name]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, (key, name)


def break_eigh(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let the solver fail on matrices of this size."""
    solve = torch.linalg.eigh

    def eigh(A: torch.Tensor) -> Any:
        if A.shape[-1] == size:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solve(A)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
