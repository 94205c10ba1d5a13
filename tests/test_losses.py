"""Recognition of losses; Hessians and their roots against torch.func on the user's loss itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import hessian

from kronecker_probe.gradients.losses import SoftmaxLoss, resolve_loss
from tests.functional_oracle import RELATIVE, assert_close

Loss = Callable[[Tensor, Tensor], Tensor]

# Standard errors that a mean of sampled draws may be off, the worst of a few dozen entries.
STANDARD_ERRORS = 6.0


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(classes: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def entropy_last(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction=reduction)


WEIGHTS = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
SOME = torch.tensor([2, -100, 0, 1])
SOME_POSITIONS = labels(3, 4, 5).masked_fill(labels(2, 4, 5, seed=3) == 0, -100)
# One datum is ignored altogether, and one position in every datum.
FEW_POSITIONS = SOME_POSITIONS.index_fill(0, torch.tensor([1]), -100).index_fill(
    1, torch.tensor([3]), -100
)
BITS = labels(2, 4, 3).double()
bce = F.binary_cross_entropy_with_logits

# name -> loss, outputs, targets, kind, reduction, and s: one number for all data, or None
KNOWN: dict[str, tuple[Loss, Tensor, Tensor, str, str, float | None]] = {
    "entropy": (F.cross_entropy, normal(4, 3), labels(3, 4), "cross-entropy", "mean", 1.0),
    "entropy module": (
        nn.CrossEntropyLoss(), normal(4, 3), labels(3, 4), "cross-entropy", "mean", 1.0,
    ),
    "entropy sum": (
        lambda o, y: F.cross_entropy(o, y, reduction="sum"), normal(4, 3), labels(3, 4),
        "cross-entropy", "sum", 1.0,
    ),
    "entropy by hand": (
        lambda o, y: -o.log_softmax(-1).gather(1, y[:, None]).mean(), normal(4, 3), labels(3, 4),
        "cross-entropy", "mean", 1.0,
    ),
    "entropy of one datum": (
        F.cross_entropy, normal(1, 3), labels(3, 1), "cross-entropy", "mean", 1.0,
    ),
    "entropy of two classes": (
        F.cross_entropy, normal(4, 2), labels(2, 4), "cross-entropy", "mean", 1.0,
    ),
    "half an entropy": (
        lambda o, y: F.cross_entropy(o, y) / 2, normal(4, 3), labels(3, 4),
        "cross-entropy", "mean", 0.5,
    ),
    "entropy and a linear term": (
        lambda o, y: F.cross_entropy(o, y) + 0.1 * o.sum(-1).mean(), normal(4, 3), labels(3, 4),
        "cross-entropy", "mean", 1.0,
    ),
    "entropy of positions, classes second": (
        F.cross_entropy, normal(4, 3, 5), labels(3, 4, 5), "cross-entropy", "mean", 1 / 5,
    ),
    "entropy of positions, classes last": (
        entropy_last, normal(4, 5, 3), labels(3, 4, 5), "cross-entropy", "mean", 1 / 5,
    ),
    "entropy of as many positions as classes, classes second": (
        F.cross_entropy, normal(4, 3, 3), labels(3, 4, 3), "cross-entropy", "mean", 1 / 3,
    ),
    "entropy of as many positions as classes, classes last": (
        entropy_last, normal(4, 3, 3), labels(3, 4, 3), "cross-entropy", "mean", 1 / 3,
    ),
    "entropy of pixels": (
        F.cross_entropy, normal(2, 3, 2, 2), labels(3, 2, 2, 2), "cross-entropy", "mean", 1 / 4,
    ),
    "entropy of flattened positions": (
        lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), normal(4, 5, 3),
        labels(3, 4, 5), "cross-entropy", "mean", 1 / 5,
    ),
    "entropy summed over positions": (
        lambda o, y: entropy_last(o, y, "sum") / len(y), normal(4, 5, 3), labels(3, 4, 5),
        "cross-entropy", "mean", 1.0,
    ),
    "entropy sum of positions": (
        lambda o, y: entropy_last(o, y, "sum"), normal(4, 5, 3), labels(3, 4, 5),
        "cross-entropy", "sum", 1.0,
    ),
    "ignored labels": (
        F.cross_entropy, normal(4, 3), SOME, "cross-entropy", "mean", None,
    ),
    "ignored class": (
        nn.CrossEntropyLoss(ignore_index=2), normal(4, 3), labels(3, 4), "cross-entropy", "mean",
        None,
    ),
    "ignored positions": (
        entropy_last, normal(4, 5, 3), FEW_POSITIONS, "cross-entropy", "mean", None,
    ),
    "ignored positions, sum": (
        lambda o, y: entropy_last(o, y, "sum"), normal(4, 5, 3), SOME_POSITIONS,
        "cross-entropy", "sum", None,
    ),
    "label smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1), normal(4, 3), labels(3, 4),
        "cross-entropy", "mean", 1.0,
    ),
    "class weights": (
        nn.CrossEntropyLoss(weight=WEIGHTS), normal(4, 3), labels(3, 4),
        "cross-entropy", "mean", None,
    ),
    "class weights, sum": (
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), normal(4, 3), labels(3, 4),
        "cross-entropy", "sum", None,
    ),
    "class weights, smoothing and ignored pixels": (
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2), normal(4, 3, 5), SOME_POSITIONS,
        "cross-entropy", "mean", None,
    ),
    "probabilities": (
        F.cross_entropy, normal(4, 3), normal(4, 3, seed=2).softmax(-1),
        "cross-entropy", "mean", 1.0,
    ),
    "probabilities of positions, with weights": (
        nn.CrossEntropyLoss(weight=WEIGHTS), normal(4, 3, 5), normal(4, 3, 5, seed=2).softmax(1),
        "cross-entropy", "mean", None,
    ),
    "probabilities, classes last": (
        lambda o, y: -(y * o.log_softmax(-1)).sum(-1).mean(), normal(4, 5, 3),
        normal(4, 5, 3, seed=2).softmax(-1), "cross-entropy", "mean", 1 / 5,
    ),
    "distillation": (
        lambda o, y: F.kl_div(o.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
        normal(4, 3), normal(4, 3, seed=2), "cross-entropy", "mean", 1.0,
    ),
    "square": (F.mse_loss, normal(4, 3), normal(4, 3, seed=1), "mse", "mean", 2 / 3),
    "square module": (nn.MSELoss(), normal(4, 3), normal(4, 3, seed=1), "mse", "mean", 2 / 3),
    "square by hand": (
        lambda o, y: ((y - o) ** 2).mean(), normal(4, 3), normal(4, 3, seed=1),
        "mse", "mean", 2 / 3,
    ),
    "square of one output": (F.mse_loss, normal(4), normal(4, seed=1), "mse", "mean", 2.0),
    "square of a column against a vector, squeezed": (
        lambda o, y: F.mse_loss(o.squeeze(-1), y), normal(4, 1), normal(4, seed=1),
        "mse", "mean", 2.0,
    ),
    "square of counts": (
        lambda o, y: (o - y).square().mean(), normal(4, 3), labels(9, 4, 3), "mse", "mean", 2 / 3),
    "square of a grid": (
        F.mse_loss, normal(4, 2, 3), normal(4, 2, 3, seed=1), "mse", "mean", 1 / 3,
    ),
    "square sum": (
        nn.MSELoss(reduction="sum"), normal(4, 3), normal(4, 3, seed=1), "mse", "sum", 2.0,
    ),
    "half a square norm": (
        lambda o, y: (o - y).square().sum(-1).mean() / 2, normal(4, 3), normal(4, 3, seed=1),
        "mse", "mean", 1.0,
    ),
    "square with output weights": (
        lambda o, y: (WEIGHTS * (o - y).square()).mean(), normal(4, 3), normal(4, 3, seed=1),
        "mse", "mean", None,
    ),
    "relative square": (
        lambda o, y: ((o - y) / y).square().mean(), normal(4, 3), normal(4, 3, seed=1),
        "mse", "mean", None,
    ),
    "square of what is not missing": (
        lambda o, y: (o - y)[y != 0].square().sum(), normal(4, 3), BITS, "mse", "sum", None,
    ),
    "binary": (bce, normal(4, 3), BITS, "binary-cross-entropy", "mean", 1 / 3),
    "binary, one output": (
        nn.BCEWithLogitsLoss(), normal(4), BITS[:, 0], "binary-cross-entropy", "mean", 1.0,
    ),
    "binary, class indices": (
        lambda o, y: bce(o[:, 0], y.double()), normal(4, 1), labels(2, 4),
        "binary-cross-entropy", "mean", 1.0,
    ),
    "binary, soft": (
        nn.BCEWithLogitsLoss(reduction="sum"), normal(4, 3), normal(4, 3, seed=1).sigmoid(),
        "binary-cross-entropy", "sum", 1.0,
    ),
    "binary with weight and pos_weight": (
        nn.BCEWithLogitsLoss(weight=WEIGHTS, pos_weight=WEIGHTS.flip(0)), normal(4, 3), BITS,
        "binary-cross-entropy", "mean", None,
    ),
    "binary, soft, with pos_weight": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), normal(4, 3), normal(4, 3, seed=1).sigmoid(),
        "binary-cross-entropy", "mean", None,
    ),
}  # fmt: skip

known = pytest.mark.parametrize("name", KNOWN)


def share_hessians(loss: Loss, outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The Hessian of each datum's share, [N, K, K], from that of the whole batch's loss."""
    n_examples = len(outputs)
    full = hessian(lambda flat: loss(flat.view(outputs.shape), targets))(outputs.reshape(-1))
    blocks = full.view(n_examples, outputs[0].numel(), n_examples, -1).transpose(1, 2)
    apart = torch.arange(n_examples)
    coupled = blocks.clone()
    coupled[apart, apart] = 0
    assert float(coupled.abs().max()) <= RELATIVE * float(blocks.abs().max())
    return blocks[apart, apart] * (n_examples if reduction == "mean" else 1)


