"""A measured model, and everything around it, is left exactly as it was; also by an error."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.gradients.isolation import isolated
from tests.small_models import SMALL_MODELS
from tests.small_modules import CLASSES, Lambda, three

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Restless(nn.Module):
    """A forward pass that changes whatever a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, max_norm=0.5)  # renormalizes its weight in place
        self.a = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.always = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, CLASSES)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", None)
        self.register_buffer("graph", torch.eye(3).to_sparse())
        self.longest = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        self.calls += 1
        self.longest, self.cache = len(x), torch.ones(len(x))
        self.register_buffer("lazy", torch.ones(2))
        self.head.bias.data.mul_(1.5)
        self.always.train()
        self.frozen.requires_grad_(True)
        h = self.drop(F.relu(self.always(self.norm(self.frozen(self.a(self.table(x)))))))
        self.last = self.head(h)
        return self.last


def restless() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Restless().train()
    model.norm.eval()  # modes differ from module to module
    model.a.weight.grad = torch.randn(6, 3)
    model.head.bias.grad = torch.randn(CLASSES)
    batch = torch.randint(7, (8,)), torch.randint(CLASSES, (8,))
    for _ in range(3):
        model.register_forward_hook(lambda *_: None)
    model.a.register_forward_hook(lambda *_: None)
    model.a.register_forward_pre_hook(lambda *_: None)
    model.a.register_full_backward_hook(lambda *_: None)
    model.a.register_forward_hook(lambda *_, **__: None, with_kwargs=True, always_call=True)
    return model, batch


