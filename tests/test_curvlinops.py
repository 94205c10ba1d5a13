"""Against curvlinops, where it is installed (``make peers``): another library's GGN and K-FAC."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kronecker_probe as kp

curvlinops = pytest.importorskip("curvlinops")

TOLERANCE = 1e-10  # relative, float64


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(loss_fn: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    if isinstance(loss_fn, nn.MSELoss):
        return x, torch.randn(7, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (7,), generator=generator)


LOSSES = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


@pytest.mark.parametrize("loss_fn", LOSSES, ids=str)
@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_gauss_newton_products_agree(loss_fn: nn.Module, name: str) -> None:
    model, data = mlp(), batch(loss_fn)
    parameter = dict(model.named_parameters())[name]
    theirs = curvlinops.GGNLinearOperator(model, loss_fn, [parameter], [data])
    H = kp.SecondMoment(kp.capture(model, loss_fn, data)[name])
    x = torch.randn(parameter.shape, dtype=torch.float64)
    product = (theirs @ [x])[0]
    if loss_fn.reduction == "sum":
        product = product / 7  # H is a mean over data, their operator the loss's own sum
    assert difference(H.apply(x), product) < TOLERANCE


@pytest.mark.parametrize("loss_fn", LOSSES[:2], ids=str)
@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_kfac_agrees(loss_fn: nn.Module, name: str) -> None:
    model, data = mlp(), batch(loss_fn)
    parameter = dict(model.named_parameters())[name]
    theirs = curvlinops.KFACLinearOperator(
        model, loss_fn, [parameter], [data], fisher_type="type-2"
    )
    H = kp.SecondMoment(kp.capture(model, loss_fn, data)[name])
    x = torch.randn(parameter.shape, dtype=torch.float64)
    product = (theirs @ [x])[0]
    if loss_fn.reduction == "sum":
        product = product / 7
    assert difference(kp.approximate(H, "kfac").apply(x), product) < TOLERANCE
