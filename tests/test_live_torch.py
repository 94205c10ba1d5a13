"""Live operators of torch's optimizers: real steps are -lr P^(-1/2) M, from independent formulas.

M and the second moments are written as weighted sums over the whole history of gradients, in
float64, and never read from the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.tracking.optimizer_state.in_use import operator_in_use

STEPS = 5
SAME = 1e-11  # float64 recurrences against float64 sums
FLOAT32 = 1e-5  # the same of float32 parameters, of size 1, beside updates of size lr
FLOAT32_PRODUCT = 1e-9  # NAdam keeps the product of its mu, here about 0.01, in float32
SHAPES = [(4, 3), (3, 2, 2, 2), (5,), ()]

History = list[Tensor]


def decayed(history: History, beta: float, power: int = 1) -> Tensor:
    """sum_i (1 - beta) beta^(t - i) g_i^power."""
    t = len(history)
    terms = [(1 - beta) * beta ** (t - 1 - i) * g.pow(power) for i, g in enumerate(history)]
    return torch.stack(terms).sum(dim=0)


def adam_moment(history: History, beta1: float) -> Tensor:
    return decayed(history, beta1) / (1 - beta1 ** len(history))


def adam_denominator(history: History, beta2: float, eps: float) -> Tensor:
    return (decayed(history, beta2, 2) / (1 - beta2 ** len(history))).sqrt() + eps


def train(
    shape: tuple[int, ...],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    l2: float = 0.0,
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
) -> tuple[torch.optim.Optimizer, nn.Parameter, Tensor, History]:
    """Steps on random gradients; also the weights before the last one and what it saw."""
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    optimizer = make([weight])
    history: History = []
    before = weight.detach().clone()
    for step in range(steps):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5**step
        weight.grad = gradient.to(dtype)
        before = weight.detach().clone()
        history.append(weight.grad.double() + l2 * before.double())
        optimizer.step()
    return optimizer, weight, before.double(), history


def direction(optimizer: torch.optim.Optimizer, weight: nn.Parameter, moment: Tensor) -> Tensor:
    """P^(-1/2) M in the shape of the parameter."""
    operator: Any = operator_in_use(optimizer, weight)
    shape = weight.shape
    assert operator.shape == (shape[0] if shape else 1, math.prod(shape[1:]))
    taken: Tensor = operator.power(-0.5).apply(moment.reshape(operator.shape))
    return taken.reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("foreach", [False, True])
def test_adamw(shape: tuple[int, ...], foreach: bool) -> None:
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            params, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2, foreach=foreach
        )

    optimizer, weight, before, history = train(shape, make)
    expected = (1 - 0.1 * 0.2) * before - 0.1 * direction(
        optimizer, weight, adam_moment(history, 0.8)
    )
    torch.testing.assert_close(weight.detach(), expected, rtol=SAME, atol=SAME)
    dense = operator_in_use(optimizer, weight).diagonal().reshape(weight.shape)
    torch.testing.assert_close(dense, adam_denominator(history, 0.9, 1e-3) ** 2, rtol=SAME, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"maximize": True}, {"fused": True}, {"betas": (0.0, 0.5)}, {"weight_decay": 0.3}],
)
def test_adam(options: dict[str, Any]) -> None:
    kept: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3} | options
    optimizer, weight, before, history = train(
        (4, 3), lambda params: torch.optim.Adam(params, **kept), l2=kept.get("weight_decay", 0.0)
    )
    sign = 1 if "maximize" in options else -1
    step = direction(optimizer, weight, adam_moment(history, kept["betas"][0]))
    torch.testing.assert_close(weight.detach(), before + sign * 0.1 * step, rtol=SAME, atol=SAME)


def test_amsgrad_holds_the_largest_moment() -> None:
    optimizer, weight, before, history = train(
        (4, 3), lambda params: torch.optim.Adam(params, 0.1, (0.8, 0.5), 1e-3, amsgrad=True)
    )
    moments = [decayed(history[: t + 1], 0.5, 2) for t in range(STEPS)]
    largest = torch.stack(moments).amax(dim=0)
    assert not torch.equal(largest, moments[-1])  # the gradients shrink
    expected = ((largest / (1 - 0.5**STEPS)).sqrt() + 1e-3) ** 2
    got = operator_in_use(optimizer, weight)
    torch.testing.assert_close(got.diagonal(), expected, rtol=SAME, atol=0)
    step = direction(optimizer, weight, adam_moment(history, 0.8))
    torch.testing.assert_close(weight.detach(), before - 0.1 * step, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("shape", SHAPES)
def test_nadam_divides_its_mixture(shape: tuple[int, ...]) -> None:
    beta1, decay = 0.8, 4e-3
    optimizer, weight, before, history = train(
        shape, lambda params: torch.optim.NAdam(params, 0.1, (beta1, 0.9), 1e-3)
    )
    mu = [beta1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in range(1, STEPS + 2)]
    product = math.prod(mu[:-1])
    mixture = (1 - mu[-2]) / (1 - product) * history[-1] + mu[-1] / (
        1 - product * mu[-1]
    ) * decayed(history, beta1)
    got = operator_in_use(optimizer, weight).diagonal().reshape(shape)
    torch.testing.assert_close(got, adam_denominator(history, 0.9, 1e-3) ** 2, rtol=SAME, atol=0)
    step = direction(optimizer, weight, mixture)
    torch.testing.assert_close(weight.detach(), before - 0.1 * step, rtol=0, atol=FLOAT32_PRODUCT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop(shape: tuple[int, ...], centered: bool) -> None:
    optimizer, weight, before, history = train(
        shape,
        lambda params: torch.optim.RMSprop(
            params, lr=0.1, alpha=0.7, eps=1e-3, centered=centered, weight_decay=0.1
        ),
        l2=0.1,
    )
    variance = decayed(history, 0.7, 2) - (decayed(history, 0.7) ** 2 if centered else 0)
    got = operator_in_use(optimizer, weight).diagonal().reshape(shape)
    torch.testing.assert_close(got, (variance.sqrt() + 1e-3) ** 2, rtol=SAME, atol=SAME)
    step = direction(optimizer, weight, history[-1])
    torch.testing.assert_close(weight.detach(), before - 0.1 * step, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("shape", SHAPES)
def test_adagrad(shape: tuple[int, ...]) -> None:
    optimizer, weight, before, history = train(
        shape,
        lambda params: torch.optim.Adagrad(
            params, lr=0.1, lr_decay=0.2, eps=1e-3, initial_accumulator_value=0.3
        ),
    )
    total = 0.3 + torch.stack(history).square().sum(dim=0)
    got = operator_in_use(optimizer, weight).diagonal().reshape(shape)
    torch.testing.assert_close(got, (total.sqrt() + 1e-3) ** 2, rtol=SAME, atol=SAME)
    rate = 0.1 / (1 + (STEPS - 1) * 0.2)
    step = direction(optimizer, weight, history[-1])
    torch.testing.assert_close(weight.detach(), before - rate * step, rtol=SAME, atol=SAME)


def test_float32_parameters_agree_to_their_rounding() -> None:
    optimizer, weight, before, history = train(
        (6, 5), lambda params: torch.optim.AdamW(params, lr=0.1), dtype=torch.float32
    )
    step = direction(optimizer, weight, adam_moment(history, 0.9))
    expected = (1 - 0.1 * 0.01) * before - 0.1 * step
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=FLOAT32)


def test_an_epsilon_that_underflows_is_not_hidden() -> None:
    """1e-8 is 0 in float16: torch divides 0 by 0, and so there is no operator."""
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))
    optimizer = torch.optim.Adam([weight], foreach=False)
    weight.grad = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float16)
    optimizer.step()
    assert weight.isnan().any()
    with pytest.raises(UnsupportedError, match=r"divides by zero in 2 of 4.*raise eps"):
        operator_in_use(optimizer, weight)


CUBIC = (1.5, -0.5, 0.0)  # Newton-Schulz that converges


def test_muon_to_the_polar_factor() -> None:
    """With a polynomial that converges: Shampoo with beta2 = 0, and the polar factor."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = torch.optim.Muon([weight], ns_coefficients=CUBIC, ns_steps=60)
    momentum = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    optimizer.state[weight]["momentum_buffer"] = momentum
    operator = operator_in_use(optimizer, weight)
    assert isinstance(operator, KroneckerOperator)
    left, right = (
        torch.from_numpy(scipy.linalg.sqrtm(gram.numpy()))
        for gram in (momentum @ momentum.T, momentum.T @ momentum)
    )
    torch.testing.assert_close(operator.to_dense(), torch.kron(left, right), rtol=SAME, atol=SAME)
    u, _, vt = torch.linalg.svd(momentum)
    torch.testing.assert_close(operator.power(-0.5).apply(momentum), u @ vt, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("rank", [2, 4])
def test_muon_is_its_own_polynomial(shape: tuple[int, int], rank: int) -> None:
    """P^(-1/2) B is the quintic iteration on B itself, of any rank, to float64 rounding."""
    generator = torch.Generator().manual_seed(rank)
    factors = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape]
    momentum = factors[0] @ factors[1].T
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = torch.optim.Muon([weight])
    optimizer.state[weight]["momentum_buffer"] = momentum
    iterate = momentum / momentum.norm()
    for _ in range(5):
        gram = iterate @ iterate.T
        iterate = 3.4445 * iterate + (-4.7750 * gram + 2.0315 * gram @ gram) @ iterate
    operator: Any = operator_in_use(optimizer, weight)
    got = operator.power(-0.5).apply(momentum)
    torch.testing.assert_close(got, iterate, rtol=0, atol=1e-10)
    assert float(torch.linalg.eigvalsh(operator.to_dense())[0]) > 0