def share_gradients(loss: Loss, outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    leaf = outputs.clone().requires_grad_(True)
    loss(leaf, targets).backward()
    return leaf.grad * (len(outputs) if reduction == "mean" else 1)


@known
def test_a_loss_is_recognized_by_what_it_computes(name: str) -> None:
    loss, outputs, targets, kind, reduction, scale = KNOWN[name]
    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction) == (kind, reduction)
    assert found.value == pytest.approx(float(loss(outputs, targets)), rel=1e-14)
    if scale is not None:
        assert found.scales.unique().tolist() == pytest.approx([scale], rel=1e-14)
    if isinstance(found, SoftmaxLoss) and targets.ndim < outputs.ndim:
        d = found.class_dim
        assert targets.shape == outputs.shape[:d] + outputs.shape[d + 1 :]


@known
def test_root_columns_are_a_root_of_the_hessian(name: str) -> None:
    loss, outputs, targets, _, reduction, _ = KNOWN[name]
    found = resolve_loss(loss, outputs, targets)
    columns = torch.stack(list(found.root_columns(outputs)), dim=1)
    assert columns.shape[1] == found.n_columns(outputs)
    S = columns.reshape(*columns.shape[:2], -1)
    assert_close(S.mT @ S, share_hessians(loss, outputs, targets, reduction))


