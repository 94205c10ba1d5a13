"""Captured gradients against torch.func, and everything that a capture says about itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from tests import functional_oracle as oracle
from tests.functional_oracle import RELATIVE, assert_close, matrices, second_moment
from tests.small_models import SMALL_MODELS, SmallModel
from tests.small_modules import CLASSES, Lambda, mlp, three

# Standard errors that a mean of sampled draws may be off, the worst of a few hundred entries: by
# chance less than once in 1e6 seeds, and the seed is fixed.
STANDARD_ERRORS = 6.0

# What torch says about models of the registry, and not about the package.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


every_model = pytest.mark.parametrize("small", SMALL_MODELS.values(), ids=SMALL_MODELS.keys())
every_kind = pytest.mark.parametrize("kind", ["cross-entropy", "mse"])
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


@every_model
@every_kind
def test_gauss_newton_is_that_of_torch_func(small: SmallModel, kind: str) -> None:
    model, batch, loss = small.model(), small.batch(kind), small.loss(kind)
    samples = kp.capture(model, loss, batch, target="ggn")
    assert tuple(samples) == small.samples
    expected = oracle.gauss_newton(small.reference(model), loss, *batch, small.samples)
    for name in small.samples:
        assert_close(second_moment(samples[name]), expected[name])


@every_model
@every_reduction
@every_kind
def test_empirical_fisher_is_the_gradient_of_each_datum(
    small: SmallModel, kind: str, reduction: str
) -> None:
    model, batch, loss = small.model(), small.batch(kind), small.loss(kind, reduction)
    samples = kp.capture(model, loss, batch, target="empirical-fisher")
    expected = oracle.share_gradients(small.reference(model), loss, *batch, small.samples)
    for name in small.samples:
        assert samples[name].n_columns == 1
        assert_close(matrices(samples[name])[:, 0].flatten(1), expected[name].flatten(1))
        assert_close(samples[name].matrices().flatten(1), expected[name].flatten(1))


@pytest.mark.parametrize(
    "small",
    [s for s in SMALL_MODELS.values() if s.batchable and not s.coupled],
    ids=lambda small: small.name,
)
def test_empirical_fisher_is_the_gradient_of_each_datum_alone(small: SmallModel) -> None:
    model, batch = small.model(), small.batch("cross-entropy")
    loss = small.loss("cross-entropy")
    samples = kp.capture(model, loss, batch, target="empirical-fisher")
    expected = oracle.per_sample_gradients(small.reference(model), loss, *batch)
    for name in small.samples:
        assert_close(samples[name].matrices()[:, 0].flatten(1), expected[name].flatten(1))


@every_model
def test_what_no_rule_measures_has_its_reason(small: SmallModel) -> None:
    samples = kp.capture(small.model(), F.mse_loss, small.batch("mse"))
    assert tuple(samples) == small.samples
    assert tuple(samples.skipped) == tuple(n for n in small.names if n not in small.samples)
    assert set(samples.fallback) == set(small.samples) - set(small.measured)
    for reasons, patterns in ((samples.skipped, small.skipped), (samples.fallback, small.fallback)):
        for name, reason in reasons.items():
            assert re.search(small.why(name, patterns), reason), reason


@every_model
def test_without_the_fallback_rules_measure_the_same(small: SmallModel) -> None:
    model, batch = small.model(), small.batch("mse")
    whole = kp.capture(model, F.mse_loss, batch)
    samples = kp.capture(model, F.mse_loss, batch, fallback=False)
    assert tuple(samples) == small.measured
    assert not samples.fallback
    for name in small.measured:
        assert torch.equal(samples[name].matrices(), whole[name].matrices())
    for name in whole.fallback:
        assert whole.fallback[name].startswith(samples.skipped[name])


@pytest.mark.parametrize("reader", [0, 1])
def test_a_coupling_is_seen_in_either_direction(reader: int) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        seen = [torch.zeros_like(h[0]), torch.zeros_like(h[0])]
        seen[reader] = h[1 - reader]
        return m.c(m.b(h) + torch.stack(seen))

    model = three(forward).double()
    samples = kp.capture(model, F.mse_loss, SMALL_MODELS["2-D"].batch("mse", 2))
    assert list(samples) == ["b.weight", "b.bias", "c.weight", "c.bias"]
    assert "mix" in samples.skipped["a.weight"]
    assert "mix" in samples.skipped["a.bias"]


SHAPES = ("2-D", "3-D", "classes second", "pooled sequence", "conv in-place activation, pixels")


@pytest.mark.parametrize("target", ["ggn", "fisher", "empirical-fisher"])
def test_models_that_return_one_number_a_datum(target: str) -> None:
    small = SMALL_MODELS["2-D"]
    model = nn.Sequential(small.model(), Lambda(lambda m, x: x[:, 0]))
    inputs = small.inputs()
    targets = small.inputs(seed=5)[:, 0]
    samples = kp.capture(model, F.mse_loss, (inputs, targets), target=target)
    assert list(samples) == ["0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"]
    assert samples["0.0.weight"].n_columns == 1
    if target == "ggn":
        expected = oracle.gauss_newton(model, F.mse_loss, inputs, targets, ["0.0.weight"])
        assert_close(second_moment(samples["0.0.weight"]), expected["0.0.weight"])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("kind", "reduction"),
    [("cross-entropy", "sum"), ("mse", "sum"), ("cross-entropy", "mixed"), ("mse", "mixed")],
)
def test_gauss_newton_of_other_reductions(name: str, kind: str, reduction: str) -> None:
    small = SMALL_MODELS[name]
    model, batch = small.model(), small.batch(kind)
    loss = small.loss(kind, "sum")
    if reduction == "mixed":  # a sum over a datum's terms, and a mean over data
        total = loss
        loss = lambda outputs, targets: total(outputs, targets) / len(targets)  # noqa: E731
    samples = kp.capture(model, loss, batch)
    expected = oracle.gauss_newton(model, loss, *batch, small.measured)
    for parameter in small.measured:
        assert_close(second_moment(samples[parameter]), expected[parameter])
    assert samples.loss == pytest.approx(loss(model(batch[0]), batch[1]).item(), rel=RELATIVE)


@pytest.mark.parametrize(
    ("name", "kind", "reduction"),
    [
        ("2-D", "cross-entropy", "mean"),
        ("2-D", "mse", "mean"),
        ("3-D", "cross-entropy", "mean"),
        ("3-D", "mse", "mean"),
        ("classes second", "cross-entropy", "sum"),
        ("pooled sequence", "mse", "sum"),
    ],
)
def test_fisher_is_unbiased_for_gauss_newton(name: str, kind: str, reduction: str) -> None:
    small, K = SMALL_MODELS[name], 1500
    model, batch, loss = small.model(), small.batch(kind, 2), small.loss(kind, reduction)
    samples = kp.capture(model, loss, batch, target="fisher", label_draws=K, seed=5)
    exact = kp.capture(model, loss, batch, target="ggn")
    for parameter in small.measured:
        expected = second_moment(exact[parameter])
        G = samples[parameter].matrices().flatten(2)  # [N, K, mn], K independent label draws
        draws = torch.einsum("ikp,ikq->kpq", G, G) / len(G)
        error = draws.std(0) / K**0.5
        assert_close(second_moment(samples[parameter]), draws.mean(0))
        assert float(((draws.mean(0) - expected).abs() / (error + 1e-12)).max()) < STANDARD_ERRORS
        # sharp enough to see a factor of T, of the number of outputs, or of 2
        assert float(error.norm() / expected.norm()) < 0.15


@every_kind
def test_a_mean_of_sampled_gradients_vanishes(kind: str) -> None:
    small, K = SMALL_MODELS["2-D"], 2000
    batch = small.batch(kind, 2)
    samples = kp.capture(small.model(), small.loss(kind), batch, target="fisher", label_draws=K)
    G = samples["0.weight"].matrices().flatten(2)
    z = G.mean(1) / (G.std(1) / K**0.5)
    assert float(z.abs().max()) < STANDARD_ERRORS


def test_sampled_labels_follow_the_model_and_not_the_targets() -> None:
    small = SMALL_MODELS["2-D"]
    model, (inputs, targets) = small.model(), small.batch("cross-entropy")
    other = (targets + 1) % CLASSES
    one = kp.capture(model, F.cross_entropy, (inputs, targets), target="fisher", seed=3)
    two = kp.capture(model, F.cross_entropy, (inputs, other), target="fisher", seed=3)
    # the scale of the loss is solved for, hence the rounding
    torch.testing.assert_close(
        one["0.weight"].output_grads, two["0.weight"].output_grads, rtol=1e-5, atol=0.0
    )
    assert one.loss != two.loss


@pytest.mark.parametrize("kind", ["cross-entropy", "mse"])
def test_fisher_is_fixed_by_its_seed_alone(kind: str) -> None:
    small = SMALL_MODELS["3-D"]
    model, batch, loss = small.model(), small.batch(kind), small.loss(kind)

    def drawn(seed: int) -> Tensor:
        return kp.capture(model, loss, batch, target="fisher", seed=seed)["0.weight"].output_grads

    torch.manual_seed(1)
    first = drawn(7)
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(first, drawn(7))
    assert not torch.equal(first, drawn(8))


@pytest.mark.parametrize("target", ["ggn", "fisher", "empirical-fisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["2-D", "3-D", "conv reflect", "layer norm"])
def test_lower_precision_agrees_with_float64(name: str, dtype: torch.dtype, target: str) -> None:
    small = SMALL_MODELS[name]
    model, (inputs, targets) = small.model(), small.batch("cross-entropy")
    loss = small.loss("cross-entropy")
    exact = kp.capture(model, loss, (inputs, targets), target=target)
    low = kp.capture(model.to(dtype), loss, (inputs.to(dtype), targets), target=target)
    assert tuple(low) == small.measured
    for parameter in small.measured:
        one = low[parameter]
        summed = name != "2-D" and one.shape[1] == 1  # over positions, at least in float32
        assert one.output_grads.dtype == dtype or (summed and one.output_grads.dtype.itemsize == 4)
        # a dozen roundings, each relative to entries of the size of the whole
        tolerance = 32 * torch.finfo(dtype).eps
        assert_close(second_moment(low[parameter]), second_moment(exact[parameter]), tolerance)


def test_layers_of_different_precision() -> None:
    small = SMALL_MODELS["2-D"]
    model, (inputs, targets) = small.model(), small.batch("cross-entropy")
    exact = kp.capture(model, F.cross_entropy, (inputs, targets))
    mixed = Lambda(
        lambda m, x: m.last(m.first(x).float()), first=model[:2].bfloat16(), last=model[2].float()
    )
    samples = kp.capture(mixed, F.cross_entropy, (inputs.bfloat16(), targets))
    assert samples["first.0.weight"].output_grads.dtype == torch.bfloat16
    assert samples["last.weight"].output_grads.dtype == torch.float32
    tolerance = 32 * torch.finfo(torch.bfloat16).eps
    assert_close(second_moment(samples["last.weight"]), second_moment(exact["2.weight"]), tolerance)
    assert_close(
        second_moment(samples["first.0.weight"]), second_moment(exact["0.weight"]), tolerance
    )


@pytest.mark.parametrize("name", ["2-D", "called twice", "tied", "functional use beside the call"])
def test_under_autocast(name: str) -> None:
    small = SMALL_MODELS[name]
    model, (inputs, targets) = small.model(), small.batch("cross-entropy")
    exact = kp.capture(model, F.cross_entropy, (inputs, targets))
    model, inputs = model.float(), inputs.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs).sum().backward()  # fills the cache of cast weights
        samples = kp.capture(model, F.cross_entropy, (inputs, targets))
    assert tuple(samples) == small.measured
    tolerance = 32 * torch.finfo(torch.bfloat16).eps
    for parameter in small.measured:
        assert_close(second_moment(samples[parameter]), second_moment(exact[parameter]), tolerance)


def assert_same_samples(got: kp.Capture, expected: kp.Capture, prefix: str) -> None:
    assert [name.removeprefix(prefix) for name in got] == list(expected)
    for name, one in expected.items():
        assert torch.equal(got[prefix + name].output_grads, one.output_grads)


def test_data_parallel() -> None:
    small = SMALL_MODELS["2-D"]
    model, batch = small.model(), small.batch("cross-entropy")
    expected = kp.capture(model, F.cross_entropy, batch)
    wrapped = nn.DataParallel(model)
    assert_same_samples(kp.capture(wrapped, F.cross_entropy, batch), expected, "module.")


@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("name", ["2-D", "called twice", "functional use beside the call"])
def test_compiled_models_are_measured_as_if_they_were_not(name: str, run_before: bool) -> None:
    small = SMALL_MODELS[name]
    model, batch = small.model(), small.batch("cross-entropy")
    expected = kp.capture(model, F.cross_entropy, batch)
    compiled = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    wrapped = torch.compile(model, backend=backend)
    if run_before:
        wrapped(batch[0])
    before = len(compiled)
    assert_same_samples(kp.capture(wrapped, F.cross_entropy, batch), expected, "_orig_mod.")
    assert len(compiled) == before
    assert torch.equal(wrapped(batch[0]), model(batch[0]))
    assert len(compiled) == 1


def test_models_compiled_in_place_are_measured_as_if_they_were_not() -> None:
    small = SMALL_MODELS["2-D"]
    model, batch = small.model(), small.batch("cross-entropy")
    expected = kp.capture(model, F.cross_entropy, batch)
    model.compile(backend="eager")
    model(batch[0])
    assert_same_samples(kp.capture(model, F.cross_entropy, batch), expected, "")


def test_traced_models_are_measured() -> None:
    small = SMALL_MODELS["2-D"]
    model, batch = small.model(), small.batch("cross-entropy")
    expected = kp.capture(model, F.cross_entropy, batch)
    traced = torch.fx.symbolic_trace(model)
    assert_same_samples(kp.capture(traced, F.cross_entropy, batch), expected, "")


def test_a_gradient_that_a_custom_backward_leaves_out_is_zero() -> None:
    class Block(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> None:
            return None

    model = three(lambda m, x: m.c(m.a(x) + Block.apply(m.b(m.a(x))))).double()
    samples = kp.capture(model, F.mse_loss, SMALL_MODELS["2-D"].batch("mse"))
    assert float(samples["b.weight"].output_grads.abs().max()) == 0
    assert float(samples["a.weight"].output_grads.abs().max()) > 0


def test_another_default_device_does_no_harm() -> None:
    small = SMALL_MODELS["2-D"]
    model, batch = small.model(), small.batch("cross-entropy")
    expected = kp.capture(model, F.cross_entropy, batch, target="fisher")
    with torch.device("meta"):
        got = kp.capture(model, F.cross_entropy, batch, target="fisher")
    assert_same_samples(got, expected, "")


def test_models_of_the_registry_are_varied() -> None:
    """A registry that lost its skipped or shared cases would leave the tests above hollow."""
    assert sum(bool(small.skipped) for small in SMALL_MODELS.values()) >= 10
    assert sum(bool(small.fallback) for small in SMALL_MODELS.values()) >= 8
    assert sum(small.coupled for small in SMALL_MODELS.values()) >= 4
    assert mlp()[0].weight.shape == (4, 3)


def test_the_printed_coverage_folds_long_reasons() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.25)) for _ in range(8)))
    model[0][0].bias.requires_grad = False
    samples = kp.capture(model, F.mse_loss, (torch.randn(6, 4), torch.randn(6, 4)))
    frame, text = samples.coverage, str(samples)
    assert frame["reason"].str.len().max() > 200
    lines = text.splitlines()
    assert max(map(len, lines)) < 110
    assert len(lines) > len(frame) + 1
    shown = " ".join(text.split())
    note = samples.note
    assert shown.count(note) == len(samples)
    assert "0.0.bias skipped frozen (requires_grad=False)" in shown
