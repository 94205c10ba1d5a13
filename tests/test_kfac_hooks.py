"""What the hooks of KFAC and EKFAC record, leave alone and refuse."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kronecker_probe import optim
from kronecker_probe.errors import (
    InvalidInputError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from tests.kfac_cases import (
    LOSS,
    N,
    Reread,
    Twice,
    assert_close,
    assert_same_statistics,
    dense,
    fresh,
    problem,
    step,
)


@pytest.mark.parametrize("name", ["linear", "conv2d", "twice"])
def test_hooks_change_no_output_and_no_gradient(name: str) -> None:
    model, x, y = problem(name)
    plain = copy.deepcopy(model)
    optim.KFAC(model)
    outputs = [m(x) for m in (model, plain)]
    assert torch.equal(*outputs)
    for output in outputs:
        LOSS(output, y).backward()
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.equal(one.grad, two.grad)


def test_passes_add_up_to_the_batch_that_they_are_parts_of() -> None:
    model, x, y = problem("conv2d")

    def parts(_: optim.KroneckerOptimizer) -> None:
        for part in (slice(0, 10), slice(10, 25), slice(25, N)):
            (LOSS(model(x[part]), y[part]) * len(x[part]) / N).backward()

    assert_same_statistics(model, parts, lambda _: LOSS(model(x), y).backward())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_count_once(reentrant: bool) -> None:
    model, x, y = problem("twice")
    assert isinstance(model, Twice)

    def run(_: optim.KroneckerOptimizer) -> None:
        inputs = x.clone().requires_grad_()
        hidden = checkpoint(lambda v: torch.tanh(model.inner(v)), inputs, use_reentrant=reentrant)
        LOSS(model.head(torch.relu_(hidden)), y).backward()

    def plain(_: optim.KroneckerOptimizer) -> None:
        LOSS(model.head(torch.relu(torch.tanh(model.inner(x)))), y).backward()

    assert_same_statistics(model, run, plain)


def test_what_is_no_training_leaves_no_trace() -> None:
    model, x, y = problem()

    def with_others(optimizer: optim.KroneckerOptimizer) -> None:
        LOSS(model(x[:7]), y[:7]).backward()
        optimizer.zero_grad()
        with torch.no_grad():
            model(2 * x)
        model(3 * x)  # no backward pass
        model.eval()
        LOSS(model(4 * x.requires_grad_()), y).backward()
        model.train()
        for param in model.parameters():
            param.grad = None
        inputs = (5 * x).detach().requires_grad_()
        torch.autograd.grad(LOSS(model(inputs), y), inputs)
        LOSS(model(x.detach()), y).backward()

    assert_same_statistics(model, with_others, lambda _: LOSS(model(x.detach()), y).backward())


def test_sampling_gives_the_statistics_and_no_gradient() -> None:
    model, x, y = problem()
    drawn = [(y + k) % 4 for k in (1, 2)]
    optimizer = fresh(model)
    outputs = model(x)
    with optimizer.sampling():
        for labels in drawn:
            (LOSS(outputs, labels) / 2).backward(retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    LOSS(outputs, y).backward()
    own = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), own, strict=True))
    optimizer.step()
    optimizer.remove_hooks()
    model.zero_grad()
    other = fresh(model)
    LOSS(model(torch.cat([x, x])), torch.cat(drawn)).backward()
    other.step()
    for param in model.parameters():
        assert_close(dense(optimizer, param), dense(other, param))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_the_model_zeroed_are_forgotten(set_to_none: bool) -> None:
    model, x, y = problem()

    def discarded(_: optim.KroneckerOptimizer) -> None:
        LOSS(model(100 * x), y).backward()
        model.zero_grad(set_to_none=set_to_none)
        LOSS(model(x), y).backward()

    assert_same_statistics(model, discarded, lambda _: LOSS(model(x), y).backward())


def test_passes_in_evaluation_mode_are_of_the_gradient_too() -> None:
    model, x, y = problem()

    def mixed(_: optim.KroneckerOptimizer) -> None:
        (LOSS(model(x[:4]), y[:4]) * 4 / len(x)).backward()
        model.eval()
        (LOSS(model(x[4:]), y[4:]) * (len(x) - 4) / len(x)).backward()
        model.train()

    assert_same_statistics(model, mixed, lambda _: LOSS(model(x), y).backward())


def test_what_was_sampled_outlives_zeroed_gradients() -> None:
    model, x, y = problem()

    def sampled(optimizer: optim.KroneckerOptimizer, *, late: bool) -> None:
        if not late:
            optimizer.zero_grad()
        with optimizer.sampling():
            LOSS(model(x), (y + 1) % 4).backward()
        if late:
            optimizer.zero_grad()
        LOSS(model(x), y).backward()

    assert_same_statistics(model, lambda o: sampled(o, late=True), lambda o: sampled(o, late=False))


def test_a_step_with_sampled_labels_is_refused() -> None:
    model, x, y = problem()
    optimizer = optim.KFAC(model)
    with optimizer.sampling():
        LOSS(model(x), y).backward()
        with pytest.raises(InvalidInputError, match=r"step\(\) inside sampling\(\)"):
            optimizer.step()


def test_scaled_losses_give_the_statistics_of_plain_ones() -> None:
    model, x, y = problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)

    def scaled(optimizer: optim.KroneckerOptimizer) -> None:
        optimizer.attach(model, scaler=scaler)
        for part in (slice(0, 4), slice(4, None)):
            share = LOSS(model(x[part]), y[part]) * len(x[part]) / len(x)
            scaler.scale(share).backward()
        scaler.unscale_(optimizer)

    assert_same_statistics(model, scaled, lambda _: LOSS(model(x), y).backward())


def test_a_closure_is_recorded() -> None:
    model, x, y = problem()
    twin = copy.deepcopy(model)
    optimizer, other = optim.KFAC(model), optim.KFAC(twin)

    def closure() -> float:
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return float(loss.detach())

    first = LOSS(model(x), y).item()
    assert optimizer.step(closure) == first
    optimizer.step(closure)
    for _ in range(2):
        step(twin, other, x, y)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_end_with_removal_and_do_not_keep_the_optimizer() -> None:
    model, x, y = problem()
    optimizer = optim.KFAC(model)
    assert hooks_of(model) == 3  # the model and its two layers
    optimizer.attach(model)
    assert hooks_of(model) == 3
    optimizer.remove_hooks()
    assert hooks_of(model) == 0
    LOSS(model(x), y).backward()
    with pytest.raises(InvalidInputError, match="attach"):
        optimizer.step()
    optimizer.attach(model)
    step(model, optimizer, x, y)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    LOSS(model(x), y).backward()  # its hooks find nobody


def test_an_input_changed_in_place_is_refused() -> None:
    model = nn.Linear(4, 2)
    optim.KFAC(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autograd keeps a copy of its own
        x = torch.randn(3, 4)
        output = model(x)
        x.add_(1)
    with pytest.raises(UnsupportedError, match="in place"):
        output.sum().backward()


@pytest.mark.parametrize("mistake", ["functional", "twice"])
def test_a_gradient_without_statistics_is_refused(mistake: str) -> None:
    model, x, y = problem()
    optimizer = optim.KFAC(model)
    optimizer.step()  # no gradient, nothing to do
    if mistake == "functional":
        torch.func.functional_call(
            nn.Sequential(*copy.deepcopy(model)), dict(model.named_parameters()), x
        ).sum().backward()
    else:
        LOSS(model(x), y).backward()
    if mistake == "twice":
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InvalidInputError, match=r"'0\.weight'.*Run the model itself"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_different_numbers_of_data_in_one_pass_are_refused() -> None:
    model, x, y = problem()
    optimizer = optim.KFAC(model)
    (LOSS(model(x), y) + LOSS(model(x[:3]), y[:3])).backward()
    with pytest.raises(UnsupportedError, match=r"\[3, 40\]"):
        optimizer.step()


@pytest.mark.parametrize(("build", "error", "told"), [
    (lambda: optim.KFAC(nn.LayerNorm(3)), InvalidInputError, "EShampoo"),
    (lambda: optim.KFAC(nn.Conv2d(4, 4, 2, groups=2)), InvalidInputError, "groups"),
    (lambda: optim.KFAC(nn.Linear(3, 2).requires_grad_(False)), InvalidInputError, "EShampoo"),
    (lambda: optim.KFAC(nn.Linear(9, 2, bias=False), shapes={"max_dim": 8}), InvalidInputError,
     "max_dim=8"),
    (lambda: optim.KFAC(nn.Linear(3, 2).parameters()), InvalidInputError, "the model"),  # type: ignore[arg-type]
    (lambda: optim.KFAC(nn.Linear(3, 2), loss_reduction="none"), UnknownNameError, "mean"),
    (lambda: optim.KFAC(nn.Linear(3, 2), shapes={"block_size": 2}), InvalidInputError, "block"),
    (lambda: optim.KFAC(nn.Linear(3, 2), shapes={"vectors": "diagonal"}), InvalidInputError,
     "vectors"),
    (lambda: optim.EKFAC(nn.Linear(3, 2), basis={"marginals": True}), InvalidInputError,
     "marginals"),
    (lambda: optim.KFAC(nn.Linear(3, 2), statistics={"batch_size": 2}), InvalidInputError,
     "batch_size"),
    (lambda: optim.SOAP(nn.Linear(3, 2).parameters(), statistics={"loss_reduction": "sum"}),
     InvalidInputError, "kfac"),
    (lambda: optim.SOAP(nn.Linear(3, 2).parameters()).attach(nn.Linear(3, 2)), InvalidInputError,
     "kfac"),
    (lambda: optim.KFAC(nn.Linear(3, 2)).attach(nn.Linear(3, 2)), InvalidInputError, "no weight"),
    (lambda: optim.SOAP(nn.Linear(3, 2).parameters()).sampling(), InvalidInputError, "attached"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(
    build: Callable[[], Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        build()


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("factor", [float("inf"), 1e25])
def test_sampled_gradients_that_are_not_finite_reach_no_statistics(
    nonfinite: str, factor: float
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = optim.KFAC(model, nonfinite=nonfinite)
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    before = copy.deepcopy(optimizer.state_dict()["state"])
    outputs = model(x)
    with optimizer.sampling():
        (LOSS(outputs, y) * factor).backward(retain_graph=True)
    LOSS(outputs, y).backward()
    weight = model.weight.detach().clone()
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="recorded for parameter 'weight'"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(model.weight, weight)
    assert optimizer.state_dict()["state"] == before == {}
    optimizer.zero_grad()
    LOSS(model(x), y).backward()
    optimizer.step()
    assert all(bool(f.factor.isfinite().all()) for f in optimizer.inspect(model.weight).factors)


def test_a_class_that_is_never_sampled_still_learns_from_its_labels() -> None:
    """EK-FAC's second moments are of other gradients than those that it averages."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = optim.EKFAC(model, lr=1e-2)
    x, y = torch.randn(64, 4), torch.arange(64) % 3
    start = model.bias.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        outputs = model(x)
        with optimizer.sampling():
            LOSS(outputs[:, :2], y % 2).backward(retain_graph=True)  # never of class 2
        LOSS(outputs, y).backward()
        optimizer.step()
    assert float((model.bias.detach() - start)[2].abs()) > 1e-3


