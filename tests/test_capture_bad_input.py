"""Bad input: an error that names the layer or option, the value and the remedy; nothing wrong."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    KroneckerProbeError,
    MemoryBudgetError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from kronecker_probe.linalg import memory
from tests.small_models import SMALL_MODELS, N
from tests.small_modules import CLASSES, Lambda, conv, mlp, three

INPUTS, LABELS = SMALL_MODELS["2-D"].batch("cross-entropy")
VALUES = SMALL_MODELS["2-D"].batch("mse")[1]
MODEL = SMALL_MODELS["2-D"].model()


def refused(error: type[KroneckerProbeError], *words: str, **given: Any) -> str:
    """The message of the refusal; ``given`` replaces what a good call gets."""
    call: dict[str, Any] = {"model": MODEL, "loss_fn": F.cross_entropy, "batch": (INPUTS, LABELS)}
    with pytest.raises(error) as caught:
        kp.capture(**(call | given))
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Wide(nn.Linear):
    pass


# -- values that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite(value: float) -> None:
    inputs = INPUTS.clone()
    inputs[1, 2] = value
    linear = nn.Linear(3, CLASSES).double()
    refused(
        NonFiniteError, "inputs of the batch hold 1 NaN or infinite", "remove",
        model=linear, batch=(inputs, LABELS),
    )  # fmt: skip
    words = ("inputs of the batch",) if math.isnan(value) else ("input of layer '0'", "data")
    refused(NonFiniteError, *words, batch=(inputs, LABELS))  # tanh hides an infinity


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_parameters_that_are_not_finite(name: str, value: float) -> None:
    model = SMALL_MODELS["2-D"].model()
    model.get_parameter(name).data.view(-1)[1] = value
    refused(NonFiniteError, f"Parameter {name!r} holds NaN", "checkpoint", model=model)


def test_a_frozen_parameter_that_is_not_finite() -> None:
    model = SMALL_MODELS["2-D"].model()
    model[0].weight.requires_grad_(False)[0, 0] = math.nan
    refused(NonFiniteError, "Parameter '0.weight' holds NaN", model=model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_targets_that_are_not_finite(value: float) -> None:
    targets = VALUES.clone()
    targets[0, 0] = value
    refused(
        NonFiniteError, f"The loss is {value}", "targets",
        loss_fn=F.mse_loss, batch=(INPUTS, targets),
    )  # fmt: skip


def test_a_loss_that_overflows() -> None:
    refused(
        NonFiniteError, "The loss is inf",
        loss_fn=F.mse_loss, batch=(INPUTS, torch.full_like(VALUES, 1e200)),
    )  # fmt: skip


def test_activations_that_are_not_finite_name_the_first_layer_that_reads_them() -> None:
    model = three(lambda m, x: m.c(m.b((m.a(x) * 1e300) ** 2))).double()
    refused(NonFiniteError, "input of layer 'b'", "layers before it", model=model)


def test_a_model_that_is_one_layer_goes_by_its_class() -> None:
    model = Wide(3, CLASSES).double()
    inputs = INPUTS.clone()
    inputs[0] = math.inf
    model.weight.data[:, 1:] = 0  # 0 * inf
    refused(NonFiniteError, "inputs of the batch", model=model, batch=(inputs, LABELS))
    model.register_forward_hook(lambda m, x, y: torch.nan_to_num(y))
    refused(NonFiniteError, "input of layer 'Wide'", model=model, batch=(inputs, LABELS))


def test_outputs_that_are_not_finite_by_the_last_layer() -> None:
    model = nn.Sequential(MODEL, Lambda(lambda m, x: x / 0.0))
    refused(NonFiniteError, "outputs hold NaN", "finite inputs and parameters", model=model)


def test_masked_activations_that_are_not_finite() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        h = torch.cat([h[:, :3], torch.full_like(h[:, :1], math.inf)], dim=1)
        return m.c(torch.nan_to_num(m.b(h), 0.0, 1.0, -1.0))

    refused(NonFiniteError, "input of layer 'b'", model=three(forward).double())


def test_gradients_that_are_not_finite() -> None:
    model = three(lambda m, x: m.c(m.b((0 * m.a(x)).abs().sqrt()))).double()
    refused(NonFiniteError, "layer 'a'", "zero", model=model)
    refused(NonFiniteError, "layer 'a'", model=model, batch=(INPUTS[:1], LABELS[:1]))


def test_gradients_that_overflow_half_precision() -> None:
    model = three(lambda m, x: m.c(m.b(m.a(x)))).half()
    model.c.weight.data.fill_(6e4)
    model.b.weight.data.fill_(1e-4)
    model.a.weight.data.fill_(1e-6)
    for layer in (model.a, model.b, model.c):
        layer.bias.data.zero_()
    targets = torch.full((N, CLASSES), -100.0).half()
    refused(
        NonFiniteError, "output gradients of layer 'a'", "half precision",
        model=model, loss_fn=nn.MSELoss(reduction="sum"), batch=(INPUTS.half(), targets),
        draws="empirical-fisher",
    )  # fmt: skip


# -- batches -----------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["inputs", "targets"])


def test_a_named_tuple_or_a_list_is_a_batch() -> None:
    for batch in (Pair(INPUTS, LABELS), [INPUTS, LABELS]):
        assert len(kp.capture(MODEL, F.cross_entropy, batch)) == 2


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": INPUTS, "y": LABELS}, ["dict", "pair (inputs, targets)"]),
        (INPUTS, ["Tensor", "pair"]),
        ((INPUTS, LABELS, LABELS), ["tuple", "pair"]),
        ((INPUTS.numpy(), LABELS), ["ndarray", "must be tensors"]),
        (({"ids": INPUTS}, LABELS), ["dict", "wrap a model"]),
        (((INPUTS, INPUTS), LABELS), ["tuple and Tensor", "wrap a model"]),
        ((INPUTS, None), ["NoneType", "must be tensors"]),
        ((INPUTS, LABELS[:-1]), ["[4, 3]", "[3]", "first dimension"]),
        ((INPUTS, LABELS[0]), ["[4, 3]", "[]"]),
        ((INPUTS[0, 0], LABELS), ["[]", "first dimension"]),
        ((INPUTS[:0], LABELS[:0]), ["empty", "at least one datum"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_batches_that_are_none(batch: Any, words: list[str]) -> None:
    refused(InvalidInputError, *words, batch=batch)


@pytest.mark.parametrize(
    ("loss", "targets", "words"),
    [
        (F.cross_entropy, LABELS.int(), ["int32", "targets.long()"]),
        (F.cross_entropy, LABELS.double(), ["float64", "class indices (int64)"]),
        (F.cross_entropy, LABELS[:, None], ["[4, 1]", "[4, 3]"]),
        (F.cross_entropy, LABELS + 1000, ["1000..", "3 classes"]),
        (F.cross_entropy, LABELS - 1000, ["-1000..", "ignored targets"]),
        (F.mse_loss, VALUES[:, 0], ["[4]", "[4, 3]", "no broadcasting"]),
        (F.mse_loss, VALUES.long(), ["int64", "class indices must be"]),
    ],
)
def test_targets_of_a_wrong_dtype_shape_or_range(
    loss: Any, targets: Tensor, words: list[str]
) -> None:
    refused(InvalidInputError, *words, loss_fn=loss, batch=(INPUTS, targets))


# -- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(reduction="none"), ["returned [4]", "scalar"]),
        (nn.CrossEntropyLoss(label_smoothing=0.1), ["label smoothing"]),
        (
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()),
            ["class weights", "cross-entropy (mean)"],
        ),
        (lambda o, y: F.cross_entropy(o, y) + 1e-2 * o.square().mean(), ["added penalties"]),
        (
            lambda o, y: F.cross_entropy(o, y) + sum(p.norm() for p in MODEL.parameters()),
            ["pass the data term alone"],
        ),
        (lambda o, y: F.cross_entropy(o, y).sqrt(), ["its value or gradient differs"]),
        (F.multi_margin_loss, ["Supported: cross-entropy"]),
    ],
)
def test_losses_that_are_no_mean_or_sum(loss: Any, words: list[str]) -> None:
    refused(UnsupportedError, "loss_fn", *words, loss_fn=loss)


def test_log_probabilities_with_nll_are_told_the_way() -> None:
    model = nn.Sequential(MODEL, nn.LogSoftmax(-1))
    refused(UnsupportedError, "cross_entropy is the same loss", model=model, loss_fn=F.nll_loss)
    by_logits = kp.capture(MODEL, F.cross_entropy, (INPUTS, LABELS))
    by_advice = kp.capture(model, F.cross_entropy, (INPUTS, LABELS))
    one, two = kp.SecondMoment(by_logits["0.weight"]), kp.SecondMoment(by_advice["0.0.weight"])
    assert by_advice.loss == pytest.approx(by_logits.loss, rel=1e-12)
    assert kp.relative_error(one, two) < 1e-6


def test_an_error_of_the_loss_itself_is_not_hidden() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        kp.capture(MODEL, loss, (INPUTS, LABELS))


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draws", "near"),
    [("gnn", "'ggn'"), ("Fisher", "'fisher'"), ("empirical_fisher", "'empirical-fisher'")],
)
def test_unknown_draws(draws: str, near: str) -> None:
    refused(UnknownNameError, f"draws {draws!r}", f"Did you mean {near}?", draws=draws)
    refused(UnknownNameError, "'xyz'", "Known: empirical-fisher, fisher, ggn", draws="xyz")


@pytest.mark.parametrize("layers", ["2.wieght", ["0.weight", "2.wieght"]])
def test_unknown_layers(layers: str | list[str]) -> None:
    words = ("layers pattern", "'2.wieght'", "Did you mean '2.weight'?", "Known: 0.bias")
    refused(UnknownNameError, *words, layers=layers)


def test_layers_that_are_none() -> None:
    refused(InvalidInputError, "layers is empty", "'*'", layers=[])
    refused(UnknownNameError, "''", layers="")


@pytest.mark.parametrize("label_draws", [0, -1, 1.5, "2"])
def test_label_draws_that_are_no_count(label_draws: Any) -> None:
    refused(
        InvalidInputError, f"label_draws={label_draws!r}", "positive",
        draws="fisher", label_draws=label_draws,
    )  # fmt: skip


@pytest.mark.parametrize("draws", ["ggn", "empirical-fisher"])
def test_label_draws_where_no_label_is_drawn(draws: str) -> None:
    words = ("label_draws=3", repr(draws), "only by 'fisher'")
    refused(InvalidInputError, *words, draws=draws, label_draws=3)


# -- models ------------------------------------------------------------------------------------


def test_what_is_no_module() -> None:
    refused(InvalidInputError, "model is a function", "torch.nn.Module", model=lambda x: x)


def test_a_model_without_parameters() -> None:
    refused(InvalidInputError, "Sequential has no parameters", model=nn.Sequential(nn.ReLU()))


def test_no_supported_layer_at_all() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 3, 3), nn.Flatten()).double()
    words = ("No parameter can be measured", "1.weight", "Conv1d", "Linear and Conv2d")
    refused(InvalidInputError, *words, model=model)


def test_everything_frozen() -> None:
    model = mlp().double().requires_grad_(False)
    refused(InvalidInputError, "frozen", "no parameter that requires a gradient", model=model)


def test_nothing_measurable_is_left_by_the_glob() -> None:
    words = ("No parameter can be measured", "0.bias: a bias of Linear", "not selected by")
    refused(InvalidInputError, *words, layers="*.bias")


def test_frozen_parameters_are_skipped_and_the_rest_measured() -> None:
    model = SMALL_MODELS["2-D"].model()
    model[0].weight.requires_grad_(False)
    samples = kp.capture(model, F.cross_entropy, (INPUTS, LABELS))
    assert list(samples) == ["2.weight"]
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
    words = ("[8, 3]", "4 data", "do not flatten")
    loss = lambda o, y: F.cross_entropy(o, y.flatten())  # noqa: E731
    refused(InvalidInputError, *words, model=model, loss_fn=loss, batch=(inputs, targets))


def test_a_layer_on_a_batch_flattened_into_positions_is_skipped() -> None:
    model = three(lambda m, x: m.c(m.b(m.a(x).flatten(0, 1)).reshape(len(x), -1, 4))).double()
    small = SMALL_MODELS["3-D"]
    samples = kp.capture(model, F.mse_loss, small.batch("mse"))
    assert list(samples) == ["a.weight", "c.weight"]
    assert "[8, 4] for a batch of 4 data" in samples.skipped["b.weight"]


def test_outputs_that_are_one_number() -> None:
    model = nn.Sequential(MODEL, Lambda(lambda m, z: z.sum()))
    refused(InvalidInputError, "returned []", "first dimension", model=model)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_weights_are_skipped() -> None:
    model = Lambda(
        lambda m, x: m.c(m.a(x.to(torch.complex128)).abs()),
        a=nn.Linear(3, 4).to(torch.complex128), c=nn.Linear(4, CLASSES).double(),
    )  # fmt: skip
    samples = kp.capture(model, F.cross_entropy, (INPUTS, LABELS))
    assert list(samples) == ["c.weight"]
    assert samples.skipped["a.weight"] == "torch.complex128 is not real"


def test_sparse_inputs_of_a_layer_are_skipped() -> None:
    model = three(lambda m, x: m.c(m.b(m.a(x.to_sparse())))).double()
    samples = kp.capture(model, F.cross_entropy, (INPUTS, LABELS))
    assert list(samples) == ["b.weight", "c.weight"]
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
    refused(InvalidInputError, "No parameter", "no rule for RecursiveScriptModule", model=model)


def test_a_convolution_of_one_image_without_a_batch_is_skipped() -> None:
    model = conv()
    model(torch.zeros(1, 2, 5, 6))
    lonely = Lambda(lambda m, x: m.net[3](m.net[0](x[0]).reshape(1, -1)), net=model.double())
    samples = kp.capture(lonely, F.mse_loss, (torch.randn(1, 2, 5, 6).double(), VALUES[:1]))
    assert list(samples) == ["net.3.weight"]
    assert "[2, 5, 6] for a batch of 1 data" in samples.skipped["net.0.weight"]


def test_samples_that_would_not_fit_are_refused_with_the_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
    message = refused(MemoryBudgetError, "3 gradient columns a datum", "GB")
    assert "0.00 GB are free" in message


def test_the_memory_of_unfolded_images_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SMALL_MODELS["conv default"]
    batch = small.batch("mse")
    samples = kp.capture(small.model(), F.mse_loss, batch, draws="empirical-fisher")
    held = sum(one.nbytes for one in samples.values())
    monkeypatch.setattr(memory, "available_bytes", lambda device: held)
    kp.capture(small.model(), F.mse_loss, batch, draws="empirical-fisher")
    monkeypatch.setattr(memory, "available_bytes", lambda device: held - 1)
    with pytest.raises(MemoryBudgetError):
        kp.capture(small.model(), F.mse_loss, batch, draws="empirical-fisher")
