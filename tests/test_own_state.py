"""Modules with random generators and other stateful objects of their own are left as they were."""

from __future__ import annotations

import itertools
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import kronecker_probe as kp
from kronecker_probe.gradients.tracing import held_state
from kronecker_probe.gradients.tracing.isolation import isolated
from tests.small_modules import CLASSES


def torch_generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


class Counter:
    """An object of the user's, with a generator deeper down."""

    def __init__(self) -> None:
        self.count = 0
        self.inner = types.SimpleNamespace(rng=np.random.default_rng(3), seen=[])

    def draw(self) -> float:
        self.count += 1
        self.inner.seen.append(self.count)
        return float(self.inner.rng.random()) + self.count


@dataclass(slots=True)
class Slotted:
    count: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(5))

    def draw(self) -> float:
        self.count += 1
        return self.rng.random() + self.count


def from_array(array: Any) -> float:
    array += 1
    return float(array.sum())


def from_list_iterator(iterator: Iterator[float]) -> float:
    return next(iterator)


# what a module holds -> how its forward pass draws a number from it, and changes it
HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "torch.Generator": (torch_generator, lambda g: float(torch.rand(1, generator=g))),
    "numpy Generator": (lambda: np.random.default_rng(1), lambda g: float(g.random())),
    "numpy Philox": (
        lambda: np.random.Generator(np.random.Philox(1)), lambda g: float(g.random()),
    ),
    "numpy BitGenerator": (
        lambda: np.random.MT19937(1), lambda g: float(np.random.Generator(g).random()),
    ),
    "numpy RandomState": (lambda: np.random.RandomState(1), lambda g: float(g.rand())),
    "random.Random": (lambda: random.Random(1), lambda g: g.random()),
    "an ndarray": (lambda: np.ones(3), from_array),
    "a plain tensor": (lambda: torch.ones(3), from_array),
    "an object": (Counter, Counter.draw),
    "an object with slots": (Slotted, Slotted.draw),
    "a Sobol engine": (
        lambda: torch.quasirandom.SobolEngine(1, scramble=True, seed=3),
        lambda engine: float(engine.draw(1)),
    ),
    "an iterator of a list": (lambda: iter([0.5, 1.5, 2.5, 3.5] * 50), from_list_iterator),
    "an unregistered module": (
        lambda: [nn.BatchNorm1d(1)], lambda m: float(m[0].train()(torch.rand(4, 1)).sum().detach())
        + float(m[0].running_mean),
    ),
}  # fmt: skip

# where it is held
PLACES: dict[str, Callable[[nn.Module, Any], Callable[[], Any]]] = {
    "attribute": lambda m, one: (setattr(m, "own", one), lambda: m.own)[1],
    "list": lambda m, one: (setattr(m, "own", [0, [one]]), lambda: m.own[1][0])[1],
    "dict": lambda m, one: (setattr(m, "own", {"a": {"b": one}}), lambda: m.own["a"]["b"])[1],
    "tuple": lambda m, one: (setattr(m, "own", (1, (one,))), lambda: m.own[1][0])[1],
    "object": lambda m, one: (
        setattr(m, "own", types.SimpleNamespace(a=one)), lambda: m.own.a
    )[1],
}  # fmt: skip


class Noisy(nn.Module):
    """Scales what it reads by a number from an object of its own."""

    def __init__(self, held: str, place: str) -> None:
        super().__init__()
        make, self.draw = HELD[held]
        self.get = PLACES[place](self, make())

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * self.draw(self.get()))


def noisy(held: str, place: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Noisy(held, place), nn.Linear(4, CLASSES))


def trained(held: str, place: str, *, probed: bool) -> list[Tensor]:
    """Weights after some steps, with and without a probe at each."""
    model = noisy(held, place)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = kp.Tracker(model, F.cross_entropy, every=1, approximations="kfac")
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(12, 3, generator=generator)
        labels = torch.randint(CLASSES, (12,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        if probed:
            tracker.step((inputs, labels))
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


CASES = [(held, "attribute") for held in HELD] + [
    (held, place) for held in ("torch.Generator", "numpy Generator", "an ndarray")
    for place in PLACES if place != "attribute"
]  # fmt: skip


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("held", "place"), CASES)
def test_training_is_bitwise_that_without_a_probe(held: str, place: str) -> None:
    with_probe, without = (trained(held, place, probed=probed) for probed in (True, False))
    assert all(map(torch.equal, with_probe, without))


@pytest.mark.parametrize("call", ["compare", "estimate", "capture", "window"])
def test_every_measurement_leaves_generators_as_they_were(call: str) -> None:
    model = noisy("numpy Generator", "dict")
    batch = torch.randn(12, 3), torch.randint(CLASSES, (12,))
    state = str(model[1].own["a"]["b"].bit_generator.state)
    samples = kp.capture(model, F.cross_entropy, batch, target="fisher")
    match call:
        case "compare":
            kp.compare(samples, "kfac")
        case "estimate":
            kp.estimate(kp.SecondMoment(samples["0.weight"]), "kfac")
        case "window":
            tracker = kp.Tracker(
                model, F.cross_entropy, target="trajectory", probe=batch, approximations="kfac"
            )
            state = str(model[1].own["a"]["b"].bit_generator.state)
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            state = str(model[1].own["a"]["b"].bit_generator.state)
            tracker.step()
    assert str(model[1].own["a"]["b"].bit_generator.state) == state


def counting() -> Iterator[float]:
    number = 0.0
    while True:
        yield number
        number += 1


class Drawing(nn.Module):
    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own
        self.moves = True

    def forward(self, x: Tensor) -> Tensor:
        return x + next(self.own) if self.moves else x


def in_isolation(model: nn.Module, change: Callable[[], object]) -> None:
    with isolated(model):
        change()


@pytest.mark.parametrize(
    "make", [counting, itertools.count, lambda: iter({1: 2, 3: 4}), lambda: iter([1.0])]
)
def test_what_cannot_be_put_back_is_named(make: Callable[[], Iterator[float]]) -> None:
    own = make()
    model = nn.Sequential(nn.Linear(3, 4), Drawing(own))
    named = rf"changes 1\.own, a {type(own).__name__} whose state"
    with pytest.warns(RuntimeWarning, match=named):
        in_isolation(model, lambda: list(itertools.islice(own, 2)))  # past the end of the short one


@pytest.mark.parametrize("make", [counting, itertools.count, lambda: iter([1.0])])
def test_what_does_not_change_is_not_warned_of(
    make: Callable[[], Iterator[float]], recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), Drawing(make()))
    model[1].moves = False
    with isolated(model):
        model(torch.randn(6, 3))
    assert [str(w.message) for w in recwarn if issubclass(w.category, RuntimeWarning)] == []


class Examples(Dataset[Tensor]):
    def __init__(self) -> None:
        self.reads = 0

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return torch.ones(3)


def test_datasets_are_none_of_the_models_business() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    model.examples = Examples()
    with isolated(model):
        model.examples[0]
    assert model.examples.reads == 1


def test_tensors_of_objects_are_copied_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_state, "_LARGEST", 64)
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].own = types.SimpleNamespace(small=torch.ones(8), large=torch.ones(17))

    def change() -> None:
        model[0].own.small.zero_()
        model[0].own.large.zero_()
        model[0].own.new = 1

    with pytest.warns(RuntimeWarning, match=r"changes 0\.own\.large, a Tensor"):
        in_isolation(model, change)
    assert torch.equal(model[0].own.small, torch.ones(8))
    assert not hasattr(model[0].own, "new")
