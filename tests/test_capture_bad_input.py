"""Bad input: an error that names the layer or option, the value and the remedy; nothing wrong."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from tests.refusals import INPUTS, LABELS, MODEL, VALUES, refused
from tests.small_models import SMALL_MODELS, N
from tests.small_modules import CLASSES, Lambda, three


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
        model=linear, data=(inputs, LABELS),
    )  # fmt: skip
    words = ("inputs of the batch",) if math.isnan(value) else ("input of layer '0'", "examples")
    refused(NonFiniteError, *words, data=(inputs, LABELS))  # tanh hides an infinity


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
        loss_fn=F.mse_loss, data=(INPUTS, targets),
    )  # fmt: skip


def test_a_loss_that_overflows() -> None:
    refused(
        NonFiniteError, "The loss is inf",
        loss_fn=F.mse_loss, data=(INPUTS, torch.full_like(VALUES, 1e200)),
    )  # fmt: skip


def test_activations_that_are_not_finite_name_the_first_layer_that_reads_them() -> None:
    model = three(lambda m, x: m.c(m.b((m.a(x) * 1e300) ** 2))).double()
    refused(NonFiniteError, "input of layer 'b'", "layers before it", model=model)


def test_a_model_that_is_one_layer_goes_by_its_class() -> None:
    model = Wide(3, CLASSES).double()
    inputs = INPUTS.clone()
    inputs[0] = math.inf
    model.weight.data[:, 1:] = 0  # 0 * inf
    refused(NonFiniteError, "inputs of the batch", model=model, data=(inputs, LABELS))
    model.register_forward_hook(lambda m, x, y: torch.nan_to_num(y))
    refused(NonFiniteError, "input of layer 'Wide'", model=model, data=(inputs, LABELS))


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
    refused(NonFiniteError, "layer 'a'", model=model, data=(INPUTS[:1], LABELS[:1]))


def test_gradients_that_overflow_half_precision() -> None:
    model = three(lambda m, x: m.c(m.b(m.a(x)))).half()
    model.c.weight.data.fill_(6e4)
    model.b.weight.data.fill_(1e-4)
    model.a.weight.data.fill_(1e-6)
    for layer in (model.a, model.b, model.c):
        layer.bias.data.zero_()
    targets = torch.full((N, CLASSES), -100.0).half()
    refused(
        NonFiniteError, "output gradients of layer 'b'", "float16 ends at 6.55e+04",
        model=model, loss_fn=nn.MSELoss(reduction="sum"), data=(INPUTS.half(), targets),
        target="empirical-fisher",
    )  # fmt: skip


def test_activations_that_overflow_half_precision() -> None:
    model = three(lambda m, x: m.c(m.b(m.a(x)))).half()
    model.a.weight.data.fill_(6e4)
    refused(
        NonFiniteError, "input of layer 'b'", "float16 ends at 6.55e+04",
        model=model, data=(INPUTS.half(), LABELS),
    )  # fmt: skip


# -- batches -----------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["inputs", "targets"])


def test_a_named_tuple_or_a_list_is_a_batch() -> None:
    for batch in (Pair(INPUTS, LABELS), [INPUTS, LABELS]):
        assert len(kp.capture(MODEL, F.cross_entropy, batch)) == 4


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": INPUTS, "y": LABELS}, ["dict", "pair (inputs, targets)"]),
        (INPUTS, ["Tensor", "pair"]),
        ((INPUTS, LABELS, LABELS), ["tuple of 3 parts", "pair"]),
        ((INPUTS.numpy(), LABELS), ["ndarray", "must be tensors"]),
        (({"ids": INPUTS}, LABELS), ["dict", "wrap a model"]),
        (((INPUTS, INPUTS), LABELS), ["tuple and Tensor", "wrap a model"]),
        ((INPUTS, None), ["NoneType", "must be tensors"]),
        ((INPUTS, LABELS[:-1]), ["[4, 3]", "[3]", "first dimension"]),
        ((INPUTS, LABELS[0]), ["[4, 3]", "[]"]),
        ((INPUTS[0, 0], LABELS), ["[]", "first dimension"]),
        ((INPUTS[:0], LABELS[:0]), ["empty", "at least one example"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_batches_that_are_none(batch: Any, words: list[str]) -> None:
    refused(InvalidInputError, *words, data=batch)


@pytest.mark.parametrize(
    ("loss", "targets", "words"),
    [
        (F.cross_entropy, LABELS.int(), ["int32", "targets.long()"]),
        (F.cross_entropy, LABELS.double(), ["float64", "class indices (int64)"]),
        (F.cross_entropy, LABELS[:, None], ["[4, 1]", "[4, 3]"]),
        (F.cross_entropy, LABELS + 1000, ["1000..", "3 classes"]),
        (F.cross_entropy, LABELS - 1000, ["-1000..", "ignored targets"]),
        (F.mse_loss, VALUES[:, 0], ["[4]", "[4, 3]", "no broadcasting"]),
        (F.multilabel_soft_margin_loss, LABELS[:, None, None], ["[4, 1, 1]", "targets of others"]),
    ],
)
def test_targets_of_a_wrong_dtype_shape_or_range(
    loss: Any, targets: Tensor, words: list[str]
) -> None:
    refused(InvalidInputError, *words, loss_fn=loss, data=(INPUTS, targets))


# -- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(reduction="none"), ["returned [4]", "scalar"]),
        (
            lambda o, y: F.cross_entropy(o, y) + sum(p.norm() for p in MODEL.parameters()),
            ["penalty on parameters", "pass the data term alone"],
        ),
        (lambda o, y: F.cross_entropy(o, y).sqrt(), ["neither a mean nor a sum over data"]),
        (F.multi_margin_loss, ["no second derivative", "'empirical-fisher'"]),
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
    ("target", "near"),
    [("gnn", "'ggn'"), ("Fisher", "'fisher'"), ("empirical_fisher", "'empirical-fisher'")],
)
def test_unknown_draws(target: str, near: str) -> None:
    refused(UnknownNameError, f"target {target!r}", f"Did you mean {near}?", target=target)
    refused(UnknownNameError, "'xyz'", "Known: empirical-fisher, fisher, ggn", target="xyz")


@pytest.mark.parametrize("layers", ["2.wieght", ["0.weight", "2.wieght"]])
def test_unknown_layers(layers: str | list[str]) -> None:
    words = ("layers pattern", "'2.wieght'", "Did you mean '2.weight'?", "Known: 0.bias")
    refused(UnknownNameError, *words, layers=layers)


def test_layers_that_are_none() -> None:
    refused(InvalidInputError, "layers is empty", "'*'", layers=[])
    refused(UnknownNameError, "''", layers="")


@pytest.mark.parametrize("layers", [3, [1.5], None])
def test_layers_that_are_no_names(layers: Any) -> None:
    refused(InvalidInputError, f"layers={layers!r}", "glob", layers=layers)


def test_a_name_with_brackets_stands_for_itself() -> None:
    model = nn.ModuleDict({"[x]": nn.Linear(3, CLASSES), "x": nn.Linear(3, CLASSES)}).double()
    model.forward = lambda x: model["[x]"](x) + model["x"](x)
    samples = kp.capture(model, F.cross_entropy, (INPUTS, LABELS), layers="[x].weight")
    assert list(samples) == ["[x].weight", "x.weight"]  # the name, and what the glob matches


@pytest.mark.parametrize("seed", [2**70, -(2**63) - 1, "a", 1.5, None, True])
def test_seeds_that_are_none(seed: Any) -> None:
    refused(InvalidInputError, f"seed={seed!r}", "whole number", target="fisher", seed=seed)
    with pytest.raises(InvalidInputError, match="seed="):
        kp.capture(MODEL, F.cross_entropy, [(INPUTS, LABELS)], seed=seed)
    samples = kp.capture(MODEL, F.cross_entropy, (INPUTS, LABELS), target="fisher")
    with pytest.raises(InvalidInputError, match="seed="):
        kp.batch_gradients(samples, 2, 3, seed=seed)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_seeds_at_the_ends(seed: int) -> None:
    for data in ((INPUTS, LABELS), [(INPUTS, LABELS)]):
        assert kp.capture(MODEL, F.cross_entropy, data, target="fisher", seed=seed)


@pytest.mark.parametrize("loss", [None, "ce"])
def test_a_loss_that_is_no_function(loss: Any) -> None:
    for data in ((INPUTS, LABELS), [(INPUTS, LABELS)]):
        with pytest.raises(InvalidInputError, match=f"loss_fn is {loss!r}; give a function"):
            kp.capture(MODEL, loss, data)


@pytest.mark.parametrize("label_draws", [0, -1, 1.5, "2", True])
def test_label_draws_that_are_no_count(label_draws: Any) -> None:
    refused(
        InvalidInputError, f"label_draws={label_draws!r}", "positive",
        target="fisher", label_draws=label_draws,
    )  # fmt: skip


@pytest.mark.parametrize("target", ["ggn", "empirical-fisher"])
def test_label_draws_where_no_label_is_drawn(target: str) -> None:
    words = ("label_draws=3", repr(target), "only by 'fisher'")
    refused(InvalidInputError, *words, target=target, label_draws=3)


@pytest.mark.parametrize(
    ("target", "maker"),
    [("batch-gradient", "kp.batch_gradients"), ("trajectory", "GradientWindow")],
)
def test_draws_that_are_made_otherwise_name_their_maker(target: str, maker: str) -> None:
    batch = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UnknownNameError, match=rf"{target}.*{maker}"):
        kp.capture(nn.Linear(5, 3), nn.CrossEntropyLoss(), batch, target=target)


def test_items_of_three_parts_are_counted() -> None:
    item = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64), torch.ones(4)
    with pytest.raises(InvalidInputError, match="list whose first item has 3 parts"):
        kp.capture(nn.Linear(5, 3), nn.CrossEntropyLoss(), [item, item])
