"""Layer rules for module classes of a user's own, registered from outside of the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.layers.base import layouts
from kronecker_probe.gradients.layers.modules import MODULE_RULES
from kronecker_probe.gradients.tracing.record import recording


class Gated(nn.Module):
    """y = (x W^T) o s + b: no function of torch reads W as it stands."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n, dtype=torch.float64))
        self.gate = nn.Parameter(torch.randn(m, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(m, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...n,mn->...m", x, self.weight * self.gate[:, None]) + self.bias


def gated(module: Gated, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Any]:
    (x,) = inputs
    image = x @ module.weight.T
    sums = [t if t.ndim == 2 else t.sum(1) for t in (output_grad * image, output_grad)]
    return {"weight": (output_grad * module.gate, x), "gate": sums[0], "bias": sums[1]}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Gated(5, 4)
        self.last = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.fixture
def rule() -> Iterator[None]:
    kp.register_layer_rule(Gated)(gated)
    yield
    del MODULE_RULES[Gated]


def batch(*positions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, *positions, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (20,), generator=generator)


class Mean(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


@pytest.mark.parametrize("target", ["ggn", "fisher", "empirical-fisher"])
@pytest.mark.parametrize(("network", "positions"), [(Network, ()), (Mean, (3,))])
def test_a_registered_rule_gives_the_samples_of_the_fallback(
    rule: None, target: str, network: type[nn.Module], positions: tuple[int, ...]
) -> None:
    model, data = network(), batch(*positions)
    found = kp.capture(model, F.cross_entropy, data, target)
    held = MODULE_RULES.pop(Gated)
    expected = kp.capture(model, F.cross_entropy, data, target)
    MODULE_RULES[Gated] = held
    assert not found.fallback
    assert "first.weight" in expected.fallback
    assert found["first.weight"].n_positions == max(1, *positions, 1)
    for name, samples in expected.items():
        torch.testing.assert_close(found[name].matrices(), samples.matrices())


def test_the_rule_serves_loaders_subclasses_and_joint_biases(rule: None) -> None:
    class Derived(Gated):
        pass

    model, (x, y) = Network(), batch()
    model.first = Derived(5, 4)
    whole = kp.capture(model, F.cross_entropy, (x, y), "empirical-fisher", bias="joint")
    parts = kp.capture(
        model, F.cross_entropy, [(x[:8], y[:8]), (x[8:], y[8:])], "empirical-fisher", bias="joint"
    )
    assert not whole.fallback
    assert "first.weight+bias" in whole
    for name in whole:
        torch.testing.assert_close(whole[name].matrices(), parts[name].matrices())


def test_a_weight_that_is_also_read_elsewhere_is_not_taken_for_the_whole(rule: None) -> None:
    class Tied(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x @ self.first.weight.T)[:, :3]

    found = kp.capture(Tied(), F.cross_entropy, batch(), "empirical-fisher")
    assert "used in operations that have no rule" in found.fallback["first.weight"]
    assert "first.gate" not in found.fallback

    class Both(Network):  # the linear call has a rule: both add up
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + F.linear(x, self.first.weight)[:, :3]

    model = Both()
    samples = kp.capture(model, F.cross_entropy, batch(), "empirical-fisher")
    assert "first.weight" not in samples.fallback
    x, y = batch()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.first.weight)
    torch.testing.assert_close(samples["first.weight"].matrices().mean(0)[0], grad)


def wrong_scale(module: Gated, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Any]:
    return gated(module, inputs, output_grad) | {"weight": (output_grad, inputs[0])}


def wrong_order(module: Gated, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Any]:
    return {"bias": output_grad.roll(1, 0)}


def wrong_shape(module: Gated, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Any]:
    return {"weight": (inputs[0], output_grad)}


def wrong_name(module: Gated, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Any]:
    return {"kernel": (output_grad, inputs[0])}


def wrong_factors(module: Gated, inputs: tuple[Tensor, ...], output_grad: Tensor) -> dict[str, Any]:
    return {"weight": (torch.ones_like(output_grad), inputs[0] + output_grad.sum())}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (wrong_scale, ("'first.weight'", "add up", "Gated")),
        (wrong_order, ("'first.bias'", "output gradients of others")),
        (wrong_shape, ("'weight'", "[20, T, 4]", "[20, T, 5]")),
        (wrong_name, ("kernel", "weight, gate, bias")),
        (wrong_factors, ("'weight'", "return G itself")),
    ],
)
def test_a_wrong_rule_is_refused_by_name(function: Any, words: tuple[str, ...]) -> None:
    kp.register_layer_rule(Gated)(function)
    try:
        with pytest.raises(InvalidInputError) as caught:
            kp.capture(Network(), F.cross_entropy, batch())
    finally:
        del MODULE_RULES[Gated]
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_parameter_that_the_rule_leaves_out_is_measured_without_it() -> None:
    kp.register_layer_rule(Gated)(lambda module, inputs, d: {"bias": d})
    try:
        found = kp.capture(Network(), F.cross_entropy, batch())
    finally:
        del MODULE_RULES[Gated]
    assert "gives no samples of 'weight'" in found.fallback["first.weight"]
    assert "first.bias" in found
    assert "first.bias" not in found.fallback


def test_names_are_unique_and_classes_are_modules(rule: None) -> None:
    with pytest.raises(InvalidInputError, match="Gated has a layer rule already"):
        kp.register_layer_rule(Gated)
    for wrong in (Gated(1, 1), int, "Gated"):
        with pytest.raises(InvalidInputError, match="give a class of modules"):
            kp.register_layer_rule(wrong)  # type: ignore[arg-type]


def test_the_model_is_left_as_it_was(rule: None) -> None:
    model = Network()
    kp.capture(model, F.cross_entropy, batch())
    assert not model.first._forward_hooks
    assert not model.first._forward_pre_hooks


@pytest.mark.parametrize("positions", [(), (3,)])
def test_a_call_is_treated_in_chunks_of_examples(rule: None, positions: tuple[int, ...]) -> None:
    """As K-FAC's optimizer does it: outputs and inputs of chunks are those of the whole call."""
    model, (x, _) = Network(), batch(*positions)
    with recording(model, dict(model.named_parameters())) as record:
        model(x)
    assert [call.name for call in record.calls] == ["first", "last"]
    for call in record.calls:
        call.layout = layouts(call.lead, len(x))[0]
        d = torch.randn(call.output_shape, dtype=torch.float64)
        whole = call.outputs("weight", d), call.inputs("weight")
        chunks = [slice(0, 7), slice(7, 20)]
        parts = [call.examples(part) for part in chunks]
        outputs = [
            one.outputs("weight", call.examples_of(d, part))
            for one, part in zip(parts, chunks, strict=True)
        ]
        torch.testing.assert_close(torch.cat(outputs), whole[0])
        torch.testing.assert_close(torch.cat([one.inputs("weight") for one in parts]), whole[1])
