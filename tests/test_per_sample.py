"""Per-sample gradients of arbitrary parameters: refusals, chunks, precision, and no traces."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronecker_probe.errors import MemoryBudgetError, NonFiniteError
from kronecker_probe.gradients.per_example import methods as per_sample_ways
from kronecker_probe.gradients.per_example.gradients import PerSampleGradients, per_sample_gradients
from kronecker_probe.gradients.tracing.isolation import isolated
from kronecker_probe.linalg import memory
from tests.module_registry import REGISTRY
from tests.restless import Snapshot, restless
from tests.small_models import SMALL_MODELS
from tests.small_modules import CLASSES, Lambda, mlp, three

# float64 sums of a few products in another order; float32 through a few hundred layers' roundings.
DOUBLE = 1e-12
SINGLE = 1e-4

N, COLUMNS = 5, 3


def run(
    model: nn.Module, inputs: Tensor, columns: int = COLUMNS, names: tuple[str, ...] = ()
) -> PerSampleGradients:
    parameters = {k: p for k, p in model.named_parameters() if not names or k in names}
    with isolated(model):
        return per_sample_gradients(model, inputs, cotangents(model, inputs, columns),
                                    parameters, columns)  # fmt: skip


def cotangents(model: nn.Module, inputs: Tensor, columns: int = COLUMNS) -> list[Tensor]:
    with isolated(model), torch.no_grad():
        outputs = model(inputs.clone())
    generator = torch.Generator().manual_seed(4)
    shape = (columns, *outputs.shape)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).to(outputs.dtype))


def by_definition(model: nn.Module, inputs: Tensor, name: str) -> Tensor:
    """One backward pass a datum and column, through the whole batch, ``[N, C, *parameter]``."""
    parameter = dict(model.named_parameters())[name]
    with isolated(model):
        outputs = model(inputs.clone())
        rows = [
            torch.autograd.grad(
                (outputs[i] * c[i]).sum(), parameter, retain_graph=True, allow_unused=True
            )[0]
            for i in range(len(inputs))
            for c in cotangents(model, inputs)
        ]
    zero = torch.zeros_like(parameter)
    stacked = torch.stack([zero if row is None else row.to_dense() for row in rows])
    return stacked.unflatten(0, (len(inputs), -1))


def data(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, *shape, generator=generator, dtype=torch.float64)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double().eval()


def assert_same(found: PerSampleGradients, model: nn.Module, inputs: Tensor) -> None:
    for name, G in found.gradients.items():
        expected = by_definition(model, inputs, name).flatten(2)
        assert float(expected.norm()) > 0
        assert float((G.flatten(2) - expected).norm()) <= DOUBLE * float(expected.norm()), name


class Held(nn.Module):
    """Reads its weight also through a reference that torch.func cannot replace."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, CLASSES)
        self.held = [self.W]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.W) + x @ self.held[0])


class Kept(nn.Module):
    """Computes its weight once and keeps it, as torch's parametrize.cached() does."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.head = nn.Parameter(torch.randn(3, 4).double()), nn.Linear(4, CLASSES)
        self.cache = {"W": 2 * self.W}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.cache["W"]))


class Mixing(nn.Module):
    """Outputs that are apart, and gradients that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(3, 4, bias=False), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient - gradient.mean(0))
        return self.c(h)


class Counting(nn.Module):
    """Another answer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.calls = nn.Linear(3, CLASSES), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) * self.calls


class Routed(nn.Module):
    """Data with a positive first number take another weight than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.V = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row @ (self.W if row[0].item() > 0 else self.V) for row in x])


