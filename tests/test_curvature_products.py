"""Curvature-vector products against dense torch.func matrices, and against the sampled draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from kronecker_probe.gradients.losses import resolve_loss
from tests.functional_oracle import RELATIVE
from tests.module_registry import REGISTRY
from tests.restless import Snapshot, restless
from tests.test_losses import labels, normal, share_gradients, share_hessians

Loss = Callable[[Tensor, Tensor], Tensor]

N, CLASSES = 6, 3
# Standard errors that a mean of sampled draws may be off, the worst of a hundred entries.
STANDARD_ERRORS = 6.0

POINTS = labels(CLASSES, N)
LOSSES: dict[str, tuple[Loss, Tensor, str]] = {
    "entropy": (F.cross_entropy, POINTS, "mean"),
    "entropy sum": (nn.CrossEntropyLoss(reduction="sum"), POINTS, "sum"),
    "weights, smoothing, ignored": (
        nn.CrossEntropyLoss(
            weight=torch.tensor([1.0, 2.0, 3.0]).double(), label_smoothing=0.1
        ), POINTS.index_fill(0, torch.tensor([1, 4]), -100), "mean",
    ),
    "square": (F.mse_loss, normal(N, CLASSES, seed=2), "mean"),
    "binary sum": (
        nn.BCEWithLogitsLoss(reduction="sum"), labels(2, N, CLASSES).double(), "sum",
    ),
    "custom": (lambda o, y: F.cross_entropy(o / 2, y), POINTS, "mean"),
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)

INPUTS = normal(N, 4, seed=5)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def dense(operator: LinearOperator) -> Tensor:
    return torch.from_numpy(operator @ np.eye(operator.shape[0]))


def jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """[N, K, P] over all parameters in order."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    J = jacrev(lambda p: functional_call(model, p, (inputs,)).reshape(len(inputs), -1))(parameters)
    return torch.cat([part.flatten(2) for part in J.values()], dim=2)


def loss_of_vector(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Loss:
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(shape) for shape in shapes.values()])
        given = {name: part.view(s) for (name, s), part in zip(shapes.items(), parts, strict=True)}
        return loss(functional_call(model, given, (inputs,)), targets)

    return value


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def difference(one: Tensor, other: Tensor) -> float:
    assert float(other.norm()) > 0
    return float((one - other).norm() / other.norm())


# -- dense matrices ------------------------------------------------------------------------------


@every_loss
def test_the_gauss_newton_matrix_of_a_whole_model(name: str) -> None:
    loss, targets, reduction = LOSSES[name]
    model = mlp()
    J = jacobian(model, INPUTS)
    H = share_hessians(loss, model(INPUTS).detach(), targets, reduction)
    expected = torch.einsum("iap,iab,ibq->pq", J, H, J) / N
    operator = kp.curvature_operator(model, loss, (INPUTS, targets))
    assert difference(dense(operator), expected) < RELATIVE
    assert operator.loss == pytest.approx(float(loss(model(INPUTS), targets)), rel=1e-12)


@every_loss
def test_the_empirical_fisher_matrix_of_a_whole_model(name: str) -> None:
    loss, targets, reduction = LOSSES[name]
    model = mlp()
    c = share_gradients(loss, model(INPUTS).detach(), targets, reduction)
    g = torch.einsum("iap,ia->ip", jacobian(model, INPUTS), c)
    operator = kp.curvature_operator(model, loss, (INPUTS, targets), "empirical-fisher")
    assert difference(dense(operator), g.T @ g / N) < RELATIVE


@every_loss
def test_the_hessian_of_a_whole_model(name: str) -> None:
    loss, targets, reduction = LOSSES[name]
    model = mlp()
    expected = hessian(loss_of_vector(model, loss, INPUTS, targets))(vector(model))
    if reduction == "sum":
        expected = expected / N
    operator = kp.curvature_operator(model, loss, (INPUTS, targets), "hessian")
    assert difference(dense(operator), expected) < RELATIVE


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "custom"])
def test_the_fisher_matrix_is_that_of_the_labels_drawn(name: str) -> None:
    loss, targets, _ = LOSSES[name]
    model, K = mlp(), 3
    outputs = model(INPUTS).detach()
    resolved, generator = resolve_loss(loss, outputs, targets), torch.Generator().manual_seed(9)
    drawn = torch.stack([resolved.sampled(outputs, generator) for _ in range(K)], dim=1)
    g = torch.einsum("iap,ika->ikp", jacobian(model, INPUTS), drawn).flatten(0, 1)
    batch = (INPUTS, targets)
    operator = kp.curvature_operator(model, loss, batch, "fisher", label_draws=K, seed=9)
    assert difference(dense(operator), g.T @ g / (N * K)) < RELATIVE
    other = kp.curvature_operator(model, loss, batch, "fisher", label_draws=K, seed=8)
    assert difference(dense(other), dense(operator)) > 0.01


