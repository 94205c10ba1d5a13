"""[W b] as one matrix, and the forms and the memory of samples."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import MemoryBudgetError, UnknownNameError
from kronecker_probe.gradients.samples.base import FactoredSamples, MatrixSamples
from kronecker_probe.linalg import memory
from tests import functional_oracle as oracle
from tests.functional_oracle import assert_close, matrices
from tests.small_models import SMALL_MODELS, SmallModel
from tests.small_modules import CLASSES, Lambda, tied

N = 5

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("small", SMALL_MODELS.values(), ids=SMALL_MODELS.keys())
def test_joint_is_the_weight_beside_the_bias(small: SmallModel) -> None:
    model, batch = small.model(), small.batch("mse")
    apart = kp.capture(model, F.mse_loss, batch, target="empirical-fisher")
    joint = kp.capture(model, F.mse_loss, batch, target="empirical-fisher", bias="joint")
    covered: list[str] = []
    for name, one in joint.items():
        if not name.endswith("+bias"):
            assert torch.equal(one.matrices(), apart[name].matrices())
            covered.append(name)
            continue
        weight = name.removesuffix("+bias")
        bias = weight.removesuffix("weight") + "bias"
        expected = torch.cat([apart[weight].matrices(), apart[bias].matrices()], dim=3)
        assert_close(matrices(one), expected, 1e-14)
        covered += [weight, bias]
    assert sorted(covered) == sorted(apart)
    assert joint.skipped == apart.skipped


def test_joint_of_linear_maps_stays_factored_and_is_named_after_the_module() -> None:
    small = SMALL_MODELS["3-D"]
    model, batch = small.model(), small.batch("mse")
    samples = kp.capture(model, F.mse_loss, batch, bias="joint")
    assert list(samples) == ["0.weight+bias", "2.weight+bias"]
    one = samples["0.weight+bias"]
    assert isinstance(one, FactoredSamples)
    assert one.shape == (4, 4)
    assert torch.equal(one.inputs[..., -1], torch.ones(one.inputs.shape[:2]).double())
    rows = samples.coverage.set_index("parameter")
    assert rows.loc["0.weight+bias", "status"] == "measured"
    assert rows.loc["0.weight+bias", "shape"] == "4 x 4"


def test_joint_where_the_bias_is_added_by_other_calls_is_a_matrix() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight  # W is used with two biases
    model = Lambda(lambda m, x: m.b(torch.tanh(m.a(x))), a=a, b=b).double()
    batch = torch.randn(N, 3).double(), torch.randn(N, 3).double()
    samples = kp.capture(model, F.mse_loss, batch, target="empirical-fisher", bias="joint")
    assert list(samples) == ["a.weight+bias", "b.bias"]
    assert isinstance(samples["a.weight+bias"], MatrixSamples)
    expected = oracle.per_sample_gradients(model, F.mse_loss, *batch)
    both = torch.cat([expected["a.weight"], expected["a.bias"][..., None]], dim=2)
    assert_close(samples["a.weight+bias"].matrices()[:, 0], both)


def test_joint_takes_only_what_is_selected() -> None:
    small = SMALL_MODELS["2-D"]
    model, batch = small.model(), small.batch("mse")
    for layers, names in (
        ("*weight", ["0.weight", "2.weight"]),
        ("*bias", ["0.bias", "2.bias"]),
        (["0.*", "2.weight"], ["0.weight+bias", "2.weight"]),
    ):
        assert list(kp.capture(model, F.mse_loss, batch, layers=layers, bias="joint")) == names


def test_joint_of_attention_s_projections() -> None:
    model = Lambda(
        lambda m, x: m.c(m.mha(x, x, x, need_weights=False)[0]),
        mha=nn.MultiheadAttention(4, 2, batch_first=True), c=nn.Linear(4, CLASSES),
    ).double()  # fmt: skip
    batch = torch.randn(N, 2, 4).double(), torch.randn(N, 2, CLASSES).double()
    samples = kp.capture(model, F.mse_loss, batch, bias="joint")
    assert list(samples) == ["mha.in_proj_weight+bias", "mha.out_proj.weight+bias", "c.weight+bias"]
    assert samples["mha.in_proj_weight+bias"].shape == (12, 5)


def test_a_normalization_stays_separate() -> None:
    small = SMALL_MODELS["layer norm"]
    samples = kp.capture(small.model(), F.mse_loss, small.batch("mse"), bias="joint")
    assert list(samples) == ["0.weight+bias", "1.weight", "1.bias", "3.weight+bias"]


def test_an_unknown_treatment_of_biases() -> None:
    small = SMALL_MODELS["2-D"]
    with pytest.raises(UnknownNameError, match=r"bias 'jiont'.*Did you mean 'joint'"):
        kp.capture(small.model(), F.mse_loss, small.batch("mse"), bias="jiont")


# -- forms and memory --------------------------------------------------------------------------


def test_a_bias_is_m_by_1_whatever_the_positions() -> None:
    for name in ("2-D", "3-D", "conv default", "called twice"):
        small = SMALL_MODELS[name]
        samples = kp.capture(small.model(), F.mse_loss, small.batch("mse"))
        for parameter in small.names:
            if parameter.endswith("bias"):
                one = samples[parameter]
                assert isinstance(one, FactoredSamples)
                assert (one.n_positions, one.shape[1]) == (1, 1)
                assert torch.equal(one.inputs, torch.ones_like(one.inputs))


def test_an_unshared_bias_reads_the_block_of_its_weight() -> None:
    small = SMALL_MODELS["2-D"]
    samples = kp.capture(small.model(), F.mse_loss, small.batch("mse"))
    weight, bias = samples["0.weight"], samples["0.bias"]
    assert bias.output_grads.data_ptr() == weight.output_grads.data_ptr()


def test_inputs_that_are_a_slice_do_not_hold_the_whole() -> None:
    model = Lambda(
        lambda m, x: m.c(torch.tanh(m.a(x))[:, 0]), a=nn.Linear(3, 4), c=nn.Linear(4, CLASSES)
    ).double()
    batch = torch.randn(N, 50, 3).double(), torch.randint(CLASSES, (N,))
    a = kp.capture(model, F.cross_entropy, batch)["c.weight"].inputs
    assert a.untyped_storage().nbytes() == a.nbytes


def test_output_gradients_that_are_expanded_take_their_own_memory() -> None:
    model = Lambda(lambda m, x: m.a(x).sum(1), a=nn.Linear(3, CLASSES)).double()
    batch = torch.randn(N, 7, 3).double(), torch.randint(CLASSES, (N,))
    d = kp.capture(model, F.cross_entropy, batch, target="fisher")["a.weight"].output_grads
    assert d.untyped_storage().nbytes() == d.nbytes


def test_the_memory_of_a_tied_embedding_is_counted_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = nn.Embedding(50, 4)
    model = Lambda(
        lambda m, x: m.head(torch.tanh(m.table(x))).mean(1),
        table=table, head=tied(table, nn.Linear(4, 50, bias=False)),
    ).double()  # fmt: skip
    batch = torch.randint(50, (N, 2)), torch.randint(50, (N,))
    held = 8 * N * 50 * 4
    monkeypatch.setattr(memory, "available_bytes", lambda device: held - 1)
    with pytest.raises(MemoryBudgetError, match=r"'table.weight'.*GB"):
        kp.capture(model, F.cross_entropy, batch, target="fisher")
    monkeypatch.setattr(memory, "available_bytes", lambda device: held)
    samples = kp.capture(model, F.cross_entropy, batch, target="fisher")
    assert samples["table.weight"].nbytes == held


def test_the_memory_of_the_fallback_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SMALL_MODELS["subclass with a forward of its own"]
    monkeypatch.setattr(memory, "available_bytes", lambda device: 700)
    model, batch = small.model(), small.batch("mse")
    kp.capture(model, F.mse_loss, batch, target="fisher", fallback=False)
    with pytest.raises(MemoryBudgetError):
        kp.capture(model, F.mse_loss, batch, target="fisher")


# -- samples and the model ---------------------------------------------------------------------


class Static(nn.Module):
    """A layer whose input lies in memory that the model keeps."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where = nn.Linear(3, CLASSES), where
        if where == "buffer":
            self.register_buffer("kept", torch.zeros(2 * N, 3))
        elif where == "parameter":
            self.kept = nn.Parameter(torch.randn(2 * N, 3))
        else:
            self.kept = torch.zeros(2 * N, 3)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.kept[: len(x)]
        if self.where != "parameter":
            inside.copy_(x)
        return self.layer(inside) + 0 * x.sum(1, keepdim=True)


