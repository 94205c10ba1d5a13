"""Live operators of SOAP, from states made by hand, against dense matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.structures.diagonal import DiagonalOperator
from kronecker_probe.operators.structures.eigen import EigenOperator
from kronecker_probe.tracking.optimizer_state import soap
from kronecker_probe.tracking.optimizer_state.in_use import operator_in_use

SAME = 1e-12  # the same float64 products in another order
EPS, BETA2, STEP = 1e-2, 0.9, 3
CORRECTION = 1 - BETA2**STEP
M, N = 4, 3


class Soap(torch.optim.Optimizer):
    """Holds a state laid out like SOAP's; it never steps."""

    def __init__(self, weight: nn.Parameter, state: dict[str, Any], **group: Any) -> None:
        super().__init__([weight], {"lr": 0.1, "betas": (0.8, BETA2), "eps": EPS} | group)
        self.state[weight].update(state)


def orthonormal(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    basis: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    return basis


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).double()


def moments(shape: tuple[int, ...] = (M, N)) -> dict[str, Any]:
    return {"step": STEP, "exp_avg": random(*shape), "exp_avg_sq": random(*shape).square()}


def authors(state: dict[str, Any], shape: tuple[int, ...] = (M, N), **group: Any) -> Soap:
    options = {"correct_bias": True, "max_precond_dim": 10000, "precondition_frequency": 10}
    return Soap(nn.Parameter(torch.zeros(shape).double()), state, **(options | group))


def factors() -> dict[str, Any]:
    return {"GG": [torch.eye(M), torch.eye(N)], "Q": [orthonormal(M), orthonormal(N)]}


def read(optimizer: Soap) -> Any:
    return operator_in_use(optimizer, optimizer.param_groups[0]["params"][0])


def check_divides(
    optimizer: Soap,
    bases: Sequence[Tensor],
    denominator: Tensor,
    kind: type[DiagonalOperator | EigenOperator] = EigenOperator,
) -> None:
    """P^(-1/2) M = Q_L ((Q_L^T M Q_R) / d) Q_R^T, and P itself densely."""
    operator = read(optimizer)
    assert isinstance(operator, kind)
    left, right = bases
    matrix = random(M, N).roll(1, 0)
    expected = left @ ((left.T @ matrix @ right) / denominator) @ right.T
    got = operator.power(-0.5).apply(matrix)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME * float(expected.abs().max()))
    basis = torch.kron(left.contiguous(), right.contiguous())
    dense = basis @ torch.diag(denominator.flatten() ** 2) @ basis.T
    torch.testing.assert_close(operator.to_dense(), dense, rtol=0, atol=SAME * float(dense.max()))


@pytest.mark.parametrize("statistics", [True, False])
def test_the_authors_layout_without_bias_correction(statistics: bool) -> None:
    held = factors()
    if not statistics:
        del held["GG"]
    optimizer = authors(moments() | held, correct_bias=False)
    denominator = moments()["exp_avg_sq"].sqrt() + EPS
    check_divides(optimizer, held["Q"], denominator)


@pytest.mark.parametrize("limit", ["max_precond_dim", "max_precondition_dim"])
def test_the_authors_convention_corrects_epsilon_too(limit: str) -> None:
    """Step size lr sqrt(1 - beta2^t) / (1 - beta1^t) on M / (sqrt(v) + eps)."""
    held = factors()
    weight = nn.Parameter(torch.zeros(M, N).double())
    optimizer = Soap(weight, moments() | held, correct_bias=True, **{limit: 100})
    denominator = (moments()["exp_avg_sq"].sqrt() + EPS) / math.sqrt(CORRECTION)
    check_divides(optimizer, held["Q"], denominator)


def test_pytorch_optimizer_counts_steps_in_the_group() -> None:
    held = moments() | factors()
    del held["step"]
    weight = nn.Parameter(torch.zeros(M, N).double())
    optimizer = Soap(weight, held, correct_bias=True, max_precondition_dim=100, step=STEP)
    denominator = (moments()["exp_avg_sq"].sqrt() + EPS) / math.sqrt(CORRECTION)
    check_divides(optimizer, held["Q"], denominator)


@pytest.mark.parametrize("sides", [True, False])
@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("where", ["group", "attribute"])
def test_emerging_optimizers(sides: bool, corrects: bool, where: str) -> None:
    """Both of its layouts, with the options in the group (older) or on the optimizer."""
    held = factors()
    left, right = held["Q"]
    if sides:
        held = {"L": held["GG"][0], "R": held["GG"][1], "Q_L": left, "Q_R": right}
    options = {"correct_bias": corrects, "max_update_rms": 0.0}
    weight = nn.Parameter(torch.zeros(M, N).double())
    optimizer = Soap(weight, moments() | held, **(options if where == "group" else {}))
    if where == "attribute":
        vars(optimizer).update(options)
    moment = moments()["exp_avg_sq"] / (CORRECTION if corrects else 1.0)
    check_divides(optimizer, [left, right], moment.sqrt() + EPS)


