"""The Shampoo optimizer against a dense numpy reference, other optimizers and theorems."""

from __future__ import annotations

import copy
import io
import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from kronecker_probe.optim import preconditioner

# Two float64 programs of 30 steps, roots of matrices of condition number up to 1e4: 1e4 eps,
# times ten for other machines.
FLOAT64 = 1e-11
# The same in float32: 1e3 eps, as the worst directions are damped by epsilon.
FLOAT32 = 1e-4
# The same formula in another order of operations, a few steps.
ROUNDING = 1e-12
# A finite sample of white noise: reference bound for min(K n / m, K m / n) >= 50.
WHITE_NOISE = 0.05

SHAPES = {
    "matrix": (5, 4),
    "vector": (6,),
    "convolution": (3, 2, 2, 2),
    "row": (1, 4),
    "scalar": (),
}


# Where the options that the tests vary stand in the sections
PLACES = {
    "exponent": ("spectrum", "exponent"),
    "precondition_frequency": ("basis", "frequency"),
    "start_preconditioning_step": ("basis", "start"),
    "statistics": ("statistics", "accumulate"),
    "bias_correction": ("statistics", "bias_correction"),
    "grafting": ("magnitude", "grafting"),
    "grafting_beta2": ("magnitude", "beta2"),
    "grafting_epsilon": ("magnitude", "epsilon"),
    "max_preconditioner_dim": ("shapes", "max_dim"),
}


def sections(options):
    """The options of a test as those of the preset."""
    found = {}
    for name, value in options.items():
        if name not in PLACES:
            found[name] = value
            continue
        section, field = PLACES[name]
        value = "average" if value == "ema" else value
        found.setdefault(section, {})[field] = value
    return found


def shampoo(params, **options):
    """The preset with options by their short names."""
    return kp.optim.Shampoo(params, **sections(options))


class Reference:
    """Shampoo by its definition: dense mn x mn Kronecker products, roots by SVD, float64."""

    def __init__(self, shape, options):
        self.o = {
            "lr": 1e-2,
            "betas": (0.9, 0.999),
            "epsilon": 1e-8,
            "weight_decay": 0.0,
            "exponent": None,
            "precondition_frequency": 10,
            "statistics": "ema",
            "bias_correction": True,
            "grafting": "adam",
            "grafting_epsilon": 1e-8,
            "max_preconditioner_dim": 1024,
            **options,
        }
        self.m = shape[0] if shape else 1
        self.n = int(np.prod(shape[1:]))
        self.has = [1 < size <= self.o["max_preconditioner_dim"] for size in (self.m, self.n)]
        self.L, self.R = np.zeros((self.m, self.m)), np.zeros((self.n, self.n))
        self.v, self.w = np.zeros(self.m * self.n), np.zeros(self.m * self.n)
        self.M = np.zeros(self.m * self.n)
        self.inverse = None
        self.t = 0

    def corrected(self, beta):
        return 1 - beta**self.t if self.o["bias_correction"] else 1.0

    def power(self, A, size, present):
        if not present:
            return np.eye(size)
        exponent = self.o["exponent"]
        if exponent is None:
            exponent = {1: -1 / 2, 2: -1 / 4}[sum(self.has)]
        b = 1.0 if self.o["statistics"] == "sum" else self.corrected(self.o["betas"][1])
        U, s, Vt = np.linalg.svd(A / b + self.o["epsilon"] * np.eye(size))
        return (U * s**exponent) @ Vt

    def step(self, w, g):
        o, (beta1, beta2) = self.o, self.o["betas"]
        graft_beta2 = o.get("grafting_beta2", beta2)
        start = o.get("start_preconditioning_step", o["precondition_frequency"])
        self.t += 1
        G = g.reshape(self.m, self.n)
        old, new = (beta2, 1 - beta2) if o["statistics"] == "ema" else (1.0, 1.0)
        self.L = old * self.L + new * G @ G.T
        self.R = old * self.R + new * G.T @ G
        self.v = old * self.v + new * g**2
        self.w = graft_beta2 * self.w + (1 - graft_beta2) * g**2
        self.M = beta1 * self.M + (1 - beta1) * g
        M = self.M / self.corrected(beta1)
        graft = M
        if o["grafting"] == "adam":
            graft = M / (np.sqrt(self.w / self.corrected(graft_beta2)) + o["grafting_epsilon"])
        if self.t >= start and (self.t - start) % o["precondition_frequency"] == 0:
            self.inverse = np.kron(
                self.power(self.L, self.m, self.has[0]), self.power(self.R, self.n, self.has[1])
            )
        if self.t < start:
            U = graft
        elif any(self.has):
            U = self.inverse @ M
        else:
            b = 1.0 if o["statistics"] == "sum" else self.corrected(beta2)
            U = M / (np.sqrt(self.v / b) + o["epsilon"])
        if self.t >= start and o["grafting"] != "none":
            U = U * np.linalg.norm(graft) / np.linalg.norm(U)
        return w - o["lr"] * o["weight_decay"] * w - o["lr"] * U