@known
def test_hessian_products(name: str) -> None:
    loss, outputs, targets, _, reduction, _ = KNOWN[name]
    u = normal(*outputs.shape, seed=7)
    product = resolve_loss(loss, outputs, targets).hessian_product(outputs, u)
    H = share_hessians(loss, outputs, targets, reduction)
    assert_close(product.reshape(len(u), -1, 1), H @ u.reshape(len(u), -1, 1))


@known
def test_true_gradient_is_that_of_the_share(name: str) -> None:
    loss, outputs, targets, _, reduction, _ = KNOWN[name]
    gradient = resolve_loss(loss, outputs, targets).true_gradient(outputs, targets)
    assert_close(gradient, share_gradients(loss, outputs, targets, reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_share_of_a_normalized_loss_by_hand(reduction: str, smoothing: float) -> None:
    """Torch divides the weighted mean by the weights of the labels, smoothed or not."""
    outputs, targets = normal(4, 3), SOME
    loss = nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=smoothing, reduction=reduction)
    w = torch.where(targets >= 0, WEIGHTS[targets.clamp(min=0)], 0)
    s = (1 - smoothing) * w + smoothing * (targets >= 0).double() * WEIGHTS.mean()
    if reduction == "mean":
        s = s * len(targets) / w.sum()
    found = resolve_loss(loss, outputs, targets)
    assert_close(found.scales[:, 0], s)


@known
def test_sampled_gradients_have_the_hessian_as_covariance(name: str) -> None:
    loss, outputs, targets, _, reduction, _ = KNOWN[name]
    n_examples, copies = len(outputs), 6000
    many = outputs.repeat(copies, *[1] * (outputs.ndim - 1))
    again = targets.repeat(copies, *[1] * (targets.ndim - 1))
    found = resolve_loss(loss, many, again)  # the share of a datum stays as it is
    drawn = found.sampled(many, torch.Generator().manual_seed(4)).reshape(copies, n_examples, -1)
    expected = share_hessians(loss, outputs, targets, reduction)
    products = drawn[..., :, None] * drawn[..., None, :]
    error = products.std(0) / math.sqrt(copies) + 1e-12
    assert float(((products.mean(0) - expected) / error).abs().max()) < STANDARD_ERRORS
    assert float(error.norm() / expected.norm()) < 0.1
    mean = drawn.mean(0) / (drawn.std(0) / math.sqrt(copies) + 1e-12)
    assert float(mean.abs().max()) < STANDARD_ERRORS


def test_a_sampled_cross_entropy_gradient_is_that_of_one_of_the_labels() -> None:
    outputs = normal(200, 3)
    loss = resolve_loss(F.cross_entropy, outputs, labels(3, 200))
    drawn = loss.sampled(outputs, torch.Generator().manual_seed(0))
    options = torch.stack(
        [loss.true_gradient(outputs, torch.full((200,), k)) for k in range(3)], dim=1
    )
    distance = (options - drawn[:, None]).abs().amax(-1)
    assert float(distance.amin(1).max()) < 1e-14
    assert set(distance.argmin(1).tolist()) == {0, 1, 2}


def test_enumerated_labels_average_to_the_hessian() -> None:
    """The Fisher mean over labels, of cross-entropy and of binary cross-entropy, exactly."""
    outputs = normal(5, 3)
    loss = resolve_loss(F.cross_entropy, outputs, labels(3, 5))
    g = torch.stack([loss.true_gradient(outputs, torch.full((5,), k)) for k in range(3)], dim=1)
    fisher = torch.einsum("ik,ika,ikb->iab", outputs.softmax(-1), g, g)
    S = torch.stack(list(loss.root_columns(outputs)), dim=1)
    assert_close(S.mT @ S, fisher)
    one = outputs[:, 0]
    binary = resolve_loss(bce, one, torch.ones_like(one))
    both = [binary.true_gradient(one, torch.full_like(one, y)) for y in (1.0, 0.0)]
    p = one.sigmoid()
    (root,) = binary.root_columns(one)
    assert_close(root**2, p * both[0] ** 2 + (1 - p) * both[1] ** 2)


@pytest.mark.parametrize("size", [1.0, 50.0, 1e4])
def test_roots_of_saturated_outputs(size: float) -> None:
    outputs = torch.tensor([[size, 0.0, -size], [0.0, size, size]], dtype=torch.float64)
    for loss, targets in ((F.cross_entropy, torch.tensor([0, 1])), (bce, BITS[:2])):
        found = resolve_loss(loss, outputs, targets)
        S = torch.stack(list(found.root_columns(outputs)), dim=1)
        assert bool(torch.isfinite(S).all())
        difference = S.mT @ S - share_hessians(loss, outputs, targets, "mean")
        assert float(difference.abs().max()) < 1e-15


@pytest.mark.parametrize("fitted", [1e2, 1e4])
def test_a_perfect_fit_is_still_recognized(fitted: float) -> None:
    targets = labels(3, 5)
    outputs = fitted * F.one_hot(targets, 3).double()
    assert resolve_loss(F.cross_entropy, outputs, targets).kind == "cross-entropy"
    values = normal(5, 3)
    found = resolve_loss(F.mse_loss, values, values.clone())
    assert (found.kind, found.reduction, found.value) == ("mse", "mean", 0.0)


@pytest.mark.parametrize("constant", [0.0, 0.5, 1.0, 7.0])
def test_outputs_that_are_all_alike(constant: float) -> None:
    """A head that starts at zero, or a sigmoid of one."""
    outputs = torch.full((6, 3), constant, dtype=torch.float64)
    assert resolve_loss(F.cross_entropy, outputs, labels(3, 6)).kind == "cross-entropy"
    assert resolve_loss(F.mse_loss, outputs, normal(6, 3)).kind == "mse"
    assert resolve_loss(bce, outputs, labels(2, 6, 3).double()).kind == "binary-cross-entropy"


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    n_examples=st.integers(2, 5),
    output_scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e3, 1e12]),
    target_scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e3, 1e12]),
    reduction=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_mse_is_recognized_at_any_scale_and_shape(
    shape: list[int], n_examples: int, output_scale: float, target_scale: float, reduction: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    outputs = normal(n_examples, *shape, scale=output_scale).to(dtype)
    targets = normal(n_examples, *shape, seed=1, scale=target_scale).to(dtype)
    loss = nn.MSELoss(reduction=reduction)
    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction) == ("mse", reduction)
    scale = 2 / max(1, math.prod(shape)) if reduction == "mean" else 2
    assert found.scales.unique().tolist() == pytest.approx([scale], rel=64 * torch.finfo(dtype).eps)