@pytest.mark.parametrize("none", [[], None, torch.empty(0)])
@pytest.mark.parametrize("side", [0, 1])
def test_a_side_without_a_basis_is_the_identity(none: Any, side: int) -> None:
    held = factors()
    held["Q"][side] = none
    bases = [torch.eye(M).double(), torch.eye(N).double()]
    bases[1 - side] = held["Q"][1 - side]
    denominator = moments()["exp_avg_sq"].sqrt() + EPS
    check_divides(authors(moments() | held, correct_bias=False), bases, denominator)


def test_without_any_basis_it_is_adam() -> None:
    held: dict[str, Any] = {"GG": [[], []], "Q": [[], []]}
    denominator = moments()["exp_avg_sq"].sqrt() + EPS
    check_divides(
        authors(moments() | held, correct_bias=False),
        [torch.eye(M).double(), torch.eye(N).double()],
        denominator,
        DiagonalOperator,
    )


@pytest.mark.parametrize("shape", [(5,), (3, 2, 2, 2)])
def test_vectors_and_tensors_without_a_basis_are_adam_too(shape: tuple[int, ...]) -> None:
    optimizer = authors(moments(shape) | {"Q": [[]] * len(shape)}, shape, correct_bias=False)
    expected = (moments(shape)["exp_avg_sq"].sqrt() + EPS) ** 2
    torch.testing.assert_close(
        read(optimizer).diagonal(), expected.reshape(shape[0], -1), rtol=SAME, atol=0
    )


def test_float32_bases_are_orthonormal_enough() -> None:
    held = factors()
    held["Q"] = [basis.float() for basis in held["Q"]]
    assert isinstance(read(authors(moments() | held)), EigenOperator)


REFUSED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda state: state.update(Q=None), "no eigenbasis for this parameter yet"),
    (lambda state: state.update(step=0), "no step with this parameter yet"),
    (lambda state: state.pop("step"), "no step count"),
    (lambda state: state["exp_avg_sq"].zero_(), "second moment of Soap is zero"),
    (lambda state: state["exp_avg_sq"].neg_(), "negative"),
    (lambda state: state["exp_avg_sq"].fill_(math.nan), "a NaN or an infinity"),
    (lambda state: state.update(exp_avg_sq=torch.ones(2, 2, 3)), r"is \[2, 2, 3\]"),
    (lambda state: state["Q"][0].fill_(math.nan), "eigenbasis.*a NaN or an infinity"),
    (lambda state: state["Q"][1].mul_(1.01), r"\[3, 3\].*not orthonormal"),
    (lambda state: state["Q"].reverse(), r"is \[3, 3\], where \[4, 4\]"),
    (lambda state: state.update(Q=torch.eye(4)), '"Q" that Soap holds is a Tensor'),
    (lambda state: state.update(Q=[orthonormal(M * N)]), "holds 1 bases"),
    (lambda state: state.update(Q=[orthonormal(4)[None], orthonormal(3)]), r"is \[1, 4, 4\]"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED)
def test_a_state_that_is_not_understood_is_refused(
    change: Callable[[dict[str, Any]], object], told: str
) -> None:
    state = moments() | factors()
    assert isinstance(read(authors(state)), EigenOperator)
    change(state)
    with pytest.raises(UnsupportedError, match=told):
        read(authors(state))


@pytest.mark.parametrize(
    "group",
    [
        {},
        {"correct_bias": True},
        {"correct_bias": "yes", "max_precond_dim": 9},
        {"correct_bias": True, "max_precond_dim": 9, "warmup_steps": 1},
        {"correct_bias": None, "max_update_rms": 0.0},
    ],
)
def test_another_convention_is_refused(group: dict[str, Any]) -> None:
    """The same state under other options is divided otherwise: no guess is made."""
    optimizer = Soap(nn.Parameter(torch.zeros(M, N)), moments() | factors(), **group)
    with pytest.raises(UnsupportedError, match="not the options of"):
        read(optimizer)


def test_one_side_missing_is_refused() -> None:
    held = moments() | {"Q_L": orthonormal(M)}
    with pytest.raises(UnsupportedError, match='"Q_L" without "Q_R"'):
        read(authors(held))


def test_a_convolution_with_bases_is_refused() -> None:
    shape = (3, 2, 2, 2)
    bases = [orthonormal(size) for size in shape]
    with pytest.raises(UnsupportedError, match=r"holds 4 bases.*\[3, 2, 2, 2\]"):
        read(authors(moments(shape) | {"Q": bases}, shape))


def test_a_parameter_without_state_beside_one_with_it() -> None:
    """It is known as SOAP by the others, and the reason is that this one is not there yet."""
    weight, other = nn.Parameter(torch.zeros(M, N)), nn.Parameter(torch.zeros(M, N))
    optimizer = Soap(weight, moments() | factors(), correct_bias=True, max_precond_dim=9)
    optimizer.add_param_group({"params": [other]})
    with pytest.raises(UnsupportedError, match="no state for this parameter yet"):
        operator_in_use(optimizer, other)
    optimizer.state[other].update(moments())
    with pytest.raises(UnsupportedError, match="no eigenbasis for this parameter yet"):
        operator_in_use(optimizer, other)


def test_an_identity_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soap, "available_bytes", lambda device: 100.0)
    held = factors()
    held["Q"][0] = []
    with pytest.raises(UnsupportedError, match="a side of 4 without a basis"):
        read(authors(moments() | held))