def test_a_step_of_muon() -> None:
    """torch iterates in bfloat16: 3 digits of each product, five times three products."""
    optimizer, weight, before, history = train(
        (8, 6),
        lambda params: torch.optim.Muon(params, lr=0.1, momentum=0.6, nesterov=False),
        dtype=torch.float64,
    )
    step = direction(optimizer, weight, decayed(history, 0.6))
    taken = ((1 - 0.1 * 0.1) * before - weight.detach()) / (0.1 * math.sqrt(8 / 6))
    assert float((taken - step).norm() / step.norm()) < 0.05


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({}, "no state for this parameter yet"),
        ({"momentum_buffer": torch.zeros(3, 2)}, "is zero"),
        ({"momentum_buffer": torch.full((3, 2), math.nan)}, "a NaN or an infinity"),
        ({"momentum_buffer": torch.ones(2, 3)}, r"is \[2, 3\], where \[3, 2\]"),
    ],
)
def test_muon_without_a_polar_factor(state: dict[str, Tensor], told: str) -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.Muon([weight])
    optimizer.state[weight].update(state)
    with pytest.raises(UnsupportedError, match=told):
        operator_in_use(optimizer, weight)


def test_muon_with_a_polynomial_that_turns_the_sign() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.Muon([weight], ns_coefficients=(1.0, -9.0, 0.0), ns_steps=1)
    optimizer.state[weight]["momentum_buffer"] = torch.eye(3)[:, :2]
    with pytest.raises(UnsupportedError, match="not positive"):
        operator_in_use(optimizer, weight)


