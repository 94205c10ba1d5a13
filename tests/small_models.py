"""Small modules that do what users' models do, each with what must be measured and skipped."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.small_modules import (
    CLASSES,
    Checkpointed,
    Lambda,
    PlainSubclass,
    ScaledConv2d,
    ScaledLinear,
    attention,
    constant_target,
    conv,
    conv_changed_after_construction,
    conv_changed_kernel,
    group_statistic,
    in_place_residual,
    initialized,
    mlp,
    one_way,
    other_weight,
    position_table,
    pruned,
    registered_twice,
    replaced_forward,
    routed,
    seq_first,
    stop_gradient,
    three,
    tied_linears,
    tied_to_embedding,
    uncheckpointed,
    unused_call_beside_functional_use,
    without_tracking,
)

N = 4


@dataclass(frozen=True)
class SmallModel:
    """A model in float64 evaluation mode, and what a capture of it must say.

    Every parameter that is neither in ``fallback`` nor in ``skipped`` must be measured by rules.

    Attributes:
        build: Makes the model.
        shape: Of one datum.
        fallback: Glob to a pattern of the reason why per-sample gradients are needed.
        skipped: Glob to a pattern of the reason why there is no measurement.
        class_dim: Of the outputs.
        vocabulary: The inputs are token indices below this, if positive.
        coupled: Outputs of a datum depend on the other data of the batch.
        batchable: Has batching rules for vmap.
        reference: The same computation for torch.func, which has no activation checkpointing.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fallback: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    class_dim: int = 1
    vocabulary: int = 0
    coupled: bool = False
    batchable: bool = True
    reference: Callable[[nn.Module], nn.Module] = lambda model: model

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """All parameters, in the order of the model."""
        return tuple(name for name, _ in self.model().named_parameters())

    @functools.cached_property
    def measured(self) -> tuple[str, ...]:
        """What rules must measure."""
        return tuple(n for n in self.names if not (self.why(n, self.fallback, self.skipped)))

    @functools.cached_property
    def samples(self) -> tuple[str, ...]:
        """What must be measured in one way or the other."""
        return tuple(name for name in self.names if not self.why(name, self.skipped))

    @staticmethod
    def why(name: str, *reasons: dict[str, str]) -> str:
        """The pattern of the reason that is given for a parameter, or ""."""
        found = [
            pattern
            for one in reasons
            for glob, pattern in one.items()
            if fnmatch.fnmatchcase(name, glob)
        ]
        return found[0] if found else ""

    def loss(self, kind: str, reduction: str = "mean") -> Callable[[Tensor, Tensor], Tensor]:
        """The loss as a user would write it."""
        if kind == "mse":
            return lambda outputs, targets: F.mse_loss(outputs, targets, reduction=reduction)
        return lambda outputs, targets: F.cross_entropy(
            outputs.movedim(self.class_dim, 1), targets, reduction=reduction
        )

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().double().eval()

    def inputs(self, n_examples: int = N, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (n_examples, *self.shape)
        if self.vocabulary:
            return torch.randint(self.vocabulary, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def batch(self, kind: str, n_examples: int = N, seed: int = 2) -> tuple[Tensor, Tensor]:
        """Inputs, and targets of ``kind`` "cross-entropy" or "mse"."""
        inputs = self.inputs(n_examples)
        with torch.no_grad():
            outputs = self.reference(self.model())(inputs)
        generator = torch.Generator().manual_seed(seed)
        if kind == "mse":
            return inputs, torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        positions = list(outputs.shape)
        classes = positions.pop(self.class_dim)
        return inputs, torch.randint(classes, positions, generator=generator)


def _conv(name: str, build: Callable[[], nn.Module], **kwargs: object) -> SmallModel:
    shape = (2, 5, 6)
    return SmallModel(
        f"conv {name}", functools.partial(initialized, build, shape), shape,
        **kwargs,
    )  # fmt: skip


_LINEAR = (
    SmallModel("2-D", mlp, (3,)),
    SmallModel("3-D", mlp, (2, 3), class_dim=2),
    SmallModel("4-D", mlp, (2, 2, 3), class_dim=3),
    SmallModel(
        "classes second",
        lambda: nn.Sequential(mlp(), Lambda(lambda m, x: x.transpose(1, 2))),
        (2, 3),
    ),
    SmallModel(
        "pooled sequence",
        lambda: three(lambda m, x: m.c(torch.tanh(m.b(m.a(x))).mean(1))),
        (3, 3),
    ),
    SmallModel(
        "input by keyword",
        lambda: three(lambda m, x: m.c(input=torch.tanh(m.b(input=m.a(input=x))))),
        (3,),
    ),
    SmallModel(
        "layer norm",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, CLASSES)),
        (3,),
    ),
    SmallModel(
        "embedding in front",
        lambda: Lambda(
            lambda m, x: m.c(torch.tanh(m.a(m.e(x)))),
            e=nn.Embedding(5, 3), a=nn.Linear(3, 4), c=nn.Linear(4, CLASSES),
        ),
        (2,), class_dim=2, vocabulary=5,
    ),
    SmallModel(
        "recurrent in front",
        lambda: Lambda(
            lambda m, x: m.c(m.rnn(m.a(x))[0][:, -1]),
            a=nn.Linear(3, 4), rnn=nn.GRU(4, 4, batch_first=True), c=nn.Linear(4, CLASSES),
        ),
        (2, 3), {"rnn.*": "operations that have no rule.*loop over examples"}, batchable=False,
    ),
)  # fmt: skip

