"""Putting samples together and taking them apart, against dense sums and slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, MemoryBudgetError
from kronecker_probe.gradients.samples import base as module
from kronecker_probe.gradients.samples.base import GradientSamples
from tests import oracle

# The same float64 products and sums in another order.
EXACT = 1e-12
M, N = 4, 3


def factored(count: int, columns: int, positions: int, seed: int) -> kp.GradientSamples:
    draw = torch.Generator().manual_seed(seed)
    d = torch.randn(count, columns, positions, M, generator=draw, dtype=torch.float64)
    a = torch.randn(count, positions, N, generator=draw, dtype=torch.float64)
    weights = torch.rand(count, generator=draw, dtype=torch.float64)
    return kp.GradientSamples.from_factors(d, a, weights)


def matrices(count: int, columns: int, seed: int) -> kp.GradientSamples:
    draw = torch.Generator().manual_seed(seed)
    G = torch.randn(count, columns, M, N, generator=draw, dtype=torch.float64)
    return kp.GradientSamples.from_matrices(G, torch.rand(count, generator=draw).double())


def embedding(count: int, columns: int, positions: int, seed: int) -> kp.GradientSamples:
    draw = torch.Generator().manual_seed(seed)
    d = torch.randn(count, columns, positions, N, generator=draw, dtype=torch.float64)
    tokens = torch.randint(M, (count, positions), generator=draw)
    weights = torch.rand(count, generator=draw, dtype=torch.float64)
    return GradientSamples.from_embedding(tokens, d, M, weights)


def dense(samples: kp.GradientSamples) -> np.ndarray:
    return oracle.second_moment(samples.matrices().numpy(), samples.weights.numpy())


def test_what_truncation_dropped_goes_with_the_samples() -> None:
    for made in (factored(4, 1, 2, 0), matrices(4, 1, 0)):
        assert made.dropped_energy == 0
        made.dropped_energy = 0.25
        derived = [
            made.subset([0, 2]), made.subset(slice(2)), made.to("cpu"), made.padded(3, 4),
            made.block(slice(0, 2), slice(0, 2)), made.with_tensors(made.tensors, made.weights),
            kp.GradientSamples.stack([made, factored(2, 1, 2, 1)]),
            kp.GradientSamples.stack([matrices(2, 1, 1), made]),
        ]  # fmt: skip
        assert [one.dropped_energy for one in derived] == [0.25] * len(derived)
        assert "0.25 dropped" in repr(made)


PARTS = {
    "alike": lambda: [factored(2, 1, 1, 0), factored(3, 1, 1, 1)],
    "positions": lambda: [factored(2, 1, 3, 0), factored(3, 1, 1, 1), factored(1, 1, 2, 2)],
    "columns": lambda: [factored(2, 4, 2, 0), factored(3, 1, 2, 1)],
    "both": lambda: [factored(2, 1, 3, 0), factored(3, 2, 1, 1)],
    "matrices": lambda: [matrices(2, 2, 0), matrices(3, 1, 1)],
    "kinds": lambda: [factored(2, 2, 3, 0), matrices(3, 1, 1)],
    "tokens": lambda: [embedding(2, 1, 3, 0), embedding(3, 2, 5, 1)],
    "tokens and factors": lambda: [embedding(2, 1, 3, 0), factored(3, 2, 2, 1)],
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_moment_of_a_stack_is_the_sum_of_moments(name: str, scaled: bool):
    parts = PARTS[name]()
    scales = [0.5, 2.0, 0.0][: len(parts)] if scaled else None
    stacked = kp.GradientSamples.stack(parts, scales)
    expected = sum(s * dense(p) for s, p in zip(scales or [1.0] * len(parts), parts, strict=True))
    assert stacked.n_examples == sum(len(part) for part in parts)
    assert dense(stacked) == pytest.approx(expected, rel=EXACT, abs=EXACT)
    H = kp.SecondMoment(stacked)
    assert H.norm() == pytest.approx(oracle.norm(expected), rel=EXACT)
    kinds = {type(part) for part in parts}
    assert type(stacked) is (kinds.pop() if len(kinds) == 1 else module.MatrixSamples)


def test_padding_changes_only_the_scale_of_kfac():
    samples = factored(3, 1, 2, 0)
    left, right = kp.SecondMoment(samples).kfac_factors()
    wider = samples.padded(1, 6)
    assert wider.n_positions == 6
    more_left, more_right = kp.SecondMoment(wider).kfac_factors()
    assert torch.allclose(more_left.matrix, left.matrix, rtol=EXACT)
    assert torch.allclose(more_right.matrix * 3, right.matrix, rtol=EXACT)


@pytest.mark.parametrize("make", [lambda: factored(3, 2, 2, 0), lambda: matrices(3, 2, 0)])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 3), slice(-1, None), slice(2, 99)])
@pytest.mark.parametrize("columns", [slice(None), slice(0, 1), slice(1, None, 1)])
def test_a_block_is_a_slice_of_every_matrix(make, rows: slice, columns: slice):
    samples = make()
    block = samples.block(rows, columns)
    assert torch.allclose(
        block.matrices(), samples.matrices()[..., rows, columns], rtol=EXACT, atol=EXACT
    )
    assert torch.equal(block.weights, samples.weights)
    assert type(block) is type(samples)


def test_blocks_share_memory_with_the_samples():
    for samples in (factored(3, 2, 2, 0), matrices(3, 2, 0)):
        block = samples.block(slice(1, 3), slice(0, 2))
        for part, whole in zip(block.tensors, samples.tensors, strict=True):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_whether_draws_are_independent_is_handed_on():
    samples = factored(3, 1, 1, 0)
    assert samples.independent
    samples.independent = False
    derived = [samples.subset([0]), samples.to("cpu"), samples.block(slice(1), slice(1))]
    derived += [samples.padded(2, 2), kp.GradientSamples.stack([samples, factored(2, 1, 1, 1)])]
    assert not any(one.independent for one in derived)


@pytest.mark.parametrize("part", [slice(2, 2), slice(0, 4, 2), slice(9, None), 1, Tensor([1])])
def test_bad_blocks(part: object):
    for samples in (factored(2, 1, 1, 0), matrices(2, 1, 0)):
        with pytest.raises(InvalidInputError, match=r"rows=.* of 4"):
            samples.block(part, slice(None))
        with pytest.raises(InvalidInputError, match=r"columns=.* of 3"):
            samples.block(slice(None), part)


def test_bad_stacks(monkeypatch: pytest.MonkeyPatch):
    one = factored(2, 1, 1, 0)
    other = kp.GradientSamples.from_matrices(torch.ones(1, M, N + 1))
    for parts, scales, said in [
        ([], None, "no samples"),
        ([one, other], None, "4 x 3 and 4 x 4"),
        ([one, one.matrices()], None, "Tensor"),
        ([one], [1.0, 2.0], "1 parts"),
        ([one], [-1.0], "scale >= 0"),
        ([one], [float("nan")], "finite scale"),
        ([one, one.to("meta")], None, "cpu and meta"),
    ]:
        with pytest.raises(InvalidInputError, match=said):
            kp.GradientSamples.stack(parts, scales)
    monkeypatch.setattr("kronecker_probe.linalg.memory.available_bytes", lambda device: 10.0)
    with pytest.raises(MemoryBudgetError, match="GB"):
        kp.GradientSamples.stack([one, one])
