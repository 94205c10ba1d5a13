"""Packed factors and products along the dimensions of stacked blocks."""

from __future__ import annotations

import pytest
import torch

from kronecker_probe.optim.blocks.contractions import (
    PANELLED,
    add_outer,
    completed,
    contract,
    packed_identity,
    packed_shape,
    unfold,
)

# float64 products of some 300 terms
SAME = 1e-12

SIZES = [1, 7, PANELLED - 1, PANELLED, PANELLED + 1, 2 * PANELLED + 37]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_a_packed_factor_is_the_running_average_of_outer_products(size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(1, dtype=torch.float64)
    held = 2.0 * packed_identity(size, like).repeat(count, *[1] * len(packed_shape(size)))
    expected = 2.0 * torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)
    for _ in range(3):
        rows = torch.randn(count, size, 5, generator=generator, dtype=torch.float64)
        add_outer(held, rows, 0.9, 0.1)
        expected = 0.9 * expected + 0.1 * rows @ rows.mT
    found = completed(held, size)
    assert torch.linalg.norm(found - expected) <= SAME * torch.linalg.norm(expected)


@pytest.mark.parametrize("size", [512, 784, 1024])
def test_packing_saves_two_fifths_of_a_large_factor(size: int) -> None:
    (entries,) = packed_shape(size)
    assert 0.5 < entries / size**2 < 0.57


@pytest.mark.parametrize("side", [0, 1, 2])
def test_a_contraction_is_the_sum_over_that_dimension(side: int) -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    size = blocks.shape[side + 1]
    matrix = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    letters = "abc".replace("abc"[side], "x")
    expected = torch.einsum(f"kabc,kx{'abc'[side]}->k{letters}", blocks, matrix)
    assert torch.allclose(contract(blocks, matrix, side), expected, rtol=SAME, atol=SAME)
    rows = unfold(blocks, side)
    others = [d for d in range(3) if d != side]
    gram = torch.tensordot(blocks[0], blocks[0], dims=(others, others))
    assert torch.allclose((rows @ rows.mT)[0], gram, rtol=SAME, atol=SAME)
    assert unfold(blocks[:, :, :, 0], 1).shape == (2, 4, 3)