REFUSED = {
    "train-mode statistics": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Unflatten(1, (2, 2)),
            nn.BatchNorm1d(2, track_running_stats=False), nn.Flatten(),
        ),
        "couples the examples",
    ),
    "mean over the batch": (
        lambda: three(lambda m, x: m.c(m.b(m.a(x)) + m.a(x).mean(0))), "couples the examples",
    ),
    "flattened positions": (
        lambda: three(lambda m, x: m.c(m.a(x).flip(0))), "first dimension of its inputs",
    ),
    "dropout that never stops": (
        lambda: three(lambda m, x: m.c(F.dropout(m.b(F.dropout(m.a(x), 0.5, True)), 0.5, True))),
        "random numbers",
    ),
    "state": (Counting, "a state that changes"),
    "no batch of one": (
        lambda: three(lambda m, x: m.c(m.a(x.view(N, 3)))), "does not run on one example alone",
    ),
    "gradients that mix": (Mixing, "do not add up to the gradient of the batch"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "pattern"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_per_sample_gradient_is_refused(
    build: Callable[[], nn.Module], pattern: str
) -> None:
    model = seeded(build)
    found = run(model, data(3))
    refused = "a.weight" if hasattr(model, "a") else "0.weight"
    assert re.search(pattern, found.reasons[refused])
    assert refused not in found.gradients
    assert_same(found, model, data(3))  # what is left is right
    assert {*found.gradients, *found.reasons} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("build", [Held, Kept])
def test_what_vmap_does_not_see_is_measured_by_the_loop(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    found = run(model, data(3))
    assert found.reasons == {}
    assert found.way == "vmap; loop over examples for W"
    assert set(found.gradients) == {"W", "head.weight", "head.bias"}
    outputs = model(data(3))
    for c, cotangent in enumerate(cotangents(model, data(3))):
        for i in range(N):  # in the batch, and so beyond functional_call as well
            share = (outputs[i] * cotangent[i]).sum()
            (expected,) = torch.autograd.grad(share, model.W, retain_graph=True)
            assert float((found.gradients["W"][i, c] - expected).norm()) <= DOUBLE * float(
                expected.norm()
            )


def test_a_hundredth_of_a_coupling_is_seen_in_single_precision() -> None:
    model = three(lambda m, x: m.c(m.a(x) + 0.01 * m.a(x).mean(0))).float()
    assert "couples the examples" in run(model, data(3).float()).reasons["c.weight"]


def test_unused_parameters_are_named() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = m.b(m.a(x))
        return m.c(h)

    found = run(seeded(lambda: three(forward)), data(3))
    assert set(found.gradients) == {"c.weight", "c.bias"}
    assert list(found.reasons) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert all(reason.startswith("unused: ") for reason in found.reasons.values())


def test_a_model_without_a_graph_has_only_unused_parameters() -> None:
    found = run(seeded(mlp).requires_grad_(False), data(3))
    assert (found.gradients, found.way) == ({}, "")
    assert len(found.reasons) == 4


def test_parameters_without_elements_are_named() -> None:
    model = seeded(mlp)
    model.none = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    found = run(model, data(3))
    assert found.reasons == {"none": "it has no elements"}
    assert_same(found, model, data(3))


UNREADABLE = (
    "checkpoint", "tied", "tied to an embedding", "weight_norm", "pruned", "conv channels last",
    "sequence first, as long as the batch", "own forward called past the hooks",
    "functional use and an unused call", "recurrent in front",
)  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_models_that_rules_cannot_read(name: str) -> None:
    small = SMALL_MODELS[name]
    model, inputs = small.model(), small.inputs()
    found = run(model, inputs)
    assert set(found.reasons) <= {"b.bias"}
    assert_same(found, model, inputs)


def test_data_that_do_not_use_a_parameter_have_zero_gradient() -> None:
    model, inputs = seeded(Routed), data(3)
    found = run(model, inputs)
    assert found.way.startswith("loop over examples")
    assert_same(found, model, inputs)
    assert not bool(found.gradients["V"][inputs[:, 0] > 0].any())


def test_sparse_gradients_are_dense() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Flatten()))
    inputs = torch.arange(2 * N).reshape(N, 2) % 6
    assert_same(run(model, inputs), model, inputs)
    looped = nn.Sequential(model, Lambda(lambda m, x: x * (1 + x.sum().item() * 0)))
    assert run(looped, inputs).way.startswith("loop over examples")
    assert_same(run(looped, inputs), looped, inputs)


