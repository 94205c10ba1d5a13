"""Small modules of every kind, with data, losses, and how each parameter must be measured."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.registered_modules import (
    CLASSES,
    ConvShuffle,
    CountedBranch,
    LastStep,
    PlainMatrices,
    PreNormBlock,
    ResidualMlp,
    SmallResNet,
    Steps,
    StraightThrough,
    TinyGpt,
    attended,
    detached_sign,
    embedded,
    mixed,
    normed,
    pooled_conv,
    transposed,
)
from tests.small_modules import Lambda, tied_linears, tied_to_embedding

N = 4


@dataclass(frozen=True)
class RegisteredModel:
    """A model in float64 evaluation mode.

    Attributes:
        build: Makes the model.
        shape: Of one datum.
        kind: "cross-entropy" or "mse".
        class_dim: Of the outputs.
        vocabulary: The inputs are token indices below this, if positive.
        fallback: Globs of the parameters that have no rule, and go by per-sample gradients.
        either: Globs of those that may have one; all others must be measured by their rule.
        zero: Names of the parameters without any effect on the outputs (a shift of all keys).
        reference: The same computation for torch.func.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: str = "cross-entropy"
    class_dim: int = 1
    vocabulary: int = 0
    fallback: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    reference: Callable[[nn.Module], nn.Module] = lambda model: model

    def __str__(self) -> str:
        return self.name

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss as a user would write it."""
        if self.kind == "mse":
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs.movedim(self.class_dim, 1), targets)

    def model(self) -> nn.Module:
        """With random values in all parameters and statistics, also in those that start at 0 or 1.

        Other tests read it, and nobody writes.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().double()
            model.eval()(self.inputs())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)
                for name, buffer in model.named_buffers():
                    if "running" in name:
                        buffer += 0.3 * torch.rand_like(buffer)
        return model

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (N, *self.shape)
        if self.vocabulary:
            return torch.randint(self.vocabulary, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def batch(self) -> tuple[Tensor, Tensor]:
        inputs = self.inputs()
        with torch.no_grad():
            outputs = self.model()(inputs)
        generator = torch.Generator().manual_seed(2)
        if self.kind == "mse":
            return inputs, torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        positions = list(outputs.shape)
        classes = positions.pop(self.class_dim)
        return inputs, torch.randint(classes, positions, generator=generator)

    def statuses(self, parameter: str) -> tuple[str, ...]:
        """What the coverage may say of a parameter."""
        if any(fnmatch.fnmatchcase(parameter, glob) for glob in self.fallback):
            return ("fallback",)
        if any(fnmatch.fnmatchcase(parameter, glob) for glob in self.either):
            return ("measured", "fallback")
        return ("measured",)


def _conv(name: str, kind: type[nn.Module], *sizes: int, **options: object) -> RegisteredModel:
    dimensions = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    given = {"in_channels": 2, "out_channels": 4, "kernel_size": 3, **options}
    build = functools.partial(pooled_conv, functools.partial(kind, **given), dimensions)
    shape = (int(given["in_channels"]), *sizes)
    return RegisteredModel(f"{kind.__name__}, {name}", build, shape)


def _sequence(name: str, build: Callable[[], nn.Module], **options: object) -> RegisteredModel:
    return RegisteredModel(name, build, (3, 4), class_dim=2, **options)


def _tokens(name: str, build: Callable[[], nn.Module], **options: object) -> RegisteredModel:
    return RegisteredModel(name, build, (5,), vocabulary=7, **options)


def _norm(name: str, norm: Callable[[], nn.Module], **options: object) -> RegisteredModel:
    return RegisteredModel(name, lambda: normed(norm()), (5, 6), **options)


_LINEAR = (
    RegisteredModel("Linear", lambda: mixed(nn.Linear(3, 5), nn.Linear(5, CLASSES)), (3,)),
    RegisteredModel(
        "Linear, squared error", lambda: mixed(nn.Linear(3, 5), nn.Linear(5, 2)), (3,), kind="mse",
    ),
    RegisteredModel(
        "Linear, one position dimension",
        lambda: mixed(nn.Linear(3, 5), nn.Linear(5, CLASSES)), (2, 3), class_dim=2,
    ),
    RegisteredModel(
        "Linear, two position dimensions",
        lambda: mixed(nn.Linear(3, 5), nn.Linear(5, CLASSES, bias=False)), (2, 2, 3), class_dim=3,
    ),
    RegisteredModel(
        "Linear, a squeezed output",
        lambda: nn.Sequential(
            nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), Lambda(lambda m, x: x.squeeze())
        ),
        (3,), kind="mse",
    ),
    RegisteredModel(
        "in-place ReLU",
        lambda: nn.Sequential(
            nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True),
            nn.Linear(8, CLASSES),
        ),
        (3,),
    ),
    RegisteredModel("residual MLP", ResidualMlp, (3,)),
    RegisteredModel(
        "called twice",
        lambda: Lambda(
            lambda m, x: m.c(torch.tanh(m.norm(m.b(torch.tanh(m.norm(m.b(m.a(x)))))))),
            a=nn.Linear(3, 4), b=nn.Linear(4, 4), norm=nn.LayerNorm(4), c=nn.Linear(4, CLASSES),
        ),
        (2, 3), class_dim=2,
    ),
    RegisteredModel("tied Linears", tied_linears, (3,)),
    RegisteredModel("Bilinear", lambda: Lambda(
        lambda m, x: m.c(torch.tanh(m.b(x[:, 0], x[:, 1]))),
        b=nn.Bilinear(3, 3, 4), c=nn.Linear(4, CLASSES),
    ), (2, 3), fallback=("b.weight",)),
)  # fmt: skip

