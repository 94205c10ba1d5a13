"""KFAC and EKFAC against kp.approximate, a dense reference and Adam."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.layers import samples as layer_samples
from kronecker_probe.workloads import digits
from tests.kfac_cases import (
    CLOSE,
    LOSS,
    MODELS,
    N,
    assert_close,
    dense,
    fresh,
    problem,
    step,
)


@pytest.mark.parametrize("rule", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_operator_of_one_batch_is_the_approximation(
    name: str, rule: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = problem(name)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    samples = kp.capture(model, loss, (x, y), target="empirical-fisher")
    optimizer = fresh(model, rule, loss_reduction=reduction)
    loss(model(x), y).backward()
    monkeypatch.setattr(layer_samples, "_CHUNK", 1000)  # several chunks of data, the last shorter
    optimizer.step()
    weights = [k for k, p in model.named_parameters() if p.ndim > 1]
    assert len(weights) >= 2
    for key in weights:
        param = model.get_parameter(key)
        wanted = kp.approximate(kp.SecondMoment(samples[key]), rule).to_dense()
        assert_close(dense(optimizer, param), wanted)
        assert optimizer.rule(param) == rule


@pytest.mark.parametrize("rule", ["kfac", "ekfac"])
def test_a_bias_has_its_exact_second_moment_where_nothing_is_shared(rule: str) -> None:
    model, x, y = problem()
    samples = kp.capture(model, LOSS, (x, y), target="empirical-fisher", layers=["*"])
    optimizer = fresh(model, rule)
    LOSS(model(x), y).backward()
    optimizer.step()
    for key in ("0.bias", "2.bias"):
        wanted = kp.SecondMoment(samples[key]).to_dense()
        assert_close(dense(optimizer, model.get_parameter(key)), wanted)


class Reference:
    """A 6-5-4 tanh network under K-FAC or EK-FAC: backpropagation and mn x mn solves in numpy."""

    def __init__(self, model: nn.Module, rule: str, frequency: int) -> None:
        self.params = [p.detach().numpy().copy() for p in model.parameters()]
        self.rule, self.frequency, self.t = rule, frequency, 0
        self.lr, self.beta1, self.beta2, self.epsilon = 0.01, 0.9, 0.95, 0.1
        self.held: list[Any] = [None] * 4
        self.B, self.A, self.M, self.D = [0.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4

    def pairs(self, x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(d, a) of every datum for W1, b1, W2, b2."""
        W1, b1, W2, b2 = self.params
        h = np.tanh(x @ W1.T + b1)
        z = h @ W2.T + b2
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        d2 = p - np.eye(4)[y]
        d1 = d2 @ W2 * (1 - h**2)
        one = np.ones((len(x), 1))
        return [(d1, x), (d1, one), (d2, h), (d2, one)]

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        self.t += 1
        b1, b2 = 1 - self.beta1**self.t, 1 - self.beta2**self.t
        for k, (d, a) in enumerate(self.pairs(x, y)):
            g = np.einsum("im,in->imn", d, a)
            self.M[k] = self.beta1 * self.M[k] + (1 - self.beta1) * g.mean(0)
            self.B[k] = self.beta2 * self.B[k] + (1 - self.beta2) * d.T @ d / len(x)
            self.A[k] = self.beta2 * self.A[k] + (1 - self.beta2) * a.T @ a / len(x)
            if (self.t - 1) % self.frequency == 0:
                B, A = self.B[k] / b2, self.A[k] / b2
                if self.rule == "ekfac":
                    self.held[k] = np.linalg.eigh(B)[1], np.linalg.eigh(A)[1]
                else:
                    damped = [
                        F + self.epsilon * np.linalg.norm(F, 2) * np.eye(len(F)) for F in (B, A)
                    ]
                    self.held[k] = np.kron(*damped)
            M = self.M[k] / b1
            if self.rule == "ekfac":
                Q, R = self.held[k]
                self.D[k] = self.beta2 * self.D[k] + (1 - self.beta2) * ((Q.T @ g @ R) ** 2).mean(0)
                D = self.D[k] / b2
                U = Q @ (Q.T @ M @ R / (D + self.epsilon * D.max())) @ R.T
            else:
                U = np.linalg.solve(self.held[k], M.reshape(-1))
            self.params[k] = self.params[k] - self.lr * U.reshape(self.params[k].shape)