@pytest.mark.parametrize("name", ["Linear", "LSTM", "Embedding", "x @ W, scale and shift"])
@pytest.mark.parametrize("bytes_at_once", [1, 1000, 1 << 30])
def test_chunks_change_nothing(
    name: str, bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = REGISTRY[name].model(), REGISTRY[name].inputs()
    expected = run(model, inputs, 7)
    monkeypatch.setattr(per_sample_ways, "CHUNK_BYTES", bytes_at_once)
    found = run(model, inputs, 7)
    assert found.way == expected.way
    for parameter, G in found.gradients.items():
        size = float(expected.gradients[parameter].norm())
        assert float((G - expected.gradients[parameter]).norm()) <= DOUBLE * size


def test_only_the_parameters_asked_for() -> None:
    model, inputs = seeded(mlp), data(3)
    found = run(model, inputs, names=("2.weight",))
    assert list(found.gradients) == ["2.weight"]
    assert_same(found, model, inputs)


@pytest.mark.parametrize("name", ["small ResNet", "TransformerEncoder", "GRU"])
def test_single_precision_is_that_of_double_rounded(name: str) -> None:
    model, inputs = REGISTRY[name].model(), REGISTRY[name].inputs()
    expected = run(model, inputs).gradients
    found = run(model.float(), inputs.float())
    assert found.reasons == {}
    for parameter, G in found.gradients.items():
        assert G.dtype == torch.float32
        assert float((G - expected[parameter]).norm()) <= SINGLE * float(expected[parameter].norm())


def test_a_deep_model_in_single_precision_is_not_taken_for_a_coupled_one() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(40) for m in (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())]
    found = run(nn.Sequential(*layers), torch.randn(64, 64), columns=1)
    assert found.reasons == {}
    assert found.way == "vmap"


@pytest.mark.parametrize("name", ["Linear", "small ResNet", "TransformerEncoder"])
def test_autocast_is_as_coarse_as_its_type(name: str) -> None:
    model, inputs = REGISTRY[name].model().float(), REGISTRY[name].inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, inputs)
    assert found.reasons == {}
    expected = run(model, inputs).gradients
    for parameter, G in found.gradients.items():
        error = float((G - expected[parameter]).norm()) / float(expected[parameter].norm())
        assert error < 0.2  # three roundings of 2^-8 in a row would be .02; a wrong gradient is 1


def test_memory_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000.0)
    with pytest.raises(MemoryBudgetError, match=r"3 columns per example.* 0\.weight.* GB"):
        run(seeded(mlp), data(3))


def test_gradients_that_are_not_finite_are_named() -> None:
    model = seeded(lambda: three(lambda m, x: m.c(torch.sqrt(0 * m.a(x)))))  # 0 / 0 backwards
    with pytest.raises(NonFiniteError, match=r"parameter 'a\.weight'"):
        run(model, data(3))


def test_hooks_on_parameters_do_not_act() -> None:
    model, inputs = seeded(lambda: nn.GRU(3, 4, batch_first=True)), data(2, 3)
    wrapped = Lambda(lambda m, x: m.rnn(x)[0], rnn=model)
    expected = run(wrapped, inputs).gradients
    seen = []
    for parameter in wrapped.parameters():
        parameter.register_hook(lambda g: seen.append(g) or 2 * g)
    found = run(wrapped, inputs)
    assert seen == []
    assert found.reasons == {}
    assert all(torch.equal(G, expected[name]) for name, G in found.gradients.items())


def test_hooks_on_modules_act_as_in_training() -> None:
    model, inputs = seeded(mlp), data(3)
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    assert_same(run(model, inputs), model, inputs)


