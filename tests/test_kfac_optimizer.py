"""KFAC and EKFAC: what the hooks record, against kp.approximate and a dense reference."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError, UnknownNameError, UnsupportedError
from kronecker_probe.optim import layer_samples
from kronecker_probe.workloads import digits

# float64 sums and eigendecompositions of small, well-conditioned factors
CLOSE = 1e-10
N = 40
LOSS = nn.CrossEntropyLoss()


class Twice(nn.Module):
    """A layer called twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))  # type: ignore[no-any-return]


class Positions(nn.Module):
    """Logits averaged over the positions of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))).mean(1)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))  # type: ignore[no-any-return]


def conv(layer: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return nn.Sequential(layer(2, 3, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))

    return build


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (mlp, (6,)),
    "conv1d": (conv(nn.Conv1d, kernel_size=3, dilation=2), (2, 8)),
    "conv2d": (conv(nn.Conv2d, kernel_size=(3, 2), stride=2, padding=1), (2, 5, 6)),
    "conv2d-same": (conv(nn.Conv2d, kernel_size=2, padding="same"), (2, 3, 4)),
    "conv3d": (conv(nn.Conv3d, kernel_size=2, bias=False), (2, 3, 3, 3)),
    "twice": (Twice, (5,)),
    "tied": (Tied, (5,)),
    "positions": (Positions, (3, 5)),
}


def problem(name: str = "linear", seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    x, y = torch.randn(N, *shape, dtype=torch.float64), torch.randint(4, (N,))
    model = build().double()
    model(x)  # lazy layers
    return model, x, y


def dense(optimizer: optim.KroneckerOptimizer, param: Tensor) -> Tensor:
    return optimizer.operator(param).to_dense()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() <= CLOSE * wanted.norm()
    assert wanted.norm() > 0


def fresh(model: nn.Module, rule: str = "kfac", **options: Any) -> optim.KroneckerOptimizer:
    """One whose operator is that of the last batch."""
    return optim.MODEL_PRESETS[rule](model, lr=0.0, betas=(0.0, 0.0), epsilon=0.0, **options)


@pytest.mark.parametrize("rule", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_operator_of_one_batch_is_the_approximation(
    name: str, rule: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = problem(name)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    samples = kp.capture(model, loss, (x, y), draws="empirical-fisher")
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
    samples = kp.capture(model, LOSS, (x, y), draws="empirical-fisher", layers=["*"])
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
    assert sum(losses[-10:]) / 10 < 0.3 * losses[0]


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


def operators(model: nn.Module, run: Callable[[optim.KroneckerOptimizer], None]) -> list[Tensor]:
    """Those of all parameters after ``run`` and a step of an optimizer of a copy."""
    optimizer = fresh(model, "ekfac")
    run(optimizer)
    optimizer.step()
    optimizer.remove_hooks()
    model.zero_grad()
    return [dense(optimizer, p) for p in model.parameters()]


def test_passes_add_up_to_the_batch_that_they_are_parts_of() -> None:
    model, x, y = problem("conv2d")

    def parts(_: optim.KroneckerOptimizer) -> None:
        for part in (slice(0, 10), slice(10, 25), slice(25, N)):
            (LOSS(model(x[part]), y[part]) * len(x[part]) / N).backward()

    found = operators(model, parts)
    wanted = operators(model, lambda _: LOSS(model(x), y).backward())
    for one, two in zip(found, wanted, strict=True):
        assert_close(one, two)


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

    found = operators(model, with_others)
    wanted = operators(model, lambda _: LOSS(model(x.detach()), y).backward())
    for one, two in zip(found, wanted, strict=True):
        assert_close(one, two)


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


def step(model: nn.Module, optimizer: optim.KroneckerOptimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    LOSS(model(x), y).backward()
    optimizer.step()


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


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_end_with_removal_and_do_not_keep_the_optimizer() -> None:
    model, x, y = problem()
    optimizer = optim.KFAC(model)
    assert hooks_of(model) == 2
    optimizer.attach(model)
    assert hooks_of(model) == 2
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


@pytest.mark.parametrize("mistake", ["eval", "functional", "twice"])
def test_a_gradient_without_statistics_is_refused(mistake: str) -> None:
    model, x, y = problem()
    optimizer = optim.KFAC(model)
    optimizer.step()  # no gradient, nothing to do
    if mistake == "functional":
        torch.func.functional_call(
            nn.Sequential(*copy.deepcopy(model)), dict(model.named_parameters()), x
        ).sum().backward()
    else:
        model.train(mistake != "eval")
        LOSS(model(x), y).backward()
    if mistake == "twice":
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InvalidInputError, match=r"'0\.weight'.*model\.train"):
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
    (lambda: optim.Statistics(rule="kfac", batch_size=2), InvalidInputError, "batch_size"),
    (lambda: optim.Statistics(loss_reduction="sum"), InvalidInputError, "kfac"),
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


def test_layers_that_are_also_used_otherwise_are_left_to_adam() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    attention = nn.MultiheadAttention(4, 2)
    names = [g["param_names"] for g in optim.KFAC(model).param_groups]
    assert names == [["1.weight", "1.bias"], ["0.weight"]]
    with pytest.raises(InvalidInputError, match="EShampoo"):
        optim.KFAC(attention)  # its output layer is called as a function