_FLOW = (
    SmallModel(
        "in-place activation",
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)),
        (3,),
    ),
    SmallModel(
        "in-place activation, shared positions",
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)),
        (2, 3), class_dim=2,
    ),
    SmallModel(
        "in-place residual",
        lambda: three(in_place_residual), (3,),
    ),
    SmallModel(
        "called twice",
        lambda: three(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.b(m.a(x))))))),
        (3,),
    ),
    SmallModel(
        "called with and without positions",
        lambda: three(lambda m, x: m.c(torch.tanh(m.b(m.b(m.a(x)).tanh().mean(1))))),
        (2, 3),
    ),
    SmallModel(
        "one of two calls unused",
        lambda: three(lambda m, x: (m.b(m.a(x)), m.c(torch.tanh(m.b(m.a(x)))))[1]),
        (3,),
    ),
    SmallModel("tied", tied_linears, (3,)),
    SmallModel("registered twice", registered_twice, (3,)),
    SmallModel(
        "checkpoint", lambda: Checkpointed(False), (3,),
        reference=uncheckpointed,
    ),
    SmallModel(
        "reentrant checkpoint", lambda: Checkpointed(True), (3,),
        skipped={"a.*": "'a' passes through reentrant", "b.*": "call of 'b' ran without gradi"},
        reference=uncheckpointed,
    ),
    SmallModel(
        "stop gradient", lambda: three(stop_gradient), (3,),
        skipped={"b.*": "unused: no gradient of the outputs reaches"},
    ),
    SmallModel(
        "part under no_grad", lambda: three(without_tracking), (3,),
        skipped={"a.*": "call of 'a' ran without gradient tracking"},
    ),
    SmallModel(
        "a call under no_grad beside one with gradients",
        lambda: three(constant_target), (3,),
    ),
    SmallModel(
        "layer that is never called", lambda: three(lambda m, x: m.c(m.a(x))), (3,),
        skipped={"b.*": "unused: the forward pass does not read it"},
    ),
    SmallModel(
        "own forward called past the hooks",
        lambda: three(lambda m, x: m.c(torch.tanh(m.b.forward(m.a(x))))),
        (3,),
    ),
)  # fmt: skip

