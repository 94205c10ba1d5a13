"""Every preset against its definition in dense numpy, 50 steps in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kronecker_probe import optim
from tests.dense_optimizer import Dense, Rule

# Two float64 programs of 50 steps: roots of matrices of condition 1e6 in other orders of operation
FLOAT64 = 1e-9
STEPS = 50

# Factors of full rank: the basis of a null space is anyone's choice
LATE = {"start": 5}

Build = Callable[[list[torch.Tensor]], optim.KroneckerOptimizer]

CASES: dict[str, tuple[Build, Rule]] = {
    "Shampoo": (
        lambda p: optim.Shampoo(p, lr=0.01, weight_decay=0.1),
        Rule(graft="adam", decay=0.1),
    ),
    "Shampoo, every third statistics": (
        lambda p: optim.Shampoo(p, lr=0.01, statistics={"every": 3}, basis={"frequency": 5}),
        Rule(graft="adam", every=3, frequency=5, start=5),
    ),
    "Shampoo, sum, AdaGrad graft": (
        lambda p: optim.Shampoo(
            p, lr=0.01, statistics={"accumulate": "sum"}, magnitude={"grafting": "adagrad"}
        ),
        Rule(graft="adagrad", beta2=None),
    ),
    "ShampooSquared": (
        lambda p: optim.ShampooSquared(p, lr=0.01, epsilon=1e-3),
        Rule(exponents=1.0, trace=True, epsilon=1e-3, relative=True, start=1),
    ),
    "EShampoo": (
        lambda p: optim.EShampoo(p, lr=0.01, basis=LATE),
        Rule(estimate="corrected", start=5),
    ),
    "EShampoo, transport": (
        lambda p: optim.EShampoo(p, lr=0.01, basis={"carry": "transport", "frequency": 3, **LATE}),
        Rule(estimate="corrected", start=5, frequency=3, carry="transport"),
    ),
    "EShampoo, grafted": (
        lambda p: optim.EShampoo(p, lr=0.01, magnitude={"grafting": "adam"}, basis=LATE),
        Rule(estimate="corrected", start=5, graft="adam"),
    ),
    "SOAP by eigh": (
        lambda p: optim.SOAP(p, lr=0.01, basis={"solver": "eigh", **LATE}),
        Rule(estimate="corrected", start=5, beta1=0.95, beta2=0.95),
    ),
    "KLShampoo": (
        lambda p: optim.KLShampoo(p, lr=0.01, epsilon=1e-2),
        Rule(exponents=1.0, whitened=0, beta2=0.98, start=1, epsilon=1e-2, relative=True),
    ),
    "SQ": (
        lambda p: optim.KLShampoo(p, lr=0.01, epsilon=1e-2, statistics={"q": 0.5}),
        Rule(exponents=1.0, whitened=0.5, beta2=0.98, start=1, epsilon=1e-2, relative=True),
    ),
    "KLSOAP by eigh": (
        lambda p: optim.KLSOAP(p, lr=0.01, epsilon=1e-4, basis={"solver": "eigh", **LATE}),
        Rule(estimate="corrected", whitened=0, beta2=0.98, start=5, epsilon=1e-4),
    ),
    "RootFreeShampoo": (
        lambda p: optim.RootFreeShampoo(p, lr=0.01, batch_size=8, weight_decay=0.1),
        Rule(beta1=0.0, beta2=0.99, exponents=1.0, trace=True, power=1.0, batch=8, mu=0.9,
             epsilon=1e-3, relative=True, decay=0.1, initial=1.0, correct=False, start=1),
    ),
    "RMSpropRootFree": (
        lambda p: optim.RMSpropRootFree(p, lr=0.01, batch_size=4),
        Rule(beta1=0.0, estimate="diagonal", power=1.0, correct=False, initial=1.0, batch=4,
             mu=0.9, epsilon=1e-5),
    ),
    "AdaGradRootFree": (
        lambda p: optim.AdaGradRootFree(p, lr=0.01),
        Rule(beta1=0.0, beta2=None, estimate="diagonal", power=1.0, initial=1.0, mu=0.9,
             epsilon=1e-5),
    ),
    "Muon, exact": (
        lambda p: optim.Muon(p, lr=0.01, spectrum={"root": "eigh"}),
        Rule(estimate="polar", beta1=0.95, correct=False, nesterov=True, by_shape=True),
    ),
}  # fmt: skip


def gradients(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A sequence with a drifting covariance."""
    rng = np.random.default_rng(seed)
    m, n = shape
    left, right = rng.standard_normal((m, m)), rng.standard_normal((n, n))
    noise = rng.standard_normal((STEPS, m, n))
    drift = 1 + np.linspace(0, 1, STEPS)[:, None, None] * rng.random((m, 1))
    return drift * (left @ noise @ right) / np.sqrt(m * n)


