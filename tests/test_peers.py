"""Against curvlinops and nngeometry, where they are installed (``make peers``).

Other people's Gauss-Newton products, dense Fisher matrices, K-FAC (expand and reduce) and EK-FAC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import kronecker_probe as kp
from tests.registered_modules import PreNormBlock
from tests.small_modules import Lambda

TOLERANCE = 1e-10  # relative, float64

N, CLASSES = 7, 3

LOSSES = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
]

every_loss = pytest.mark.parametrize("loss_fn", LOSSES, ids=str)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def _sequence() -> nn.Module:
    """Linears on shared positions, and a mean over them."""
    return Lambda(
        lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x)))).mean(1)),
        a=nn.Linear(4, 5), b=nn.Linear(5, 5), c=nn.Linear(5, CLASSES),
    )  # fmt: skip


def _transformer() -> nn.Module:
    """A pre-norm block with causal attention, and a mean over positions."""
    return Lambda(
        lambda m, x: m.c(m.block(x).mean(1)), block=PreNormBlock(4, 0), c=nn.Linear(4, CLASSES)
    )


def _normed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(2, 4, 2), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (_mlp, (5,)),
    "CNN": (_cnn, (2, 5, 5)),
    "sequence": (_sequence, (3, 4)),
    "transformer": (_transformer, (4, 4)),
    "norms": (_normed, (2, 2, 2)),
}

SHARED = ("MLP", "CNN", "sequence", "transformer")  # with layers that curvlinops knows


@pytest.fixture
def curvlinops() -> ModuleType:
    return pytest.importorskip("curvlinops")


@pytest.fixture
def nngeometry() -> Iterator[ModuleType]:
    module = pytest.importorskip("nngeometry")
    torch.set_default_dtype(torch.float64)  # it makes its own tensors in the default dtype
    yield module
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _differentiable_twice() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
        yield


def model_and_data(name: str, loss_fn: nn.Module) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    build, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        x = torch.randn(N, *shape, dtype=torch.float64)
        if isinstance(loss_fn, nn.MSELoss):
            return model, (x, torch.randn(N, CLASSES, dtype=torch.float64))
        return model, (x, torch.randint(0, CLASSES, (N,)))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def assert_agree(
    name: str,
    loss_fn: nn.Module,
    theirs: Callable[[nn.Module, nn.Parameter, list[tuple[Tensor, Tensor]]], object],
    ours: Callable[[kp.SecondMoment], object],
    vectors: bool = False,
) -> None:
    """Products with a random direction agree, for each weight of the model."""
    model, data = model_and_data(name, loss_fn)
    samples = kp.capture(model, loss_fn, data)
    chosen = {k: p for k, p in model.named_parameters() if vectors or p.ndim > 1}
    for parameter_name, parameter in chosen.items():
        operator = theirs(model, parameter, [data])
        x = torch.randn(parameter.shape, dtype=torch.float64)
        product = (operator @ [x])[0]
        if loss_fn.reduction == "sum":
            product = product / N  # H is a mean over data, their operator the loss's own sum
        found = ours(kp.SecondMoment(samples[parameter_name])).apply(x.reshape(len(x), -1))
        assert difference(found, product.reshape(found.shape)) < TOLERANCE, parameter_name


@every_loss
@pytest.mark.parametrize("name", SHARED)
def test_gauss_newton_products_agree(curvlinops: ModuleType, name: str, loss_fn: nn.Module) -> None:
    assert_agree(
        name, loss_fn,
        lambda model, p, data: curvlinops.GGNLinearOperator(model, loss_fn, [p], data),
        lambda H: H, vectors=True,
    )  # fmt: skip


@every_loss
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(("ours", "theirs"), [("kfac", "expand"), ("kfac-reduce", "reduce")])
def test_kfac_agrees(
    curvlinops: ModuleType, name: str, loss_fn: nn.Module, ours: str, theirs: str
) -> None:
    assert_agree(
        name, loss_fn,
        lambda model, p, data: curvlinops.KFACLinearOperator(
            model, loss_fn, [p], data, fisher_type="type-2", kfac_approx=theirs
        ),
        lambda H: kp.approximate(H, ours),
    )  # fmt: skip


@every_loss
@pytest.mark.parametrize("name", SHARED)
def test_ekfac_agrees(curvlinops: ModuleType, name: str, loss_fn: nn.Module) -> None:
    assert_agree(
        name, loss_fn,
        lambda model, p, data: curvlinops.EKFACLinearOperator(
            model, loss_fn, [p], data, fisher_type="type-2"
        ),
        lambda H: kp.approximate(H, "ekfac"),
    )  # fmt: skip


def fisher(model: nn.Module, data: tuple[Tensor, Tensor], kind: str) -> Tensor:
    """Another library's Fisher matrix of all parameters in a row, dense."""
    from nngeometry.metrics import FIM
    from nngeometry.object import pspace

    loader = DataLoader(TensorDataset(*data), batch_size=N)
    matrix = FIM(model, loader, getattr(pspace, kind), "classif_logits")
    if kind == "PMatEKFAC":
        matrix.update_diag(loader)
    if kind == "PMatDense":
        return matrix.to_torch()
    return matrix.to_torch(split_weight_bias=False)


@pytest.mark.parametrize("name", ["MLP", "CNN", "norms"])
def test_the_fisher_matrix_of_all_parameters_agrees(nngeometry: ModuleType, name: str) -> None:
    """Across layers, too: captures of different parameters order data and columns alike."""
    loss_fn = nn.CrossEntropyLoss()
    model, data = model_and_data(name, loss_fn)
    samples = kp.capture(model, loss_fn, data)
    names = [name for name, _ in model.named_parameters()]
    J = torch.cat([samples[name].matrices().flatten(2) for name in names], dim=-1)
    H = torch.einsum("i,icp,icq->pq", samples[names[0]].weights, J, J)
    assert difference(H, fisher(model, data, "PMatDense")) < TOLERANCE


@pytest.mark.parametrize("name", ["MLP", "CNN"])
@pytest.mark.parametrize(("ours", "theirs"), [("kfac", "PMatKFAC"), ("ekfac", "PMatEKFAC")])
def test_joint_factors_agree(nngeometry: ModuleType, name: str, ours: str, theirs: str) -> None:
    """Of [W b], as the other library keeps them."""
    loss_fn = nn.CrossEntropyLoss()
    model, data = model_and_data(name, loss_fn)
    samples = kp.capture(model, loss_fn, data, bias="joint")
    blocks = [kp.approximate(kp.SecondMoment(s), ours).to_dense() for s in samples.values()]
    assert len(blocks) == len([name for name in samples if name.endswith("weight+bias")])
    assert difference(torch.block_diag(*blocks), fisher(model, data, theirs)) < TOLERANCE