class Problem:
    """sum_i log cosh((K w - c_t)_i), with other targets c_t in each step."""

    def __init__(self, shape, seed=0):
        rng = np.random.default_rng(seed)
        self.shape = shape
        size = int(np.prod(shape))
        self.K = rng.standard_normal((3 * size, size)) / math.sqrt(3 * size)
        self.w = rng.standard_normal(size)
        self.targets = rng.standard_normal((50, 3 * size))

    def gradient(self, w, t):
        return self.K.T @ np.tanh(self.K @ w - self.targets[t])

    def loss(self, param, t):
        K = torch.tensor(self.K).to(param.dtype)
        x = K @ param.reshape(-1) - torch.tensor(self.targets[t]).to(param.dtype)
        return (x + torch.nn.functional.softplus(-2 * x)).sum()

    def parameter(self, dtype=torch.float64):
        return torch.nn.Parameter(torch.tensor(self.w.reshape(self.shape)).to(dtype))


OPTIONS = {
    "defaults": {"epsilon": 1e-3},
    "every step": {"epsilon": 1e-3, "precondition_frequency": 1},
    "late start, odd interval": {
        "epsilon": 1e-2,
        "start_preconditioning_step": 5,
        "precondition_frequency": 3,
    },
    "sum": {"epsilon": 1e-2, "statistics": "sum", "grafting": "none", "lr": 0.1},
    "no grafting": {"epsilon": 1e-2, "grafting": "none", "betas": (0.8, 0.95)},
    "SGD grafting": {"epsilon": 1e-3, "grafting": "sgd", "lr": 1e-3},
    "own grafting options": {
        "epsilon": 1e-3,
        "grafting_beta2": 0.9,
        "grafting_epsilon": 1e-2,
        "precondition_frequency": 4,
    },
    "square": {"epsilon": 1e-1, "exponent": -0.5, "grafting": "none", "betas": (0.0, 0.9)},
    "odd exponent": {"epsilon": 1e-2, "exponent": -1 / 3, "precondition_frequency": 7},
    "weight decay": {"epsilon": 1e-3, "weight_decay": 0.3, "lr": 0.05},
    "no bias correction": {"epsilon": 1e-3, "bias_correction": False, "betas": (0.5, 0.9)},
    "one side too large": {"epsilon": 1e-3, "max_preconditioner_dim": 4},
    "no factor": {"epsilon": 1e-3, "max_preconditioner_dim": 1, "grafting": "sgd", "lr": 1e-3},
    "no factor, sum": {
        "epsilon": 1e-3,
        "max_preconditioner_dim": 1,
        "statistics": "sum",
        "grafting": "none",
    },
}