@pytest.mark.parametrize("shape", [(4, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_are_those_of_the_dense_definition(name: str, shape: tuple[int, int]) -> None:
    build, rule = CASES[name]
    sequence = gradients(shape)
    start = np.random.default_rng(1).standard_normal(shape)
    dense = Dense(rule, start)
    param = torch.tensor(start, requires_grad=True)
    optimizer = build([param])
    for G in sequence:
        dense.step(G)
        param.grad = torch.tensor(G)
        optimizer.step()
    difference = np.linalg.norm(param.detach().numpy() - dense.W)
    assert difference <= FLOAT64 * np.linalg.norm(dense.W - start)


@pytest.mark.parametrize("name", CASES)
def test_the_operator_takes_the_average_to_the_direction(name: str) -> None:
    build, rule = CASES[name]
    if rule.mu or rule.estimate == "polar" or rule.graft != "none":
        pytest.skip("the update is more than the direction")
    param = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = build([param])
    dense = Dense(rule, np.zeros((4, 3)))
    for G in gradients((4, 3))[:17]:
        before = param.detach().clone()
        param.grad = torch.tensor(G)
        optimizer.step()
        dense.step(G)
    P = optimizer.operator(param).to_dense()
    values, vectors = torch.linalg.eigh(P)
    M = torch.tensor(dense.M).reshape(-1) / (1 - rule.beta1**17)
    direction = vectors @ (values ** (-rule.power) * (vectors.T @ M))
    update = ((before - param.detach()) / 0.01).reshape(-1)
    assert torch.linalg.norm(direction - update) <= FLOAT64 * torch.linalg.norm(update)


Options = dict[str, Any]


@pytest.mark.parametrize("name", ["Shampoo", "EShampoo", "KLShampoo", "RootFreeShampoo"])
def test_equal_blocks_are_parameters_of_their_own(name: str) -> None:
    build: Any = getattr(optim, name)
    sequence = gradients((6, 8))
    whole = torch.zeros(6, 8, dtype=torch.float64, requires_grad=True)
    cut = build([whole], lr=0.01, shapes={"block_size": 4})
    corners = [(r, c) for r in (slice(0, 4), slice(4, 6)) for c in (slice(0, 4), slice(4, 8))]
    parts = [torch.zeros(6, 8, dtype=torch.float64)[at].clone().requires_grad_() for at in corners]
    apart = build(parts, lr=0.01)
    for G in sequence:
        whole.grad = torch.tensor(G)
        for part, at in zip(parts, corners, strict=True):
            part.grad = torch.tensor(G)[at].clone()
        cut.step()
        apart.step()
    for part, at in zip(parts, corners, strict=True):
        assert torch.linalg.norm(whole[at] - part) <= FLOAT64 * torch.linalg.norm(part)
    operator = cut.operator(whole).to_dense().reshape(6, 8, 6, 8)
    for part, (r, c) in zip(parts, corners, strict=True):
        block = operator[r, c][:, :, r, c]
        own = apart.operator(part).to_dense().reshape(block.shape)
        assert torch.linalg.norm(block - own) <= FLOAT64 * torch.linalg.norm(own)
