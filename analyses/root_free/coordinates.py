"""Part "invariance" of ``root_free``: runs in rescaled weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from kronecker_probe import optim

from .methods import CNN, DECAY, METHODS, Params, Preset, Row, workload_of

SPREAD = 1.0  # standard deviation of log D


@dataclass(frozen=True)
class Coordinates:
    """w = D v of one parameter, seen as an m x n matrix.

    Attributes:
        left: Of the Kronecker product, [m].
        right: [n].
        full: Entries of D, [m, n]: their product, or drawn one by one.
    """

    left: Tensor
    right: Tensor
    full: Tensor

    @classmethod
    def drawn(
        cls, param: Tensor, generator: torch.Generator, spread: float, *, kronecker: bool
    ) -> Coordinates:
        """Log-normal entries; 1 without spread."""
        m, n = len(param), param.numel() // len(param)

        def draw(*shape: int) -> Tensor:
            normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (spread * normal).exp()

        # a vector has one factor
        left, right = draw(m), draw(n) if param.ndim > 1 else torch.ones(1, dtype=torch.float64)
        full = torch.outer(left, right) if kronecker else draw(m, n)
        return cls(left, right, full)


def _start_moment(state: dict[str, Any], at: Coordinates) -> None:
    """s = 1 of w is s = D^2 of v."""
    state["second_moment"].copy_(at.full.square().view_as(state["second_moment"]))


def _start_inverses(state: dict[str, Any], at: Coordinates) -> None:
    """Inverse factors I of w are D^-1 of v."""
    for side, one in enumerate((at.left, at.right)):
        if f"inverse_{side}" in state:
            state[f"inverse_{side}"].copy_(one.reciprocal().diag()[None])
            state[f"velocity_{side}"].zero_()


@dataclass(frozen=True)
class Compared:
    """How a method is compared in two coordinates.

    Attributes:
        build: The method, undamped where a damping is not invariant.
        kronecker: Whether D is a Kronecker product.
        start: Maps what it holds at the start; None where that is 0.
    """

    build: Callable[[Params], Optimizer]
    kronecker: bool
    start: Callable[[dict[str, Any], Coordinates], None] | None = None


COMPARED = {
    "RMSprop": Compared(lambda named: METHODS["RMSprop"].build(named, 1e-3, 1), False),
    "RMSpropRootFree": Compared(
        lambda named: optim.RMSpropRootFree(
            named, lr=0.03, beta2=DECAY, batch_size=64, epsilon=0.0
        ), False, _start_moment,
    ),
    "Shampoo": Compared(lambda named: METHODS["Shampoo"].build(named, 1e-3, 1), True),
    "InverseFreeShampoo": Compared(
        lambda named: optim.InverseFreeShampoo(
            named, lr=0.03, batch_size=64, inverse={"damping": 0.0}
        ), True, _start_inverses,
    ),
}  # fmt: skip


def invariance(seed: int, preset: Preset) -> Iterator[Row]:
    """Distances of reparameterized runs, step by step."""
    for name, how in COMPARED.items():
        plain, mapped = (trajectory(how, seed, preset.compared, on) for on in (False, True))
        for step in range(1, preset.compared + 1):
            distance = (mapped[step] - plain[step]).norm() / (plain[step] - plain[0]).norm()
            value = math.log10(max(float(distance), 1e-17))
            yield {"method": name, "measured": "log10_distance", "step": step, "value": value}


def trajectory(how: Compared, seed: int, steps: int, mapped: bool) -> list[Tensor]:
    """All weights w after each step, trained as v = w / D or (not ``mapped``) themselves."""
    workload = workload_of(CNN, seed)
    model = workload.model.double()
    generator = torch.Generator().manual_seed(seed)
    spread = SPREAD if mapped else 0.0
    places = {
        name: Coordinates.drawn(param, generator, spread, kronecker=how.kronecker)
        for name, param in model.named_parameters()
    }
    D = {name: places[name].full.view_as(param) for name, param in model.named_parameters()}
    named = [
        (name, nn.Parameter(param.detach() / D[name])) for name, param in model.named_parameters()
    ]
    optimizer = how.build(named)
    if how.start is not None:
        for _, param in named:
            param.grad = torch.zeros_like(param)
        optimizer.step()  # makes the state
        for name, param in named:
            how.start(optimizer.state[param], places[name])
    found = []
    for step in range(steps + 1):
        weights = {name: D[name] * param for name, param in named}
        found.append(torch.cat([weight.detach().flatten() for weight in weights.values()]))
        inputs, targets = workload.batch(step, workload.batch_size, seed)
        outputs = functional_call(model, weights, (inputs.double(),))
        optimizer.zero_grad()
        workload.loss_fn(outputs, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found