def trajectories(shape, options, dtype, steps=30):
    """The largest difference from the reference along a run, relative to the weights."""
    problem = Problem(shape)
    param = problem.parameter(dtype)
    optimizer = shampoo([param], **options)
    reference, w = Reference(shape, options), problem.w
    worst = 0.0
    for t in range(steps):
        optimizer.zero_grad()
        problem.loss(param, t).backward()
        optimizer.step()
        w = reference.step(w, problem.gradient(w, t))
        found = param.detach().double().numpy().reshape(-1)
        worst = max(worst, np.abs(found - w).max() / np.abs(w).max())
    return worst


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trajectory_equals_the_dense_reference(shape, options):
    assert trajectories(shape, options, torch.float64) < FLOAT64


@pytest.mark.parametrize("name", ["defaults", "no grafting", "sum"])
def test_float32_follows_the_float64_reference(name):
    assert trajectories((5, 4), OPTIONS[name], torch.float32) < FLOAT32


# --- theorems -------------------------------------------------------------------------------


def step_of(gradients, dtype=torch.float64, **options):
    """The change of a zero parameter, over lr = 1, by the last of some gradients."""
    param = torch.nn.Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer = shampoo([param], lr=1.0, **options)
    for gradient in gradients:
        before = param.detach().clone()
        param.grad = gradient.to(dtype)
        optimizer.step()
    return param.detach() - before, optimizer, param


PLAIN = {
    "betas": (0.0, 0.0),
    "grafting": "none",
    "precondition_frequency": 1,
}


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 9)])
def test_without_memory_the_direction_is_the_polar_factor(shape):
    rng = np.random.default_rng(0)
    U, _, Vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    s = np.linspace(0.5, 2.0, min(shape))
    G = torch.tensor((U * s) @ Vt)
    change, *_ = step_of([G], epsilon=0.0, **PLAIN)
    assert np.abs(change.numpy() + U @ Vt).max() < ROUNDING
    for epsilon in (1e-1, 1e-4, 1e-8):  # the singular values become s / sqrt(s^2 + epsilon)
        change, *_ = step_of([G], epsilon=epsilon, **PLAIN)
        expected = (U * (s / np.sqrt(s**2 + epsilon))) @ Vt
        assert np.abs(change.numpy() + expected).max() < FLOAT64


@pytest.mark.parametrize(("shape", "K"), [((16, 8), 200), ((32, 32), 100), ((8, 24), 300)])
@pytest.mark.parametrize("statistics", ["sum", "ema"])
def test_white_noise_shrinks_by_the_fourth_root_of_the_size(shape, K, statistics):
    m, n = shape
    rng = np.random.default_rng(1)
    gradients = [torch.tensor(rng.standard_normal(shape)) for _ in range(K + 1)]
    options = {"grafting": "none", "start_preconditioning_step": K, "precondition_frequency": 10**6}
    # An EMA with beta2 = 1 - 1e-6 weighs K gradients alike; a sum is K means: K^(-1/4) a side.
    change, *_ = step_of(gradients, betas=(0.0, 1 - 1e-6), statistics=statistics, **options)
    scale = math.sqrt(K) if statistics == "sum" else 1.0
    ratio = scale * float(change.norm() / gradients[-1].norm())
    assert ratio == pytest.approx((m * n) ** -0.25, rel=WHITE_NOISE)


# --- other optimizers -----------------------------------------------------------------------


def run_both(ours, theirs, shape=(3, 5), steps=30):
    problem = Problem(shape)
    params = problem.parameter(), problem.parameter()
    optimizers = ours([params[0]]), theirs([params[1]])
    for t in range(steps):
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.zero_grad()
            problem.loss(param, t).backward()
            optimizer.step()
        torch.testing.assert_close(params[0], params[1], rtol=ROUNDING, atol=ROUNDING)


DIAGONAL = {"max_preconditioner_dim": 1, "grafting": "none", "start_preconditioning_step": 1}


