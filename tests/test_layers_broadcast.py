"""What is computed once for all data and broadcast to each, against gradients by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.gradients.samples.base import EmbeddingSamples, FactoredSamples
from tests import functional_oracle as oracle
from tests.functional_oracle import assert_close
from tests.small_modules import CLASSES, Lambda

N, T, D = 6, 4, 5

Forward = Callable[[nn.Module, Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def steps(length: int) -> Tensor:
    return torch.arange(length)


def build(add: Forward, *shape: int) -> nn.Module:
    """Activations from a layer, something added to them, and a nonlinear classifier.

    ``p`` is a parameter of the given shape, ``table`` an embedding, ``side`` a linear map.
    """
    model = Lambda(
        lambda m, x: m.c(torch.tanh(add(m, m.a(x)))),
        a=nn.Linear(3, D), c=nn.Linear(D, CLASSES), table=nn.Embedding(9, D), side=nn.Linear(2, D),
        norm=nn.LayerNorm(D),
    )  # fmt: skip
    model.p = nn.Parameter(torch.randn(shape))
    return model.double()


def check(model: nn.Module, name: str, length: int = T, n_examples: int = N) -> kp.Capture:
    """A capture whose draws of ``name`` and of the first layer are those of torch.func."""
    inputs = torch.randn(n_examples, length, 3).double()
    targets = torch.randn_like(model(inputs).detach())
    names = [name, "a.weight", "c.bias"]
    expected = oracle.share_gradients(model, F.mse_loss, inputs, targets, names)
    for target in ("ggn", "empirical-fisher"):
        samples = kp.capture(model, F.mse_loss, (inputs, targets), target=target, layers=names)
        assert list(samples) == [k for k, _ in model.named_parameters() if k in names]
        if target == "ggn" and model.get_parameter(name).ndim:
            full = oracle.gauss_newton(model, F.mse_loss, inputs, targets, [name])
            assert_close(oracle.second_moment(samples[name]), full[name])
    for one in names:
        got = oracle.matrices(samples[one])[:, 0]
        assert_close(got.flatten(1), expected[one].reshape(n_examples, -1))
    return samples


CALLS: dict[str, tuple[str, Forward]] = {
    "look-up": ("table.weight", lambda m, h: h + m.table(steps(h.shape[1]))),
    "look-up first": ("table.weight", lambda m, h: m.table(steps(h.shape[1])) + h),
    "look-up with a dimension": ("table.weight", lambda m, h: h + m.table(steps(h.shape[1]))[None]),
    "look-up of [1, T]": ("table.weight", lambda m, h: h + m.table(steps(h.shape[1])[None])),
    "repeated tokens": ("table.weight", lambda m, h: h + m.table(steps(h.shape[1]) // 2)),
    "in place": ("table.weight", lambda m, h: h.clone().add_(m.table(steps(h.shape[1])))),
    "expanded": (
        "table.weight", lambda m, h: h * m.table(steps(h.shape[1])).expand(len(h), -1, -1),
    ),
    "linear map": (
        "side.weight", lambda m, h: h + m.side(torch.ones(h.shape[1], 2, dtype=h.dtype).cumsum(0)),
    ),
    "its bias": (
        "side.bias", lambda m, h: h + m.side(torch.ones(h.shape[1], 2, dtype=h.dtype).cumsum(0)),
    ),
    "one row for all positions": (
        "side.weight", lambda m, h: h + m.side(torch.ones(1, 2, dtype=h.dtype)),
    ),
    "normalized": ("norm.weight", lambda m, h: h + m.norm(m.table(steps(h.shape[1])))),
    "twice": (
        "table.weight",
        lambda m, h: (h + m.table(steps(h.shape[1]))) * (h + m.table(steps(h.shape[1]) + 1)),
    ),
    "beside a look-up of the data": (
        "table.weight",
        lambda m, h: h + m.table(steps(h.shape[1])) + m.table((h.detach().abs() * 2).long()[..., 0]
                                                              .clamp_max(8)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("length", [T, N, 2 * N, 1], ids="T={}".format)
@pytest.mark.parametrize("name", CALLS)
def test_calls_without_a_batch(name: str, length: int) -> None:
    parameter, add = CALLS[name]
    model = build(add, 1)
    model.table = nn.Embedding(2 * N + 1, D).double()
    samples = check(model, parameter, length)
    assert not samples.fallback
    kind = EmbeddingSamples if parameter == "table.weight" else FactoredSamples
    assert isinstance(samples[parameter], kind)


PARAMETERS: dict[str, tuple[tuple[int, ...], Forward]] = {
    "[T, D]": ((T, D), lambda m, h: h + m.p),
    "[1, T, D]": ((1, T, D), lambda m, h: m.p + h),
    "first rows": ((1, 9, D), lambda m, h: h + m.p[:, : h.shape[1]]),
    "rows of a matrix": ((9, D), lambda m, h: h + m.p[2 : 2 + h.shape[1]]),
    "one of several": ((3, T, D), lambda m, h: h + m.p[1]),
    "transposed": ((D, T), lambda m, h: h + m.p.T),
    "a shift": ((D,), lambda m, h: h + m.p),
    "a shift a position": ((T, 1), lambda m, h: h + m.p),
    "a number": ((), lambda m, h: h + m.p),
    "a class token": ((1, 1, D), lambda m, h: torch.cat([m.p.expand(len(h), -1, -1), h], 1)),
    "added twice": ((T, D), lambda m, h: (h + m.p) * (h.sin() + m.p)),
    "four dimensions": ((1, 1, T, D), lambda m, h: (h[:, None] + m.p)[:, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_that_are_added(name: str) -> None:
    shape, add = PARAMETERS[name]
    samples = check(build(add, *shape), "p")
    assert not samples.fallback


OTHERS: dict[str, tuple[tuple[int, ...], Forward]] = {
    "a multiple": ((T, D), lambda m, h: torch.add(h, m.p, alpha=2)),
    "a product": ((T, D), lambda m, h: h * m.p),
    "a view with two readers": ((9, D), lambda m, h: (lambda w: h + w + w.sin())(m.p[:T])),
    "a product beside a sum": ((T, D), lambda m, h: (h + m.p) * m.p),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_uses_go_by_the_fallback(name: str) -> None:
    shape, add = OTHERS[name]
    samples = check(build(add, *shape), "p")
    assert list(samples.fallback) == ["p"]


def test_a_parameter_of_another_precision_goes_by_the_fallback() -> None:
    model = build(lambda m, h: h + m.p, T, D)
    model.p = nn.Parameter(model.p.detach().float())  # the sum casts its gradient
    batch = torch.randn(N, T, 3).double(), torch.randn(N, T, CLASSES).double()
    samples = kp.capture(model, F.mse_loss, batch, target="fisher")
    assert list(samples.fallback) == ["p"]


def test_a_multiple_of_a_look_up_goes_by_the_fallback() -> None:
    model = build(lambda m, h: torch.add(h, m.table(steps(T)), alpha=2), 1)
    assert list(check(model, "table.weight").fallback) == ["table.weight"]


def test_differences_of_positions_are_no_batch() -> None:
    """[N, 1, T, D] and [N, T, 1, D] are both broadcast, and not over the data."""
    model = build(lambda m, h: (m.side(h[..., :2])[:, None] + h[:, :, None]).tanh().mean(1), 1)
    for length in (T, N):
        assert not check(model, "side.weight", length).fallback


def test_a_shift_of_coupled_data_is_not_measured() -> None:
    model = build(lambda m, h: (h + m.p).sub((h + m.p).mean(0)), T, D)
    batch = torch.randn(N, T, 3).double(), torch.randn(N, T, CLASSES).double()
    samples = kp.capture(model, F.mse_loss, batch, target="fisher", layers=["p", "c.bias"])
    assert "p" in samples.skipped


@pytest.mark.parametrize("n_examples", [1, 2, 40])
def test_any_number_of_data(n_examples: int) -> None:
    model = build(lambda m, h: h + m.table(steps(T)), 1)
    samples = check(model, "table.weight", n_examples=n_examples)
    assert not samples.fallback or n_examples == 1
    model = build(lambda m, h: h + m.p[:, :T], 1, 9, D)
    samples = check(model, "p", n_examples=n_examples)
    assert not samples.fallback or n_examples == 1


def test_a_table_costs_no_second_pass() -> None:
    sizes: list[int] = []
    model = build(lambda m, h: h + m.table(steps(T)), 1)
    model.a.register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    batch = torch.randn(N, T, 3).double(), torch.randn(N, T, CLASSES).double()
    kp.capture(model, F.mse_loss, batch, target="fisher", layers="table.weight")
    assert sizes == [N]
