"""A measured model, and everything around it, is left exactly as it was; also by an error."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.gradients.tracing.isolation import isolated
from tests.restless import Snapshot, restless, same
from tests.small_models import SMALL_MODELS
from tests.small_modules import CLASSES, Lambda, three

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("target", ["ggn", "fisher", "empirical-fisher"])
def test_a_restless_model_is_left_as_it_was(target: str) -> None:
    model, batch = restless()
    before = Snapshot.of(model)
    kp.capture(model, F.cross_entropy, batch, target=target)
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
    return lambda o, y: F.cross_entropy(o, y).sqrt()


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


@pytest.mark.parametrize("target", ["ggn", "fisher"])
def test_training_goes_on_bitwise_as_without(target: str) -> None:
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
                kp.capture(model, F.cross_entropy, (inputs, targets), target=target)
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
    samples = kp.capture(model, F.mse_loss, batch, target="empirical-fisher")
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
    samples = kp.capture(model, F.mse_loss, batch, target="empirical-fisher")
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


class Remembering(nn.Module):
    """Adds to every kind of container among its attributes, and writes into a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, CLASSES)
        self.seen: list[Tensor] = []
        self.cache: dict[str, list[Tensor]] = {"keys": [torch.zeros(1)]}
        self.sizes, self.last = {0}, deque([1, 2], maxlen=2)
        self.order, self.scratch = [3, 1, 2], torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.seen.append(h)
        self.cache["keys"].append(h)
        self.cache["values"] = [h]
        self.sizes.add(len(x))
        self.last.append(len(x))
        self.order.sort()
        self.scratch.add_(h.detach().sum(0))
        return self.b(h)


@pytest.mark.parametrize("n_examples", [6, 40])
def test_containers_among_the_attributes_are_left_as_they_were(n_examples: int) -> None:
    model = Remembering()
    held = (model.seen, model.cache, model.cache["keys"], model.sizes, model.last, model.order)
    first = model.cache["keys"][0]
    batch = torch.randn(n_examples, 3), torch.randint(CLASSES, (n_examples,))
    kp.capture(model, F.cross_entropy, batch)
    assert model.seen == []
    assert list(model.cache) == ["keys"]
    assert [id(t) for t in model.cache["keys"]] == [id(first)]
    assert model.sizes == {0}
    assert list(model.last) == [1, 2]
    assert model.order == [3, 1, 2]
    assert torch.equal(model.scratch, torch.zeros(4))
    now = (model.seen, model.cache, model.cache["keys"], model.sizes, model.last, model.order)
    assert all(one is other for one, other in zip(held, now, strict=True))


def test_a_container_that_holds_itself() -> None:
    model = Remembering()
    model.seen.append(model.seen)
    with isolated(model):
        model.seen.append(1)
    assert len(model.seen) == 1
    assert model.seen[0] is model.seen


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
