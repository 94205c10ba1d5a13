"""Factor health: constructed spectra, where every number is known in closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.quality.metrics.factor_health import factor_health

F32, F64 = (float(torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64))
EXACT = 1e-12  # float64 spectra, read back from a rotated matrix; relative to the largest


def rotated(spectrum: list[float], seed: int = 0) -> Tensor:
    """Q diag(spectrum) Q^T with a random orthogonal Q, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix: Tensor = (basis * torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
    return matrix


def test_every_number_of_a_deficient_factor() -> None:
    epsilon = 1e-6
    health = factor_health(rotated([8.0, 4.0, 2.0, 0.0, 0.0]), epsilon, exponent=-0.5)
    assert health.size == 5
    assert health.largest == pytest.approx(8, rel=EXACT)
    assert health.relative_floor == 5 * F64
    assert health.numerical_rank == 3
    assert health.stable_rank == pytest.approx((64 + 16 + 4) / 64, rel=EXACT)
    assert health.below_floor_share == 0.4
    assert health.amplification == pytest.approx(math.sqrt((4 + epsilon) / epsilon), rel=EXACT)
    assert health.suggested_relative_epsilon == pytest.approx(2 / 8, rel=EXACT)
    assert health.suggested_relative_cutoff == health.relative_floor


def test_the_floor_is_that_of_the_dtype_of_the_run() -> None:
    matrix = rotated([1.0, 0.5, 1e-10])
    assert factor_health(matrix, 0.0).numerical_rank == 3
    assert factor_health(matrix, 0.0, dtype=torch.float32).numerical_rank == 2
    assert factor_health(matrix, 0.0, dtype=torch.float32).relative_floor == 3 * F32


def test_a_bfloat16_factor_has_the_floor_of_its_storage() -> None:
    """The eigenvalues of a stored matrix move by at most the norm of the rounding (Weyl)."""
    spectrum = [1.0, 0.5, 0.25] + [1e-5] * 37
    matrix = rotated(spectrum)
    health = factor_health(matrix.bfloat16(), 1e-8)
    moved = torch.linalg.eigvalsh(matrix.bfloat16().double()) - torch.linalg.eigvalsh(matrix)
    assert 40 * F32 < float(moved.abs().max()) <= health.relative_floor * health.largest
    assert health.relative_floor == pytest.approx(2**-8 * math.sqrt(1.3125), rel=0.01)
    assert health.numerical_rank == 3
    assert factor_health(matrix.float(), 1e-8).numerical_rank == 40


def test_a_resolved_factor_amplifies_nothing() -> None:
    health = factor_health(rotated([3.0, 2.0, 1.0]), 0.0)
    assert (health.numerical_rank, health.below_floor_share, health.amplification) == (3, 0.0, 1.0)
    assert health.suggested_relative_epsilon == health.relative_floor


def test_without_epsilon_unresolved_directions_are_amplified_without_bound() -> None:
    assert factor_health(rotated([3.0, 2.0, 0.0]), 0.0).amplification == math.inf


def test_a_zero_factor_has_no_rank() -> None:
    health = factor_health(torch.zeros(4, 4), 1e-8)
    assert (health.largest, health.numerical_rank, health.stable_rank) == (0.0, 0, 0.0)
    assert (health.below_floor_share, health.amplification) == (1.0, 1.0)
    assert all(math.isfinite(value) for value in dataclasses.astuple(health))


@settings(max_examples=25, deadline=None)
@given(
    resolved=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6),
    null=st.integers(1, 6),
    exponent=st.sampled_from([-0.25, -0.5, -1.0]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_the_suggestion_keeps_what_it_says(
    resolved: list[float], null: int, exponent: float, scale: float
) -> None:
    """Dense roots at the suggested epsilon; and no number but the largest depends on the scale."""
    matrix = scale * rotated(sorted(resolved, reverse=True) + [0.0] * null)
    health = factor_health(matrix, scale * 1e-3, exponent=exponent)
    assert health.numerical_rank == len(resolved)
    epsilon = health.suggested_relative_epsilon * health.largest
    root = torch.linalg.eigvalsh(matrix).clamp_min(0).add(epsilon).pow(exponent)
    gain = float(root[0] / root[null])  # ascending: a null one over the least resolved
    assert gain == pytest.approx(2**-exponent, rel=1e-9)
    unscaled = factor_health(matrix / scale, 1e-3, exponent=exponent)
    assert dataclasses.astuple(unscaled)[2:] == pytest.approx(
        dataclasses.astuple(health)[2:], rel=1e-9
    )


def test_the_rounding_of_a_long_average_raises_the_floor_and_is_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.zeros(10, 10)
    for step in range(6000):  # gradients in 9 dimensions that shrink a thousandfold
        rows = torch.randn(10, 3, generator=generator) * 10 ** (-3 * min(1.0, step / 1000))
        rows = rows - rows.mean(0)
        factor.mul_(0.999).add_(rows @ rows.T, alpha=0.001)
    values = torch.linalg.eigvalsh(factor.double())
    noise = float(-values[0] / values[-1])
    assert noise > 10 * torch.finfo(torch.float32).eps  # more than a decomposition's
    health = factor_health(factor, 0.0)
    assert health.relative_floor == pytest.approx(noise)
    assert health.numerical_rank == 9


@pytest.mark.parametrize(
    ("matrix", "options", "error", "told"),
    [
        (torch.eye(3), {"epsilon": -1.0}, InvalidInputError, "epsilon=-1"),
        (torch.eye(3), {"epsilon": math.nan}, InvalidInputError, "epsilon=nan"),
        (torch.eye(3), {"epsilon": 0.0, "exponent": 0.5}, InvalidInputError, "exponent=0.5"),
        (torch.ones(3, 2), {"epsilon": 0.0}, InvalidInputError, r"got \[3, 2\]"),
        (torch.ones(0, 0), {"epsilon": 0.0}, InvalidInputError, r"got \[0, 0\]"),
        (torch.diag(torch.tensor([1.0, -0.1])), {"epsilon": 0.0}, InvalidInputError, "not PSD"),
        (-torch.eye(3), {"epsilon": 0.0}, InvalidInputError, "not PSD"),
        (torch.full((2, 2), math.nan), {"epsilon": 0.0}, NonFiniteError, "NaN"),
        (torch.eye(3, dtype=torch.int64), {"epsilon": 0.0}, UnsupportedError, "int64"),
    ],
)
def test_bad_input_is_refused(
    matrix: Tensor, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        factor_health(matrix, **options)
