"""Averages held in bfloat16: rounding whose errors cancel over the updates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kronecker_probe.optim.blocks.rounding import store

# bfloat16 has 8 significant bits: neighbours of x are within this share of it
STEP = 2.0**-7
DECAY = 0.999


def rounded(values: Tensor, update: int) -> Tensor:
    held = torch.empty(values.shape, dtype=torch.bfloat16)
    store(values.clone(), held, update)
    return held


@given(
    st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    st.integers(1, 10**9),
)
def test_a_number_becomes_one_of_its_neighbours(value: float, update: int) -> None:
    found = float(rounded(torch.tensor([value]), update)[0])
    # bfloat16 values are the float32 ones whose last 16 bits are zero
    down = float(rounded_down(torch.tensor([value])))
    assert abs(found - down) in (0.0, ulp(down))
    assert (found == value) or (down != value)
    assert float(rounded(torch.tensor([-value]), update)[0]) == -found


def rounded_down(value: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(value.double())
    return torch.ldexp(torch.trunc(mantissa * 2**8) / 2**8, exponent)


def ulp(value: float) -> float:
    return 0.0 if value == 0 else 2.0 ** (math.frexp(abs(value))[1] - 8)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 1 / 3, 0.5, 0.618, 0.99])
def test_many_updates_by_a_fraction_of_a_step_add_up(fraction: float) -> None:
    held = torch.tensor([1.0], dtype=torch.bfloat16)
    step, count = 2.0**-7, 100  # within [1, 2), where steps are equal
    for update in range(1, count + 1):
        store(held.float() + fraction * step, held, update)
    exact = 1.0 + count * fraction * step
    assert abs(float(held[0]) - exact) <= 3 * step


def test_an_average_follows_where_rounding_to_the_nearest_stands_still() -> None:
    held, nearest = (torch.tensor([1.0], dtype=torch.bfloat16) for _ in range(2))
    for update in range(1, 5001):
        store(DECAY * held.float() + (1 - DECAY) * 1.5, held, update)
        nearest = (DECAY * nearest.float() + (1 - DECAY) * 1.5).bfloat16()
    assert float(nearest[0]) == 1.0
    assert abs(float(held[0]) - (1.5 - 0.5 * DECAY**5000)) <= 3 * STEP


@pytest.mark.parametrize("decay", [0.9, 0.99, DECAY])
def test_the_errors_of_an_average_are_those_of_independent_roundings_at_most(decay: float) -> None:
    """Each rounds by a standard deviation of half a step at most, and is forgotten with decay."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(12, 12, dtype=torch.float64)
    held = torch.zeros(12, 12, dtype=torch.bfloat16)
    for update in range(1, round(3 / (1 - decay)) + 1):
        x = torch.randn(12, 4, generator=generator)
        new = (1 - decay) * x @ x.T
        exact = decay * exact + new.double()
        store(decay * held.float() + new, held, update)
    error = torch.linalg.norm(held.double() - exact) / torch.linalg.norm(exact)
    assert float(error) <= 0.5 * STEP / math.sqrt(1 - decay**2)


def test_the_values_of_another_precision_are_left_alone() -> None:
    values = torch.tensor([1.0 + 2.0**-9], dtype=torch.float64)
    held = torch.empty(1, dtype=torch.bfloat16)
    store(values, held, 1)
    assert float(values[0]) == 1.0 + 2.0**-9
    assert float(held[0]) in (1.0, 1.0 + 2.0**-7)