@pytest.mark.parametrize("by_model", [False, True])
def test_what_was_sampled_beside_a_step_that_was_left_out_goes_with_its_gradient(
    by_model: bool,
) -> None:
    """As a GradScaler leaves steps out, of whose overflow nobody tells the optimizer."""
    model, x, y = problem()

    def once(factor: float) -> None:
        with recorded[0].sampling():
            (LOSS(model(x), (y + 1) % 4) * factor).backward()
        (LOSS(model(x), y) * factor).backward()

    recorded: list[optim.KroneckerOptimizer] = []

    def left_out(optimizer: optim.KroneckerOptimizer) -> None:
        recorded[:] = [optimizer]
        once(float("inf"))
        (model if by_model else optimizer).zero_grad()
        once(1.0)

    def alone(optimizer: optim.KroneckerOptimizer) -> None:
        recorded[:] = [optimizer]
        once(1.0)

    assert_same_statistics(model, left_out, alone)


# ---------------------------------------------------------------- reads that are no calls of layers


def test_a_weight_that_is_also_read_by_a_function_has_all_of_its_statistics() -> None:
    """The factors of all reads, as the calls' own inputs and output gradients give them."""
    torch.manual_seed(0)
    model = Reread(F.linear).double()
    x, y = torch.randn(N, 5, dtype=torch.float64), torch.randint(4, (N,))
    optimizer = fresh(model)
    LOSS(model(x), y).backward()
    optimizer.step()
    W, b = model.inner.weight.detach(), model.inner.bias.detach()
    h = torch.tanh(x @ W.T + b)
    z = torch.tanh(h @ W.T)
    d_out = torch.softmax(z @ model.head.weight.T + model.head.bias, 1) - F.one_hot(y, 4)
    d2 = d_out @ model.head.weight * (1 - z**2)
    d1 = d2 @ W * (1 - h**2)
    left, right = optimizer.inspect(model.inner.weight).factors
    assert_close(left.factor, (d1.T @ d1 + d2.T @ d2).detach() / N)
    assert_close(right.factor, (x.T @ x + h.T @ h) / (2 * N))