def test_the_diagonal_is_adam():
    options = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1}
    run_both(
        lambda p: shampoo(p, epsilon=1e-3, **options, **DIAGONAL),
        lambda p: torch.optim.AdamW(p, eps=1e-3, **options),
    )


def test_the_diagonal_without_momentum_and_correction_is_rmsprop():
    run_both(
        lambda p: shampoo(
            p, lr=0.03, betas=(0.0, 0.9), epsilon=1e-3, bias_correction=False, **DIAGONAL
        ),
        lambda p: torch.optim.RMSprop(p, lr=0.03, alpha=0.9, eps=1e-3),
    )


def test_the_diagonal_of_a_sum_is_adagrad():
    run_both(
        lambda p: shampoo(
            p, lr=0.3, betas=(0.0, 0.9), epsilon=1e-3, statistics="sum", **DIAGONAL
        ),
        lambda p: torch.optim.Adagrad(p, lr=0.3, eps=1e-3),
    )


def test_before_the_first_refresh_the_grafted_method_runs():
    run_both(
        lambda p: shampoo(p, lr=0.03, precondition_frequency=1000),
        lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.9, 0.999), eps=1e-8),
    )
    for grafting in ("sgd", "none"):
        options = {"betas": (0.0, 0.9), "grafting": grafting, "precondition_frequency": 1000}
        run_both(
            lambda p, options=options: shampoo(p, lr=1e-3, **options),
            lambda p: torch.optim.SGD(p, lr=1e-3),
        )


@pytest.mark.parametrize("shape", [(5, 4), (6,), (1, 4), ()])
def test_grafting_takes_the_norm_of_one_method_and_the_direction_of_the_other(shape):
    rng = np.random.default_rng(2)
    gradients = [torch.tensor(rng.standard_normal(shape)) for _ in range(12)]
    plain = {"precondition_frequency": 3, "betas": (0.9, 0.99)}
    own, *_ = step_of(gradients, grafting="none", **plain)
    never = {"betas": (0.9, 0.99), "precondition_frequency": 1000}
    for grafting in ("adam", "sgd"):
        grafted, *_ = step_of(gradients, grafting=grafting, **plain)
        other, *_ = step_of(gradients, grafting=grafting, **never)
        expected = own * other.norm() / own.norm()
        torch.testing.assert_close(grafted, expected, rtol=FLOAT64, atol=FLOAT64)


# --- checkpoints ----------------------------------------------------------------------------


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Linear(6, 1)
    ).to(dtype)


def train(model, optimizer, start, stop):
    dtype = next(model.parameters()).dtype
    for t in range(start, stop):
        inputs = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(t)).to(dtype)
        optimizer.zero_grad()
        (model(inputs) - inputs.sum((1, 2, 3))[:, None]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grafting", ["adam", "none"])
def test_a_resumed_run_continues_bitwise(dtype, grafting):
    options = {
        "lr": 1e-3,
        "epsilon": 1e-2,
        "precondition_frequency": 3,
        "grafting": grafting,
        "max_preconditioner_dim": 10,
    }
    whole = network(dtype)
    whole_optimizer = shampoo(whole.parameters(), **options)
    train(whole, whole_optimizer, 0, 7)
    stored = io.BytesIO()
    torch.save([whole.state_dict(), whole_optimizer.state_dict()], stored)
    stored.seek(0)
    weights, state = torch.load(stored, weights_only=True)
    untouched = copy.deepcopy(state)

    resumed = network(dtype)
    resumed.load_state_dict(weights)
    optimizer = shampoo(resumed.parameters(), lr=0.5)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, 7, 15)  # a refresh at 9, 12 and 15
    assert_equal_states(state, untouched)  # the loaded dict is not shared
    train(whole, whole_optimizer, 7, 15)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_equal_states(whole_optimizer.state_dict(), optimizer.state_dict())
    held = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert {v.dtype for v in held} == {torch.promote_types(dtype, torch.float32)}