_OUTSIDE = (
    SmallModel(
        "functional use beside the call",
        lambda: three(lambda m, x: m.c(torch.tanh(m.b(m.a(x)) + F.linear(m.a(x), m.b.weight)))),
        (3,),
    ),
    SmallModel(
        "functional use of a transpose",
        lambda: Lambda(
            lambda m, x: m.c(F.linear(torch.tanh(m.a(x)), m.a.weight.t())),
            a=nn.Linear(3, 4), c=nn.Linear(3, CLASSES),
        ),
        (3,), {"a.weight": r"read 2 times .*\(a\) account for 1: .* no rule"},
    ),
    SmallModel(
        "functional use and an unused call", lambda: three(unused_call_beside_functional_use),
        (3,), skipped={"b.bias": "unused: no gradient"},
    ),
    SmallModel(
        "another weight by functional_call", lambda: three(other_weight), (3,),
        {"a.weight": "operations that have no rule"},
        {"b.*": "unused: the forward pass does not read it"},
    ),
    SmallModel(
        "tied to an embedding", tied_to_embedding, (2,),
        class_dim=2, vocabulary=5,
    ),
    SmallModel(
        "plain subclass",
        lambda: nn.Sequential(PlainSubclass(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
        (3,),
    ),
    SmallModel(
        "subclass with a forward of its own",
        lambda: nn.Sequential(ScaledLinear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
        (3,), {"0.weight": "operations that have no rule"},
    ),
    SmallModel(
        "forward replaced on the instance", replaced_forward, (3,),
        skipped={"0.bias": "unused: the forward pass does not read it"},
    ),
    SmallModel(
        "weight_norm",
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, CLASSES)
        ),
        (3,), {"0.param*.original?": "operations that have no rule"},
    ),
    SmallModel(
        "spectral_norm",
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, CLASSES)
        ),
        (3,), {"0.param*.original": "operations that have no rule"},
    ),
    SmallModel(
        "pruned", pruned, (3,), {"0.weight_orig": "operations that have no rule"},
    ),
    SmallModel(
        "attention", attention, (2, 3), class_dim=2,
    ),
    SmallModel(
        "transformer layer",
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Linear(4, CLASSES)
        ),
        (2, 4), class_dim=2,
    ),
)  # fmt: skip

_MIXING = (
    SmallModel(
        "batch norm without running statistics",
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(),
            nn.Linear(4, CLASSES),
        ),
        (3,), skipped={"0.*": "mix in layer '0'", "1.*": "statistics of the batch"}, coupled=True,
    ),
    SmallModel(
        "sequence first, as long as the batch", lambda: three(seq_first), (N, 3), class_dim=2,
    ),
    SmallModel(
        "sequence first", lambda: three(seq_first), (N - 1, 3), class_dim=2,
    ),
    SmallModel(
        "statistic of groups", lambda: three(group_statistic), (3,),
        skipped={"a.*": "mix in layer 'a'"}, coupled=True,
    ),
    SmallModel(
        "one-way coupling", lambda: three(one_way), (3,),
        skipped={"a.*": "mix in layer 'a'"}, coupled=True,
    ),
    SmallModel(
        "table as long as the batch", lambda: three(position_table), (4, 3), class_dim=2,
    ),
    SmallModel(
        "part of the batch", lambda: three(routed), (3,),
        skipped={"b.*": r"gives \[2, 4\] for a batch of 4 examples"}, coupled=True,
    ),
)  # fmt: skip

_CONV = (
    _conv("default", conv),
    _conv("stride and padding", lambda: conv(stride=2, padding=1)),
    _conv("tuples", lambda: conv(stride=(2, 1), padding=(2, 1), kernel_size=(3, 2))),
    _conv("valid", lambda: conv(padding="valid", kernel_size=(1, 3))),
    _conv("same", lambda: conv(padding="same")),
    _conv(
        "same, even kernel, dilated",
        lambda: conv(padding="same", kernel_size=(2, 4), dilation=(1, 2)),
    ),
    _conv("dilation", lambda: conv(dilation=(2, 1), padding=1, bias=False)),
    _conv("reflect", lambda: conv(padding=(1, 2), padding_mode="reflect")),
    _conv("circular", lambda: conv(padding=(2, 1), padding_mode="circular", stride=2)),
    _conv(
        "replicate, same",
        lambda: conv(padding="same", padding_mode="replicate", kernel_size=(2, 3)),
    ),
    _conv("changed after construction", conv_changed_after_construction),
    _conv("kernel replaced", conv_changed_kernel),
    _conv(
        "channels last",
        lambda: nn.Sequential(
            Lambda(lambda m, x: x.contiguous(memory_format=torch.channels_last)), conv(padding=1)
        ),
        batchable=False,
    ),
    _conv(
        "in-place activation, pixels",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, CLASSES, (2, 1))
        ),
    ),
    _conv(
        "groups",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.LazyLinear(3)),
    ),
    _conv(
        "scaled in _conv_forward",
        lambda: nn.Sequential(ScaledConv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)),
        fallback={"0.weight": "operations that have no rule"},
    ),
    _conv(
        "batch norm",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Flatten(), nn.LazyLinear(CLASSES),
        ),
    ),
)  # fmt: skip

SMALL_MODELS = {model.name: model for model in (*_LINEAR, *_FLOW, *_OUTSIDE, *_MIXING, *_CONV)}
