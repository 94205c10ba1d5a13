"""Models, and what the tests of K-FAC's optimizers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kronecker_probe import optim

# float64 sums and eigendecompositions of small, well-conditioned factors
CLOSE = 1e-10
N = 40
LOSS = nn.CrossEntropyLoss()


class Twice(nn.Module):
    """A layer called twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))  # type: ignore[no-any-return]


class Positions(nn.Module):
    """Logits averaged over the positions of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))).mean(1)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))  # type: ignore[no-any-return]


def conv(layer: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return nn.Sequential(layer(2, 3, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))

    return build


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (mlp, (6,)),
    "conv1d": (conv(nn.Conv1d, kernel_size=3, dilation=2), (2, 8)),
    "conv2d": (conv(nn.Conv2d, kernel_size=(3, 2), stride=2, padding=1), (2, 5, 6)),
    "conv2d-same": (conv(nn.Conv2d, kernel_size=2, padding="same"), (2, 3, 4)),
    "conv3d": (conv(nn.Conv3d, kernel_size=2, bias=False), (2, 3, 3, 3)),
    "twice": (Twice, (5,)),
    "tied": (Tied, (5,)),
    "positions": (Positions, (3, 5)),
}


def problem(name: str = "linear", seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    x, y = torch.randn(N, *shape, dtype=torch.float64), torch.randint(4, (N,))
    model = build().double()
    model(x)  # lazy layers
    return model, x, y


def dense(optimizer: optim.KroneckerOptimizer, param: Tensor) -> Tensor:
    return optimizer.operator(param).to_dense()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() <= CLOSE * wanted.norm()
    assert wanted.norm() > 0


def fresh(model: nn.Module, rule: str = "kfac", **options: Any) -> optim.KroneckerOptimizer:
    """One whose operator is that of the last batch."""
    return optim.MODEL_PRESETS[rule](model, lr=0.0, betas=(0.0, 0.0), epsilon=0.0, **options)


def operators(model: nn.Module, run: Callable[[optim.KroneckerOptimizer], None]) -> list[Tensor]:
    """Those of all parameters after ``run`` and a step of an optimizer of a copy."""
    optimizer = fresh(model, "ekfac")
    run(optimizer)
    optimizer.step()
    optimizer.remove_hooks()
    model.zero_grad()
    return [dense(optimizer, p) for p in model.parameters()]


def assert_same_statistics(
    model: nn.Module,
    run: Callable[[optim.KroneckerOptimizer], None],
    wanted: Callable[[optim.KroneckerOptimizer], None],
) -> None:
    """After ``run`` and a step all operators are those after ``wanted`` and one."""
    for one, other in zip(operators(model, run), operators(model, wanted), strict=True):
        assert_close(one, other)


def step(model: nn.Module, optimizer: optim.KroneckerOptimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    LOSS(model(x), y).backward()
    optimizer.step()


class Reread(nn.Module):
    """A layer whose weight is also read otherwise: ``read`` of its input and its weight."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 4)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(torch.tanh(self.read(h, self.inner.weight)))  # type: ignore[no-any-return]