_CONV = (
    _conv("plain", nn.Conv1d, 6),
    _conv("stride, padding, dilation", nn.Conv1d, 9, stride=2, padding=2, dilation=2, bias=False),
    _conv("groups, circular", nn.Conv1d, 6, groups=2, padding=1, padding_mode="circular"),
    _conv("plain", nn.Conv2d, 5, 6),
    _conv("stride, padding", nn.Conv2d, 5, 6, stride=(2, 1), padding=(1, 2)),
    _conv("dilation, even kernel", nn.Conv2d, 6, 6, dilation=(2, 1), kernel_size=(2, 4)),
    _conv("same", nn.Conv2d, 4, 5, padding="same"),
    _conv("groups", nn.Conv2d, 5, 4, groups=2, stride=2, padding=1),
    _conv("depthwise", nn.Conv2d, 4, 4, in_channels=4, groups=4),
    _conv("depthwise with multiplier", nn.Conv2d, 4, 4, out_channels=6, groups=2, dilation=1),
    _conv("reflect", nn.Conv2d, 4, 4, padding=1, padding_mode="reflect"),
    _conv("replicate, groups", nn.Conv2d, 4, 4, padding=2, padding_mode="replicate", groups=2),
    _conv("plain", nn.Conv3d, 3, 4, 3),
    _conv("all options", nn.Conv3d, 5, 4, 3, stride=(2, 1, 1), padding=(2, 1, 1), groups=2,
          dilation=(2, 1, 1), padding_mode="circular"),
    RegisteredModel("PixelShuffle", ConvShuffle, (2, 3, 3)),
    RegisteredModel("small ResNet", SmallResNet, (2, 6, 6)),
    RegisteredModel(
        "ConvTranspose1d", lambda: transposed(nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2)),
        (2, 4), either=("0.*",),
    ),
    RegisteredModel(
        "ConvTranspose2d", lambda: transposed(nn.ConvTranspose2d(2, 4, 3, output_padding=1,
                                                                 stride=2, padding=1)),
        (2, 3, 3), either=("0.*",),
    ),
)  # fmt: skip

_EMBEDDING = (
    _tokens("Embedding", lambda: embedded(nn.Embedding(7, 4)), class_dim=2),
    _tokens("Embedding, padding_idx", lambda: embedded(nn.Embedding(7, 4, padding_idx=2)),
            class_dim=2),
    _tokens("Embedding, pooled", lambda: embedded(nn.Embedding(7, 4), pool=True)),
    _tokens("Embedding, max_norm", lambda: embedded(nn.Embedding(7, 4, max_norm=0.7), pool=True),
            either=("table.weight",)),
    _tokens("EmbeddingBag", lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, CLASSES)),
            fallback=("0.weight",)),
    RegisteredModel("Embedding tied to the head", tied_to_embedding, (2,), class_dim=2,
                    vocabulary=5, either=("table.weight",)),
    RegisteredModel("tiny GPT, tied embedding", TinyGpt, (4,), class_dim=2, vocabulary=6,
                    either=("token.weight", "position.weight")),
    RegisteredModel("tiny GPT, separate head, position parameter",
                    lambda: TinyGpt(tied=False, table=True), (4,), class_dim=2, vocabulary=6),
)  # fmt: skip

