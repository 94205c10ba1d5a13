"""A model that changes whatever a forward pass can change, and a snapshot of everything."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small_modules import CLASSES

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


class Restless(nn.Module):
    """A forward pass that changes whatever a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, max_norm=0.5)  # renormalizes its weight in place
        self.a = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.always = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, CLASSES)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", None)
        self.register_buffer("graph", torch.eye(3).to_sparse())
        self.longest = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        self.calls += 1
        self.longest, self.cache = len(x), torch.ones(len(x))
        self.register_buffer("lazy", torch.ones(2))
        self.head.bias.data.mul_(1.5)
        self.always.train()
        self.frozen.requires_grad_(True)
        h = self.drop(F.relu(self.always(self.norm(self.frozen(self.a(self.table(x)))))))
        self.last = self.head(h)
        return self.last


def restless() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Restless().train()
    model.norm.eval()  # modes differ from module to module
    model.a.weight.grad = torch.randn(6, 3)
    model.head.bias.grad = torch.randn(CLASSES)
    batch = torch.randint(7, (8,)), torch.randint(CLASSES, (8,))
    for _ in range(3):
        model.register_forward_hook(lambda *_: None)
    model.a.register_forward_hook(lambda *_: None)
    model.a.register_forward_pre_hook(lambda *_: None)
    model.a.register_full_backward_hook(lambda *_: None)
    model.a.register_forward_hook(lambda *_, **__: None, with_kwargs=True, always_call=True)
    return model, batch


@dataclass
class Snapshot:
    """Everything to be found again, by value, and by identity where a user may hold it."""

    modules: list[dict[str, Any]]
    state: dict[str, Any]
    flags: list[tuple[bool, bool]]
    grads: list[Tensor | None]
    identities: list[int]
    versions: list[int]
    hooks: list[list[tuple[int, int]]]
    generators: tuple[Any, ...]
    modes: tuple[Any, ...]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        plain = (bool, int, float, type(None), Tensor)
        modules = list(model.modules())
        parameters = list(model.parameters())
        held = [*parameters, *(p.grad for p in parameters), *model.buffers()]
        return Snapshot(
            modules=[{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in modules],
            state=copy.deepcopy({k: v for m in modules for k, v in _tensors(m)}),
            flags=[(p.requires_grad, p.is_leaf) for p in parameters],
            grads=[None if p.grad is None else p.grad.clone() for p in parameters],
            identities=[id(t) for t in held],
            versions=[t._version for t in held if t is not None],
            hooks=[
                [(key, id(hook)) for key, hook in getattr(m, kind).items()]
                for m in modules
                for kind in HOOKS
            ],
            generators=(torch.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
            modes=(
                torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
                torch.is_autocast_cache_enabled(), torch.is_anomaly_enabled(),
            ),
        )  # fmt: skip

    def check(self, model: nn.Module, *, versions: bool = True) -> None:
        now = Snapshot.of(model)
        for name in ("modules", "flags", "identities", "hooks", "modes"):
            assert getattr(now, name) == getattr(self, name), name
        assert list(now.state) == list(self.state)
        for name, value in self.state.items():
            assert same(now.state[name], value), name
        assert all(map(same, now.grads, self.grads))
        assert torch.equal(now.generators[0], self.generators[0])
        assert now.generators[2] == self.generators[2]
        for mine, theirs in zip(now.generators[1], self.generators[1], strict=True):
            assert np.array_equal(mine, theirs)
        if versions:
            assert now.versions == self.versions


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    for registry in (module._parameters, module._buffers):
        for name, tensor in registry.items():
            yield f"{id(module)}.{name}", None if tensor is None else tensor.detach()


def same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    one, two = one.to_dense(), two.to_dense()
    if one.dtype != two.dtype or not torch.equal(one.isnan(), two.isnan()):
        return False
    return torch.equal(one.nan_to_num(), two.nan_to_num())