@given(
    classes=st.integers(2, 5),
    positions=st.lists(st.integers(1, 4), max_size=2),
    n_examples=st.integers(1, 5),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
    last=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    weighted=st.booleans(),
    ignored=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_cross_entropy_family_is_recognized_at_any_scale_and_shape(
    classes: int, positions: list[int], n_examples: int, scale: float, last: bool, smoothing: float,
    weighted: bool, ignored: bool, reduction: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    targets = labels(classes, n_examples, *positions)
    if ignored:
        targets.view(-1)[1:] = targets.view(-1)[1:].masked_fill(
            labels(2, targets.numel() - 1, seed=5) == 0, -100
        )
    class_dim = len(positions) + 1 if last else 1
    outputs = normal(n_examples, *positions, classes, scale=scale).to(dtype).movedim(-1, class_dim)
    weight = torch.linspace(0.5, 2, classes) if weighted else torch.ones(classes)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            o.movedim(class_dim, 1), y, weight.to(o.dtype), reduction=reduction,
            label_smoothing=smoothing,
        )  # fmt: skip

    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction) == ("cross-entropy", reduction)
    assert found.class_dim == class_dim
    S = torch.stack(list(found.root_columns(outputs)), dim=1).flatten(2)
    expected = share_hessians(loss, outputs.double(), targets, reduction)
    error, size = (float(matrix.norm()) for matrix in (S.mT @ S - expected, expected))
    assert error <= 64 * torch.finfo(dtype).eps * max(1, scale) * max(1, size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_large_batches_of_low_precision_are_recognized(dtype: torch.dtype, reduction: str) -> None:
    outputs = normal(1024, 256).to(dtype)
    entropy = resolve_loss(nn.CrossEntropyLoss(reduction=reduction), outputs, labels(256, 1024))
    assert (entropy.kind, entropy.reduction) == ("cross-entropy", reduction)
    targets = (outputs.float() + 1e-2 * normal(1024, 256, seed=1).float()).to(dtype)
    square = resolve_loss(nn.MSELoss(reduction=reduction), outputs, targets)
    assert (square.kind, square.reduction) == ("mse", reduction)
    first = next(iter(square.root_columns(outputs)))
    for tensor in (first, square.true_gradient(outputs, targets)):
        assert tensor.dtype == torch.float32


def test_many_data_of_which_most_are_ignored() -> None:
    outputs, targets = normal(3000, 7).float(), torch.full((3000,), -100)
    targets[1234], targets[2999] = 3, 5
    found = resolve_loss(F.cross_entropy, outputs, targets)
    assert (found.kind, found.reduction) == ("cross-entropy", "mean")
    assert found.scales.nonzero()[:, 0].tolist() == [1234, 2999]
    assert found.scales[1234].item() == pytest.approx(1500, rel=1e-6)
    assert found.accuracy(outputs, targets) is not None


def test_one_datum_of_many_that_leaves_the_family() -> None:
    """Clamped where the model is, though not at the few data that are looked at first."""
    outputs = normal(3000, 3)
    outputs[1777] = torch.tensor([30.0, 0.0, -30.0])
    found = resolve_loss(
        lambda o, y: F.cross_entropy(o.clamp(-10, 10), y), outputs, labels(3, 3000)
    )
    assert found.kind == "custom"


def test_regression_targets_of_another_precision() -> None:
    outputs, targets = normal(5, 3).float(), normal(5, 3, seed=1)
    assert resolve_loss(F.mse_loss, outputs, targets).kind == "mse"
    near = outputs.double() + 1e-7 * targets
    assert resolve_loss(lambda o, y: F.mse_loss(o, y.float()), outputs, near).kind == "mse"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_that_takes_low_precision_only(dtype: torch.dtype) -> None:
    outputs, targets = normal(32, 4).to(dtype), labels(4, 32)
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=dtype)
    found = resolve_loss(nn.CrossEntropyLoss(weight=weight), outputs, targets)
    assert (found.kind, found.reduction) == ("cross-entropy", "mean")
    w = weight.double()[targets]
    assert_close(found.scales[:, 0].double(), w * len(w) / w.sum(), relative=0.05)
    assert found.true_gradient(outputs, targets).dtype == torch.float32