def test_the_fisher_matrix_is_the_gauss_newton_matrix_on_average() -> None:
    model, batch = mlp(), (INPUTS, POINTS)
    v = normal(sum(p.numel() for p in model.parameters()), 1).numpy()
    forms = []
    for seed in range(60):
        operator = kp.curvature_operator(
            model, F.cross_entropy, batch, "fisher", label_draws=20, seed=seed
        )
        forms.append(float((v.T @ (operator @ v)).item()))
    ggn = kp.curvature_operator(model, F.cross_entropy, batch)
    expected = float((v.T @ (ggn @ v)).item())
    error = np.std(forms, ddof=1) / math.sqrt(len(forms))
    assert abs(np.mean(forms) - expected) < STANDARD_ERRORS * error
    assert error < 0.05 * expected


@given(
    n_examples=st.integers(1, 5),
    width=st.integers(1, 4),
    classes=st.integers(2, 4),
    kind=st.sampled_from(["ggn", "hessian"]),
    reduction=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=40)
def test_a_softmax_layer_has_its_closed_form(
    n_examples: int, width: int, classes: int, kind: str, reduction: str, dtype: torch.dtype
) -> None:
    """mean_i (diag p - p p^T) kron x x^T, where the Hessian is the Gauss-Newton matrix."""
    torch.manual_seed(n_examples)
    model = nn.Linear(width, classes, bias=False).to(dtype)
    x, y = normal(n_examples, width).to(dtype), labels(classes, n_examples)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    p = model(x).double().softmax(-1)
    M = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    X = x.double()[:, :, None] * x.double()[:, None, :]
    expected = torch.einsum("iab,ipq->apbq", M, X).reshape(classes * width, -1) / n_examples
    operator = kp.curvature_operator(model, loss, (x, y), kind)
    assert operator.dtype == np.float64
    assert difference(dense(operator), expected) < 100 * torch.finfo(dtype).eps


# -- the draws that are captured -----------------------------------------------------------------

