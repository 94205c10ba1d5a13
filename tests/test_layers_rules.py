"""Every rule against gradients by torch.func, in float64, on modules that users combine."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from tests import functional_oracle as oracle
from tests.functional_oracle import assert_close
from tests.small_modules import Lambda, initialized, tied

N, CLASSES, T, V = 5, 3, 4, 7

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

Build = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def classified(body: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The body, flattened into a classifier."""
    build = lambda: nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))  # noqa: E731
    return initialized(build, shape)


def densely(model: nn.Module) -> nn.Module:
    """The same model with dense gradients, for torch.func."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    return copied


def check(model: nn.Module, inputs: Tensor, *, fallback: bool = False) -> kp.Capture:
    """All parameters, by rules alone unless ``fallback``, against those of torch.func."""
    model = model.double().eval()
    targets = torch.randn_like(model(inputs).detach())
    options = {"target": "empirical-fisher", "fallback": fallback}
    samples = kp.capture(model, F.mse_loss, (inputs, targets), **options)
    names = [name for name, _ in model.named_parameters()]
    assert list(samples) == names, samples.skipped
    expected = oracle.share_gradients(densely(model), F.mse_loss, inputs, targets, names)
    for name in names:
        parameter = model.get_parameter(name)
        assert samples[name].shape == (parameter.shape[0], parameter[0].numel())
        assert_close(oracle.matrices(samples[name])[:, 0].flatten(1), expected[name].flatten(1))
        assert_close(samples[name].matrices()[:, 0].flatten(1), expected[name].flatten(1))
    return samples


# -- convolutions ------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "1d stride": (lambda: nn.Conv1d(2, 3, 4, stride=3, padding=2), (2, 9)),
    "1d same": (lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), (2, 9)),
    "1d circular": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 7)),
    "1d groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), (4, 7)),
    "1d depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, dilation=2), (4, 7)),
    "2d groups": (lambda: nn.Conv2d(4, 2, (1, 3), groups=2, stride=(2, 1)), (4, 5, 6)),
    "2d depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding="same", bias=False), (3, 4, 5)),
    "2d one pixel": (lambda: nn.Conv2d(2, 3, (4, 5)), (2, 4, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 2)), (2, 3, 4, 4)),
    "3d dilation": (lambda: nn.Conv3d(2, 2, 2, dilation=(1, 2, 1), stride=(1, 1, 2)), (2, 3, 4, 4)),
    "3d reflect": (lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 3, 3, 4)),
    "3d groups": (lambda: nn.Conv3d(2, 4, 2, groups=2, padding="same"), (2, 2, 3, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    samples = check(classified(build(), shape), torch.randn(N, *shape).double())
    grouped = "groups" in name or "depthwise" in name
    assert (samples["0.weight"].n_positions is None) == grouped


def test_a_convolution_over_frames_that_were_folded_into_the_batch() -> None:
    model = Lambda(
        lambda m, x: m.c(torch.tanh(m.a(x.flatten(0, 1))).flatten(1).view(len(x), 3, -1).mean(1)),
        a=nn.Conv2d(2, 2, 3), c=nn.Linear(8, CLASSES),
    )  # fmt: skip
    samples = check(model, torch.randn(N, 3, 2, 4, 4).double())
    assert samples["a.weight"].n_positions == 3 * 4
    assert samples["a.bias"].n_positions == 1


# -- normalizations ----------------------------------------------------------------------------


def running(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


NORMALIZATIONS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(4, eps=0.1), (4,)),
    "layer, positions": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer without bias": (lambda: nn.LayerNorm(4, bias=False), (2, 3, 4)),
    "rms": (lambda: nn.RMSNorm(4), (3, 4)),
    "rms eps": (lambda: nn.RMSNorm(4, eps=0.1), (4,)),
    "batch": (lambda: running(nn.BatchNorm1d(4)), (4,)),
    "batch, positions": (lambda: running(nn.BatchNorm1d(4, eps=0.1)), (4, 3)),
    "batch 2d": (lambda: running(nn.BatchNorm2d(4)), (4, 3, 2)),
    "batch 3d": (lambda: running(nn.BatchNorm3d(2)), (2, 3, 2, 2)),
    "group": (lambda: nn.GroupNorm(2, 4, eps=0.1), (4, 3)),
    "instance": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 3, 2)),
    "instance, running": (
        lambda: running(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)), (3, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalizations(name: str) -> None:
    build, shape = NORMALIZATIONS[name]
    norm = build()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    samples = check(classified(norm, shape), torch.randn(N, *shape).double())
    assert samples["0.weight"].n_positions == 1  # m x 1, so that sample space holds it


def test_a_normalization_over_two_dimensions_goes_by_the_fallback() -> None:
    samples = check(classified(nn.LayerNorm((3, 4)), (3, 4)), torch.randn(N, 3, 4).double(),
                    fallback=True)  # fmt: skip
    assert "normalizes 2 dimensions" in samples.fallback["0.weight"]
    assert samples["0.weight"].shape == (3, 4)


# -- embeddings --------------------------------------------------------------------------------


def tokens(*shape: int) -> Tensor:
    drawn = torch.randint(V, (N, *shape))
    drawn[0] = drawn[0].flatten()[0]  # one datum repeats its token
    return drawn


EMBEDDINGS: dict[str, Build] = {
    "plain": lambda: nn.Embedding(V, 3),
    "padding": lambda: nn.Embedding(V, 3, padding_idx=2),
    "padding from the end": lambda: nn.Embedding(V, 3, padding_idx=-1),
    "max_norm": lambda: nn.Embedding(V, 3, max_norm=0.5),
    "sparse": lambda: nn.Embedding(V, 3, sparse=True),
}


@pytest.mark.parametrize("shape", [(), (T,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name: str, shape: tuple[int, ...]) -> None:
    table = EMBEDDINGS[name]()
    model = Lambda(
        lambda m, x: m.c(torch.tanh(m.table(x)).flatten(1, -2).mean(1) if x.ndim > 1
                         else torch.tanh(m.table(x))),
        table=table, c=nn.Linear(3, CLASSES),
    )  # fmt: skip
    inputs = tokens(*shape)
    samples = check(model, inputs)
    one = samples["table.weight"]
    assert torch.equal(one.tokens, inputs.flatten(1) if shape else inputs[:, None])
    assert one.nbytes == 8 * N * (one.tokens.shape[1] * (3 + 1))  # no one-hot


def test_an_embedding_scaled_by_counts_of_the_batch_is_refused() -> None:
    table = nn.Embedding(V, 3, scale_grad_by_freq=True)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(3 * T, CLASSES)).double()
    batch = tokens(T), torch.randint(CLASSES, (N,))
    samples = kp.capture(model, F.cross_entropy, batch, fallback=False)
    assert "scale_grad_by_freq=True" in samples.skipped["0.weight"]


# -- shared and tied ---------------------------------------------------------------------------


class Language(nn.Module):
    """A small GPT: token and position tables, attention by hand, head tied to the table."""

    def __init__(self, functional_head: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, 4), nn.Embedding(T, 4)
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.functional_head = functional_head
        if not functional_head:
            self.head = tied(self.wte, nn.Linear(4, V, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return F.linear(h, self.wte.weight) if self.functional_head else self.head(h)


@pytest.mark.parametrize("functional_head", [True, False])
def test_a_language_model_with_a_tied_head(functional_head: bool) -> None:
    samples = check(Language(functional_head), tokens(T), fallback=True)
    assert isinstance(samples["wte.weight"].n_positions, type(None))
    assert samples["wte.weight"].shape == (V, 4)
    # the table of positions is looked up once for all data
    assert torch.equal(samples["wpe.weight"].tokens, torch.arange(T).expand(N, T))
    assert not samples.fallback


def test_two_tables_looked_up_together_and_one_twice() -> None:
    model = Lambda(
        lambda m, x: m.c(torch.tanh(m.a(x[:, :2]) + m.a(x[:, 2:]) * m.b(x[:, 1:3])).mean(1)),
        a=nn.Embedding(V, 3), b=nn.Embedding(V, 3), c=nn.Linear(3, CLASSES),
    )  # fmt: skip
    samples = check(model, tokens(T))
    assert samples["a.weight"].tokens.shape == (N, T)
    assert samples["b.weight"].tokens.shape == (N, 2)


def within(parameter: str, *shape: int) -> Callable[..., nn.Module]:
    """A model with one parameter of its own, and a classifier."""

    def build(forward: Callable[[nn.Module, Tensor], Tensor], width: int) -> nn.Module:
        model = Lambda(forward, c=nn.Linear(width, CLASSES))
        setattr(model, parameter, nn.Parameter(torch.randn(*shape)))
        return model

    return build


@pytest.mark.parametrize("width", [1, 4, 9])
def test_a_look_up_in_a_part_of_a_table(width: int) -> None:
    model = within("w", 9, width)(lambda m, x: m.c(F.embedding(x, m.w[2:]).tanh().mean(1)), width)
    samples = check(model, tokens(T))
    assert samples["w"].shape == (9, width)
    assert int(samples["w"].tokens.min()) >= 2


def test_a_table_in_two_parts_with_padding() -> None:
    model = within("w", 9, 3)(
        lambda m, x: m.c((F.embedding(x % 4, m.w[5:], padding_idx=1) * F.embedding(x, m.w[:7]))
                         .tanh().mean(1)), 3,
    )  # fmt: skip
    check(model, tokens(T))


def test_a_tied_part_of_a_table() -> None:
    model = within("w", 9, 3)(
        lambda m, x: m.c(F.linear(F.embedding(x, m.w[2:]).tanh(), m.w[1:8])[..., :3].mean(1)), 3
    )
    check(model, tokens(T))


PARTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "slice of a slice": lambda m, x: torch.cat([F.linear(x, m.w[:4][:2]), x @ m.w[2:4].T], 1),
    "one slice, read twice": lambda m, x: (
        lambda w: torch.cat([F.linear(x, w[:2]), x @ w[2:].T], 1))(m.w[:4]),
    "slice of a view": lambda m, x: (
        lambda w: torch.cat([F.linear(x, w[:2]), x @ w[2:].T], 1))(m.w.view(6, 5)[:4]),
    "norm of the whole": lambda m, x: (
        lambda w: torch.cat([F.linear(x, w[:2]), F.linear(x, w[:2])], 1) * w.norm())(m.w[:4]),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_also_used_elsewhere_goes_by_the_fallback(name: str) -> None:
    forward = PARTS[name]
    model = within("w", 6, 5)(lambda m, x: m.c(torch.tanh(forward(m, x))), 4)
    samples = check(model, torch.randn(N, 5).double(), fallback=True)
    assert list(samples.fallback) == ["w"]
    assert "other operations" in samples.fallback["w"] or "no rule" in samples.fallback["w"]


def test_a_convolution_and_a_linear_map_that_share_a_bias() -> None:
    conv, linear = nn.Conv1d(2, 4, 3), nn.Linear(4, 4)
    linear.bias = conv.bias
    model = Lambda(
        lambda m, x: m.c(torch.tanh(m.linear(torch.tanh(m.conv(x)).mean(-1)))),
        conv=conv, linear=linear, c=nn.Linear(4, CLASSES),
    )  # fmt: skip
    check(model, torch.randn(N, 2, 6).double())


# -- attention ---------------------------------------------------------------------------------


class Attended(nn.Module):
    """One attention module, in self- or cross-attention, batch first outside whatever inside."""

    def __init__(self, cross: str = "", **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.cross = cross
        widths = {"kdim": options.get("kdim", 4), "vdim": options.get("vdim", 4)}
        self.key = nn.Linear(4, widths["kdim"])
        self.value = nn.Linear(4, widths["vdim"])
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query = x
        key = self.key(x[:, :3]) if self.cross else x
        value = self.value(x[:, :3]) if self.cross == "three" else key
        triple = (query, key, value)
        if not self.attention.batch_first:
            triple = tuple(part.transpose(0, 1) for part in triple)
            if not self.cross:
                triple = (triple[0],) * 3
        out, weights = self.attention(*triple, need_weights=self.cross == "two")
        out = out if self.attention.batch_first else out.transpose(0, 1)
        out = torch.tanh(out) if weights is None else torch.tanh(out) + weights.mean(-1)[..., None]
        unused = self.key(x).mean() + self.value(x).mean()
        return self.last(out) + 0 * (0 if self.cross == "three" else unused)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("cross", "options"),
    [
        ("", {}),
        ("", {"bias": False}),
        ("two", {}),
        ("two", {"bias": False}),
        ("three", {}),
        ("three", {"kdim": 3, "vdim": 2}),
        ("three", {"kdim": 3, "vdim": 2, "bias": False}),
        ("three", {"add_zero_attn": True}),
    ],
)
def test_attention(cross: str, options: dict[str, object], batch_first: bool) -> None:
    model = Attended(cross, batch_first=batch_first, **options).double().eval()
    inputs = torch.randn(N, T, 4).double()
    targets = torch.randn(N, T, CLASSES).double()
    samples = kp.capture(
        model, F.mse_loss, (inputs, targets), target="empirical-fisher", fallback=False
    )
    names = [n for n, _ in model.named_parameters() if n.startswith(("attention", "last"))]
    assert set(names) <= set(samples), samples.skipped
    expected = oracle.share_gradients(model, F.mse_loss, inputs, targets, names)
    for name in names:
        got = oracle.matrices(samples[name])[:, 0].flatten(1)
        if expected[name].norm() < 1e-12:  # the rows of unused keys
            assert float(got.norm()) < 1e-12
        else:
            assert_close(got, expected[name].flatten(1))


def test_attention_with_a_bias_for_keys_goes_by_the_fallback_for_it_alone() -> None:
    model = Lambda(
        lambda m, x: m.c(m.mha(x, x, x, need_weights=False)[0]),
        mha=nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True),
        c=nn.Linear(4, CLASSES),
    )  # fmt: skip
    samples = check(model, torch.randn(N, T, 4).double(), fallback=True)
    assert list(samples.fallback) == ["mha.bias_k", "mha.bias_v"]


def test_attention_of_one_sequence_without_a_batch() -> None:
    model = Lambda(
        lambda m, x: m.c(m.mha(x[0], x[0], x[0], need_weights=False)[0])[None],
        mha=nn.MultiheadAttention(4, 2), c=nn.Linear(4, CLASSES),
    )  # fmt: skip
    check(model, torch.randn(1, T, 4).double())


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        4, 2, 6, batch_first=batch_first, norm_first=norm_first, activation="gelu"
    )
    turned = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    model = Lambda(
        lambda m, x: m.c(turned(m.encoder(turned(x)))),
        encoder=nn.TransformerEncoder(layer, 2), c=nn.Linear(4, CLASSES),
    )  # fmt: skip
    samples = check(model, torch.randn(N, T, 4).double())
    assert samples["encoder.layers.1.self_attn.in_proj_weight"].n_positions == T


def test_transformer_with_a_decoder() -> None:
    model = Lambda(
        lambda m, x: m.c(m.transformer(x[:, :3], x[:, 1:])),
        transformer=nn.Transformer(4, 2, 1, 1, 6, batch_first=True), c=nn.Linear(4, CLASSES),
    )  # fmt: skip
    samples = check(model, torch.randn(N, T, 4).double())
    # queries are T - 1 positions of the first rows, keys and values 3 of the others
    cross = samples["transformer.decoder.layers.0.multihead_attn.in_proj_weight"]
    assert cross.shape == (12, 4)
    assert cross.n_positions == 3 + 3