def assert_equal_states(first, second):
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert state.keys() == second["state"][key].keys()
        for name, value in state.items():
            other = second["state"][key][name]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, (key, name)


def test_load_hooks_see_and_may_change_the_state():
    model = network()
    optimizer = shampoo(model.parameters(), precondition_frequency=2)
    train(model, optimizer, 0, 4)
    other = shampoo(network().parameters())

    def faster(_, state_dict):
        groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    seen = []
    other.register_load_state_dict_pre_hook(faster)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [0.125]
    assert other.param_groups[0]["precondition_frequency"] == 2


def test_a_foreign_state_is_refused_and_nothing_changes():
    model = network()
    optimizer = shampoo(model.named_parameters())
    train(model, optimizer, 0, 3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InvalidInputError, match=r"precondition_frequency.*not those of Shampoo"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][2]["left_factor"] = torch.eye(5)
    with pytest.raises(InvalidInputError, match=r"left_factor .*'2.weight'.*\[5, 5\].*\[6, 6\]"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(before)
    wrong["state"][2]["momentum_buffer"] = torch.zeros(6, 12)
    with pytest.raises(InvalidInputError, match=r"'2.weight' holds 'momentum_buffer'"):
        optimizer.load_state_dict(wrong)
    del wrong["state"][2]["step"]
    with pytest.raises(InvalidInputError, match="no int 'step'"):
        optimizer.load_state_dict(wrong)
    assert_equal_states(optimizer.state_dict(), before)


def test_copies_are_independent(monkeypatch):
    model = network()
    optimizer = shampoo(model.parameters(), precondition_frequency=2)
    train(model, optimizer, 0, 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, 6)
    train(twin, twin_optimizer, 3, 6)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)
    break_eigh(monkeypatch, 9)
    with pytest.warns(RuntimeWarning, match="right factor of parameter 0 of group 0"):
        train(twin, twin_optimizer, 6, 8)


# --- groups, schedulers, closures -----------------------------------------------------------


def test_groups_have_their_own_options():
    joint, first, second = network(), network(), network()
    a = {"lr": 1e-2, "exponent": -0.5, "grafting": "sgd", "betas": (0.5, 0.9)}
    b = {"weight_decay": 0.1, "precondition_frequency": 2, "statistics": "sum"}
    params = list(joint.parameters())
    optimizer = shampoo([{"params": params[:3], **a}], lr=1e-3)
    optimizer.add_param_group({"params": params[3:], **b})
    assert optimizer.param_groups[1]["start_preconditioning_step"] == 2
    separate = [
        shampoo(list(first.parameters())[:3], **a),
        shampoo(list(second.parameters())[3:], lr=1e-3, **b),
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


def test_schedulers_drive_the_rate():
    problem = Problem((5, 4))
    scheduled, manual = problem.parameter(), problem.parameter()
    optimizer = shampoo([scheduled], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    by_hand = shampoo([manual], lr=0.1)
    for t in range(20):
        for param, each in ((scheduled, optimizer), (manual, by_hand)):
            each.zero_grad()
            problem.loss(param, t).backward()
        by_hand.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * t / 20))
        optimizer.step()
        by_hand.step()
        scheduler.step()
    torch.testing.assert_close(scheduled, manual, rtol=ROUNDING, atol=ROUNDING)


def test_one_cycle_moves_the_momentum_too():
    param = Problem((5, 4)).parameter()
    optimizer = shampoo([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    param.grad = torch.ones_like(param)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    optimizer.step()


def test_a_closure_is_evaluated_with_gradients():
    problem = Problem((5, 4))
    by_closure, by_hand = problem.parameter(), problem.parameter()
    optimizers = [shampoo([param]) for param in (by_closure, by_hand)]
    for t in range(12):

        def closure(t=t):
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


def test_parameters_without_gradient_or_entries_are_skipped():
    moving, frozen = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    empty = torch.nn.Parameter(torch.zeros(0, 4))
    alone = torch.nn.Parameter(torch.ones(2))
    optimizer = shampoo([moving, frozen, empty], weight_decay=0.5)
    optimizer.add_param_group({"params": [alone]})
    moving.grad, empty.grad = torch.ones(3, 2), torch.zeros(0, 4)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3, 2))
    assert torch.equal(alone, torch.ones(2))
    assert {frozen, alone}.isdisjoint(optimizer.state)
    frozen.grad = torch.ones(3, 2)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in (moving, frozen)] == [2, 1]