_NORM = (
    _norm("LayerNorm", lambda: nn.LayerNorm(6)),
    _norm("LayerNorm, no bias", lambda: nn.LayerNorm(6, bias=False)),
    _norm("LayerNorm, two dimensions", lambda: nn.LayerNorm((5, 6)), either=("0.*",)),
    _norm("RMSNorm", lambda: nn.RMSNorm(6)),
    _norm("BatchNorm1d", lambda: nn.BatchNorm1d(5)),
    _norm("GroupNorm", lambda: nn.GroupNorm(1, 5), either=("0.*",)),
    _norm("InstanceNorm1d", lambda: nn.InstanceNorm1d(5, affine=True), either=("0.*",)),
    _norm("PReLU", lambda: nn.PReLU(5), fallback=("0.*",)),
    RegisteredModel("BatchNorm2d", lambda: normed(nn.BatchNorm2d(2), 2), (2, 2, 3)),
    RegisteredModel(
        "BatchNorm1d, no positions", lambda: normed(nn.BatchNorm1d(6), 6, flat=False), (6,)
    ),
)

_ATTENTION = (
    _sequence("MultiheadAttention", attended),
    _sequence("MultiheadAttention, no bias", lambda: attended(bias=False)),
    _sequence("MultiheadAttention, sequence first", lambda: attended(batch_first=False)),
    _sequence("MultiheadAttention, causal, with weights", lambda: attended(causal=True)),
    _sequence("MultiheadAttention, cross", lambda: attended(cross=True), zero=("key.bias",)),
    _sequence("MultiheadAttention, kdim and vdim", lambda: attended(cross=True, kdim=3, vdim=5),
              zero=("key.bias",)),
    _sequence("MultiheadAttention, sequence first, kdim and vdim",
              lambda: attended(cross=True, kdim=3, vdim=5, batch_first=False), zero=("key.bias",)),
    _sequence("MultiheadAttention, bias_kv", lambda: attended(add_bias_kv=True),
              either=("mha.bias_k", "mha.bias_v")),
    _sequence("TransformerEncoderLayer", lambda: nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Linear(4, CLASSES))),
    _sequence("TransformerEncoderLayer, norm first, GELU", lambda: nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True, activation="gelu",
                                   bias=False), nn.Linear(4, CLASSES))),
    _sequence("TransformerEncoderLayer, sequence first", lambda: Lambda(
        lambda m, x: m.head(m.layer(x.transpose(0, 1)).transpose(0, 1).mean(1, keepdim=True)),
        layer=nn.TransformerEncoderLayer(4, 2, 6), head=nn.Linear(4, CLASSES))),
    _sequence("TransformerEncoder", lambda: nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2,
                              norm=nn.LayerNorm(4)), nn.Linear(4, CLASSES))),
    _sequence("TransformerDecoderLayer", lambda: Lambda(
        lambda m, x: m.head(m.layer(x, torch.tanh(x.flip(1)))),
        layer=nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), head=nn.Linear(4, CLASSES))),
    _sequence("pre-norm block with a packed qkv Linear", PreNormBlock),
)  # fmt: skip

_OTHER = (
    _sequence("LSTM", lambda: LastStep(nn.LSTM(4, 3, batch_first=True)), fallback=("rnn.*",)),
    _sequence("LSTM, two layers, both ways, projected", lambda: LastStep(
        nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, proj_size=2), 4),
        fallback=("rnn.*",)),
    _sequence("GRU", lambda: LastStep(nn.GRU(4, 3, batch_first=True)), fallback=("rnn.*",)),
    _sequence("GRUCell, step by step", Steps, fallback=("cell.*",)),
    RegisteredModel("x @ W, scale and shift", PlainMatrices, (2, 4), class_dim=2,
                    fallback=("W", "scale", "kernel")),
    RegisteredModel("control flow that depends on data", CountedBranch, (4,), fallback=("W",)),
    RegisteredModel("autograd function without a rule for vmap", StraightThrough, (4,),
                    fallback=("W",), reference=detached_sign),
    RegisteredModel("weight_norm", lambda: mixed(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Linear(5, CLASSES)), (3,),
        fallback=("0.parametrizations.*",)),
)  # fmt: skip

REGISTRY = {
    entry.name: entry
    for entry in (*_LINEAR, *_CONV, *_EMBEDDING, *_NORM, *_ATTENTION, *_OTHER)
}  # fmt: skip
