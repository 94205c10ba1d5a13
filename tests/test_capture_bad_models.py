"""Models that cannot be measured, or in part: an error or a reason, and never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
)
from kronecker_probe.linalg import memory
from tests import functional_oracle as oracle
from tests.functional_oracle import assert_close
from tests.refusals import INPUTS, LABELS, MODEL, VALUES, refused
from tests.small_models import SMALL_MODELS
from tests.small_modules import CLASSES, Lambda, conv, mlp, three


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_what_is_no_module() -> None:
    refused(InvalidInputError, "model is a function", "torch.nn.Module", model=lambda x: x)


def test_a_model_without_parameters() -> None:
    refused(InvalidInputError, "Sequential has no parameters", model=nn.Sequential(nn.ReLU()))


def test_no_supported_layer_at_all() -> None:
    layer = nn.ConvTranspose1d(1, 1, 1)
    model = nn.Sequential(nn.Unflatten(1, (1, 3)), layer, nn.Flatten()).double()
    words = ("No parameter can be measured", "1.weight: it is read by operations that have no rule")
    refused(InvalidInputError, *words, model=model, fallback=False)
    assert len(kp.capture(model, F.cross_entropy, (INPUTS, LABELS)).fallback) == 2


def test_everything_frozen() -> None:
    model = mlp().double().requires_grad_(False)
    refused(InvalidInputError, "frozen", "no parameter that requires a gradient", model=model)


def test_nothing_measurable_is_left_by_the_glob() -> None:
    model = SMALL_MODELS["2-D"].model()
    model[0].weight.requires_grad_(False)
    words = ("No parameter can be measured", "0.weight: frozen", "not selected by")
    refused(InvalidInputError, *words, model=model, layers="0.weight")


def test_frozen_parameters_are_skipped_and_the_rest_measured() -> None:
    model = SMALL_MODELS["2-D"].model()
    model[0].weight.requires_grad_(False)
    samples = kp.capture(model, F.cross_entropy, (INPUTS, LABELS))
    assert list(samples) == ["0.bias", "2.weight", "2.bias"]
    assert samples.skipped["0.weight"] == "frozen (requires_grad=False)"


def test_a_model_under_no_grad() -> None:
    class Frozen(nn.Sequential):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    refused(InvalidInputError, "torch.no_grad()", model=Frozen(MODEL))


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda z: (z, z), "tuple"),
        (lambda z: {"logits": z}, "dict"),
        (lambda z: [z], "list"),
        (lambda z: None, "NoneType"),
        (lambda z: z.detach().numpy(), "ndarray"),
    ],
)
def test_outputs_that_are_no_tensor(wrap: Callable[[Tensor], Any], kind: str) -> None:
    model = nn.Sequential(MODEL, Lambda(lambda m, z: wrap(z)))
    refused(InvalidInputError, f"returned a {kind}", "wrap it", "logits", model=model)


def test_a_batch_flattened_into_positions() -> None:
    small = SMALL_MODELS["3-D"]
    inputs, targets = small.batch("cross-entropy")
    model = nn.Sequential(small.model(), nn.Flatten(0, 1))
    words = ("[8, 3]", "4 examples", "do not flatten")
    loss = lambda o, y: F.cross_entropy(o, y.flatten())  # noqa: E731
    refused(InvalidInputError, *words, model=model, loss_fn=loss, data=(inputs, targets))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_on_a_batch_flattened_into_positions_is_measured(transposed: bool) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        h = h.transpose(0, 1) if transposed else h
        h = m.b(h.flatten(0, 1)).reshape(*h.shape[:2], 4)
        return m.c(torch.tanh(h.transpose(0, 1) if transposed else h))

    model, batch = three(forward).double(), SMALL_MODELS["3-D"].batch("mse")
    samples = kp.capture(model, F.mse_loss, batch, target="empirical-fisher", fallback=False)
    expected = oracle.per_sample_gradients(model, F.mse_loss, *batch)
    assert samples["b.weight"].n_positions == 2
    for name in expected:
        assert_close(oracle.matrices(samples[name])[:, 0].flatten(1), expected[name].flatten(1))


def test_outputs_that_are_one_number() -> None:
    model = nn.Sequential(MODEL, Lambda(lambda m, z: z.sum()))
    refused(InvalidInputError, "returned []", "first dimension", model=model)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_model_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, CLASSES)
    with pytest.raises(InvalidInputError, match=r"'weight' was made under torch.inference_mode"):
        kp.capture(model, F.cross_entropy, (INPUTS, LABELS))


def test_complex_weights_are_skipped() -> None:
    model = Lambda(
        lambda m, x: m.c(m.a(x.to(torch.complex128)).abs()),
        a=nn.Linear(3, 4).to(torch.complex128), c=nn.Linear(4, CLASSES).double(),
    )  # fmt: skip
    samples = kp.capture(model, F.cross_entropy, (INPUTS, LABELS))
    assert list(samples) == ["c.weight", "c.bias"]
    assert samples.skipped["a.weight"] == "torch.complex128 is not real"


def test_sparse_inputs_of_a_layer_have_no_rule() -> None:
    model = three(lambda m, x: m.c(m.b(m.a(x.to_sparse())))).double()
    samples = kp.capture(model, F.cross_entropy, (INPUTS, LABELS), fallback=False)
    assert list(samples) == ["b.weight", "b.bias", "c.weight", "c.bias"]
    assert "sparse_coo" in samples.skipped["a.weight"]


def test_an_input_overwritten_after_the_layer_read_it() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        x.add_(1)
        return m.c(y)

    words = ("input of layer 'a'", "changed in place", "out of place")
    refused(InvalidInputError, *words, model=three(forward).double())


def test_a_scripted_model_has_no_layers_to_read() -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        model = torch.jit.script(mlp().double())
    words = ("No parameter", "operations that have no rule")
    refused(InvalidInputError, *words, model=model, fallback=False)


def test_a_convolution_of_one_image_without_a_batch() -> None:
    model = conv()
    model(torch.zeros(1, 2, 5, 6))
    lonely = Lambda(lambda m, x: m.net[3](m.net[0](x[0]).reshape(1, -1)), net=model.double())
    batch = torch.randn(1, 2, 5, 6).double(), VALUES[:1]
    samples = kp.capture(lonely, F.mse_loss, batch, target="empirical-fisher", fallback=False)
    expected = oracle.share_gradients(lonely, F.mse_loss, *batch, list(samples))
    assert len(expected) == 4
    for name in expected:
        assert_close(oracle.matrices(samples[name])[:, 0].flatten(1), expected[name].flatten(1))


def test_samples_that_would_not_fit_are_refused_with_the_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
    message = refused(MemoryBudgetError, "3 gradient columns per example", "GB")
    assert "0.00 GB are free" in message


def test_the_memory_of_unfolded_images_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SMALL_MODELS["conv default"]
    batch = small.batch("mse")
    samples = kp.capture(small.model(), F.mse_loss, batch, target="empirical-fisher")
    shared = samples["3.bias"].output_grads  # the block of its weight, held once
    assert shared.data_ptr() == samples["3.weight"].output_grads.data_ptr()
    held = sum(one.nbytes for one in samples.values()) - shared.nbytes
    monkeypatch.setattr(memory, "available_bytes", lambda device: held)
    kp.capture(small.model(), F.mse_loss, batch, target="empirical-fisher")
    monkeypatch.setattr(memory, "available_bytes", lambda device: held - 1)
    with pytest.raises(MemoryBudgetError):
        kp.capture(small.model(), F.mse_loss, batch, target="empirical-fisher")
