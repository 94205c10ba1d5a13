"""Losses of no known family, losses that are refused, and targets that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
    NonFiniteError,
    UnsupportedError,
)
from kronecker_probe.gradients.losses import resolve_loss
from tests.functional_oracle import RELATIVE, assert_close
from tests.test_losses import labels, normal, share_gradients, share_hessians

Loss = Callable[[Tensor, Tensor], Tensor]

_parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)
POINTS = torch.tensor([0, 1, 2, 0, 1, 2])
ANCHORS = torch.linspace(1, 2, 6, dtype=torch.float64)


def focal(o: Tensor, y: Tensor) -> Tensor:
    p = o.softmax(-1).gather(1, y[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


def gaussian(o: Tensor, y: Tensor) -> Tensor:
    return (0.5 * (o[:, 0] - y).square() * (-o[:, 1]).exp() + 0.5 * o[:, 1]).mean()


# Means and sums over data: loss, outputs, targets, reduction.
CUSTOM: dict[str, tuple[Loss, Tensor, Tensor, str]] = {
    "temperature": (lambda o, y: F.cross_entropy(o / 2, y), normal(6, 3), POINTS, "mean"),
    "z-loss": (
        lambda o, y: F.cross_entropy(o, y) + 1e-2 * o.logsumexp(-1).square().mean(),
        normal(6, 3), POINTS, "mean",
    ),
    "penalty on outputs": (
        lambda o, y: F.cross_entropy(o, y, reduction="sum") + 1e-3 * o.square().sum(),
        normal(6, 3), POINTS, "sum",
    ),
    "clamped logits": (
        lambda o, y: F.cross_entropy(o.clamp(-1, 1), y), normal(6, 3), POINTS, "mean",
    ),
    "Poisson": (F.poisson_nll_loss, normal(6, 3), labels(9, 6, 3).double(), "mean"),
    "Poisson of counts in one output": (
        lambda o, y: F.poisson_nll_loss(o[:, 0], y), normal(6, 1), labels(900, 6), "mean",
    ),
    "Poisson of rates": (
        lambda o, y: F.poisson_nll_loss(o, y, log_input=False), normal(6, 3).exp(),
        1.0 + labels(9, 6, 3), "mean",
    ),
    "cross-entropy of probabilities": (
        F.binary_cross_entropy, normal(6, 3).sigmoid(), labels(2, 6, 3).double(), "mean",
    ),
    "Huber": (F.huber_loss, normal(6, 3, scale=3), normal(6, 3, seed=1), "mean"),
    "fourth power": (
        lambda o, y: (o - y).pow(4).sum(), normal(6, 2, 3), normal(6, 2, 3, seed=1), "sum",
    ),
    "log-cosh of one output": (
        lambda o, y: (o - y).cosh().log().mean(), normal(6), normal(6, seed=1), "mean",
    ),
    "exponential": (
        lambda o, y: (-(2 * y - 1) * o).exp().mean(), normal(6), labels(2, 6), "mean",
    ),
    "norm of a datum's error": (
        lambda o, y: ((o - y).square().sum(-1) + 1).sqrt().mean(), normal(6, 3),
        normal(6, 3, seed=1), "mean",
    ),
    "one datum": (lambda o, y: F.cross_entropy(o / 2, y), normal(1, 3), labels(3, 1), "mean"),
    "targets in a column": (
        lambda o, y: F.huber_loss(o, y.expand_as(o)), normal(6, 3), normal(6, 1, seed=1), "mean",
    ),
}  # fmt: skip

custom = pytest.mark.parametrize("name", CUSTOM)


@custom
def test_any_mean_or_sum_over_data_has_shares(name: str) -> None:
    loss, outputs, targets, reduction = CUSTOM[name]
    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction) == ("custom", reduction)
    assert found.value == pytest.approx(float(loss(outputs, targets)), rel=1e-14)
    gradient = found.true_gradient(outputs, targets)
    assert_close(gradient, share_gradients(loss, outputs, targets, reduction))
    assert found.accuracy(outputs, targets) is None


@custom
def test_custom_root_columns_and_products(name: str) -> None:
    loss, outputs, targets, reduction = CUSTOM[name]
    found = resolve_loss(loss, outputs, targets)
    H = share_hessians(loss, outputs, targets, reduction)
    columns = torch.stack(list(found.root_columns(outputs)), dim=1)
    assert columns.shape[1] == found.n_columns(outputs)
    S = columns.reshape(*columns.shape[:2], -1)
    assert_close(S.mT @ S, H)
    sizes = S.square().sum(-1)
    assert bool((sizes[:, 1:] <= sizes[:, :-1] * (1 + RELATIVE)).all())  # largest first
    u = normal(*outputs.shape, seed=7)
    product = found.hessian_product(outputs, u)
    assert_close(product.reshape(len(u), -1, 1), H @ u.reshape(len(u), -1, 1))


@given(
    n_examples=st.integers(1, 6),
    width=st.integers(1, 4),
    power=st.sampled_from([1.5, 3.0, 4.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_powers_of_errors_have_their_closed_form(
    n_examples: int, width: int, power: float, reduction: str, scale: float, dtype: torch.dtype
) -> None:
    """|f - y|^p has the diagonal Hessian p (p - 1) |f - y|^(p - 2)."""
    outputs = normal(n_examples, width, scale=scale).to(dtype)
    targets = normal(n_examples, width, scale=scale, seed=1).to(dtype)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        total = (o - y).abs().pow(power).sum()
        return total / len(o) if reduction == "mean" else total

    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction) == ("custom", reduction)
    S = torch.stack(list(found.root_columns(outputs)), dim=1).double()
    error = (outputs.double() - targets.double()).abs()
    expected = power * (power - 1) * error.pow(power - 2)
    tolerance = 1e3 * torch.finfo(dtype).eps
    assert_close(S.mT @ S, torch.diag_embed(expected), relative=tolerance)


def test_custom_losses_in_single_precision() -> None:
    loss, outputs, targets, _ = CUSTOM["z-loss"]
    found = resolve_loss(loss, outputs.float(), targets)
    columns = torch.stack(list(found.root_columns(outputs.float())), dim=1)
    assert columns.dtype == torch.float32
    H = share_hessians(loss, outputs, targets, "mean")
    assert_close((columns.mT @ columns).double(), H, relative=1e-5)


def test_a_custom_loss_goes_through_capture() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs = normal(6, 4, seed=3)
    scaled = nn.Sequential(model, nn.Threshold(-1e9, 0.0))

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o / 2, y)

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = scaled

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) / 2

    for target in ("ggn", "empirical-fisher"):
        ours = kp.capture(model, loss, (inputs, POINTS), target=target)
        theirs = kp.capture(Halved(), F.cross_entropy, (inputs, POINTS), target=target)
        for name in ours:
            one = kp.SecondMoment(ours[name])
            other = kp.SecondMoment(theirs[f"model.0.{name}"])
            assert kp.relative_error(one, other) < 1e-7


# -- no Gauss-Newton, or no sampling model ------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "targets", "words"),
    [
        (F.nll_loss, POINTS, ["zero", "linear", "cross_entropy is the same loss"]),
        (F.l1_loss, normal(6, 3, seed=1), ["zero", "[6, 3]", "'empirical-fisher'"]),
        (F.multi_margin_loss, POINTS, ["no second derivative", "multi_margin", "differentiable"]),
        (
            lambda o, y: -F.cross_entropy(o, y), POINTS,
            ["not convex", "eigenvalue -", "the largest of the batch", "'empirical-fisher'"],
        ),
        (
            lambda o, y: (o.tanh() - y).square().mean(), normal(6, 3, seed=1),
            ["not convex", "example", "eigenvalue"],
        ),
        (gaussian, normal(6, seed=1, scale=9), ["not convex", "eigenvalue"]),
        (focal, POINTS, ["not convex", "eigenvalue"]),
    ],
)  # fmt: skip
def test_losses_without_a_gauss_newton_matrix(
    loss: Loss, targets: Tensor, words: list[str]
) -> None:
    outputs = normal(6, 3, scale=3)
    found = resolve_loss(loss, outputs, targets)
    gradient = found.true_gradient(outputs, targets)
    assert_close(gradient, share_gradients(loss, outputs, targets, "mean"))
    with pytest.raises(UnsupportedError) as caught:
        list(found.root_columns(outputs))
    for word in words:
        assert word in str(caught.value)


def test_the_eigenvalue_that_is_named_is_the_smallest() -> None:
    outputs, targets = normal(6, 3, scale=3), normal(6, 3, seed=1)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return (o.tanh() - y).square().mean()

    values = torch.linalg.eigvalsh(share_hessians(loss, outputs, targets, "mean"))
    datum = int(values[:, 0].argmin())
    with pytest.raises(UnsupportedError) as caught:
        list(resolve_loss(loss, outputs, targets).root_columns(outputs))
    assert f"at example {datum} its Hessian has the eigenvalue {float(values.min()):.3g}" in str(
        caught.value
    )


def test_a_custom_loss_has_no_labels_to_draw() -> None:
    outputs = normal(6, 3)
    found = resolve_loss(lambda o, y: F.cross_entropy(o / 2, y), outputs, POINTS)
    with pytest.raises(UnsupportedError) as caught:
        found.sampled(outputs, torch.Generator())
    for word in ("'fisher' draws labels", "'ggn' or 'empirical-fisher'", "temperature"):
        assert word in str(caught.value)


def test_a_custom_hessian_that_would_not_fit() -> None:
    outputs = torch.zeros(2, 100_000).normal_(generator=torch.Generator().manual_seed(0))
    found = resolve_loss(lambda o, y: (o - y).pow(4).mean(), outputs, torch.zeros_like(outputs))
    with pytest.raises(MemoryBudgetError, match=r"Hessian of loss_fn in 100000 outputs.*GB"):
        next(iter(found.root_columns(outputs)))


# -- no mean or sum over data -------------------------------------------------------------------

REFUSED: dict[str, tuple[Loss, str]] = {
    "root": (lambda o, y: F.cross_entropy(o, y).sqrt(), "neither a mean nor a sum"),
    "divided by the root of N": (
        lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(y) ** 0.5, "neither a mean",
    ),
    "weights by place": (
        lambda o, y: (F.cross_entropy(o, y, reduction="none") * torch.arange(len(y))).mean(),
        "neither a mean nor a sum",
    ),
    "hard examples": (
        lambda o, y: F.cross_entropy(o, y, reduction="none").topk(2)[0].mean(),
        "neither a mean nor a sum",
    ),
    "spread of the batch": (
        lambda o, y: F.cross_entropy(o, y) + (o - o.mean(0)).square().mean(), "neither a mean",
    ),
    "in-batch negatives": (
        lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(y))), "neither a mean",
    ),
    "pairs of neighbours": (
        lambda o, y: (o[::2] - o[1::2]).square().sum() + F.cross_entropy(o, y, reduction="sum"),
        "couples data",
    ),
    "values that the loss holds for each datum": (
        lambda o, y: (F.cross_entropy(o / 2, y, reduction="none") * ANCHORS).mean(),
        "make these part of the targets",
    ),
    "noise": (lambda o, y: F.cross_entropy(o + torch.randn_like(o), y), "random: two calls"),
    "penalty on parameters": (
        lambda o, y: F.cross_entropy(o, y) + _parameter.square().sum(), "penalty on parameters",
    ),
    "temperature that is learned": (
        lambda o, y: F.cross_entropy(o * _parameter, y), "parameters of its own.*detached",
    ),
    "detached": (lambda o, y: F.cross_entropy(o.detach(), y), "no gradient in outputs"),
    "constant in outputs": (lambda o, y: _parameter.sum(), "besides the outputs"),
    "no gradient at all": (lambda o, y: torch.zeros(()), "no gradient in outputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_are_no_mean_or_sum_over_data(name: str) -> None:
    loss, words = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(UnsupportedError, match=rf"loss_fn.*{words}"):
        resolve_loss(loss, normal(6, 3), POINTS)


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


def test_a_gradient_that_is_not_finite_is_named() -> None:
    outputs = normal(4, 3)
    outputs[0, 0] = 0
    with pytest.raises(NonFiniteError, match="gradient of loss_fn"):
        resolve_loss(lambda o, y: o.abs().sqrt().sum(), outputs, labels(3, 4))


def test_all_labels_ignored() -> None:
    ignored = torch.full((4,), -100)
    with pytest.raises(NonFiniteError, match="every label of the batch is ignored"):
        resolve_loss(F.cross_entropy, normal(4, 3), ignored)
    with pytest.raises(InvalidInputError, match="every label is ignored"):
        resolve_loss(nn.CrossEntropyLoss(reduction="sum"), normal(4, 3), ignored)


def test_an_error_of_the_loss_itself_is_not_hidden() -> None:
    def loss(o: Tensor, y: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        resolve_loss(loss, normal(4, 3), labels(3, 4))


# -- targets --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "words"),
    [
        (F.cross_entropy, normal(4, 3), labels(3, 4).int(), ["int32", "targets.long()"]),
        (F.cross_entropy, normal(4, 3), labels(3, 4).bool(), ["bool", "int64"]),
        (F.cross_entropy, normal(4, 3), labels(3, 4).to(torch.complex64), ["complex64", "int64"]),
        (
            F.cross_entropy, normal(4, 3), labels(3, 4).double(),
            ["[4]", "[4, 3]", "broadcasting", "int64"],
        ),
        (F.cross_entropy, normal(4, 3), labels(3, 4, 1), ["[4, 1]", "[4, 3]", "[N, ...]"]),
        (F.cross_entropy, normal(4, 3), labels(3, 4, 3), ["[4, 3]", "[N, ...]"]),
        (F.cross_entropy, normal(4, 5, 3), labels(3, 4), ["[4]", "[4, 5, 3]"]),
        (F.cross_entropy, normal(4, 2, 5, 3), labels(3, 4, 2, 3), ["[4, 2, 3]", "[4, 2, 5, 3]"]),
        (F.cross_entropy, normal(4), labels(3, 4), ["[4]", "[N, C, ...]"]),
        (F.cross_entropy, normal(4, 3), torch.tensor([0, 1, 2, 3]), ["0..3", "3 classes"]),
        (F.cross_entropy, normal(4, 3), torch.tensor([0, 1, 2, -1]), ["-1..2", "ignore_index"]),
        (
            nn.CrossEntropyLoss(ignore_index=-1), normal(4, 3), torch.tensor([0, 1, 2, -100]),
            ["-100..2", "from 0 to 2", "IndexError"],
        ),
        (F.mse_loss, normal(4, 3), normal(4), ["[4]", "[4, 3]", "no broadcasting"]),
        (F.mse_loss, normal(4, 1), normal(4), ["[4]", "[4, 1]", "broadcasting"]),
        (F.mse_loss, normal(4), normal(4, 1), ["[4, 1]", "[4]", "targets of others"]),
        (
            lambda o, y: (o - y).pow(4).mean(), normal(5, 1), normal(5, seed=1),
            ["[5]", "[5, 1]", "targets of others"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_targets_of_a_wrong_dtype_shape_or_range(
    loss: Loss, outputs: Tensor, targets: Tensor, words: list[str]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        resolve_loss(loss, outputs, targets)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.gpu
def test_labels_outside_the_classes_do_not_stop_the_device() -> None:
    outputs, targets = normal(4, 3).cuda(), torch.tensor([0, 1, 2, 7]).cuda()
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64).cuda())
    captured = torch.ones(3, dtype=torch.float64).cuda()
    for loss in (
        F.cross_entropy, weighted, lambda o, y: F.cross_entropy(o, y, weight=captured),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match=r"0\.\.7.*3 classes"):
            resolve_loss(loss, outputs, targets)
        ignored = targets.clamp(max=2).index_fill(0, torch.tensor([0]).cuda(), -100)
        assert resolve_loss(loss, outputs, ignored).scales[0].item() == 0
    assert float(outputs.sum()) == pytest.approx(float(normal(4, 3).sum()))  # it still works


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUSTOM)
def test_custom_losses_on_a_device(name: str) -> None:
    loss, outputs, targets, reduction = CUSTOM[name]
    found = resolve_loss(loss, outputs.cuda(), targets.cuda())
    assert (found.kind, found.reduction) == ("custom", reduction)
    S = torch.stack(list(found.root_columns(outputs.cuda())), dim=1).cpu()
    S = S.reshape(*S.shape[:2], -1)
    assert_close(S.mT @ S, share_hessians(loss, outputs, targets, reduction), RELATIVE)