# Zero in exact arithmetic, so that two roundings of it need not agree.
NO_EFFECT = 1e-25
# An operation of these has neither a forward mode nor a second backward pass.
ONCE = {"EmbeddingBag"}
QUICK = {
    "Linear, two position dimensions", "called twice", "tied Linears", "Conv1d, groups, circular",
    "small ResNet", "Embedding, padding_idx", "Embedding, max_norm", "tiny GPT, tied embedding",
    "LayerNorm", "BatchNorm2d", "MultiheadAttention, cross",
    "TransformerEncoderLayer, norm first, GELU", "GRU",
    "autograd function without a rule for vmap", "weight_norm",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical-fisher"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in REGISTRY
        if name not in ONCE
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_quadratic_forms_are_those_of_the_sampled_operators(name: str, kind: str) -> None:
    entry = REGISTRY[name]
    model, batch = entry.model(), entry.batch()
    K = 3 if kind == "fisher" else 1
    operator = kp.curvature_operator(model, entry.loss, batch, kind, label_draws=K, seed=3)
    captured = kp.capture(model, entry.loss, batch, kind, label_draws=K, seed=3)
    assert set(captured) <= set(operator.names)
    v = np.random.default_rng(0).standard_normal(operator.shape[0])
    V = np.zeros((len(v), len(captured)))
    for column, parameter in enumerate(captured):
        place = operator.slices[parameter]
        V[place, column] = v[place]
    products = operator @ V
    for column, parameter in enumerate(captured):
        H = kp.SecondMoment(captured[parameter])
        x = torch.from_numpy(V[operator.slices[parameter], column]).view(*H.shape)
        expected = float((x * H.apply(x)).sum())
        form = float(V[:, column] @ products[:, column])
        assert abs(form - expected) <= RELATIVE * abs(expected) + NO_EFFECT, parameter


def test_the_names_are_there() -> None:
    assert set(REGISTRY) >= QUICK | ONCE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in sorted(QUICK)
        for kind in ("ggn", "hessian")
        if (name, kind) != ("weight_norm", "hessian")
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_products_are_symmetric(name: str, kind: str) -> None:
    entry = REGISTRY[name]
    operator = kp.curvature_operator(entry.model(), entry.loss, entry.batch(), kind)
    U = np.random.default_rng(1).standard_normal((operator.shape[0], 3))
    products = U.T @ (operator @ U)
    assert np.abs(products - products.T).max() <= RELATIVE * np.abs(products).max()


# -- the operator ---------------------------------------------------------------------------------


def test_parameters_have_their_names_shapes_and_places() -> None:
    operator = kp.curvature_operator(mlp(), F.cross_entropy, (INPUTS, POINTS))
    assert isinstance(operator, kp.CurvatureOperator)
    assert operator.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert operator.shapes == {
        "0.weight": (5, 4), "0.bias": (5,), "2.weight": (3, 5), "2.bias": (3,),
    }  # fmt: skip
    assert operator.slices["2.weight"] == slice(25, 40)
    assert operator.shape == (43, 43)
    assert operator.kind == "ggn"


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_selected_parameters_are_a_block_of_the_whole(kind: str) -> None:
    whole = kp.curvature_operator(mlp(), F.cross_entropy, (INPUTS, POINTS), kind)
    part = kp.curvature_operator(
        mlp(), F.cross_entropy, (INPUTS, POINTS), kind, layers=["2.*", "0.bias"]
    )
    assert part.names == ("0.bias", "2.weight", "2.bias")
    assert difference(dense(part), dense(whole)[20:, 20:]) < RELATIVE


def test_frozen_parameters_are_left_out() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    operator = kp.curvature_operator(model, F.cross_entropy, (INPUTS, POINTS))
    assert operator.names == ("2.weight", "2.bias")


def test_it_is_a_scipy_operator() -> None:
    operator = kp.curvature_operator(mlp(), F.cross_entropy, (INPUTS, POINTS))
    H = dense(operator)
    values = eigsh(operator, k=3, return_eigenvectors=False)
    assert np.allclose(np.sort(values), torch.linalg.eigvalsh(H)[-3:].numpy(), rtol=1e-10)
    v = np.random.default_rng(0).standard_normal(43)
    assert np.allclose(operator.T @ v, operator @ v, rtol=1e-12)
    assert np.allclose((2 * operator + operator.H) @ v, 3 * (operator @ v), rtol=1e-12)
    assert (operator @ v).dtype == np.float64
    assert (operator @ v.astype(np.float32)).shape == (43,)
    assert (operator @ np.zeros((43, 0))).shape == (43, 0)


def test_integers_and_columns() -> None:
    operator = kp.curvature_operator(mlp(), F.cross_entropy, (INPUTS, POINTS))
    column = np.arange(43)[:, None]
    assert (operator @ column).shape == (43, 1)
    assert np.allclose((operator @ column)[:, 0], operator @ column[:, 0].astype(float))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical-fisher", "hessian"])
def test_lower_precision(dtype: torch.dtype, kind: str) -> None:
    model, batch = mlp().to(dtype), (INPUTS.to(dtype), POINTS)
    operator = kp.curvature_operator(model, F.cross_entropy, batch, kind)
    exact = kp.curvature_operator(
        model.double(), F.cross_entropy, (batch[0].double(), POINTS), kind
    )
    if kind == "fisher":  # a label drawn from other logits may be another
        exact = operator
    assert difference(dense(operator), dense(exact)) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["ggn", "fisher", "hessian"])
