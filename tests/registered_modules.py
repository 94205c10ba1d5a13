"""The modules of ``tests.module_registry`` that torch does not have ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


def mixed(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), second)


def pooled_conv(build: Callable[[], nn.Module], dimensions: int) -> nn.Module:
    """A convolution, one of 1 x 1 behind it, and the mean over pixels."""
    conv = build()
    pointwise = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions](
        conv.out_channels, CLASSES, 1
    )
    return nn.Sequential(conv, nn.Tanh(), pointwise, nn.Flatten(2), Mean())


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean(-1)


def transposed(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))


def normed(norm: nn.Module, features: int = 30, flat: bool = True) -> nn.Module:
    """A norm on the data themselves, and a head that reads all of its outputs."""
    middle = nn.Flatten() if flat else nn.Identity()
    return nn.Sequential(norm, nn.Tanh(), middle, nn.LazyLinear(CLASSES))


class Embedded(nn.Module):
    def __init__(self, table: nn.Embedding, pool: bool) -> None:
        super().__init__()
        self.table, self.head, self.pool = table, nn.Linear(4, CLASSES), pool

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.table(tokens))
        return self.head(h.mean(1) if self.pool else h)


def embedded(table: nn.Embedding, pool: bool = False) -> nn.Module:
    return Embedded(table, pool)


class ConvShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.second = nn.Conv2d(2, CLASSES, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.shuffle(self.first(x)))).mean((2, 3))


class Block(nn.Module):
    """Two convolutions with batch norms, and a strided projection around them."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or width != out:
            conv = nn.Conv2d(width, out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class ResidualMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 5)
        self.norm, self.c = nn.LayerNorm(5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for _ in range(2):
            h = h + F.gelu(self.b(self.norm(h)))
        return self.c(h)


class Attended(nn.Module):
    """Attention between two Linears; ``cross`` takes keys and values of other widths."""

    def __init__(self, cross: bool, causal: bool, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, **options)
        self.head = nn.Linear(4, CLASSES)
        self.first = options["batch_first"]
        self.causal = causal
        self.key = nn.Linear(4, self.mha.kdim) if cross else None
        self.value = nn.Linear(4, self.mha.vdim) if cross else None

    def forward(self, x: Tensor) -> Tensor:
        q = x if self.first else x.transpose(0, 1)
        k, v = q, q
        if self.key is not None and self.value is not None:
            k, v, q = self.key(q), self.value(torch.tanh(q)), q.narrow(int(self.first), 0, 2)
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        h, weights = self.mha(q, k, v, need_weights=self.causal, attn_mask=mask)
        if weights is not None:
            h = h + weights.square().sum(-1, keepdim=True)
        return self.head(h if self.first else h.transpose(0, 1))


def attended(
    cross: bool = False, causal: bool = False, batch_first: bool = True, **options: Any
) -> nn.Module:
    return Attended(cross, causal, batch_first=batch_first, **options)


class PreNormBlock(nn.Module):
    def __init__(self, width: int = 4, head: int = CLASSES) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out, self.up = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, head) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


class TinyGpt(nn.Module):
    """Token and position tables, one block, and a head that may share the token table."""

    def __init__(self, tied: bool = True, table: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(6, 4)
        self.position = nn.Parameter(torch.randn(4, 4)) if table else nn.Embedding(4, 4)
        self.block = PreNormBlock(4, head=0)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.position
        steps = table(torch.arange(4)) if isinstance(table, nn.Embedding) else table
        return self.head(self.norm(self.block(self.token(tokens) + steps)))


class LastStep(nn.Module):
    """A recurrent layer and a head on all of its steps."""

    def __init__(self, rnn: nn.RNNBase, width: int = 3) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state, steps = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            steps.append(self.head(state))
        return torch.stack(steps, 1)


class PlainMatrices(nn.Module):
    """Parameters of the model itself (a matrix, a number, three dimensions), and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 5))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.kernel = nn.Parameter(torch.randn(2, 5, CLASSES))
        self.head = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.W) * self.scale
        return self.head(torch.einsum("ntk,tkc->ntc", h, self.kernel) + h @ self.W.T[:, :CLASSES])


class CountedBranch(nn.Module):
    """As many steps as the datum says, by ``.item()``: a batch is treated datum by datum."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            for _ in range(1 + int(row[0].item() > 0)):
                row = torch.tanh(row @ self.W)
            rows.append(row)
        return self.head(torch.stack(rows))


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(nn.Module):
    """A sign whose gradient is that of the identity; ``by_detach`` writes it so for torch.func."""

    def __init__(self, by_detach: bool = False) -> None:
        super().__init__()
        self.W, self.head = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, CLASSES)
        self.by_detach = by_detach

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.W
        sign = h + (h.sign() - h).detach() if self.by_detach else _Sign.apply(h)
        return self.head(torch.tanh(h) + 0.1 * sign)


def detached_sign(model: nn.Module) -> nn.Module:
    plain = StraightThrough(by_detach=True).double()
    plain.load_state_dict(model.state_dict())
    return plain