@pytest.mark.parametrize(("rule", "frequency"), [("kfac", 1), ("kfac", 3), ("ekfac", 100)])
def test_twenty_steps_equal_a_dense_reference(rule: str, frequency: int) -> None:
    model, _, _ = problem()
    reference = Reference(model, rule, frequency)
    optimizer = optim.MODEL_PRESETS[rule](
        model, lr=0.01, betas=(0.9, 0.95), epsilon=0.1, basis={"frequency": frequency}
    )
    start = [p.copy() for p in reference.params]
    for t in range(20):
        _, x, y = problem(seed=t + 1)
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
        reference.step(x.numpy(), y.numpy())
    for param, wanted, first in zip(model.parameters(), reference.params, start, strict=True):
        error = np.linalg.norm(param.detach().numpy() - wanted)
        assert error <= CLOSE * np.linalg.norm(wanted - first)


@pytest.mark.parametrize("rule", ["kfac", "ekfac"])
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_the_defaults_train(rule: str, scale: float) -> None:
    """Also where inputs are small: damping is relative to the factors."""
    workload = digits.digits_mlp(0)
    x, y = scale * workload.train[0], workload.train[1]
    torch.manual_seed(0)
    for layer in workload.model:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    optimizer = optim.MODEL_PRESETS[rule](workload.model)
    losses = []
    for _ in range(100):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = LOSS(workload.model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 1.1 * losses[0]
    assert sum(losses[-10:]) / 10 < 0.75 * losses[0]


@pytest.mark.parametrize("rule", ["kfac", "ekfac"])
def test_layers_of_one_shape_keep_to_themselves(rule: str) -> None:
    """They share tensors of state; one that is left out of a step keeps its own."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    optimizer = fresh(model, rule, basis={"frequency": 1})
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(4, (N,))
    step(model, optimizer, x, y)
    before = [dense(optimizer, weight) for weight in weights]
    optimizer.zero_grad()
    last = model[1:]
    LOSS(last(x), y).backward()
    optimizer.step()
    optimizer.remove_hooks()
    samples = kp.capture(last, LOSS, (x, y), target="empirical-fisher")
    assert torch.equal(dense(optimizer, weights[0]), before[0])
    for k in (1, 2):
        wanted = kp.approximate(kp.SecondMoment(samples[f"{k}.weight"]), rule).to_dense()
        assert_close(dense(optimizer, weights[k]), wanted)
        assert (wanted - before[k]).norm() > 0.01 * wanted.norm()


def test_parameters_of_no_layer_follow_adam() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4), nn.LayerNorm(4)).double()
    twin = copy.deepcopy(model)
    optimizer = optim.KFAC(model, lr=0.0, diagonal_lr=0.01)
    assert [g["param_names"] for g in optimizer.param_groups] == [
        ["1.weight", "1.bias"],
        ["0.weight", "2.weight", "2.bias"],
    ]
    adam = torch.optim.Adam([p for k in (0, 2) for p in twin[k].parameters()], lr=0.01)
    for _ in range(10):
        tokens, y = torch.randint(9, (30,)), torch.randint(4, (30,))
        for one, net in ((optimizer, model), (adam, twin)):
            one.zero_grad()
            LOSS(net(tokens), y).backward()
            one.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=CLOSE, atol=CLOSE)


def test_a_single_datum_without_a_batch_and_a_single_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 1, 2), nn.Flatten(0), nn.Linear(3, 1)).double()
    optimizer = fresh(model)
    x = torch.randn(2, 4, dtype=torch.float64)
    (3 * model(x)).sum().backward()
    optimizer.step()
    h = model[:2](x).detach()
    assert_close(dense(optimizer, model[2].weight), 9 * torch.outer(h, h))
    assert_close(dense(optimizer, model[2].bias), torch.tensor([[9.0]], dtype=torch.float64))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("rule", ["kfac", "ekfac"])
def test_a_copy_goes_on_bitwise_once_attached(way: str, rule: str) -> None:
    model, x, y = problem("conv2d")
    optimizer = optim.MODEL_PRESETS[rule](model, basis={"frequency": 2})
    for _ in range(3):
        step(model, optimizer, x, y)
    if way == "state_dict":
        twin = copy.deepcopy(model)
        other = optim.MODEL_PRESETS[rule](twin)
        other.load_state_dict(optimizer.state_dict())
    else:
        both = model, optimizer
        twin, other = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
        LOSS(twin(x), y).backward()
        with pytest.raises(InvalidInputError, match=r"optimizer\.attach\(model\)"):
            other.step()
        other.attach(twin)
    for _ in range(3):
        step(model, optimizer, x, y)
        step(twin, other, x, y)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_layers_that_are_also_used_otherwise_are_left_to_adam() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    attention = nn.MultiheadAttention(4, 2)
    names = [g["param_names"] for g in optim.KFAC(model).param_groups]
    assert names == [["1.weight", "1.bias"], ["0.weight"]]
    with pytest.raises(InvalidInputError, match="EShampoo"):
        optim.KFAC(attention)  # its output layer is called as a function