# --- the live operator ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("exponent", [None, -0.5, -0.1])
@pytest.mark.parametrize("max_dim", [1024, 4, 1])
@pytest.mark.parametrize("statistics", ["ema", "sum"])
def test_the_operator_reproduces_the_applied_direction(shape, exponent, max_dim, statistics):
    rng = np.random.default_rng(4)
    gradients = [torch.tensor(rng.standard_normal(shape)) for _ in range(8)]
    change, optimizer, param = step_of(  # refreshed at 3 and 6: stale by two steps
        gradients,
        betas=(0.0, 0.9),
        epsilon=1e-3,
        exponent=exponent,
        max_preconditioner_dim=max_dim,
        statistics=statistics,
        grafting="none",
        precondition_frequency=3,
    )
    operator = optimizer.operator(param)
    matrix = gradients[-1].reshape(operator.shape)
    applied = operator.power(-0.5).apply(matrix)
    torch.testing.assert_close(-change.reshape(operator.shape), applied, rtol=FLOAT64, atol=FLOAT64)


def test_the_operator_holds_the_root_of_the_stale_damped_factors():
    rng = np.random.default_rng(5)
    gradients = [torch.tensor(rng.standard_normal((4, 3))) for _ in range(7)]
    _, optimizer, param = step_of(
        gradients, betas=(0.5, 0.9), epsilon=1e-2, precondition_frequency=5
    )
    weights = np.array([0.9**k for k in range(4, -1, -1)])
    weights = weights / weights.sum()  # the bias-corrected EMA of the first five gradients
    G = np.stack([gradient.numpy() for gradient in gradients[:5]])
    L = np.einsum("i,iab,icb->ac", weights, G, G) + 1e-2 * np.eye(4)
    R = np.einsum("i,iab,iac->bc", weights, G, G) + 1e-2 * np.eye(3)
    operator = optimizer.operator(param)
    expected = np.kron(scipy.linalg.sqrtm(L), scipy.linalg.sqrtm(R))
    assert np.abs(operator.to_dense().numpy() - expected).max() < FLOAT64


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_a_float32_operator_with_null_directions_stays_finite(epsilon):
    G = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 5.0)) * 1e-2
    change, optimizer, param = step_of(
        [G, G], torch.float32, epsilon=epsilon, **{**PLAIN, "betas": (0.0, 0.9)}
    )
    applied = optimizer.operator(param).power(-0.5).apply(G)
    torch.testing.assert_close(-change, applied, rtol=1e-3, atol=1e-3)


def test_an_absent_operator_says_why(monkeypatch):
    params = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(()))]
    optimizer = shampoo([("weight", params[0]), ("bias", params[1])])
    for steps in (0, 3):
        while optimizer.state.get(params[0], {}).get("step", 0) < steps:
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        for param, name in zip(params, ("weight", "bias"), strict=True):
            text = f"first refresh is at step 10, {steps} steps were taken.*'{name}'"
            with pytest.raises(UnsupportedError, match=text):
                optimizer.operator(param)
    with pytest.raises(InvalidInputError, match=r"\[3, 2\] is not a parameter"):
        optimizer.operator(torch.zeros(3, 2))
    wide = torch.nn.Parameter(torch.zeros(2, 30))
    wide.grad = torch.ones_like(wide)
    optimizer = shampoo([wide], start_preconditioning_step=1, max_preconditioner_dim=2)
    optimizer.step()
    assert optimizer.operator(wide).right.equal(torch.eye(30, dtype=torch.float64))
    monkeypatch.setattr(preconditioner, "available_bytes", lambda _: 1000)
    with pytest.raises(UnsupportedError, match=r"identity \[30, 30\].*max_preconditioner_dim"):
        optimizer.operator(wide)