def test_under_autocast_the_loss_is_taken_in_full_precision() -> None:
    A = normal(3, 3).float()

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(o @ A, y)

    outputs, targets = normal(6, 3).float(), normal(6, 3, seed=1).float()
    plain = resolve_loss(loss, outputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = resolve_loss(loss, outputs, targets)
        entropy = resolve_loss(F.cross_entropy, outputs.bfloat16(), labels(3, 6))
    assert entropy.kind == "cross-entropy"
    assert found.value == plain.value
    assert_close(
        found.true_gradient(outputs, targets), plain.true_gradient(outputs, targets), relative=1e-6
    )


def test_a_loss_that_writes_into_what_it_is_given() -> None:
    def loss(o: Tensor, y: Tensor) -> Tensor:
        y[y == 2] = -100
        o *= 2
        o /= 2
        return F.cross_entropy(o, y)

    outputs, targets = normal(4, 3), torch.tensor([0, 2, 1, 2])
    before = outputs.clone(), targets.clone()
    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction) == ("cross-entropy", "mean")
    assert found.scales[:, 0].tolist() == pytest.approx([2, 0, 2, 0])
    assert torch.equal(outputs, before[0])
    assert torch.equal(targets, before[1])


def test_the_state_of_a_loss_is_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, o: Tensor, y: Tensor) -> Tensor:
            self.seen += len(y)
            self.calls += 1
            return F.cross_entropy(o, y)

    loss = Counting()
    assert resolve_loss(loss, normal(4, 3), labels(3, 4)).kind == "cross-entropy"
    assert (float(loss.seen), loss.calls, loss.training) == (0.0, 0, True)


