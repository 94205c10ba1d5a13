"""What the optimizers refuse, and that nothing changes then."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from kronecker_probe import optim
from kronecker_probe.errors import (
    InvalidInputError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from tests.optimizer_cases import PRESETS, assert_equal_states, network, train


def spoiled(
    name: str, bad: float, steps: int, **options: Any
) -> tuple[torch.nn.Module, optim.KroneckerOptimizer]:
    """A model after some steps, with a bad number in one gradient."""
    model = network()
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:]}]
    optimizer = PRESETS[name](groups, lr=1e-4, weight_decay=0.1, **options)
    train(model, optimizer, 0, steps)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    named[4][1].grad[0, 2] = bad
    return model, optimizer


@pytest.mark.parametrize(
    ("bad", "what"),
    [(math.nan, "NaN or an inf"), (-math.inf, "NaN or an inf"), (1e25, "norm above")],
    ids=["nan", "inf", "overflow"],
)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_a_bad_gradient_changes_nothing(name: str, bad: float, what: str, steps: int) -> None:
    model, optimizer = spoiled(name, bad, steps)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(NonFiniteError, match=f"parameter '3.weight'.*{what}.*Nothing was changed"):
        optimizer.step()
    assert_equal_states(optimizer.state_dict(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_with_a_bad_gradient_can_be_skipped(name: str) -> None:
    model, optimizer = spoiled(name, math.nan, 3, nonfinite="skip")
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert optimizer.step(lambda: 2.5) == 2.5
    assert_equal_states(optimizer.state_dict(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    train(model, optimizer, 4, 6)
    assert {s["step"] for s in optimizer.state.values()} == {5}


def test_unnamed_parameters_are_found_by_position_and_shape() -> None:
    param = torch.nn.Parameter(torch.zeros(3, 2))
    other = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = optim.Shampoo([{"params": [param]}, {"params": [other]}])
    other.grad = torch.full((2, 2), math.nan)
    with pytest.raises(NonFiniteError, match=r"parameter 0 of group 1, of shape \[2, 2\]"):
        optimizer.step()


@pytest.mark.parametrize("name", PRESETS)
def test_sparse_complex_and_integer_parameters_are_refused(name: str) -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = PRESETS[name](embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match=r"'weight' has a sparse gradient.*sparse=False"):
        optimizer.step()
    for dtype in (torch.complex64, torch.int32):
        wrong = torch.zeros(2, 2, dtype=dtype)
        with pytest.raises(UnsupportedError, match=str(dtype)):
            optimizer.add_param_group({"params": [("other", wrong)]})
        assert len(optimizer.param_groups) == 1


BAD: dict[str, list[Any]] = {
    "lr": [-1.0, math.nan, "fast", torch.tensor(0.1), True],
    "betas": [(0.9, 1.0), (-0.1, 0.9), 0.9, (0.9,)],
    "weight_decay": [-0.1],
    "momentum": [1.0, -0.5],
    "nesterov": [1, True],
    "scale_by_shape": [None],
    "statistics.accumulate": ["mean"],
    "statistics.rule": ["hessian"],
    "statistics.q": [1.0],
    "statistics.bias_correction": [1, None],
    "statistics.every": [0],
    "statistics.batch_size": [0, 2.5],
    "statistics.initial": [-1.0, 1.0],
    "basis.frequency": [0, 2.5, True],
    "basis.start": [0, -1],
    "basis.tolerance": [0.0, 1.0, -0.1, "tight"],
    "basis.solver": ["svd"],
    "basis.max_iterations": [0],
    "basis.carry": ["drop", "transport"],
    "basis.marginals": [1, True],
    "basis.stagger": ["yes"],
    "spectrum.eigenvalues": ["exact"],
    "spectrum.power": [0.0, 2.0],
    "spectrum.exponent": [0.25, 0.0, -2.0],
    "spectrum.epsilon": [-1e-8, math.inf],
    "spectrum.root": ["svd"],
    "inverse.lr": [0.0],
    "inverse.structure": ["sparse"],
    "magnitude.grafting": ["adamw", None],
    "magnitude.beta2": [1.0],
    "magnitude.epsilon": [-1.0],
    "shapes.max_dim": [0, 3.5],
    "shapes.block_size": [1, 0],
    "shapes.merge": [-1],
    "shapes.vectors": ["none"],
}


@pytest.mark.parametrize(
    ("option", "value"), [(key, value) for key, values in BAD.items() for value in values]
)
def test_options_are_checked_at_construction(option: str, value: Any) -> None:
    param = torch.nn.Parameter(torch.zeros(2, 2))
    section, _, field = option.partition(".")
    given = {section: {field: value}} if field else {option: value}
    match = field or option
    with pytest.raises(InvalidInputError, match=match):
        optim.Shampoo([param], **given)
    with pytest.raises(InvalidInputError, match=match):
        optim.Shampoo([{"params": [param], **given}])


@pytest.mark.parametrize("name", PRESETS)
def test_unknown_options_name_the_nearest(name: str) -> None:
    param = torch.nn.Parameter(torch.zeros(2, 2))
    for options, message in [
        ({"weightdecay": 0.1}, r"'weightdecay'.*Did you mean 'weight_decay'"),
        ({"basis": {"frequancy": 3}}, r"option of basis 'frequancy'.*'frequency'"),
    ]:
        with pytest.raises(UnknownNameError, match=message):
            PRESETS[name]([param], **options)
        with pytest.raises(UnknownNameError, match=message):
            PRESETS[name]([{"params": [param], **options}])


def test_groups_and_guards_are_checked() -> None:
    param = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(InvalidInputError, match=r"dict with 'params'.*list"):
        optim.Shampoo([param]).add_param_group([param])
    with pytest.raises(InvalidInputError, match="statistics is a str"):
        optim.Shampoo([param], statistics="mean")
    with pytest.raises(InvalidInputError, match="failures is -1"):
        optim.Shampoo([param], failures=-1)
    with pytest.raises(UnknownNameError, match="nonfinite 'ignore'"):
        optim.Shampoo([param], nonfinite="ignore")


TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "trace and exponent": (
        {"spectrum": {"trace_scale": True, "exponent": -0.25}},
        "spectrum.exponent is -0.25",
    ),
    "qr without a basis": ({"spectrum": {"root": "matmul"}, "basis": {"solver": "qr"}}, "'qr'"),
    "tolerance without a basis": (
        {"spectrum": {"root": "newton"}, "basis": {"tolerance": 0.1}},
        "basis.tolerance",
    ),
    "whitened without eigenvalues": (
        {"spectrum": {"root": "newton"}, "statistics": {"rule": "whitened"}},
        "'whitened'",
    ),
    "root of a broken order": (
        {"spectrum": {"root": "newton", "exponent": -0.3}},
        "integer order.*3.33",
    ),
    "corrected by newton": (
        {"spectrum": {"root": "newton", "eigenvalues": "corrected"}},
        "root='newton' has no effect with .*'kronecker' or 'polar'",
    ),
    "corrected and traced": (
        {"spectrum": {"trace_scale": True, "eigenvalues": "corrected"}},
        "trace_scale",
    ),
    "carry without moments": ({"basis": {"carry": "transport"}}, "basis.carry"),
    "marginals of whitened": (
        {
            "basis": {"marginals": True},
            "statistics": {"rule": "whitened"},
            "spectrum": {"eigenvalues": "corrected"},
        },
        "basis.marginals",
    ),
    "q of gradients": ({"statistics": {"q": 0.5}}, "statistics.q"),
    "blown up start": ({"statistics": {"initial": 1.0}}, "statistics.initial"),
    "whitened start": (
        {"statistics": {"initial": 1.0, "rule": "whitened", "bias_correction": False}},
        "initial=1.0 has no effect with statistics.rule='whitened'",
    ),
    "polar with bases": (
        {"spectrum": {"eigenvalues": "polar"}, "basis": {"solver": "qr"}},
        "basis.solver='qr' has no effect.*'kronecker' or 'corrected'",
    ),
    "polar, damped": (
        {"spectrum": {"eigenvalues": "polar", "epsilon": 1e-3}},
        "spectrum.epsilon=0.001 has no effect",
    ),
    "polar, refreshed": (
        {"spectrum": {"eigenvalues": "polar"}, "basis": {"frequency": 3}},
        "basis.frequency=3 has no effect",
    ),
    "polar of a sum": (
        {"spectrum": {"eigenvalues": "polar"}, "statistics": {"accumulate": "sum"}},
        "statistics.accumulate='sum' has no effect",
    ),
    "polar, every third": (
        {"spectrum": {"eigenvalues": "polar"}, "statistics": {"every": 3}},
        "statistics.every=3 has no effect",
    ),
    "polar, one-sided": (
        {"spectrum": {"eigenvalues": "polar"}, "shapes": {"max_dim": 3}},
        "shapes.max_dim=3",
    ),
    "polar by newton": ({"spectrum": {"eigenvalues": "polar", "root": "newton"}}, "newton"),
    "polar of merged": (
        {"spectrum": {"eigenvalues": "polar"}, "shapes": {"merge": 8}},
        "shapes.merge=8",
    ),
    "polar of whitened": (
        {"spectrum": {"eigenvalues": "polar"}, "statistics": {"rule": "whitened"}},
        "statistics.rule='whitened' has no effect",
    ),
    "polar of a power": (
        {"spectrum": {"eigenvalues": "polar", "exponent": -0.5}},
        "spectrum.exponent=-0.5 has no effect",
    ),
    "inverse with a root": (
        {"spectrum": {"eigenvalues": "inverse-free", "power": 1.0, "root": "newton"}},
        "spectrum.root='newton' has no effect",
    ),
    "inverse to another power": ({"spectrum": {"eigenvalues": "inverse-free"}}, "power is 0.5"),
    "inverse of what has none": (
        {"inverse": {"damping": 0.1}},
        "inverse.damping=0.1 has no effect.*use spectrum.eigenvalues='inverse-free'",
    ),
    "nesterov": ({"nesterov": True}, "nesterov.*polar"),
    "beta2 of sgd": (
        {"magnitude": {"grafting": "sgd", "beta2": 0.9}},
        r"magnitude\.beta2=0\.9 .*'rmsprop' or 'adam'",
    ),
    "epsilon of none": (
        {"magnitude": {"grafting": "none", "epsilon": 1e-3}},
        r"magnitude\.epsilon=0\.001",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_choices_that_make_no_sense_together_are_refused(name: str) -> None:
    options, message = TOGETHER[name]
    param = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(InvalidInputError, match=message):
        optim.KroneckerOptimizer([param], lr=0.1, **options)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7,), (7, 1), (1, 7), (2, 1, 3), (2, 50_000)])
def test_every_shape_takes_finite_steps(name: str, shape: tuple[int, ...]) -> None:
    param = torch.nn.Parameter(torch.ones(shape))
    optimizer = PRESETS[name]([param], lr=1e-3)
    for step in range(13):  # an odd number of signs does not cancel
        generator = torch.Generator().manual_seed(step)
        param.grad = 1e-3 * torch.randn(shape, generator=generator)
        optimizer.step()
    assert param.isfinite().all()
    assert not torch.equal(param, torch.ones(shape))
    # Steps of a few lr each, or of gradients without a root: nothing blows up
    assert float((param.detach() - 1).abs().max()) < 1
    state = optimizer.state[param].values()
    assert max(v.numel() for v in state if isinstance(v, torch.Tensor)) <= 2 * 50_000


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_gradient_for_long_and_then_some(name: str, dtype: torch.dtype) -> None:
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in [(4, 3), (5,), ()]]
    optimizer = PRESETS[name](params, lr=1e-4)
    for step in range(60):
        for param in params:
            param.grad = torch.zeros_like(param)
            if step >= 45:
                generator = torch.Generator().manual_seed(step)
                param.grad = 1e-2 * torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
        if step == 44:
            assert all(torch.equal(param, torch.ones_like(param)) for param in params)
    for param in params:
        assert param.isfinite().all()
        # float16 weights of 1 round such steps away
        assert dtype == torch.float16 or not torch.equal(param, torch.ones_like(param))
        held = optimizer.state[param].values()
        assert all(v.isfinite().all() for v in held if isinstance(v, torch.Tensor))


def test_a_parameter_that_moved_to_another_group_is_refused() -> None:
    one, other = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = optim.SOAP([{"params": [one]}, {"params": [other]}])
    one.grad, other.grad = torch.ones(3, 2), torch.ones(3, 2)
    optimizer.step()
    optimizer.param_groups[0]["params"].remove(one)
    optimizer.param_groups[1]["params"].append(one)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InvalidInputError, match="moved from parameter group 0 to 1"):
        optimizer.step()
    assert_equal_states(optimizer.state_dict(), before)


def test_a_parameter_of_another_shape_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(6, 5))
    optimizer = optim.SOAP([param])
    param.grad = torch.ones(6, 5)
    optimizer.step()
    param.grad, param.data = None, torch.ones(5, 6)
    param.grad = torch.ones(5, 6)
    with pytest.raises(InvalidInputError, match="another shape when its state was built"):
        optimizer.step()


@pytest.mark.parametrize("option", ["lr", "betas", "basis"])
def test_an_option_that_was_dropped_is_named(option: str) -> None:
    param = torch.nn.Parameter(torch.ones(6, 5))
    optimizer = optim.SOAP([param])
    del optimizer.param_groups[0][option]
    param.grad = torch.ones(6, 5)
    with pytest.raises(InvalidInputError, match=f"{option} of parameter group 0 is not there"):
        optimizer.step()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d["state"][0]["second_moment"].fill_(math.nan), "NaN or an infinity"),
        (lambda d: d["state"][0].update(step=-5), "no counts 'step'"),
        (lambda d: d["state"][0].update(step=True), "no counts 'step'"),
        (lambda d: d["state"][0].update(factor_0=torch.ones(1, 3, 3).long()), "int64"),
        (lambda d: d["param_groups"].append(3), "no list of 'params'"),
        (lambda d: d["param_groups"][0].pop("params"), "no list of 'params'"),
    ],
)
def test_a_damaged_state_is_refused(damage: Any, message: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = optim.SOAP([param])
    param.grad = torch.ones(3, 2)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    with pytest.raises(InvalidInputError, match=message):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("key", ["offset", "factor_left"])
def test_a_loaded_state_of_another_dtype_is_refused(key: str, dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = PRESETS["shampoo"]([param], lr=0.1)
    param.grad = torch.randn(3, 2)
    optimizer.step()
    state = optimizer.state_dict()
    name = key if key in state["state"][0] else next(k for k in state["state"][0] if "factor" in k)
    state["state"][0][name] = state["state"][0][name].to(dtype)
    with pytest.raises(InvalidInputError, match=f"{name} in the loaded state of .* is of {dtype}"):
        PRESETS["shampoo"]([param], lr=0.1).load_state_dict(state)


def test_a_loaded_state_of_no_parameter_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = PRESETS["shampoo"]([param], lr=0.1)
    param.grad = torch.randn(3, 2)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][7] = state["state"][0]
    with pytest.raises(InvalidInputError, match="of a parameter 7 that is in no loaded group"):
        PRESETS["shampoo"]([param], lr=0.1).load_state_dict(state)
