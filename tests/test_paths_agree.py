"""Hooks, per-sample gradients and torch.func: three ways to the same matrices, on every module."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap

import kronecker_probe as kp
from kronecker_probe.gradients.losses import ResolvedLoss, resolve_loss
from kronecker_probe.gradients.per_example.gradients import PerSampleGradients, per_sample_gradients
from kronecker_probe.gradients.targets import n_columns, output_gradients
from kronecker_probe.gradients.tracing.isolation import isolated
from tests.grid import Checks
from tests.module_registry import REGISTRY, RegisteredModel

# float64 sums of a few hundred products each, in another order.
RELATIVE = 1e-10

SEED = 3
CAPTURE_TARGETS = ("ggn", "fisher", "empirical-fisher")

pytestmark = [  # what torch says about models of the registry, and not about the package
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

every_model = pytest.mark.parametrize("entry", REGISTRY.values(), ids=str)


@functools.cache
def jacobians(entry: RegisteredModel) -> dict[str, Tensor]:
    """d outputs_i / d parameter as [N, outputs, mn], in one batched pass, by torch.func alone."""
    model, inputs = entry.reference(entry.model()), entry.inputs()
    values = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (inputs,)).reshape(len(inputs), -1)

    return {name: J.reshape(*J.shape[:2], -1) for name, J in jacrev(outputs)(values).items()}


@functools.cache
def outputs_of(entry: RegisteredModel) -> Tensor:
    with torch.no_grad():
        return entry.model()(entry.inputs())


def resolved(entry: RegisteredModel) -> ResolvedLoss:
    return resolve_loss(entry.loss, outputs_of(entry), entry.batch()[1])


def cotangents(entry: RegisteredModel, target: str) -> list[Tensor]:
    targets = entry.batch()[1]
    found = output_gradients(target, resolved(entry), outputs_of(entry), targets, 1, SEED)
    return list(found)


def loss_moment(entry: RegisteredModel, target: str) -> Tensor:
    """The second moment of the cotangents of each datum, ``[N, outputs, outputs]``.

    From the user's loss by torch.func where that defines it; the sampled labels are the package's.
    """
    outputs, targets = outputs_of(entry), entry.batch()[1]

    def loss(flat: Tensor, y: Tensor) -> Tensor:
        return entry.loss(flat.view(1, *outputs.shape[1:]), y[None])

    flat = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
    if target == "ggn":
        return vmap(hessian(loss))(flat, targets)
    if target == "fisher":
        c = cotangents(entry, target)[0].reshape(flat.shape)
    else:
        c = vmap(grad(loss))(flat, targets)
    return c[:, :, None] * c[:, None]


def expected_moment(entry: RegisteredModel, target: str, name: str) -> Tensor:
    J = jacobians(entry)[name]
    return torch.einsum("iap,iab,ibq->pq", J, loss_moment(entry, target), J) / len(J)


def second_moment(samples: kp.GradientSamples) -> Tensor:
    G = samples.matrices().flatten(2)
    return torch.einsum("i,icp,icq->pq", samples.weights, G, G)


def assert_close(got: Tensor, expected: Tensor, name: str, zero: bool) -> None:
    assert got.shape == expected.shape, name
    size = 1.0 if zero else float(expected.norm())  # numbers of order one, where all cancels
    assert zero or size > 1e-9, name
    assert float((got - expected).norm()) <= RELATIVE * size, name


@every_model
def test_every_path(entry: RegisteredModel) -> None:
    with Checks() as check:
        for target in CAPTURE_TARGETS:
            check(target, second_moments_are_those_of_torch_func, entry, target)
            check(target, per_sample_gradients_are_those_of_torch_func, entry, target)
        check("coverage", rules_cover_the_known_modules, entry)
        for option in ("joint bias", "no fallback", "one parameter"):
            check(option, coverage_partitions_the_parameters, entry, option)


def second_moments_are_those_of_torch_func(entry: RegisteredModel, target: str) -> None:
    model = entry.model()
    capture = kp.capture(model, entry.loss, entry.batch(), target=target, seed=SEED)
    assert dict(capture.skipped) == {}
    for name, parameter in model.named_parameters():
        samples = capture[name]
        rows = parameter.shape[0] if parameter.ndim else 1
        assert samples.shape == (rows, parameter.numel() // rows)
        assert_close(
            second_moment(samples), expected_moment(entry, target, name), name, name in entry.zero
        )


def rules_cover_the_known_modules(entry: RegisteredModel) -> None:
    model = entry.model()
    coverage = kp.capture(model, entry.loss, entry.batch(), target="empirical-fisher").coverage
    names = [name for name, _ in model.named_parameters()]
    assert sorted(coverage["parameter"]) == sorted(names)  # each exactly once
    for name, status in zip(coverage["parameter"], coverage["status"], strict=True):
        assert status in entry.statuses(name), (name, status)


def coverage_partitions_the_parameters(entry: RegisteredModel, option: str) -> None:
    model = entry.model()
    every = sorted(name for name, _ in model.named_parameters())
    given = {"joint bias": {"bias": "joint"}, "no fallback": {"fallback": False}}
    options = given.get(option, {"layers": every[-1]})
    capture = kp.capture(model, entry.loss, entry.batch(), target="fisher", **options)
    table = capture.coverage.set_index("parameter")["status"]
    assert sorted(part for name in table.index for part in _parts(name)) == every
    assert set(table.index[table != "skipped"]) == set(capture)
    assert set(table.index[table == "skipped"]) == set(capture.skipped)
    assert not set(capture) & set(capture.skipped)
    if option == "one parameter":
        assert list(capture) == every[-1:]
    if option == "no fallback":
        assert set(table) <= {"measured", "skipped"}


def _parts(name: str) -> list[str]:
    """A joint matrix stands for a weight and a bias."""
    return [name.removesuffix("+bias"), name.replace("weight+", "")] if "+" in name else [name]


def run(entry: RegisteredModel, target: str, seed: int = 0) -> PerSampleGradients:
    model = entry.model()
    columns = n_columns(target, resolved(entry), outputs_of(entry), 1)
    with isolated(model):
        return per_sample_gradients(
            model, entry.inputs(), iter(cotangents(entry, target)),
            dict(model.named_parameters()), columns,
        )  # fmt: skip


def per_sample_gradients_are_those_of_torch_func(entry: RegisteredModel, target: str) -> None:
    found = run(entry, target)
    assert found.reasons == {}
    assert list(found.gradients) == list(jacobians(entry))
    C = torch.stack([c.reshape(len(c), -1) for c in cotangents(entry, target)], dim=1)
    for name, parameter in entry.model().named_parameters():
        G = found.gradients[name]
        rows = parameter.shape[0] if parameter.ndim else 1
        assert G.shape == (*C.shape[:2], rows, parameter.numel() // rows)
        assert G.dtype == parameter.dtype
        expected = torch.einsum("ico,iop->icp", C, jacobians(entry)[name])
        assert_close(G.flatten(2), expected, name, name in entry.zero)


@pytest.mark.parametrize(
    "name",
    ["LSTM", "GRU", "GRUCell, step by step", "control flow that depends on data",
     "autograd function without a rule for vmap", "Embedding, max_norm"],
)  # fmt: skip
def test_what_vmap_refuses_goes_datum_by_datum(name: str) -> None:
    way = run(REGISTRY[name], "empirical-fisher").way
    assert way.startswith("loop over examples (vmap fails with ")


@pytest.mark.parametrize(
    "name", ["Linear", "small ResNet", "TransformerEncoder", "ConvTranspose2d", "EmbeddingBag"]
)
def test_what_vmap_can_do_it_does(name: str) -> None:
    assert run(REGISTRY[name], "empirical-fisher").way == "vmap"