@pytest.mark.parametrize("where", ["buffer", "parameter", "attribute"])
def test_samples_do_not_alias_what_the_model_keeps(where: str) -> None:
    model = Static(where)
    batch = torch.randn(N, 3), torch.randint(CLASSES, (N,))
    expected = (model.kept.detach()[:N] if where == "parameter" else batch[0]).clone()
    samples = kp.capture(model, F.cross_entropy, batch, target="empirical-fisher")
    with torch.no_grad():
        model.kept.zero_()
    model(torch.zeros(N, 3))
    one = samples["layer.weight"]
    assert isinstance(one, FactoredSamples)
    assert torch.equal(one.inputs[:, 0], expected)


def test_samples_do_not_alias_what_a_hook_keeps() -> None:
    kept: list[Tensor] = []
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    model[1].register_forward_hook(lambda module, given, output: kept.append(output))
    batch = torch.randn(N, 3), torch.randint(CLASSES, (N,))
    one = kp.capture(model, F.cross_entropy, batch)["2.weight"]
    assert isinstance(one, FactoredSamples)
    expected = one.inputs.clone()
    with torch.no_grad():
        kept[0].zero_()
    assert torch.equal(one.inputs, expected)


def test_what_the_samples_alone_hold_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_module = sys.modules["kronecker_probe.gradients.capture"]
    given: dict[str, tuple[Tensor, ...]] = {}
    real = capture_module.owned

    def spy(samples: dict[str, kp.GradientSamples]) -> dict[str, kp.GradientSamples]:
        given.update({name: tuple(one.tensors) for name, one in samples.items()})
        return real(samples)

    monkeypatch.setattr(capture_module, "owned", spy)
    for name in ("2-D", "3-D", "conv default", "called twice", "attention"):
        given.clear()
        small = SMALL_MODELS[name]
        samples = kp.capture(small.model(), F.mse_loss, small.batch("mse"))
        assert given
        for parameter, tensors in given.items():
            for tensor, kept in zip(tensors, samples[parameter].tensors, strict=True):
                assert tensor.data_ptr() == kept.data_ptr()


# -- data --------------------------------------------------------------------------------------


def test_an_iterable_of_batches_is_one_set_of_samples() -> None:
    small = SMALL_MODELS["2-D"]
    model, (inputs, targets) = small.model(), small.batch("mse", 6)
    whole = kp.capture(model, F.mse_loss, (inputs, targets), target="empirical-fisher")
    pairs = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]

    def generator() -> object:
        yield from pairs

    for data in (pairs, tuple(pairs), generator(), torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=4
    )):  # fmt: skip
        joined = kp.capture(model, F.mse_loss, data, target="empirical-fisher", bias="joint")
        both = torch.cat([whole["0.weight"].matrices(), whole["0.bias"].matrices()], dim=3)
        assert_close(joined["0.weight+bias"].matrices(), both, 1e-12)


def test_halves_of_a_wrong_batch_are_no_pairs() -> None:
    small = SMALL_MODELS["2-D"]
    with pytest.raises(ValueError, match="give a pair"):
        kp.capture(small.model(), F.mse_loss, 7)