def masked(h: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    return F.linear(h, W * torch.ones_like(W).tril())


@pytest.mark.parametrize(("read", "why"), [
    (masked, "read 2 times and its layers .inner. account for 1"),
    (lambda h, W: h @ W, "read 2 times"),
    (lambda h, W: F.linear(h, W[:5][1:].repeat(2, 1)[:5]), "read 2 times"),
    (lambda h, W: F.embedding(h.argmax(1), W) + h, "also read by embedding"),
    (lambda h, W: h + F.conv1d(h[:, None], W[:, None], groups=1).sum((1, 2))[:, None], "read 2"),
], ids=["masked", "product", "rows", "embedding", "view"])  # fmt: skip
def test_a_read_without_a_rule_is_refused_by_name(read: Any, why: str) -> None:
    torch.manual_seed(0)
    model = Reread(read).double()
    optimizer = optim.KFAC(model)
    x, y = torch.randn(N, 5, dtype=torch.float64), torch.randint(4, (N,))
    before = [p.detach().clone() for p in model.parameters()]
    LOSS(model(x), y).backward()
    with pytest.raises(UnsupportedError, match=rf"parameter 'inner.weight'.*{why}.*'gradient'"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_layers_that_are_called_one_by_one_are_accounted_each_by_itself() -> None:
    model, x, y = problem("twice")
    assert isinstance(model, Twice)

    def one_by_one(_: optim.KroneckerOptimizer) -> None:
        hidden = torch.tanh(model.inner(x))
        LOSS(model.head(torch.tanh(model.inner(hidden))), y).backward()

    assert_same_statistics(model, one_by_one, lambda _: LOSS(model(x), y).backward())


def test_a_model_that_reads_its_own_output_is_no_read_twice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    optimizer = optim.KFAC(model)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(4, (N,))
    LOSS(model(model(x)), y).backward()
    optimizer.step()


def test_a_penalty_on_the_weights_is_no_read_of_data() -> None:
    model, x, y = problem()
    optimizer = optim.KFAC(model)
    penalty = sum(p.square().sum() for p in model.parameters())
    (LOSS(model(x), y) + 1e-3 * penalty).backward()
    optimizer.step()