def test_no_trace_is_left() -> None:
    model, (inputs, _) = restless()
    kept = inputs.clone()
    before = Snapshot.of(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with isolated(model):
        columns = [torch.randn(8, CLASSES) for _ in range(2)]
        found = per_sample_gradients(model, inputs, columns, parameters, 2)
    before.check(model, versions=False)  # values come back; a parameter was written in between
    assert {*found.gradients, *found.reasons} == set(parameters)
    assert torch.equal(inputs, kept)


def test_a_model_that_writes_into_its_inputs() -> None:
    model = seeded(lambda: three(lambda m, x: m.c(m.a(x.mul_(2)))))
    inputs = data(3)
    found = run(model, inputs, names=("a.weight", "c.weight"))
    assert torch.equal(inputs, data(3))
    assert_same(found, model, inputs)


def test_each_attempt_starts_from_the_same_state() -> None:
    model = seeded(Counting)  # one chunk is one call, as the batch was
    found = run(model, data(3), columns=1)
    assert (found.reasons, found.way) == ({}, "vmap")
    assert model.calls == 0
    model.branch = Lambda(lambda m, x: x * (1.0 if x.sum().item() else 0.0))
    model.register_forward_hook(lambda module, args, out: module.branch(out))
    one = data(3)[:1]  # and one datum is one call, too, after a failed attempt by vmap
    assert run(model, one).way.startswith("loop over examples")
    assert_same(run(model, one), model, one)


def test_autocast_may_end_in_single_precision() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = nn.Sequential(first, Lambda(lambda m, x: x.float()))
    with torch.autocast("cpu", torch.bfloat16):  # sums over the batch are rounded to bfloat16
        found = run(model, torch.randn(64, 64), columns=1)
    assert found.reasons == {}


@pytest.mark.parametrize(("n_examples", "columns"), [(1, 10), (4, 3), (8, 100), (500, 2)])
def test_chunks_hold_no_more_rows_than_the_batch(n_examples: int, columns: int) -> None:
    model = nn.Linear(1000, 100)
    values = {name: p.detach() for name, p in model.named_parameters()}
    outputs = torch.zeros(n_examples, 100)
    problem = per_sample_ways.Problem(
        model, torch.zeros(n_examples, 1000), outputs, torch.zeros(n_examples, columns, 100),
        values, {}, {}, torch.zeros(n_examples, columns),
    )  # fmt: skip
    data_at_once, columns_at_once = problem.chunks()
    assert 1 <= data_at_once * columns_at_once <= n_examples
    size = sum(value.nbytes for value in values.values())
    assert data_at_once * columns_at_once * size <= per_sample_ways.CHUNK_BYTES


def test_recurrent_layers_run_without_cudnn_and_others_with_it() -> None:
    """Its recurrent kernels have no backward pass in evaluation mode."""
    enabled = torch.backends.cudnn.enabled
    with isolated(seeded(mlp)):
        assert torch.backends.cudnn.enabled == enabled
    with isolated(seeded(lambda: nn.Sequential(nn.LSTM(3, 4)))):
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == enabled


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["LSTM", "GRU", "small ResNet", "TransformerEncoder", "ConvTranspose2d", "Embedding"]
)
def test_on_a_cuda_device(name: str) -> None:
    model, inputs = REGISTRY[name].model(), REGISTRY[name].inputs()
    expected = run(model, inputs).gradients
    columns = [c.cuda() for c in cotangents(model, inputs)]
    model, inputs = model.cuda(), inputs.cuda()
    with isolated(model):
        found = per_sample_gradients(
            model, inputs, columns, dict(model.named_parameters()), COLUMNS
        )
    assert found.reasons == {}
    for parameter, G in found.gradients.items():
        error = float((G.cpu() - expected[parameter]).norm())
        assert error <= 1e3 * DOUBLE * float(expected[parameter].norm())