def test_an_unresolved_operator_is_refused():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([1e9, 1e9, 0.0])
    optimizer = shampoo([param], start_preconditioning_step=1, epsilon=1e-12)
    optimizer.step()
    with pytest.raises(UnsupportedError, match=r"not resolved in torch.float32.*Raise epsilon"):
        optimizer.operator(param)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "what"),
    [(math.nan, "NaN or an inf"), (-math.inf, "NaN or an inf"), (1e25, "norm above")],
    ids=["nan", "inf", "overflow"],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_bad_gradient_changes_nothing(bad, what, steps):
    model = network()
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:]}]
    optimizer = shampoo(groups, precondition_frequency=2, weight_decay=0.1)
    train(model, optimizer, 0, steps)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    named[4][1].grad[0, 2] = bad
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(NonFiniteError, match=f"parameter '3.weight'.*{what}.*Nothing was changed"):
        optimizer.step()
    assert_equal_states(optimizer.state_dict(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_unnamed_parameters_are_found_by_position_and_shape():
    param = torch.nn.Parameter(torch.zeros(3, 2))
    other = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = shampoo([{"params": [param]}, {"params": [other]}])
    other.grad = torch.full((2, 2), math.nan)
    with pytest.raises(NonFiniteError, match=r"parameter 0 of group 1, of shape \[2, 2\]"):
        optimizer.step()


def test_sparse_complex_and_integer_parameters_are_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = shampoo(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match=r"'weight' has a sparse gradient.*sparse=False"):
        optimizer.step()
    for dtype in (torch.complex64, torch.int32):
        wrong = torch.zeros(2, 2, dtype=dtype)
        with pytest.raises(UnsupportedError, match=str(dtype)):
            optimizer.add_param_group({"params": [("other", wrong)]})
        assert len(optimizer.param_groups) == 1


BAD_OPTIONS = {
    "lr": [-1.0, math.nan, "fast", torch.tensor(0.1), True],
    "betas": [(0.9, 1.0), (-0.1, 0.9), 0.9, (0.9,)],
    "epsilon": [-1e-8, math.inf],
    "weight_decay": [-0.1],
    "exponent": [0.25, 0.0, -2.0],
    "precondition_frequency": [0, 2.5, True],
    "start_preconditioning_step": [0, -1],
    "bias_correction": [1, None],
    "grafting_beta2": [1.0],
    "grafting_epsilon": [-1.0],
    "max_preconditioner_dim": [0, 3.5],
    "statistics": ["mean"],
    "grafting": ["adamw", None],
}


@pytest.mark.parametrize(
    ("option", "value"), [(key, value) for key, values in BAD_OPTIONS.items() for value in values]
)
def test_options_are_checked_at_construction(option, value):
    param = torch.nn.Parameter(torch.zeros(2, 2))
    error = UnknownNameError if option in ("statistics", "grafting") else InvalidInputError
    with pytest.raises(error, match=option):
        shampoo([param], **{option: value})
    with pytest.raises(error, match=f"{option} of parameter group 0"):
        shampoo([{"params": [param], option: value}])


def test_options_without_effect_are_refused():
    param = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(UnknownNameError, match=r"'weightdecay'.*Did you mean 'weight_decay'"):
        shampoo([{"params": [param], "weightdecay": 0.1}])
    with pytest.raises(InvalidInputError, match=r"grafting_beta2 is 0\.9, but grafting is 'sgd'"):
        shampoo([param], grafting="sgd", grafting_beta2=0.9)
    with pytest.raises(InvalidInputError, match=r"dict with 'params'.*list"):
        shampoo([param]).add_param_group([param])


# --- failures and precision -----------------------------------------------------------------


def break_eigh(monkeypatch, size):
    solve = torch.linalg.eigh

    def eigh(A):
        if A.shape[-1] == size:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solve(A)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


def test_a_failed_root_keeps_the_last_good_one_and_warns_once(monkeypatch):
    problem = Problem((5, 4))
    param = problem.parameter()
    optimizer = shampoo([("layer.weight", param)], precondition_frequency=2)

    def steps(start, stop):
        for t in range(start, stop):
            optimizer.zero_grad()
            problem.loss(param, t).backward()
            optimizer.step()

    steps(0, 2)
    left, right = (optimizer.state[param][f"{side}_inverse_root"] for side in ("left", "right"))
    kept = left.clone()
    with monkeypatch.context() as broken:
        break_eigh(broken, 5)
        with pytest.warns(RuntimeWarning, match=r"left factor of parameter 'layer.weight'.*step 4"):
            steps(2, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            steps(4, 8)
    assert torch.equal(optimizer.state[param]["left_inverse_root"], kept)
    assert not torch.equal(optimizer.state[param]["right_inverse_root"], right)
    steps(8, 10)
    assert not torch.equal(optimizer.state[param]["left_inverse_root"], kept)


def test_without_any_root_the_grafted_method_goes_on(monkeypatch):
    break_eigh(monkeypatch, 5)
    with pytest.warns(RuntimeWarning, match="grafted direction"):
        run_both(
            lambda p: shampoo(p, lr=0.03, precondition_frequency=2),
            lambda p: torch.optim.Adam(p, lr=0.03),
        )
    with pytest.warns(RuntimeWarning):
        _, optimizer, param = step_of([torch.ones(5, 4)], precondition_frequency=1)
    with pytest.raises(UnsupportedError, match=r"no inverse root of the left factor.* in 1 steps"):
        optimizer.operator(param)


@pytest.mark.parametrize("grafting", ["adam", "sgd", "none"])
@pytest.mark.parametrize("max_dim", [1, 1024])
def test_zero_gradients_without_epsilon_give_no_nan(grafting, max_dim):
    options = {"grafting_epsilon": 0.0} if grafting == "adam" else {}
    change, *_ = step_of(
        [torch.zeros(4, 3)] * 3,
        epsilon=0.0,
        grafting=grafting,
        max_preconditioner_dim=max_dim,
        precondition_frequency=1,
        **options,
    )
    assert torch.equal(change, torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_step_as_float32_ones_rounded(dtype):
    gradients = [torch.randn(6, 5, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    rounded = [gradient.to(dtype) for gradient in gradients]
    options = {"precondition_frequency": 2}
    _, low, param = step_of(rounded, dtype, **options)
    _, full, twin = step_of([gradient.float() for gradient in rounded], torch.float32, **options)
    for key, value in full.state[twin].items():
        held = low.state[param][key]
        assert torch.equal(held, value) if isinstance(value, torch.Tensor) else held == value
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(param.float(), twin, rtol=4 * resolution, atol=4 * resolution)


def test_autocast_and_reduced_products_do_not_reach_the_statistics(monkeypatch):
    gradients = [torch.randn(40, 30, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    expected, *_ = step_of(gradients, torch.float32, precondition_frequency=1)
    seen = []
    update = preconditioner.update_factor

    def spy(*arguments):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        update(*arguments)

    monkeypatch.setattr(preconditioner, "update_factor", spy)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, *_ = step_of(gradients, torch.float32, precondition_frequency=1)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert set(seen) == {"ieee"}
    assert torch.equal(found, expected)


def test_memory_format_does_not_matter():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    ]
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(weight.clone().to(memory_format=form))
        optimizer = shampoo([param], precondition_frequency=1, weight_decay=0.1)
        for gradient in gradients:
            param.grad = gradient.clone().to(memory_format=form)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)
