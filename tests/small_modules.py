"""Modules that do what users' models do; ``tests.small_models`` says what must come of each."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

CLASSES = 3


class Lambda(nn.Module):
    """A forward pass given as a function of (module, inputs); submodules by keyword."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class PlainSubclass(nn.Linear):
    """Another name, the same forward."""


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class ScaledConv2d(nn.Conv2d):
    """Equalized learning rate: forward() is inherited and still computes something else."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.use_reentrant is None:
            return self.c(torch.tanh(self.b(h)))
        return self.c(torch.tanh(checkpoint(self.b, h, use_reentrant=self.use_reentrant)))


def uncheckpointed(model: nn.Module) -> nn.Module:
    plain = Checkpointed(None).double()
    plain.load_state_dict(model.state_dict())
    return plain


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def three(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    return Lambda(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, CLASSES))


def tied(first: nn.Module, second: nn.Module) -> nn.Module:
    second.weight = first.weight
    return second


def tied_linears() -> nn.Module:
    b = nn.Linear(4, 4)
    return Lambda(
        lambda m, x: m.c(torch.tanh(m.d(torch.tanh(m.b(m.a(x)))))),
        a=nn.Linear(3, 4), b=b, d=tied(b, nn.Linear(4, 4)), c=nn.Linear(4, CLASSES),
    )  # fmt: skip


def tied_to_embedding() -> nn.Module:
    table = nn.Embedding(5, 3)
    return Lambda(
        lambda m, x: m.head(torch.tanh(m.a(m.table(x)))),
        table=table, a=nn.Linear(3, 3), head=tied(table, nn.Linear(3, 5)),
    )  # fmt: skip


def in_place_residual(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x)
    y = m.b(h.tanh())
    y += h
    y.relu_()
    return m.c(y)


def registered_twice() -> nn.Module:
    model = three(lambda m, x: m.c(torch.tanh(m.again(torch.tanh(m.b(m.a(x)))))))
    model.again = model.b
    return model


def replaced_forward() -> nn.Module:
    model = mlp()
    model[0].forward = types.MethodType(lambda self, x: F.linear(2 * x, self.weight), model[0])
    return model


def pruned() -> nn.Module:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def other_weight(m: nn.Module, x: Tensor) -> Tensor:
    fast = {"weight": 2 * m.a.weight, "bias": m.a.bias}
    return m.c(torch.tanh(torch.func.functional_call(m.a, fast, (x,))))


def unused_call_beside_functional_use(m: nn.Module, x: Tensor) -> Tensor:
    """As many reads in the graph as calls, and still not the same ones."""
    m.b(m.a(x))
    return m.c(torch.tanh(F.linear(m.a(x), m.b.weight)))


def routed(m: nn.Module, x: Tensor) -> Tensor:
    """A mixture of experts: one expert sees a part of the batch."""
    h = m.a(x)
    first = h[: len(h) // 2]
    return m.c(torch.cat([m.b(first), h[len(first) :]]))


def group_statistic(m: nn.Module, x: Tensor) -> Tensor:
    """Couples data that are half a batch apart, as a minibatch standard deviation in groups."""
    h = torch.tanh(m.a(x))
    groups = h.reshape(2, len(h) // 2, -1)
    return m.c(m.b(h) * (1 + groups.std(0).mean(1).repeat(2)[:, None]))


def one_way(m: nn.Module, x: Tensor) -> Tensor:
    """A datum sees the one before it, and not the other way round."""
    h = torch.tanh(m.a(x))
    return m.c(m.b(h) + torch.cat([torch.zeros_like(h[:1]), h[:-1]]))


def seq_first(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.transpose(0, 1)))  # [T, N, 4]
    return m.c(torch.tanh(m.b(h)).transpose(0, 1))


def position_table(m: nn.Module, x: Tensor) -> Tensor:
    """A layer on a table of T rows, where T happens to be the number of data."""
    return m.c(torch.tanh(m.a(x) + m.b(torch.eye(4, dtype=x.dtype))))


def stop_gradient(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(h * torch.sigmoid(m.b(h)).detach())


def without_tracking(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = torch.tanh(m.a(x))
    return m.c(torch.tanh(m.b(h)))


def constant_target(m: nn.Module, x: Tensor) -> Tensor:
    """A network that looks at its own outputs as constants, as in self-distillation."""
    with torch.no_grad():
        own = torch.tanh(m.b(m.a(x)))
    return m.c(torch.tanh(m.b(m.a(x))) * own)


def attention() -> nn.Module:
    return Lambda(
        lambda m, x: m.c((lambda h: m.mha(h, h, h, need_weights=False)[0])(m.a(x))),
        a=nn.Linear(3, 4), mha=nn.MultiheadAttention(4, 2, batch_first=True),
        c=nn.Linear(4, CLASSES),
    )  # fmt: skip


def conv(channels: int = 2, **options: object) -> nn.Module:
    layer = nn.Conv2d(channels, 3, **{"kernel_size": 3, **options})
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))


def conv_changed_after_construction() -> nn.Module:
    """What segmentation models do to a pretrained backbone."""
    model = conv(padding=1)
    model[0].stride, model[0].dilation, model[0].padding = (1, 1), (2, 2), (2, 2)
    return model


def conv_changed_kernel() -> nn.Module:
    model = conv(padding=1)
    model[0].weight = nn.Parameter(torch.randn(3, 2, 1, 5))
    return model


def initialized(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    """A model whose lazy layers have run once."""
    model = build()
    model(torch.zeros(2, *shape))
    return model
