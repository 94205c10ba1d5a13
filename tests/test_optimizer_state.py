"""States of the optimizers: resuming, copying, loading what fits and refusing the rest."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError
from tests.optimizer_cases import PRESETS, assert_equal_states, break_eigh, network, train

# Of layers whose batched products round otherwise than single ones
SIDE = 24
# Options beyond the defaults, under which more kinds of state exist
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in PRESETS},
    "shampoo, no graft": {"preset": "shampoo", "magnitude": {"grafting": "none"}, "epsilon": 1e-2},
    "shampoo, one side": {"preset": "shampoo", "shapes": {"max_dim": 10}},
    "shampoo, blocks": {"preset": "shampoo", "shapes": {"block_size": 4}},
    "shampoo, merged": {"preset": "shampoo", "shapes": {"merge": 6}},
    "shampoo, tolerance": {"preset": "shampoo", "basis": {"frequency": 3, "tolerance": 0.1}},
    "shampoo, newton": {"preset": "shampoo", "spectrum": {"root": "newton"}},
    "shampoo, sum": {"preset": "shampoo", "statistics": {"accumulate": "sum"}},
    "shampoo, lean": {"preset": "shampoo", "storage": {"factors": "bfloat16", "roots": "packed"}},
    "shampoo, staggered": {"preset": "shampoo", "basis": {"frequency": 3, "stagger": True}},
    "eshampoo, staggered": {"preset": "eshampoo", "basis": {"frequency": 4, "stagger": True}},
    "eshampoo, marginals": {
        "preset": "eshampoo",
        "basis": {"frequency": 3, "carry": "transport", "marginals": True},
    },
    "inverse-free, diagonal": {
        "preset": "inverse-free-shampoo",
        "inverse": {"structure": "diagonal"},
    },
    "eshampoo, momentum": {"preset": "eshampoo", "momentum": 0.5, "weight_decay": 0.1},
}


def build(variant: str, params: Any) -> optim.KroneckerOptimizer:
    options = dict(VARIANTS[variant])
    preset = options.pop("preset")
    if preset not in ("inverse-free-shampoo", "muon"):
        options.setdefault("basis", {"frequency": 3})
    return PRESETS[preset](params, lr=1e-3, **options)


def stored(*parts: Any) -> Any:
    """What a file would give back."""
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_models(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.grid),
        pytest.param(torch.float64, marks=pytest.mark.grid),
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_continues_bitwise(variant: str, dtype: torch.dtype) -> None:
    whole = network(dtype)
    whole_optimizer = build(variant, whole.parameters())
    train(whole, whole_optimizer, 0, 7)
    weights, state = stored(whole.state_dict(), whole_optimizer.state_dict())
    untouched = copy.deepcopy(state)

    resumed = network(dtype)
    resumed.load_state_dict(weights)
    optimizer = optim.KroneckerOptimizer(resumed.parameters(), lr=0.5)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, 7, 15)
    assert_equal_states(state, untouched)  # the loaded dict is not shared
    train(whole, whole_optimizer, 7, 15)
    assert_equal_models(whole, resumed)
    assert_equal_states(whole_optimizer.state_dict(), optimizer.state_dict())
    held = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    floating = {value.dtype for value in held if value.is_floating_point()}
    lean = {torch.bfloat16} if "lean" in variant else set()
    assert floating <= {torch.promote_types(dtype, torch.float32)} | lean
    assert all(value.isfinite().all() for value in [*held, *resumed.parameters()])


def uneven(model: torch.nn.Module, optimizer: Any, start: int, stop: int) -> None:
    """Steps in which parameters come and go.

    Two from step 2 on, one in even steps only, and one not in steps 1 and 2, which then has as many
    steps as the two but another stack.
    """
    params = list(model.parameters())
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for k, param in enumerate(params):
            absent = (
                (k in (2, 3) and step < 2) or (k == 1 and step % 2) or (k == 4 and step in (1, 2))
            )
            gradient = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.grad = None if absent else gradient
        optimizer.step()


def equal_layers(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(5)]
    return torch.nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("again", ["load", "deepcopy", "pickle"])
def test_parameters_that_come_and_go_are_stacked_as_before(variant: str, again: str) -> None:
    """Rounding may depend on the batch: a copy has the same batches."""
    model = equal_layers()
    optimizer = build(variant, model.parameters())
    uneven(model, optimizer, 0, 5)
    if again == "load":
        twin = equal_layers()
        twin.load_state_dict(model.state_dict())
        twin_optimizer = build(variant, twin.parameters())
        twin_optimizer.load_state_dict(stored(optimizer.state_dict())[0])
    elif again == "deepcopy":
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
    else:
        twin, twin_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    uneven(model, optimizer, 5, 11)
    uneven(twin, twin_optimizer, 5, 11)
    assert_equal_models(model, twin)
    assert_equal_states(optimizer.state_dict(), twin_optimizer.state_dict())
    assert [optimizer.state[p]["step"] for p in model.parameters()] == [11, 6, 9, 9, 9]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stack_is_as_good_as_parameters_alone(variant: str) -> None:
    """Float64, as the products of a batch may round otherwise."""
    together, alone = equal_layers(torch.float64), equal_layers(torch.float64)
    optimizer = build(variant, together.parameters())
    each = [build(variant, [param]) for param in alone.parameters()]

    class All:
        def step(self) -> None:
            for one in each:
                one.step()

    if "staggered" in variant:
        pytest.skip("staggered by the number of the block")
    uneven(together, optimizer, 0, 9)
    uneven(alone, All(), 0, 9)
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        # Muon's products are in bfloat16; the roots of others may amplify rounding
        tolerance = 1e-2 if variant == "muon" else 1e-8
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-3 * tolerance)


def test_load_hooks_see_and_may_change_the_state() -> None:
    model = network()
    optimizer = optim.Shampoo(model.parameters(), basis={"frequency": 2})
    train(model, optimizer, 0, 4)
    other_model = network()
    other = optim.Shampoo(other_model.parameters())

    def changed(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
        states = {k: {**s, "step": s["step"] + 10} for k, s in state_dict["state"].items()}
        return {"state": states, "param_groups": groups}

    seen = []
    first = next(other_model.parameters())
    other.register_load_state_dict_pre_hook(changed)
    other.register_load_state_dict_post_hook(
        lambda o: seen.append((o.param_groups[0]["lr"], o.state[first]["step"]))
    )
    other.load_state_dict(optimizer.state_dict())
    assert seen == [(0.125, 14)]
    assert other.param_groups[0]["basis"].frequency == 2


def test_a_state_may_be_loaded_again_and_again() -> None:
    model = network()
    optimizer = optim.SOAP(model.parameters())
    train(model, optimizer, 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
    assert_equal_states(optimizer.state_dict(), state)
    optimizer = copy.deepcopy(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert "differentiable" not in optimizer.state_dict()["param_groups"][1]


@pytest.mark.parametrize("loaded", sorted(PRESETS))
def test_the_state_of_another_preset_brings_its_options_with_it(loaded: str) -> None:
    model, twin = network(), network()
    optimizer = build(loaded, model.parameters())
    train(model, optimizer, 0, 4)
    twin.load_state_dict(model.state_dict())
    other = optim.Shampoo(twin.parameters())
    train(network(), other, 0, 2)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4, 8)
    train(twin, other, 4, 8)
    assert_equal_models(model, twin)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (
        lambda s: s["state"][2].update(factor_0=torch.eye(5)[None]),
        r"factor_0 .*'2.weight'.*\[1, 5, 5\].*\[1, 6, 6\]",
    ),
    "momentum of another shape": (
        lambda s: s["state"][2].update(momentum_buffer=torch.zeros(6, 11)),
        r"momentum_buffer .*'2.weight'.*\[6, 11\].*\[6, 12\]",
    ),
    "unknown tensor": (
        lambda s: s["state"][2].update(exp_avg=torch.zeros(6, 12)),
        "'2.weight' holds 'exp_avg'",
    ),
    "no step": (lambda s: s["state"][2].pop("step"), "'2.weight'.*no counts 'step'"),
    "lacks a tensor": (lambda s: s["state"][2].pop("root_1"), "'2.weight' lacks root_1"),
    "other options": (
        lambda s: s["param_groups"][0]["spectrum"].update(eigenvalues="corrected"),
        "which is no state of this optimizer under the loaded options",
    ),
    "option out of range": (
        lambda s: s["param_groups"][0]["basis"].update(frequency=0),
        r"basis\.frequency is 0",
    ),
    "fewer parameters": (
        lambda s: s["param_groups"][0]["params"].pop(),
        r"groups of \[5\] parameters, the optimizer of \[6\]",
    ),
    "no state dict": (lambda s: s.pop("state"), "'state' and 'param_groups'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(name: str) -> None:
    model = network()
    optimizer = optim.Shampoo(model.named_parameters())
    train(model, optimizer, 0, 3)
    before = copy.deepcopy(optimizer.state_dict())
    spoil, message = WRONG[name]
    wrong = copy.deepcopy(before)
    spoil(wrong)
    with pytest.raises(InvalidInputError, match=message):
        optimizer.load_state_dict(wrong)
    assert_equal_states(optimizer.state_dict(), before)
    train(model, optimizer, 3, 5)


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = network()
    optimizer = optim.Shampoo(model.named_parameters())
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(InvalidInputError, match=r"lack .*basis.*not those of this optimizer"):
        optimizer.load_state_dict(adam.state_dict())


def test_copies_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = optim.Shampoo(model.parameters(), basis={"frequency": 2}, nonfinite="skip")
    train(model, optimizer, 0, 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert twin_optimizer.nonfinite == "skip"
    train(model, optimizer, 3, 6)
    train(twin, twin_optimizer, 3, 6)
    assert_equal_models(model, twin)
    break_eigh(monkeypatch, 9)
    with pytest.warns(RuntimeWarning, match="factor 1 of parameter 0 of group 0"):
        train(twin, twin_optimizer, 6, 8)


def test_a_run_resumes_in_another_precision() -> None:
    """The state follows the dtype of the parameters that it is loaded for."""
    model = network()
    optimizer = optim.EShampoo(model.parameters())
    train(model, optimizer, 0, 3)
    wide = network(torch.float64)
    other = optim.EShampoo(wide.parameters())
    other.load_state_dict(optimizer.state_dict())
    train(wide, other, 3, 5)
    held = other.state[next(wide.parameters())]
    assert held["factor_0"].dtype == torch.float64
    assert held["tests"].dtype == torch.int64