def stepped_adam(**options: Any) -> tuple[torch.optim.Adam, nn.Parameter]:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([weight], **options)
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    return optimizer, weight


class OwnStep(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Inherited(torch.optim.Adam):
    pass


def test_a_derived_class_is_known_by_its_step() -> None:
    for kind, known in ((OwnStep, False), (Inherited, True)):
        weight = nn.Parameter(torch.ones(3, 2))
        optimizer = kind([weight])
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the step of the instance
        weight.grad = torch.ones(3, 2)
        optimizer.step()
        if known:
            assert isinstance(operator_in_use(optimizer, weight), DiagonalOperator)
        else:
            with pytest.raises(UnsupportedError, match="OwnStep has no operator"):
                operator_in_use(optimizer, weight)


class Wrapper(torch.optim.Optimizer):
    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optim = inner
        super().__init__(inner.param_groups, {})


def test_a_wrapper_names_what_it_wraps() -> None:
    optimizer, weight = stepped_adam()
    with pytest.raises(UnsupportedError, match=r"wraps a Adam; give that one \(its \.optim\)"):
        operator_in_use(Wrapper(optimizer), weight)


class Sharded(Tensor):
    pass


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.clear(), "no state for this parameter yet"),
        (lambda state: state.pop("step"), "no step count"),
        (lambda state: state.update(step=torch.tensor(0.0)), "no step with this parameter yet"),
        (lambda state: state.update(step=torch.tensor(math.nan)), "step count nan"),
        (lambda state: state.pop("exp_avg_sq"), 'holds no "exp_avg_sq"'),
        (lambda state: state["exp_avg_sq"].fill_(math.nan), "a NaN or an infinity"),
        (lambda state: state["exp_avg_sq"].fill_(-1), "negative"),
        (lambda state: state.update(exp_avg_sq=torch.ones(2, 3)), r"is \[2, 3\]"),
        (lambda state: state.update(exp_avg_sq=torch.ones(3, 2).int()), "int32"),
        (lambda state: state.update(exp_avg_sq=[1.0]), "is a list, not a plain tensor"),
        (
            lambda state: state.update(exp_avg_sq=torch.ones(3, 2).as_subclass(Sharded)),
            "is a Sharded, not a plain tensor",
        ),
        (lambda state: state.update(step="five"), "could not be read: ValueError"),
    ],
)
def test_a_damaged_state_is_refused(change: Callable[[dict[str, Any]], object], told: str) -> None:
    optimizer, weight = stepped_adam()
    assert operator_in_use(optimizer, weight).shape == (3, 2)
    change(optimizer.state[weight])
    with pytest.raises(UnsupportedError, match=told):
        operator_in_use(optimizer, weight)


def test_a_foreign_parameter_and_a_complex_one_are_refused() -> None:
    optimizer, _ = stepped_adam()
    with pytest.raises(UnsupportedError, match=r"\[3, 2\] is not a parameter of this Adam"):
        operator_in_use(optimizer, nn.Parameter(torch.ones(3, 2)))
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match="complex64"):
        operator_in_use(torch.optim.Adam([weight]), weight)


def test_a_centered_moment_below_zero_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.RMSprop([weight], centered=True)
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    optimizer.state[weight]["grad_avg"].fill_(2)
    with pytest.raises(UnsupportedError, match="negative in 6 entries"):
        operator_in_use(optimizer, weight)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adamax, torch.optim.RAdam])
def test_other_optimizers_are_named(kind: type[torch.optim.Optimizer]) -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = kind([weight], lr=0.1)  # type: ignore[call-arg]
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    with pytest.raises(
        UnsupportedError, match=f"{kind.__name__} has no operator.*no reader.*register"
    ):
        operator_in_use(optimizer, weight)
