"""Shampoo against a dense numpy reference, and theorems about its update."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kronecker_probe import optim
from tests.optimizer_cases import SHAPES, Problem, step_of

# Two float64 programs of 30 steps, roots of matrices of condition number up to 1e4: 1e4 eps,
# times ten for other machines.
FLOAT64 = 1e-11
# The same in float32: 1e3 eps, as the worst directions are damped by epsilon.
FLOAT32 = 1e-4
# The same formula in another order of operations, a few steps.
ROUNDING = 1e-12
# A finite sample of white noise: reference bound for min(K n / m, K m / n) >= 50.
WHITE_NOISE = 0.05


class Reference:
    """Shampoo by its definition: dense mn x mn Kronecker products, roots by SVD, float64.

    Args:
        shape: Of the parameter.
        options: Those of the preset.
    """

    def __init__(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.o = {
            "lr": 1e-2,
            "betas": (0.9, 0.999),
            "epsilon": 1e-8,
            "weight_decay": 0.0,
            "exponent": None,
            "frequency": 10,
            "accumulate": "average",
            "bias_correction": True,
            "grafting": "adam",
            "graft_epsilon": 1e-8,
            "max_dim": 1024,
        }
        for name, value in options.items():
            if name == "magnitude":
                value = {("graft_" + k if k != "grafting" else k): v for k, v in value.items()}
            self.o |= value if isinstance(value, dict) else {name: value}
        self.m = shape[0] if shape else 1
        self.n = int(np.prod(shape[1:]))
        self.has = [1 < size <= self.o["max_dim"] for size in (self.m, self.n)]
        self.L, self.R = np.zeros((self.m, self.m)), np.zeros((self.n, self.n))
        self.v, self.w = np.zeros(self.m * self.n), np.zeros(self.m * self.n)
        self.M = np.zeros(self.m * self.n)
        self.inverse = None
        self.t = 0

    def corrected(self, beta: float) -> float:
        return 1 - beta**self.t if self.o["bias_correction"] else 1.0

    def power(self, A: np.ndarray, size: int, present: bool) -> np.ndarray:
        if not present:
            return np.eye(size)
        exponent = self.o["exponent"]
        if exponent is None:
            exponent = {1: -1 / 2, 2: -1 / 4}[sum(self.has)]
        b = 1.0 if self.o["accumulate"] == "sum" else self.corrected(self.o["betas"][1])
        U, s, Vt = np.linalg.svd(A / b + self.o["epsilon"] * np.eye(size))
        return (U * s**exponent) @ Vt

    def step(self, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        o, (beta1, beta2) = self.o, self.o["betas"]
        graft_beta2 = o.get("graft_beta2", beta2)
        start = o.get("start", o["frequency"])
        self.t += 1
        G = g.reshape(self.m, self.n)
        old, new = (beta2, 1 - beta2) if o["accumulate"] == "average" else (1.0, 1.0)
        self.L = old * self.L + new * G @ G.T
        self.R = old * self.R + new * G.T @ G
        self.v = old * self.v + new * g**2
        self.w = graft_beta2 * self.w + (1 - graft_beta2) * g**2
        self.M = beta1 * self.M + (1 - beta1) * g
        M = self.M / self.corrected(beta1)
        graft = M
        if o["grafting"] == "adam":
            graft = M / (np.sqrt(self.w / self.corrected(graft_beta2)) + o["graft_epsilon"])
        if self.t >= start and (self.t - start) % o["frequency"] == 0:
            self.inverse = np.kron(
                self.power(self.L, self.m, self.has[0]), self.power(self.R, self.n, self.has[1])
            )
        if self.t < start:
            U = graft
        elif any(self.has):
            U = self.inverse @ M
        else:
            b = 1.0 if o["accumulate"] == "sum" else self.corrected(beta2)
            U = M / (np.sqrt(self.v / b) + o["epsilon"])
        if self.t >= start and o["grafting"] != "none":
            U = U * np.linalg.norm(graft) / np.linalg.norm(U)
        return w - o["lr"] * o["weight_decay"] * w - o["lr"] * U


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"epsilon": 0.001},
    "every step": {"epsilon": 0.001, "basis": {"frequency": 1}},
    "late start, odd interval": {"epsilon": 0.01, "basis": {"start": 5, "frequency": 3}},
    "sum": {
        "epsilon": 0.01,
        "statistics": {"accumulate": "sum"},
        "magnitude": {"grafting": "none"},
        "lr": 0.1,
    },
    "no grafting": {"epsilon": 0.01, "magnitude": {"grafting": "none"}, "betas": (0.8, 0.95)},
    "SGD grafting": {"epsilon": 0.001, "magnitude": {"grafting": "sgd"}, "lr": 0.001},
    "own grafting options": {
        "epsilon": 0.001,
        "magnitude": {"beta2": 0.9, "epsilon": 0.01},
        "basis": {"frequency": 4},
    },
    "square": {
        "epsilon": 0.1,
        "spectrum": {"exponent": -0.5},
        "magnitude": {"grafting": "none"},
        "betas": (0.0, 0.9),
    },
    "odd exponent": {"epsilon": 0.01, "spectrum": {"exponent": -1 / 3}, "basis": {"frequency": 7}},
    "weight decay": {"epsilon": 0.001, "weight_decay": 0.3, "lr": 0.05},
    "no bias correction": {
        "epsilon": 0.001,
        "statistics": {"bias_correction": False},
        "betas": (0.5, 0.9),
    },
    "one side too large": {"epsilon": 0.001, "shapes": {"max_dim": 4}},
    "no factor": {
        "epsilon": 0.001,
        "shapes": {"max_dim": 1},
        "magnitude": {"grafting": "sgd"},
        "lr": 0.001,
    },
    "no factor, sum": {
        "epsilon": 0.001,
        "shapes": {"max_dim": 1},
        "statistics": {"accumulate": "sum"},
        "magnitude": {"grafting": "none"},
    },
}


def trajectories(shape, options, dtype, steps=30):
    """The largest difference from the reference along a run, relative to the weights."""
    problem = Problem(shape)
    param = problem.parameter(dtype)
    optimizer = optim.Shampoo([param], **options)
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


PLAIN: dict[str, Any] = {
    "betas": (0.0, 0.0),
    "magnitude": {"grafting": "none"},
    "basis": {"frequency": 1},
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


# Ratio |U| / |G| on unit white noise (Purifying Shampoo's magnitude bounds, at equality)
RATIOS = {
    "Adam": (
        lambda p, **o: optim.EShampoo(p, shapes={"max_dim": 1}, **o),
        lambda m, n: 1.0,
    ),
    "EShampoo": (optim.EShampoo, lambda m, n: 1.0),
    "Shampoo": (
        lambda p, **o: optim.Shampoo(p, magnitude={"grafting": "none"}, **o),
        lambda m, n: (m * n) ** -0.25,
    ),
    "Shampoo of a sum": (
        lambda p, **o: optim.Shampoo(
            p, statistics={"accumulate": "sum"}, magnitude={"grafting": "none"}, **o
        ),
        lambda m, n: (m * n) ** -0.25,
    ),
    "Shampoo squared": (optim.ShampooSquared, lambda m, n: 1.0),
    "Shampoo squared, one side": (
        lambda p, **o: optim.ShampooSquared(p, shapes={"max_dim": 24}, **o),
        lambda m, n: 1.0,
    ),
    "Shampoo squared without the trace": (
        lambda p, **o: optim.ShampooSquared(
            p, spectrum={"trace_scale": False, "exponent": -0.5}, **o
        ),
        lambda m, n: (m * n) ** -0.5,
    ),
    "root-free": (
        lambda p, **o: optim.RootFreeShampoo(
            p, momentum=0.0, statistics={"initial": 0.0, "bias_correction": True}, **o
        ),
        lambda m, n: 1.0,
    ),
}


@pytest.mark.parametrize(("shape", "K"), [((16, 8), 200), ((32, 24), 100), ((8, 24), 300)])
@pytest.mark.parametrize("name", RATIOS)
def test_white_noise_shows_what_the_shape_does_to_the_length(name, shape, K):
    preset, expected = RATIOS[name]
    rng = np.random.default_rng(1)
    gradients = [torch.tensor(rng.standard_normal(shape)) for _ in range(K + 1)]
    # An average with beta2 = 1 - 1e-6 weighs K gradients alike; a sum is K means.
    change, *_ = step_of(
        gradients,
        preset=preset,
        betas=(0.0, 1 - 1e-6),
        epsilon=1e-12,
        basis={"start": K, "frequency": 10**6},
    )
    scale = math.sqrt(K) if name == "Shampoo of a sum" else 1.0
    ratio = scale * float(change.norm() / gradients[-1].norm())
    # each factor is off by 1/sqrt(samples a row), to the power 1 of a root-free method twice
    slack = 2 if name == "root-free" else 1
    assert ratio == pytest.approx(expected(*shape), rel=slack * WHITE_NOISE)


@pytest.mark.parametrize("shape", [(20,), (20, 1), (1, 20)])
def test_the_squared_product_of_a_single_factor_is_that_factor(shape):
    """H of a vector is its own factor: no trace stands beside it."""
    rng = np.random.default_rng(2)
    K = 2000
    gradients = [3.0 * torch.tensor(rng.standard_normal(shape)) for _ in range(K + 1)]
    change, *_ = step_of(
        gradients,
        preset=optim.ShampooSquared,
        betas=(0.0, 1 - 1e-6),
        basis={"start": K, "frequency": 10**6},
    )
    assert float(3.0 * change.norm() / gradients[-1].norm()) == pytest.approx(1, rel=WHITE_NOISE)


def test_the_squared_product_of_three_factors_has_the_scale_of_their_target():
    rng = np.random.default_rng(3)
    K, shape = 400, (6, 5, 4)
    gradients = [2.0 * torch.tensor(rng.standard_normal(shape)) for _ in range(K + 1)]
    change, optimizer, param = step_of(
        gradients,
        preset=optim.ShampooSquared,
        betas=(0.0, 1 - 1e-6),
        basis={"start": K, "frequency": 10**6},
        shapes={"merge": 6},
    )
    assert {"root_0", "root_1", "root_2"} <= optimizer.state[param].keys()
    assert float(2.0 * change.norm() / gradients[-1].norm()) == pytest.approx(1, rel=WHITE_NOISE)


@pytest.mark.parametrize("q", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("max_dim", [1024, 20])
def test_whitened_factors_have_the_scale_of_their_target(q, scale, max_dim):
    """From the first refreshes on: no factor starts in units of its own.

    The first is when all factors have full rank: the null space of a singular one whitens by
    1 / epsilon.
    """
    rng = np.random.default_rng(3)
    gradients = [scale * torch.tensor(rng.standard_normal((16, 24))) for _ in range(200)]
    for steps in (30, 36, 43, 200):
        change, *_ = step_of(
            gradients[:steps],
            preset=optim.KLShampoo,
            betas=(0.0, 1 - 1e-6),
            epsilon=1e-12,
            statistics={"q": q},
            shapes={"max_dim": max_dim},
            basis={"start": 8, "frequency": 3},
        )
        ratio = float(scale * change.norm() / gradients[steps - 1].norm())
        # few samples in the first, which is what the factors cost that are not known yet
        assert ratio == pytest.approx(1, rel=0.3 if steps < 200 else 2 * WHITE_NOISE)
