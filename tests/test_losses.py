"""Recognition of losses, and their Hessian roots against torch.func on the user's loss itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import hessian

from kronecker_probe.gradients.losses import ResolvedLoss, resolve_loss
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


# name -> loss, outputs, targets, kind, reduction, class_dim, scale
KNOWN: dict[str, tuple[Loss, Tensor, Tensor, str, str, int, float]] = {
    "entropy": (
        F.cross_entropy, normal(4, 3), labels(3, 4), "cross-entropy", "mean", 1, 1.0,
    ),
    "entropy module": (
        nn.CrossEntropyLoss(), normal(4, 3), labels(3, 4), "cross-entropy", "mean", 1, 1.0,
    ),
    "entropy sum": (
        lambda o, y: F.cross_entropy(o, y, reduction="sum"), normal(4, 3), labels(3, 4),
        "cross-entropy", "sum", 1, 1.0,
    ),
    "entropy by hand": (
        lambda o, y: -o.log_softmax(-1).gather(1, y[:, None]).mean(), normal(4, 3), labels(3, 4),
        "cross-entropy", "mean", 1, 1.0,
    ),
    "entropy of positions, classes second": (
        F.cross_entropy, normal(4, 3, 5), labels(3, 4, 5), "cross-entropy", "mean", 1, 1 / 5,
    ),
    "entropy of positions, classes last": (
        entropy_last, normal(4, 5, 3), labels(3, 4, 5), "cross-entropy", "mean", 2, 1 / 5,
    ),
    "entropy of as many positions as classes, classes second": (
        F.cross_entropy, normal(4, 3, 3), labels(3, 4, 3), "cross-entropy", "mean", 1, 1 / 3,
    ),
    "entropy of as many positions as classes, classes last": (
        entropy_last, normal(4, 3, 3), labels(3, 4, 3), "cross-entropy", "mean", 2, 1 / 3,
    ),
    "entropy of pixels": (
        F.cross_entropy, normal(2, 3, 2, 2), labels(3, 2, 2, 2), "cross-entropy", "mean", 1, 1 / 4,
    ),
    "entropy of flattened positions": (
        lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), normal(4, 5, 3),
        labels(3, 4, 5), "cross-entropy", "mean", 2, 1 / 5,
    ),
    "entropy summed over positions": (
        lambda o, y: entropy_last(o, y, "sum") / len(y), normal(4, 5, 3), labels(3, 4, 5),
        "cross-entropy", "mean", 2, 1.0,
    ),
    "entropy sum of positions": (
        lambda o, y: entropy_last(o, y, "sum"), normal(4, 5, 3), labels(3, 4, 5),
        "cross-entropy", "sum", 2, 1.0,
    ),
    "square": (F.mse_loss, normal(4, 3), normal(4, 3, seed=1), "mse", "mean", -1, 1 / 3),
    "square module": (nn.MSELoss(), normal(4, 3), normal(4, 3, seed=1), "mse", "mean", -1, 1 / 3),
    "square by hand": (
        lambda o, y: ((y - o) ** 2).mean(), normal(4, 3), normal(4, 3, seed=1),
        "mse", "mean", -1, 1 / 3,
    ),
    "square of one output": (F.mse_loss, normal(4), normal(4, seed=1), "mse", "mean", -1, 1.0),
    "square of a grid": (
        F.mse_loss, normal(4, 2, 3), normal(4, 2, 3, seed=1), "mse", "mean", -1, 1 / 6,
    ),
    "square sum": (
        nn.MSELoss(reduction="sum"), normal(4, 3), normal(4, 3, seed=1), "mse", "sum", -1, 1.0,
    ),
    "square norm": (
        lambda o, y: (o - y).square().sum(-1).mean(), normal(4, 3), normal(4, 3, seed=1),
        "mse", "mean", -1, 1.0,
    ),
}  # fmt: skip

known = pytest.mark.parametrize("name", KNOWN)


def dense_hessian(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    return hessian(lambda v: loss(v.view(1, *z.shape), y[None]))(z.reshape(-1))


@known
def test_a_loss_is_recognized_by_what_it_computes(name: str) -> None:
    loss, outputs, targets, kind, reduction, class_dim, scale = KNOWN[name]
    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction, found.class_dim) == (kind, reduction, class_dim)
    assert found.scale == pytest.approx(scale, rel=1e-15)
    assert found.value == pytest.approx(float(loss(outputs, targets)), rel=1e-14)
    assert found.batch_value(outputs, targets) == pytest.approx(found.value, rel=RELATIVE)


@known
def test_root_columns_are_a_root_of_the_hessian(name: str) -> None:
    loss, outputs, targets, *_ = KNOWN[name]
    found = resolve_loss(loss, outputs, targets)
    columns = torch.stack(list(found.root_columns(outputs)), dim=1)
    assert columns.shape[1] == found.n_columns(outputs)
    for i, (z, y) in enumerate(zip(outputs, targets, strict=True)):
        S = columns[i].reshape(columns.shape[1], -1)
        assert_close(S.T @ S, dense_hessian(loss, z, y))


@known
def test_true_gradient_is_that_of_one_datum(name: str) -> None:
    loss, outputs, targets, *_ = KNOWN[name]
    gradient = resolve_loss(loss, outputs, targets).true_gradient(outputs, targets)
    assert gradient.shape == outputs.shape
    for i in range(len(outputs)):
        leaf = outputs[i : i + 1].clone().requires_grad_(True)
        loss(leaf, targets[i : i + 1]).backward()
        assert_close(gradient[i], leaf.grad[0])


@known
def test_batch_gradient_is_that_of_the_loss(name: str) -> None:
    loss, outputs, targets, *_ = KNOWN[name]
    leaf = outputs.clone().requires_grad_(True)
    loss(leaf, targets).backward()
    found = resolve_loss(loss, outputs, targets)
    assert_close(found.batch_gradient(outputs, targets), leaf.grad)


@known
def test_sampled_gradients_have_the_hessian_as_covariance(name: str) -> None:
    loss, outputs, targets, *_ = KNOWN[name]
    found, K = resolve_loss(loss, outputs, targets), 20000
    many = outputs[:1].expand(K, *outputs.shape[1:])
    drawn = found.sampled(many, torch.Generator().manual_seed(4)).reshape(K, -1)
    expected = dense_hessian(loss, outputs[0], targets[0])
    products = drawn[:, :, None] * drawn[:, None, :]
    error = products.std(0) / math.sqrt(K) + 1e-12
    assert float(((products.mean(0) - expected) / error).abs().max()) < STANDARD_ERRORS
    assert float(error.norm() / expected.norm()) < 0.05
    mean = drawn.mean(0) / (drawn.std(0) / math.sqrt(K))
    assert float(mean.abs().max()) < STANDARD_ERRORS


def test_a_sampled_cross_entropy_gradient_is_that_of_one_of_the_labels() -> None:
    outputs = normal(200, 3)
    loss = resolve_loss(F.cross_entropy, outputs, labels(3, 200))
    drawn = loss.sampled(outputs, torch.Generator().manual_seed(0))
    options = torch.stack(
        [loss.true_gradient(outputs, torch.full((200,), k)) for k in range(3)], dim=1
    )
    distance = (options - drawn[:, None]).abs().amax(-1)
    assert float(distance.amin(1).max()) < 1e-15
    assert set(distance.argmin(1).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("size", [1.0, 50.0, 1e4])
def test_roots_of_saturated_outputs(size: float) -> None:
    outputs = torch.tensor([[size, 0.0, -size], [0.0, size, size]], dtype=torch.float64)
    targets = torch.tensor([0, 1])
    loss = resolve_loss(F.cross_entropy, outputs, targets)
    columns = torch.stack(list(loss.root_columns(outputs)), dim=1)
    assert bool(torch.isfinite(columns).all())
    for i in range(2):
        difference = columns[i].T @ columns[i] - dense_hessian(
            F.cross_entropy, outputs[i], targets[i]
        )
        assert float(difference.abs().max()) < 1e-15


@pytest.mark.parametrize("fitted", [1e2, 1e4])
def test_a_perfect_fit_is_still_recognized(fitted: float) -> None:
    targets = labels(3, 5)
    outputs = fitted * F.one_hot(targets, 3).double()
    assert resolve_loss(F.cross_entropy, outputs, targets).kind == "cross-entropy"
    values = normal(5, 3)
    found = resolve_loss(F.mse_loss, values, values.clone())
    assert (found.kind, found.reduction, found.value) == ("mse", "mean", 0.0)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    n_data=st.integers(2, 5),
    output_scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e3, 1e12]),
    target_scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e3, 1e12]),
    reduction=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_mse_is_recognized_at_any_scale_and_shape(
    shape: list[int], n_data: int, output_scale: float, target_scale: float, reduction: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    outputs = normal(n_data, *shape, scale=output_scale).to(dtype)
    targets = normal(n_data, *shape, seed=1, scale=target_scale).to(dtype)
    loss = nn.MSELoss(reduction=reduction)
    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction) == ("mse", reduction)


@given(
    classes=st.integers(2, 5),
    positions=st.lists(st.integers(1, 4), max_size=2),
    n_data=st.integers(2, 5),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
    last=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_cross_entropy_is_recognized_at_any_scale_and_shape(
    classes: int, positions: list[int], n_data: int, scale: float, last: bool, reduction: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    targets = labels(classes, n_data, *positions)
    class_dim = len(positions) + 1 if last else 1
    outputs = normal(n_data, *positions, classes, scale=scale).to(dtype).movedim(-1, class_dim)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o.movedim(class_dim, 1), y, reduction=reduction)

    found = resolve_loss(loss, outputs, targets)
    assert (found.kind, found.reduction) == ("cross-entropy", reduction)
    assert found.class_dim == class_dim


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_large_batches_of_low_precision_are_recognized(dtype: torch.dtype, reduction: str) -> None:
    outputs = normal(1024, 256).to(dtype)
    entropy = resolve_loss(nn.CrossEntropyLoss(reduction=reduction), outputs, labels(256, 1024))
    assert (entropy.kind, entropy.reduction) == ("cross-entropy", reduction)
    targets = (outputs.float() + 1e-2 * normal(1024, 256, seed=1).float()).to(dtype)
    square = resolve_loss(nn.MSELoss(reduction=reduction), outputs, targets)
    assert (square.kind, square.reduction) == ("mse", reduction)
    for tensor in (*square.root_columns(outputs[:1, :2]), square.true_gradient(outputs, targets)):
        assert tensor.dtype == torch.float32


def test_regression_targets_of_another_precision() -> None:
    outputs, targets = normal(5, 3).float(), normal(5, 3, seed=1)
    assert resolve_loss(F.mse_loss, outputs, targets).kind == "mse"
    near = outputs.double() + 1e-7 * targets
    assert resolve_loss(lambda o, y: F.mse_loss(o, y.float()), outputs, near).kind == "mse"


def test_recognition_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    resolve_loss(F.cross_entropy, normal(4, 3), labels(3, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_losses_are_values() -> None:
    one = ResolvedLoss("mse", "mean", -1, 0.5, 1.0)
    with pytest.raises(AttributeError):
        one.scale = 2.0  # type: ignore[misc]