def test_it_stays_as_it_was_when_the_model_moves_on(kind: str) -> None:
    model, inputs, targets = mlp(), INPUTS.clone(), POINTS.clone()
    operator = kp.curvature_operator(model, F.cross_entropy, (inputs, targets), kind)
    before = dense(operator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    inputs.zero_()
    targets.zero_()
    assert torch.equal(dense(operator), before)


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical-fisher", "hessian"])
def test_a_restless_model_is_left_as_it_was(kind: str) -> None:
    model, batch = restless()
    before = Snapshot.of(model)
    operator = kp.curvature_operator(model, F.cross_entropy, batch, kind)
    before.check(model, versions=False)
    v = np.ones(operator.shape[0])
    first = operator @ v
    before.check(model, versions=False)
    assert np.array_equal(operator @ v, first)  # what it writes does not add up


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_a_plain_model_is_left_as_it_was_to_the_version(kind: str) -> None:
    model = mlp().train()
    model[0].weight.grad = torch.ones(5, 4).double()
    before, fast = Snapshot.of(model), torch.backends.mha.get_fastpath_enabled()
    operator = kp.curvature_operator(model, F.cross_entropy, (INPUTS, POINTS), kind)
    with torch.no_grad():
        operator @ np.ones(43)
    before.check(model)
    assert torch.backends.mha.get_fastpath_enabled() == fast


# -- refusals -------------------------------------------------------------------------------------


def refused(error: type[Exception], *words: str, **given: object) -> None:
    call = {"model": mlp(), "loss_fn": F.cross_entropy, "batch": (INPUTS, POINTS)} | given
    with pytest.raises(error) as caught:
        kp.curvature_operator(**call)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_options_that_are_none() -> None:
    refused(UnknownNameError, "kind 'gnn'", "Did you mean 'ggn'?", kind="gnn")
    refused(UnknownNameError, "Known: empirical-fisher, fisher, ggn, hessian", kind="xyz")
    refused(InvalidInputError, "label_draws=2", "kind='hessian'", kind="hessian", label_draws=2)
    refused(InvalidInputError, "label_draws=0", "positive", kind="fisher", label_draws=0)
    refused(UnknownNameError, "layers pattern", "'2.wieght'", "'2.weight'", layers="2.wieght")
    refused(InvalidInputError, "model is a function", model=F.relu)
    refused(InvalidInputError, "data is a Tensor", batch=INPUTS)


def test_models_and_batches_that_are_none() -> None:
    frozen = mlp().requires_grad_(False)
    refused(
        InvalidInputError, "No parameter can be differentiated", "0.weight: frozen", model=frozen
    )
    broken = mlp()
    broken[2].weight.data[0, 0] = math.nan
    refused(NonFiniteError, "'2.weight'", "NaN", model=broken)
    refused(NonFiniteError, "outputs", "NaN or infinite", batch=(INPUTS / 0, POINTS))
    refused(InvalidInputError, "5..5", "3 classes", batch=(INPUTS, POINTS * 0 + 5))
    custom, targets, _ = LOSSES["custom"]
    refused(
        UnsupportedError, "'fisher' draws labels", loss_fn=custom, batch=(INPUTS, targets),
        kind="fisher",
    )  # fmt: skip


def test_vectors_that_are_not_finite() -> None:
    operator = kp.curvature_operator(mlp(), F.cross_entropy, (INPUTS, POINTS))
    with pytest.raises(NonFiniteError, match="vectors hold NaN"):
        operator @ np.full(43, np.nan)
    half = kp.curvature_operator(
        mlp().half(), lambda o, y: F.cross_entropy(o.float(), y), (INPUTS.half(), POINTS)
    )
    with pytest.raises(NonFiniteError, match=r"'0.weight'.*range of torch.float16"):
        half @ np.full(43, 1e6)


def test_a_model_that_can_be_differentiated_only_once() -> None:
    entry = REGISTRY["EmbeddingBag"]
    operator = kp.curvature_operator(entry.model(), entry.loss, entry.batch())
    with pytest.raises(UnsupportedError, match="neither a forward mode nor a second backward"):
        operator @ np.ones(operator.shape[0])


def test_a_model_whose_second_derivatives_are_wrong() -> None:
    """Torch's fused weight_norm: its second backward pass takes the norms as constants."""
    entry = REGISTRY["weight_norm"]
    operator = kp.curvature_operator(entry.model(), entry.loss, entry.batch(), "hessian")
    with pytest.raises(UnsupportedError, match=r"not symmetric.*weight_norm.*kind='ggn'"):
        operator @ np.ones(operator.shape[0])


# -- another library ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["entropy", "entropy sum", "square"])
@pytest.mark.parametrize(
    ("kind", "peer"),
    [
        ("ggn", "GGNLinearOperator"),
        ("hessian", "HessianLinearOperator"),
        ("empirical-fisher", "EFLinearOperator"),
    ],
)
def test_curvlinops_agrees(name: str, kind: str, peer: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    loss, targets, reduction = LOSSES[name]
    loss = {"mean": nn.CrossEntropyLoss(), "sum": nn.CrossEntropyLoss(reduction="sum")}[reduction]
    if name == "square":
        loss = nn.MSELoss()
    model = mlp()
    theirs = getattr(curvlinops, peer)(model, loss, list(model.parameters()), [(INPUTS, targets)])
    expected = theirs @ torch.eye(43, dtype=torch.float64)
    ours = dense(kp.curvature_operator(model, loss, (INPUTS, targets), kind))
    if reduction == "sum":
        expected = expected / N
    if kind == "empirical-fisher" and name == "square":
        pytest.skip("their empirical Fisher of a squared error has another scale")
    assert difference(ours, expected) < RELATIVE
