"""Losses that are no mean or sum of cross-entropies or squares, and targets that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.gradients.losses import resolve_loss
from tests.test_losses import labels, normal

Loss = Callable[[Tensor, Tensor], Tensor]

_weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
_parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)


def focal(o: Tensor, y: Tensor) -> Tensor:
    p = o.softmax(-1).gather(1, y[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


OTHER_ENTROPIES: dict[str, Loss] = {
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "class weights": nn.CrossEntropyLoss(weight=_weights),
    "ignored targets": nn.CrossEntropyLoss(ignore_index=0),
    "nll of logits": F.nll_loss,
    "focal": focal,
    "temperature": lambda o, y: F.cross_entropy(o / 2, y),
    "half": lambda o, y: F.cross_entropy(o, y) / 2,
    "mean over classes": lambda o, y: F.cross_entropy(o, y, reduction="sum") / o.numel(),
    "margin": F.multi_margin_loss,
    "clamped logits": lambda o, y: F.cross_entropy(o.clamp(-8, 8), y),
    "datum weights": lambda o, y: (
        F.cross_entropy(o, y, reduction="none") * torch.arange(len(y))
    ).mean(),
    "hard examples": lambda o, y: F.cross_entropy(o, y, reduction="none").topk(2)[0].mean(),
    "z-loss": lambda o, y: F.cross_entropy(o, y) + 1e-2 * o.logsumexp(-1).square().mean(),
    "penalty on outputs": lambda o, y: F.cross_entropy(o, y) + 1e-3 * o.square().mean(),
    "penalty on parameters": lambda o, y: F.cross_entropy(o, y) + _parameter.square().sum(),
    "constant": lambda o, y: F.cross_entropy(o, y) - 0.5,
    "noise": lambda o, y: F.cross_entropy(o + torch.randn_like(o), y),
    "straight-through": lambda o, y: F.cross_entropy(o, y) + 1e-3 * (o - o.detach()).sum(),
    "detached": lambda o, y: F.cross_entropy(o.detach(), y),
    "constant in outputs": lambda o, y: _parameter.sum(),
}
OTHER_SQUARES: dict[str, Loss] = {
    "absolute": F.l1_loss,
    "smooth absolute": F.smooth_l1_loss,
    "half": lambda o, y: 0.5 * F.mse_loss(o, y),
    "square inside, absolute outside": lambda o, y: 2 * F.huber_loss(o, y, delta=10.0),
    "binary cross-entropy": lambda o, y: F.binary_cross_entropy_with_logits(o, y.sigmoid()),
    "soft labels": lambda o, y: F.cross_entropy(o, y.softmax(-1)),
    "root": lambda o, y: F.mse_loss(o, y).sqrt(),
    "output weights": lambda o, y: (_weights * (o - y).square()).mean(),
    "straight-through": lambda o, y: F.mse_loss(o, y) + 1e-3 * (o - o.detach()).sum(),
    "relative": lambda o, y: ((o - y) / y).square().mean(),
    "kl": lambda o, y: F.kl_div(o.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
}


@pytest.mark.parametrize("name", OTHER_ENTROPIES)
def test_other_losses_of_labels_are_refused(name: str) -> None:
    outputs = normal(6, 3, scale=10.0)
    with pytest.raises(UnsupportedError, match=r"loss_fn.*(cross-entropy|gradient)"):
        resolve_loss(OTHER_ENTROPIES[name], outputs, torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.mark.parametrize("name", OTHER_SQUARES)
def test_other_losses_of_values_are_refused(name: str) -> None:
    outputs = normal(6, 3, scale=100.0)
    with pytest.raises(UnsupportedError, match=r"loss_fn is not mse \(mean\) or mse \(sum\)"):
        resolve_loss(OTHER_SQUARES[name], outputs, normal(6, 3, seed=1))


def test_the_refusal_says_what_is_supported_and_what_to_do() -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve_loss(nn.CrossEntropyLoss(label_smoothing=0.1), normal(4, 3), labels(3, 4))
    message = str(caught.value)
    for words in ("cross-entropy (mean)", "[4, 3]", "label smoothing", "NLLLoss", "pass the data"):
        assert words in message


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "[4]"),
        (lambda o, y: float(F.cross_entropy(o, y)), "float"),
        (lambda o, y: (F.cross_entropy(o, y), {}), "tuple"),
        (lambda o, y: None, "NoneType"),
    ],
)
def test_a_loss_must_be_a_scalar_tensor(loss: Loss, got: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve_loss(loss, normal(4, 3), labels(3, 4))
    assert f"returned {got}" in str(caught.value)
    assert "scalar" in str(caught.value)


def test_a_scalar_in_a_vector_of_one_will_do() -> None:
    found = resolve_loss(lambda o, y: F.cross_entropy(o, y)[None], normal(4, 3), labels(3, 4))
    assert found.reduction == "mean"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named(value: float) -> None:
    targets = normal(4, 3)
    targets[1, 1] = value
    with pytest.raises(NonFiniteError, match=f"The loss is {value}"):
        resolve_loss(F.mse_loss, normal(4, 3), targets)


@pytest.mark.parametrize(
    ("outputs", "targets", "words"),
    [
        (normal(4, 3), labels(3, 4).int(), ["int32", "targets.long()"]),
        (normal(4, 3), labels(3, 4).bool(), ["bool", "int64"]),
        (normal(4, 3), labels(3, 4).to(torch.uint8), ["uint8", "int64"]),
        (normal(4, 3), labels(3, 4).to(torch.complex64), ["complex64", "int64"]),
        (normal(4, 3), labels(3, 4).double(), ["[4]", "[4, 3]", "broadcasting", "int64"]),
        (normal(4, 1), normal(4), ["[4]", "[4, 1]", "broadcasting"]),
        (normal(4, 3), normal(4, 1), ["[4, 1]", "[4, 3]", "broadcasting"]),
        (normal(4, 3), labels(3, 4, 1), ["[4, 1]", "[4, 3]", "[N, ...]"]),
        (normal(4, 3), labels(3, 4, 3), ["[4, 3]", "[N, ...]"]),
        (normal(4, 5, 3), labels(3, 4), ["[4]", "[4, 5, 3]"]),
        (normal(4, 2, 5, 3), labels(3, 4, 2, 3), ["[4, 2, 3]", "[4, 2, 5, 3]"]),
        (normal(4), labels(3, 4), ["[4]", "[N, C, ...]"]),
        (normal(4, 3), torch.tensor([0, 1, 2, 3]), ["0..3", "3 classes"]),
        (normal(4, 3), torch.tensor([0, 1, 2, -100]), ["-100..2", "ignored targets"]),
    ],
    ids=lambda value: "" if isinstance(value, Tensor) else value[0],
)
def test_targets_of_a_wrong_dtype_shape_or_range(
    outputs: Tensor, targets: Tensor, words: list[str]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        resolve_loss(F.cross_entropy, outputs, targets)
    for word in words:
        assert word in str(caught.value)
