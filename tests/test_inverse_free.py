"""Inverse-free Shampoo: its definition, its fixed point, and invariance to coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.optim.blocks.scratch import Scratch
from kronecker_probe.optim.options.groups import recipe_of
from kronecker_probe.optim.options.kinds import InverseFreeOptions
from kronecker_probe.optim.preconditioners.inverse_free import InverseFree

# Two float64 programs in another order of operations, 30 steps
FLOAT64 = 1e-10


def published(G, C, K, mC, mK, *, batch, damping, decay, lr):
    """One update of the factors as reference equations state it, on matrices."""
    dC, dK = len(C), len(K)
    tK, tC = np.trace(K.T @ K) / dK, np.trace(C.T @ C) / dC
    newK = batch / dC * K.T @ G.T @ C @ C.T @ G @ K + damping * tC * K.T @ K - np.eye(dK)
    newC = batch / dK * C.T @ G @ K @ K.T @ G.T @ C + damping * tK * C.T @ C - np.eye(dC)
    mK = decay * mK + (1 - decay) * 0.5 * newK
    mC = decay * mC + (1 - decay) * 0.5 * newC
    K = K - lr / max(1, np.linalg.norm(mK)) * K @ mK
    C = C - lr / max(1, np.linalg.norm(mC)) * C @ mC
    return C, K, mC, mK


def test_thirty_steps_are_those_of_the_equations() -> None:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((4, 3))
    param = torch.tensor(W, requires_grad=True)
    optimizer = optim.InverseFreeShampoo(
        [param], lr=0.01, batch_size=8, weight_decay=0.1, inverse={"lr": 0.1, "damping": 0.05}
    )
    C, K, mC, mK = np.eye(4), np.eye(3), np.zeros((4, 4)), np.zeros((3, 3))
    M = np.zeros_like(W)
    for _ in range(30):
        G = rng.standard_normal((4, 3))
        C, K, mC, mK = published(G, C, K, mC, mK, batch=8, damping=0.05, decay=0.5, lr=0.1)
        M = 0.9 * M + C @ C.T @ G @ K @ K.T + 0.1 * W
        W = W - 0.01 * M
        param.grad = torch.tensor(G)
        optimizer.step()
    assert np.linalg.norm(param.detach().numpy() - W) <= FLOAT64 * np.linalg.norm(W)
    P = optimizer.operator(param)
    expected = np.kron(np.linalg.inv(C @ C.T), np.linalg.inv(K @ K.T))
    assert np.linalg.norm(P.to_dense().numpy() - expected) <= FLOAT64 * np.linalg.norm(expected)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_a_reparameterization_changes_nothing(structure: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gradients = normal(30, 4, 3)
    A, B = (torch.diag(normal(k).exp()) for k in (4, 3))
    if structure == "dense":
        A, B = A + 0.3 * normal(4, 4), B + 0.3 * normal(3, 3)
    rule = {"structure": structure, "damping": 0.0, "lr": 0.1}
    W = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    V = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)  # W = A V B^T
    one = optim.InverseFreeShampoo([W], lr=0.01, inverse=rule)
    two = optim.InverseFreeShampoo([V], lr=0.01, inverse=rule)
    for optimizer, param, left, right in (
        (one, W, torch.eye(4).double(), torch.eye(3).double()),
        (two, V, torch.linalg.inv(A), torch.linalg.inv(B)),
    ):
        param.grad = torch.zeros_like(param)
        optimizer.step()  # makes the state
        state = optimizer.state[param]
        for name, start in (("inverse_0", left), ("inverse_1", right)):
            state[name].copy_(start.diagonal() if structure == "diagonal" else start)
        state["velocity_0"].zero_(), state["velocity_1"].zero_()
        state["momentum_buffer"].zero_()
        param.data.zero_()
    for G in gradients:
        W.grad, V.grad = G, A.T @ G @ B
        one.step(), two.step()
    mapped = A @ V.detach() @ B.T
    assert torch.linalg.norm(mapped - W) <= FLOAT64 * torch.linalg.norm(W)


def test_with_expected_statistics_it_finds_the_kl_optimum() -> None:
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64)
    rule = optim.Inverse(lr=0.05, decay=0.0, damping=0.0)
    holder = optim.InverseFreeShampoo(
        [torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)], inverse=rule
    )
    options = recipe_of(holder.param_groups[0]).kind
    assert isinstance(options, InverseFreeOptions)
    one = InverseFree(options, 0.0, (3, 2), (0, 1), Scratch())
    state = one.initial(torch.zeros(1, 3, 2, dtype=torch.float64))
    # E over the draws of the outer products, as one gradient of 6 times the columns
    for _ in range(1200):
        velocities = []
        for draw in G:
            trial = {k: v.clone() for k, v in state.items()}
            one.update(trial, draw[None], 1)
            velocities.append([trial[f"velocity_{k}"] for k in (0, 1)])
        for k in (0, 1):
            mean = torch.stack([v[k] for v in velocities]).mean(0)
            one._move(state[f"inverse_{k}"], mean, 1)
    fitted = one.operator(state, 0, 1)
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(G))
    kl = kp.approximate(H, "divergence:q=0")
    assert kp.relative_error(kl, fitted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_state_may_be_bfloat16_and_still_trains(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(256, 8, generator=generator)
    Y = X @ torch.randn(8, 4, generator=generator)
    losses = []
    for precision in ("full", "bfloat16"):
        W = torch.zeros(4, 8, dtype=dtype, requires_grad=True)
        optimizer = optim.InverseFreeShampoo(
            [W], lr=0.05, batch_size=256, inverse={"precision": precision, "lr": 0.05}
        )
        for _ in range(150):
            optimizer.zero_grad()
            (X.to(dtype) @ W.T - Y.to(dtype)).float().square().mean().backward()
            optimizer.step()
        tensors = [v for v in optimizer.state[W].values() if isinstance(v, torch.Tensor)]
        expected = torch.float32 if precision == "full" else torch.bfloat16
        assert {t.dtype for t in tensors if t.is_floating_point()} == {expected}
        losses.append(float((X @ W.detach().float().T - Y).square().mean()))
        twin = torch.zeros(4, 8, dtype=dtype, requires_grad=True)
        other = optim.InverseFreeShampoo([twin], lr=1.0)
        other.load_state_dict(optimizer.state_dict())
        assert other.state[twin]["inverse_0"].dtype == expected
    start = float(Y.square().mean())
    assert losses[0] < 0.1 * start
    assert losses[1] < losses[0] + 0.01 * start


def test_inverse_factors_in_bfloat16_move_by_less_than_a_rounding() -> None:
    """Their updates are smaller than bfloat16's steps: rounded to the nearest they stand still."""
    held = {}
    scales = torch.ones(12)
    scales[:3] = 0.1
    for precision in ("full", "bfloat16"):
        param = torch.nn.Parameter(torch.zeros(10, 12))
        optimizer = optim.InverseFreeShampoo([param], inverse={"precision": precision})
        generator = torch.Generator().manual_seed(0)
        for _ in range(1200):
            param.grad = torch.randn(10, 12, generator=generator) * scales
            optimizer.step()
        held[precision] = optimizer.state[param]["inverse_1"][0].double().diagonal()
    assert float(held["full"][0]) > 2.0
    torch.testing.assert_close(held["bfloat16"], held["full"], rtol=0.1, atol=0.0)
