"""Factors in bfloat16 and packed roots: what is held changes, what is computed hardly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.optim.blocks.contractions import PANELLED, completed, packed
from kronecker_probe.tracking.optimizer_state.factors import factor_rows
from tests.grid import some
from tests.optimizer_cases import PRESETS

# Products in another order of operations
FLOAT64 = 1e-11
# The same through powers -4 of float64 roots
CONDITIONED = 1e-9
# bfloat16's spacing; see test_rounding for what becomes of it in an average
STEP = 2.0**-7
SHAPE = (PANELLED + 2, 100)  # one side is packed, the other is not
LEAN = {"factors": "bfloat16", "roots": "packed"}
EVERY = {"frequency": 2, "start": 2}  # factors of full rank: a null space has any basis

# Presets with factors, and those with roots of them
FACTORED = [name for name in PRESETS if name not in ("inverse-free-shampoo", "muon")]
ROOTED = ["shampoo", "shampoo-squared", "kl-shampoo", "root-free-shampoo"]


def trained(
    name: str, steps: int, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Parameter, optim.KroneckerOptimizer]:
    param = nn.Parameter(torch.zeros(SHAPE, dtype=dtype))
    optimizer = PRESETS[name]([param], lr=1e-2, **options)
    go_on(param, optimizer, 0, steps)
    return param, optimizer


def go_on(param: nn.Parameter, optimizer: Any, start: int, stop: int) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        param.grad = (gradient * torch.linspace(1, 3, SHAPE[1])).to(param.dtype)
        optimizer.step()


def relative(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.norm((found - expected).detach())
    return float(difference / torch.linalg.norm(expected.detach()))


@pytest.mark.parametrize("size", [1, PANELLED - 1, PANELLED, 2 * PANELLED + 37])
def test_a_symmetric_matrix_is_packed_without_loss(size: int) -> None:
    square = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    symmetric = square + square.mT
    assert torch.equal(completed(packed(symmetric), size), symmetric)


@pytest.mark.parametrize("name", ROOTED)
@pytest.mark.parametrize("options", [{}, {"basis": {**EVERY, "tolerance": 0.1}}])
def test_packed_roots_take_the_same_steps(name: str, options: dict[str, Any]) -> None:
    options = {"basis": EVERY, **options}
    full, first = trained(name, 9, **options)
    half, second = trained(name, 9, storage={"roots": "packed"}, **options)
    assert relative(half, full) < FLOAT64
    held, expected = second.state[half]["root_0"], first.state[full]["root_0"]
    assert held.numel() < 0.8 * expected.numel()
    X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (o.operator(p).apply(X) for o, p in ((first, full), (second, half)))
    assert relative(other, one) < CONDITIONED


@pytest.mark.parametrize("root", ["newton", "matmul"])
def test_packed_roots_of_products_take_the_same_steps(root: str) -> None:
    options: dict[str, Any] = {"spectrum": {"root": root, "epsilon": 1e-2}, "basis": EVERY}
    full, _ = trained("shampoo", 6, torch.float32, **options)
    half, _ = trained("shampoo", 6, torch.float32, storage={"roots": "packed"}, **options)
    assert relative(half, full) < 1e-5


@pytest.mark.parametrize("name", [n for n in FACTORED if "rmsprop" not in n and "ada" not in n])
@pytest.mark.parametrize("dtype", some([torch.float32, torch.float64], torch.float32), ids=str)
def test_factors_in_bfloat16_are_those_in_full_to_its_precision(
    name: str, dtype: torch.dtype
) -> None:
    wide, first = trained(name, 40, dtype, basis=EVERY)
    half, second = trained(name, 40, dtype, basis=EVERY, storage={"factors": "bfloat16"})
    for a, b in zip(first.inspect(wide).factors, second.inspect(half).factors, strict=True):
        assert 0 < relative(b.factor, a.factor) < 3 * STEP
    assert second.state[half]["factor_0"].dtype == torch.bfloat16
    assert {f.dtype for f in second.inspect(half).factors} == {torch.bfloat16}
    assert second.inspect(half).factors[0].factor.dtype == dtype
    assert 0 < relative(half, wide) < 0.2  # columns of a basis that are close turn


def test_kfac_holds_its_factors_in_bfloat16_too() -> None:
    def run(**options: Any) -> tuple[optim.KroneckerOptimizer, Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = optim.KFAC(model, lr=0.0, betas=(0.0, 0.9), **options)
        for step in range(40):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(16, 5, generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), torch.arange(16) % 3).backward()
            optimizer.step()
        return optimizer, model.weight

    (first, a), (second, b) = run(), run(storage={"factors": "bfloat16"})
    for x, y in zip(first.inspect(a).factors, second.inspect(b).factors, strict=True):
        assert 0 < relative(y.factor, x.factor) < 2 * STEP


@pytest.mark.parametrize("name", ROOTED)
def test_a_lean_run_continues_bitwise_from_a_file(name: str) -> None:
    whole, optimizer = trained(name, 5, torch.float32, basis=EVERY, storage=LEAN)
    state = copy.deepcopy(optimizer.state_dict())
    again = nn.Parameter(whole.detach().clone())
    resumed = optim.KroneckerOptimizer([again], lr=1.0)
    resumed.load_state_dict(state)
    assert resumed.state[again]["factor_0"].dtype == torch.bfloat16
    go_on(whole, optimizer, 5, 11)
    go_on(again, resumed, 5, 11)
    assert torch.equal(whole, again)
    for key, value in optimizer.state[whole].items():
        same = resumed.state[again][key]
        assert torch.equal(value, same) if isinstance(value, Tensor) else value == same


def test_the_probe_sees_the_floor_of_what_is_held() -> None:
    """Eigenvalues below the rounding of bfloat16 have no correct digit, in whatever dtype used."""
    param = nn.Parameter(torch.zeros(8, 8))
    spectrum = torch.logspace(0, -6, 8)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    under: dict[str, float] = {}
    for held in ("full", "bfloat16"):
        optimizer = optim.Shampoo([param], lr=0.0, storage={"factors": held})
        for _ in range(30):
            param.grad = basis * spectrum.sqrt() @ basis.T
            optimizer.step()
        rows = factor_rows(optimizer.inspect(param).factors)
        under[held] = next(row["value"] for row in rows if row["metric"] == "factor_under_floor")
    assert under["full"] == 0.0
    assert under["bfloat16"] > 0.4


@pytest.mark.parametrize(
    ("name", "storage", "words"),
    [
        (
            "soap",
            {"roots": "packed"},
            "storage.roots='packed' .* spectrum.eigenvalues='kronecker'",
        ),
        ("muon", {"roots": "packed"}, "storage.roots='packed' has no effect"),
        (
            "muon",
            {"factors": "bfloat16"},
            "'bfloat16' has no effect.*'kronecker' or 'corrected'",
        ),
        ("inverse-free-shampoo", {"factors": "bfloat16"}, "use inverse.precision='bfloat16'"),
    ],
)
def test_storage_of_what_is_not_there_is_refused(
    name: str, storage: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        PRESETS[name]([nn.Parameter(torch.zeros(3, 2))], storage=storage)


def test_unknown_storage_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"storage\.factors"):
        optim.Shampoo([nn.Parameter(torch.zeros(3, 2))], storage={"factors": "float8"})


def test_storage_is_for_good_once_there_is_a_state() -> None:
    param, optimizer = trained("shampoo", 1)
    optimizer.param_groups[0]["storage"] = optim.Storage(factors="bfloat16")
    param.grad = torch.ones(SHAPE, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=r"storage\.factors .* was 'full'"):
        optimizer.step()
