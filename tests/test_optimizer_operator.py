"""``optimizer.operator``: what it says the optimizer holds, and why there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.optim.preconditioners import base as preconditioner
from tests.optimizer_cases import PRESETS, SHAPES, break_eigh, step_of

# Roots of matrices of condition number up to 1e4 in float64
FLOAT64 = 1e-11
NO_GRAFT = {"grafting": "none"}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("exponent", [None, -0.5, -0.1])
@pytest.mark.parametrize("max_dim", [1024, 4, 1])
@pytest.mark.parametrize("accumulate", ["average", "sum"])
def test_the_operator_reproduces_the_applied_direction(
    shape: tuple[int, ...], exponent: float | None, max_dim: int, accumulate: str
) -> None:
    rng = np.random.default_rng(4)
    gradients = [torch.tensor(rng.standard_normal(shape)) for _ in range(8)]
    change, optimizer, param = step_of(  # refreshed at 3 and 6: stale by two steps
        gradients,
        betas=(0.0, 0.9),
        epsilon=1e-3,
        spectrum={"exponent": exponent},
        shapes={"max_dim": max_dim},
        statistics={"accumulate": accumulate},
        magnitude=NO_GRAFT,
        basis={"frequency": 3},
    )
    operator = optimizer.operator(param)
    matrix = gradients[-1].reshape(operator.shape)
    applied = operator.power(-0.5).apply(matrix)
    torch.testing.assert_close(-change.reshape(operator.shape), applied, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"muon", "shampoo"}))
def test_the_operator_of_every_preset_is_what_it_applies(
    name: str, shape: tuple[int, ...], block_size: int | None
) -> None:
    rng = np.random.default_rng(4)
    gradients = [torch.tensor(rng.standard_normal(shape)) for _ in range(23)]
    options: dict[str, Any] = {"shapes": {"block_size": block_size}}
    if "inverse-free" not in name:
        options["basis"] = {"frequency": 3}
    if "root-free" not in name and "inverse-free" not in name:
        options |= {"betas": (0.0, 0.9)}
    if "free" in name:
        options |= {"momentum": 0.0}
    change, optimizer, param = step_of(gradients, preset=PRESETS[name], **options)
    operator = optimizer.operator(param)
    power = optimizer.param_groups[0]["spectrum"].power
    matrix = gradients[-1].reshape(operator.shape)
    applied = operator.power(-power).apply(matrix)
    # factors damped by 1e-6 of the largest eigenvalue, inverted and raised twice
    torch.testing.assert_close(-change.reshape(operator.shape), applied, rtol=1e-8, atol=1e-8)


def test_the_operator_of_muon_has_the_polar_factor_for_its_direction() -> None:
    rng = np.random.default_rng(4)
    gradients = [torch.tensor(rng.standard_normal((4, 4))) for _ in range(5)]
    change, optimizer, param = step_of(
        gradients, preset=optim.Muon, nesterov=False, spectrum={"root": "eigh"}
    )
    average = optimizer.state[param]["momentum"][0]
    applied = optimizer.operator(param).power(-0.5).apply(average)
    torch.testing.assert_close(-change, applied, rtol=1e-8, atol=1e-8)


def test_the_operator_holds_the_root_of_the_stale_damped_factors() -> None:
    rng = np.random.default_rng(5)
    gradients = [torch.tensor(rng.standard_normal((4, 3))) for _ in range(7)]
    _, optimizer, param = step_of(gradients, betas=(0.5, 0.9), epsilon=1e-2, basis={"frequency": 5})
    weights = np.array([0.9**k for k in range(4, -1, -1)])
    weights = weights / weights.sum()  # the bias-corrected EMA of the first five gradients
    G = np.stack([gradient.numpy() for gradient in gradients[:5]])
    L = np.einsum("i,iab,icb->ac", weights, G, G) + 1e-2 * np.eye(4)
    R = np.einsum("i,iab,iac->bc", weights, G, G) + 1e-2 * np.eye(3)
    operator = optimizer.operator(param)
    expected = np.kron(scipy.linalg.sqrtm(L), scipy.linalg.sqrtm(R))
    assert np.abs(operator.to_dense().numpy() - expected).max() < FLOAT64


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_a_float32_operator_with_null_directions_stays_finite(epsilon: float) -> None:
    G = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 5.0)) * 1e-2
    change, optimizer, param = step_of(
        [G, G],
        torch.float32,
        epsilon=epsilon,
        betas=(0.0, 0.9),
        magnitude=NO_GRAFT,
        basis={"frequency": 1},
    )
    applied = optimizer.operator(param).power(-0.5).apply(G)
    torch.testing.assert_close(-change, applied, rtol=1e-3, atol=1e-3)


def test_an_absent_operator_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(()))]
    optimizer = optim.Shampoo([("weight", params[0]), ("bias", params[1])])
    for param, name in zip(params, ("weight", "bias"), strict=True):
        with pytest.raises(UnsupportedError, match=f"no step was taken.*'{name}'"):
            optimizer.operator(param)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param, name in zip(params, ("weight", "bias"), strict=True):
        text = f"first refresh is at step 10, 3 steps were taken.*'{name}'"
        with pytest.raises(UnsupportedError, match=text):
            optimizer.operator(param)
    with pytest.raises(InvalidInputError, match=r"\[3, 2\] is not a parameter"):
        optimizer.operator(torch.zeros(3, 2))
    break_eigh(monkeypatch, 5)
    with pytest.warns(RuntimeWarning):
        _, optimizer, param = step_of([torch.ones(5, 4)], basis={"frequency": 1})
    with pytest.raises(UnsupportedError, match=r"no refresh of parameter 0.* in 1 steps"):
        optimizer.operator(param)


@pytest.mark.parametrize("name", ["shampoo", "eshampoo", "kl-shampoo", "inverse-free-shampoo"])
def test_a_long_side_without_a_factor_is_the_identity_if_it_fits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.nn.Parameter(torch.zeros(2, 30))
    wide.grad = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    basis = None if "inverse" in name else {"start": 1}
    optimizer = PRESETS[name]([wide], basis=basis, shapes={"max_dim": 2})
    optimizer.step()
    operator = optimizer.operator(wide)
    right = operator.right_basis if name == "eshampoo" else operator.right
    assert right.equal(torch.eye(30, dtype=torch.float64))
    monkeypatch.setattr(preconditioner, "available_bytes", lambda _: 1000)
    with pytest.raises(UnsupportedError, match=r"identity, is \[30, 30\].*shapes.max_dim"):
        optimizer.operator(wide)


def test_an_unresolved_operator_is_refused() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([1e9, 1e9, 0.0])
    optimizer = optim.Shampoo([param], basis={"start": 1}, epsilon=1e-12)
    optimizer.step()
    text = r"not resolved in torch.float32.*Raise spectrum\.epsilon"
    with pytest.raises(UnsupportedError, match=text):
        optimizer.operator(param)


def test_blocks_that_are_no_rectangles_of_the_matrix_have_no_operator() -> None:
    for shape, shapes in [((4, 2, 3, 5), {"merge": 6, "block_size": 3}), ((2, 3, 5), {"merge": 6})]:
        param = torch.nn.Parameter(torch.ones(shape))
        param.grad = torch.ones(shape)
        optimizer = optim.Shampoo([param], basis={"start": 1}, shapes=shapes)
        optimizer.step()
        with pytest.raises(UnsupportedError, match=r"use shapes\.merge=0"):
            optimizer.operator(param)


def test_what_is_divided_by_a_tiny_number_is_not_null() -> None:
    """Second moments of 1 and 1e-14: the same steps of Adam, in whatever basis."""
    gradient = torch.diag(torch.tensor([1.0, 1e-7], dtype=torch.float64))
    change, optimizer, param = step_of(
        [gradient], preset=optim.EShampoo, betas=(0.0, 0.9), epsilon=1e-14
    )
    applied = optimizer.operator(param).power(-0.5).apply(gradient)
    torch.testing.assert_close(-change, applied, rtol=1e-6, atol=0)
    torch.testing.assert_close(applied.abs().diagonal(), torch.ones(2, dtype=torch.float64))