def test_recognition_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for loss in (F.cross_entropy, lambda o, y: F.cross_entropy(o / 2, y)):
        resolve_loss(loss, normal(4, 3), labels(3, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_losses_are_values() -> None:
    one = resolve_loss(F.cross_entropy, normal(4, 3), labels(3, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.value = 2.0  # type: ignore[misc]


def test_accuracy() -> None:
    outputs = torch.tensor([[2.0, 0, 1], [0, 1, 0], [0, 0, 3], [1, 0, 0]])
    targets = torch.tensor([0, 1, 1, -100])
    assert resolve_loss(F.cross_entropy, outputs, targets).accuracy(outputs, targets) == 2 / 3
    bits = torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1]])
    assert resolve_loss(bce, outputs, bits).accuracy(outputs, bits) == 9 / 12
    for loss, values in ((bce, bits / 2), (F.mse_loss, bits), (F.cross_entropy, bits.softmax(-1))):
        assert resolve_loss(loss, outputs, values).accuracy(outputs, values) is None


# A penalty on fitted logits: its curvature is larger than the cross-entropy's, and its gradient a
# millionth of what float32 can tell at random outputs.
FITTED = 15 * F.one_hot(torch.arange(8) % 4, 4).float()


@pytest.mark.parametrize("penalty", [1e-4, 1e-5, 1e-6, 1e-8])
def test_a_small_penalty_is_seen_in_single_precision(penalty: float) -> None:
    labels = torch.arange(8) % 4

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + penalty * outputs.pow(2).mean()

    found = resolve_loss(loss, FITTED, labels)
    assert found.kind == "custom"
    exact = hessian(lambda f: loss(f, labels))(FITTED.double())
    expected = len(labels) * torch.stack([exact[i, :, i] for i in range(len(labels))])
    roots = torch.stack(list(found.root_columns(FITTED)), dim=2).double()
    error = (roots @ roots.mT - expected).norm() / expected.norm()
    assert float(error) < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: F.cross_entropy(f.float(), y),
        lambda f, y: (
            0.9 * F.cross_entropy(f.float(), y) - 0.1 * F.log_softmax(f.float(), -1).mean()
        ),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0, 0.3])),
    ],
    ids=["cast", "two-casts", "float32-weights"],
)
def test_a_loss_that_computes_in_single_precision_is_recognized(loss: Loss) -> None:
    for outputs in (FITTED, normal(64, 4).float()):
        found = resolve_loss(loss, outputs, torch.arange(len(outputs)) % 4)
        assert found.kind == "cross-entropy"
