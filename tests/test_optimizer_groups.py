"""Parameter groups, options that change, schedulers, closures, gradient scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError
from tests.optimizer_cases import PRESETS, Problem, network, train

# The same formula in another order of operations, a few steps of float64.
ROUNDING = 1e-12


def test_groups_have_their_own_options() -> None:
    joint, first, second = network(), network(), network()
    a: dict[str, Any] = {
        "lr": 1e-2,
        "spectrum": {"exponent": -0.5},
        "magnitude": {"grafting": "sgd"},
        "betas": (0.5, 0.9),
    }
    b: dict[str, Any] = {
        "weight_decay": 0.1,
        "basis": {"frequency": 2},
        "statistics": {"accumulate": "sum"},
    }
    params = list(joint.parameters())
    optimizer = optim.Shampoo([{"params": params[:3], **a}], lr=1e-3)
    optimizer.add_param_group({"params": params[3:], **b})
    assert optimizer.param_groups[1]["basis"] == optim.Basis(frequency=2)
    assert optimizer.param_groups[1]["magnitude"] == optim.Magnitude(grafting="adam")
    separate = [
        optim.Shampoo(list(first.parameters())[:3], **a),
        optim.Shampoo(list(second.parameters())[3:], lr=1e-3, **b),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for triple in zip(*(m.parameters() for m in (joint, first, second)), strict=True):
            gradient = torch.randn(triple[0].shape, generator=generator)
            for param in triple:
                param.grad = gradient.clone()
        for each in (optimizer, *separate):
            each.step()
    expected = [*list(first.parameters())[:3], *list(second.parameters())[3:]]
    for found, param in zip(params, expected, strict=True):
        assert torch.equal(found, param)


@pytest.mark.parametrize("name", PRESETS)
def test_a_group_added_later_starts_from_its_own_first_step(name: str) -> None:
    late, alone = Problem((5, 4)).parameter(), Problem((5, 4)).parameter()
    early = Problem((5, 4), seed=1).parameter()
    optimizer = PRESETS[name]([early], lr=1e-3)
    for t in range(12):
        if t == 5:
            optimizer.add_param_group({"params": [late], "name": "late"})
            other = PRESETS[name]([alone], lr=1e-3)
        for param in (early, late, alone):
            generator = torch.Generator().manual_seed(t)
            param.grad = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        optimizer.step()
        if t >= 5:
            other.step()
    assert optimizer.state[late]["step"] == 7
    assert torch.equal(late, alone)


def test_schedulers_drive_the_rate() -> None:
    problem = Problem((5, 4))
    scheduled, manual = problem.parameter(), problem.parameter()
    optimizer = optim.Shampoo([scheduled], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    by_hand = optim.Shampoo([manual], lr=0.1)
    for t in range(20):
        for param, each in ((scheduled, optimizer), (manual, by_hand)):
            each.zero_grad()
            problem.loss(param, t).backward()
        by_hand.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * t / 20))
        optimizer.step()
        by_hand.step()
        scheduler.step()
    torch.testing.assert_close(scheduled, manual, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("preset", [optim.Shampoo, optim.SOAP, optim.KLShampoo, optim.Muon])
def test_one_cycle_moves_the_momentum_too(preset: Any) -> None:
    """The averages follow the betas of each step; checked by their definition."""
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = preset([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    average, betas = 0.0, []
    for step in range(9):
        beta1 = optimizer.param_groups[0]["betas"][0]
        average = beta1 * average + (1 - beta1) * (step + 1.0)
        param.grad = torch.tensor([step + 1.0], dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        betas.append(beta1)
        assert float(optimizer.state[param]["momentum"]) == pytest.approx(average, rel=ROUNDING)
    assert max(betas) - min(betas) > 0.05


def test_options_that_the_state_does_not_depend_on_may_change_between_steps() -> None:
    changes: dict[str, Any] = {
        "lr": 0.02,
        "weight_decay": 0.3,
        "momentum": 0.5,
        "betas": (0.5, 0.8),
        "basis": optim.Basis(frequency=2, start=1),
        "spectrum": optim.Spectrum(epsilon=1e-2, exponent=-0.5),
        "magnitude": optim.Magnitude(grafting="adam", epsilon=1e-2),
    }
    params = {name: Problem((5, 4)).parameter() for name in [*changes, "none"]}
    optimizers = {name: optim.Shampoo([param], lr=0.01) for name, param in params.items()}
    for t in range(13):
        if t == 4:
            for name, value in changes.items():
                optimizers[name].param_groups[0][name] = value
        for name, param in params.items():
            generator = torch.Generator().manual_seed(t)
            param.grad = torch.randn(5, 4, generator=generator, dtype=torch.float64)
            optimizers[name].step()
    for name in changes:
        assert not torch.allclose(params[name], params["none"], rtol=1e-4), name


REFUSED: dict[str, tuple[str, Any, str]] = {
    "shapes": ("shapes", optim.Shapes(max_dim=4), r"shapes\.max_dim.*was 1024 and is 4"),
    "blocks": ("shapes", optim.Shapes(block_size=2), r"shapes\.block_size"),
    "solver": ("basis", optim.Basis(solver="qr"), r"basis\.solver.*'eigh' and is 'qr'"),
    "tolerance": ("basis", optim.Basis(tolerance=0.1), r"basis\.tolerance"),
    "corrected": ("spectrum", optim.Spectrum(eigenvalues="corrected"), r"spectrum\.eigenvalues"),
    "sum": ("statistics", optim.Statistics(accumulate="sum"), r"statistics\.accumulate"),
    "every": ("statistics", optim.Statistics(every=2), r"statistics\.every"),
    "graft": ("magnitude", optim.Magnitude(), r"magnitude\.grafting.*'adam' and is 'none'"),
    "no average": ("betas", (0.0, 0.9), r"betas\[0\] > 0.*True and is False"),
    "a dict": ("basis", {"frequency": 2}, r"basis of parameter group 0 is \{'frequency': 2\}"),
    "out of range": ("lr", -1.0, r"lr of parameter group 0 is -1\.0"),
    "tensor": ("lr", torch.tensor(0.1), "lr of parameter group 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_change_that_the_state_does_not_fit_is_refused(name: str) -> None:
    option, value, message = REFUSED[name]
    param = torch.nn.Parameter(torch.ones(5, 4))
    optimizer = optim.Shampoo([param])
    param.grad = torch.ones(5, 4)
    optimizer.step()
    before, held = param.detach().clone(), optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.raises(InvalidInputError, match=message):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1
    optimizer.param_groups[0][option] = held
    optimizer.step()


def test_the_precision_of_inverse_factors_is_theirs_for_good() -> None:
    param = torch.nn.Parameter(torch.ones(5, 4))
    optimizer = optim.InverseFreeShampoo([param])
    param.grad = torch.ones(5, 4)
    optimizer.step()
    optimizer.param_groups[0]["inverse"] = optim.Inverse(precision="bfloat16")
    with pytest.raises(InvalidInputError, match=r"inverse\.precision.*'full' and is 'bfloat16'"):
        optimizer.step()


def test_before_the_first_step_every_option_may_change() -> None:
    param = torch.nn.Parameter(torch.ones(5, 4))
    optimizer = optim.Shampoo([param])
    optimizer.param_groups[0]["spectrum"] = optim.Spectrum(eigenvalues="corrected")
    param.grad = torch.ones(5, 4)
    optimizer.step()
    assert "second_moment" in optimizer.state[param]


def test_a_closure_is_evaluated_with_gradients() -> None:
    problem = Problem((5, 4))
    by_closure, by_hand = problem.parameter(), problem.parameter()
    optimizers = [optim.Shampoo([param]) for param in (by_closure, by_hand)]
    for t in range(12):

        def closure(t: int = t) -> torch.Tensor:
            optimizers[0].zero_grad()
            loss = problem.loss(by_closure, t)
            loss.backward()
            return loss

        expected = problem.loss(by_hand, t)
        assert torch.equal(optimizers[0].step(closure), expected)
        optimizers[1].zero_grad()
        expected.backward()
        assert optimizers[1].step() is None
    assert torch.equal(by_closure, by_hand)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_without_gradient_or_entries_are_skipped(name: str) -> None:
    moving, frozen = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    empty = torch.nn.Parameter(torch.zeros(0, 4))
    alone = torch.nn.Parameter(torch.ones(2))
    optimizer = PRESETS[name]([moving, frozen, empty], weight_decay=0.5)
    optimizer.add_param_group({"params": [alone]})
    moving.grad, empty.grad = torch.ones(3, 2), torch.zeros(0, 4)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3, 2))
    assert torch.equal(alone, torch.ones(2))
    assert {frozen, alone, empty}.isdisjoint(optimizer.state)
    frozen.grad = torch.ones(3, 2)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in (moving, frozen)] == [2, 1]


@pytest.mark.parametrize("name", PRESETS)
def test_a_rate_of_zero_keeps_the_weights_and_goes_on_with_the_statistics(name: str) -> None:
    model = network()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = PRESETS[name](model.parameters(), lr=0.0, weight_decay=0.1)
    train(model, optimizer, 0, 3)
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, old)
        assert optimizer.state[param]["step"] == 3


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_may_be_scaled(name: str) -> None:
    """A GradScaler unscales before the step, and leaves it out where the scale overflowed."""
    scaled, plain = network(), network()
    optimizer = PRESETS[name](scaled.parameters(), lr=1e-3)
    other = PRESETS[name](plain.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inputs = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(scaled(inputs).square().mean()).backward()
        if step == 2:
            next(scaled.parameters()).grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            other.zero_grad()
            plain(inputs).square().mean().backward()
            other.step()
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