@dataclass
class Snapshot:
    """Everything to be found again, by value, and by identity where a user may hold it."""

    modules: list[dict[str, Any]]
    state: dict[str, Any]
    flags: list[tuple[bool, bool]]
    grads: list[Tensor | None]
    identities: list[int]
    versions: list[int]
    hooks: list[list[tuple[int, int]]]
    generators: tuple[Any, ...]
    modes: tuple[Any, ...]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        plain = (bool, int, float, type(None), Tensor)
        modules = list(model.modules())
        parameters = list(model.parameters())
        held = [*parameters, *(p.grad for p in parameters), *model.buffers()]
        return Snapshot(
            modules=[{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in modules],
            state=copy.deepcopy({k: v for m in modules for k, v in _tensors(m)}),
            flags=[(p.requires_grad, p.is_leaf) for p in parameters],
            grads=[None if p.grad is None else p.grad.clone() for p in parameters],
            identities=[id(t) for t in held],
            versions=[t._version for t in held if t is not None],
            hooks=[
                [(key, id(hook)) for key, hook in getattr(m, kind).items()]
                for m in modules
                for kind in HOOKS
            ],
            generators=(torch.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
            modes=(
                torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
                torch.is_autocast_cache_enabled(), torch.is_anomaly_enabled(),
            ),
        )  # fmt: skip

    def check(self, model: nn.Module, *, versions: bool = True) -> None:
        now = Snapshot.of(model)
        for name in ("modules", "flags", "identities", "hooks", "modes"):
            assert getattr(now, name) == getattr(self, name), name
        assert list(now.state) == list(self.state)
        for name, value in self.state.items():
            assert same(now.state[name], value), name
        assert all(map(same, now.grads, self.grads))
        assert torch.equal(now.generators[0], self.generators[0])
        assert now.generators[2] == self.generators[2]
        for mine, theirs in zip(now.generators[1], self.generators[1], strict=True):
            assert np.array_equal(mine, theirs)
        if versions:
            assert now.versions == self.versions


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    for registry in (module._parameters, module._buffers):
        for name, tensor in registry.items():
            yield f"{id(module)}.{name}", None if tensor is None else tensor.detach()


def same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    one, two = one.to_dense(), two.to_dense()
    if one.dtype != two.dtype or not torch.equal(one.isnan(), two.isnan()):
        return False
    return torch.equal(one.nan_to_num(), two.nan_to_num())


@pytest.mark.parametrize("draws", ["ggn", "fisher", "empirical-fisher"])
def test_a_restless_model_is_left_as_it_was(draws: str) -> None:
    model, batch = restless()
    before = Snapshot.of(model)
    kp.capture(model, F.cross_entropy, batch, draws=draws)
    before.check(model, versions=False)  # what the model itself wrote is written back


def test_the_restless_model_is_restless() -> None:
    """The test above would prove nothing if a forward pass changed nothing."""
    model, batch = restless()
    before = Snapshot.of(model)
    model(batch[0])
    now = Snapshot.of(model)
    for name in ("modules", "flags", "identities"):
        assert getattr(now, name) != getattr(before, name)
    assert [n for n in now.state if n not in before.state] != []
    changed = [n for n, value in before.state.items() if not same(now.state[n], value)]
    assert len(changed) >= 7
    assert not torch.equal(now.generators[0], before.generators[0])
    assert now.generators[2] != before.generators[2]


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_models_of_the_registry_are_left_as_they_were_to_the_version(name: str) -> None:
    small = SMALL_MODELS[name]
    model, batch = small.model().train(), small.batch("mse")
    for k, module in enumerate(model.modules()):
        module.training = k % 2 == 0
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(k)) if k % 2 else None
    before, data = Snapshot.of(model), (batch[0].clone(), batch[1].clone())
    kp.capture(model, F.mse_loss, batch)
    before.check(model)
    assert torch.equal(batch[0], data[0])
    assert torch.equal(batch[1], data[1])
    assert batch[0].grad is None


class Broken(Exception):
    pass


def explode(*_: object) -> None:
    raise Broken


def breaks_in_forward(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    model.head.register_forward_hook(explode)
    return F.cross_entropy


def breaks_in_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return explode  # type: ignore[return-value]


def breaks_in_backward(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    model.head.register_full_backward_hook(explode)
    return F.cross_entropy


def breaks_in_recognition(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return nn.CrossEntropyLoss(label_smoothing=0.1)


def breaks_by_nan(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    model.head.weight.data[0, 0] = float("nan")
    return F.cross_entropy


@pytest.mark.parametrize(
    ("breaks", "error"),
    [
        (breaks_in_forward, Broken),
        (breaks_in_loss, Broken),
        (breaks_in_backward, Broken),
        (breaks_in_recognition, UnsupportedError),
        (breaks_by_nan, NonFiniteError),
    ],
    ids=lambda value: value.__name__,
)
def test_a_model_is_left_as_it_was_by_an_error(
    breaks: Callable[[nn.Module], Any], error: type[Exception]
) -> None:
    model, batch = restless()
    loss = breaks(model)
    before = Snapshot.of(model)
    with pytest.raises(error):
        kp.capture(model, loss, batch)
    before.check(model, versions=False)


def test_an_interrupt_leaves_no_trace_either() -> None:
    model, batch = restless()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model.a.register_forward_hook(interrupt)
    before = Snapshot.of(model)
    with pytest.raises(KeyboardInterrupt):
        kp.capture(model, F.cross_entropy, batch)
    before.check(model, versions=False)


@pytest.mark.parametrize(
    "around",
    [
        contextlib.nullcontext,
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        torch.autograd.detect_anomaly,
    ],
    ids=["plain", "no_grad", "inference_mode", "enable_grad", "autocast", "uncached", "anomaly"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_capture_works_in_any_mode_and_keeps_it(around: Callable[[], Any]) -> None:
    small = SMALL_MODELS["3-D"]
    model, batch = small.model().float(), small.batch("mse")
    batch = batch[0].float(), batch[1].float()
    expected = kp.capture(model, F.mse_loss, batch)["0.weight"].matrices()
    with around():
        inside = batch[0] + 0, batch[1] + 0  # made in that mode
        before = Snapshot.of(model)
        samples = kp.capture(model, F.mse_loss, inside)
        before.check(model)
    got = samples["0.weight"].matrices()
    assert float((got - expected).norm()) <= 0.05 * float(expected.norm())
    assert not samples["0.weight"].output_grads.is_inference()
    assert not samples["0.weight"].output_grads.requires_grad


def test_a_graph_made_before_is_still_good_after() -> None:
    small = SMALL_MODELS["conv batch norm"]
    model, (inputs, targets) = small.model().train(), small.batch("cross-entropy")
    F.cross_entropy(model(inputs), targets).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = F.cross_entropy(model(inputs), targets)
    kp.capture(model, F.cross_entropy, (inputs, targets))
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("draws", ["ggn", "fisher"])
def test_training_goes_on_bitwise_as_without(draws: str) -> None:
    def train(measured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, CLASSES)
        )
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(5):
            inputs, targets = torch.randn(8, 3), torch.randint(CLASSES, (8,))
            F.cross_entropy(model(inputs), targets).backward()
            if measured:
                kp.capture(model, F.cross_entropy, (inputs, targets), draws=draws)
            optimizer.step()
            optimizer.zero_grad()
        return [torch.rand(3), *model.state_dict().values()]

    for with_probe, without in zip(train(True), train(False), strict=True):
        assert torch.equal(with_probe, without)


def test_inputs_that_the_model_overwrites_stay() -> None:
    small = SMALL_MODELS["2-D"]
    model = nn.Sequential(nn.ReLU(inplace=True), small.model())
    inputs, targets = small.batch("mse")
    kept = inputs.clone()
    first = kp.capture(model, F.mse_loss, (inputs, targets))
    assert torch.equal(inputs, kept)
    assert first.loss == kp.capture(model, F.mse_loss, (inputs, targets)).loss


def test_targets_that_the_loss_overwrites_stay() -> None:
    small = SMALL_MODELS["2-D"]
    inputs, targets = small.batch("mse")
    kept = targets.clone()

    def greedy(outputs: Tensor, given: Tensor) -> Tensor:
        value = F.mse_loss(outputs, given.clone())
        given.zero_()
        return value

    with contextlib.suppress(UnsupportedError):
        kp.capture(small.model(), greedy, (inputs, targets))
    assert torch.equal(targets, kept)


def test_inputs_that_require_gradients_get_none() -> None:
    small = SMALL_MODELS["2-D"]
    inputs, targets = small.batch("mse")
    inputs.requires_grad_(True)
    kp.capture(small.model(), F.mse_loss, (inputs, targets))
    assert inputs.grad is None
    assert inputs.requires_grad


def test_no_overridden_train_method_runs() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            raise AssertionError("train() ran")

    small = SMALL_MODELS["2-D"]
    kp.capture(Frozen(small.model()), F.mse_loss, small.batch("mse"))


def test_hooks_of_the_model_are_part_of_it() -> None:
    small = SMALL_MODELS["2-D"]
    model, batch = small.model(), small.batch("mse")
    seen = []
    model[0].register_forward_pre_hook(lambda m, x: (3 * x[0],))
    model[0].register_forward_hook(lambda m, x, y: seen.append(y.shape), prepend=True)
    model[0].register_forward_hook(lambda m, x, y: 2 * y)
    samples = kp.capture(model, F.mse_loss, batch, draws="empirical-fisher")
    assert seen == [torch.Size([4, 4])]
    F.mse_loss(model(batch[0]), batch[1]).backward()
    gradient = model[0].weight.grad
    assert torch.allclose(samples["0.weight"].matrices().mean(0)[0], gradient, rtol=1e-10)


@pytest.mark.parametrize("cached", [True, False])
def test_the_autocast_cache_is_on_or_off_as_before(cached: bool) -> None:
    small = SMALL_MODELS["2-D"]
    before = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(cached)
        kp.capture(small.model(), F.mse_loss, small.batch("mse"))
        assert torch.is_autocast_cache_enabled() is cached
    finally:
        torch.set_autocast_cache_enabled(before)


def test_a_forward_hook_that_adds_an_adapter_is_part_of_the_model() -> None:
    small = SMALL_MODELS["2-D"]
    model, batch = small.model(), small.batch("mse")
    model.adapter = nn.Linear(3, 4).double()
    model[0].register_forward_hook(lambda m, x, y: y + model.adapter(x[0]))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    samples = kp.capture(model, F.mse_loss, batch, draws="empirical-fisher")
    F.mse_loss(model(batch[0]), batch[1]).backward()
    for name in ("0.weight", "2.weight", "adapter.weight"):
        gradient = model.get_parameter(name).grad
        assert torch.allclose(samples[name].matrices().mean(0)[0], gradient, rtol=1e-10)


def test_parameter_hooks_do_not_fire() -> None:
    small = SMALL_MODELS["2-D"]
    model = small.model()
    for parameter in model.parameters():
        parameter.register_hook(explode)
        parameter.register_post_accumulate_grad_hook(explode)
    kp.capture(model, F.mse_loss, small.batch("mse"))


def test_isolated_is_evaluation_mode_with_gradients() -> None:
    model = three(lambda m, x: m.c(m.b(m.a(x))))
    model.b.eval()
    with torch.no_grad(), isolated(model):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_cache_enabled()
        assert not any(module.training for module in model.modules())
    assert [m.training for m in (model, model.a, model.b, model.c)] == [True, True, False, True]


def test_buffers_of_values_that_are_not_numbers_stay() -> None:
    model = Lambda(lambda m, x: m.a(x), a=nn.Linear(3, CLASSES))
    model.register_buffer("empty", torch.tensor([float("nan"), 1.0]))
    batch = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    kp.capture(model, F.cross_entropy, batch)
    assert torch.equal(model.empty.isnan(), torch.tensor([True, False]))


def test_an_uninitialized_model_is_refused_untouched() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, CLASSES))
    batch = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match=r"'0\.weight' is not initialized.*run the model"):
        kp.capture(model, F.cross_entropy, batch)
    assert isinstance(model[0], nn.LazyLinear)
    assert model[0].has_uninitialized_params()
