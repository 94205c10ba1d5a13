"""Intervals and effective numbers of examples, against textbook numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kronecker_probe as kp

# two-sided quantiles of Student's t from printed tables: (level, df) -> t
TABLE = {(0.95, 9): 2.262, (0.95, 30): 2.042, (0.5, 9): 0.703, (0.99, 5): 4.032}


@pytest.mark.parametrize(("level", "df"), TABLE)
def test_an_interval_is_two_sided(level: float, df: int) -> None:
    one = kp.Estimate("cosine", "kfac", "population", 0.8, 0.1, n=50, n_eff=40.0, df=df)
    reach = 0.1 * TABLE[level, df]
    assert one.interval(level) == pytest.approx((0.8 - reach, 0.8 + reach), abs=1e-4)


def test_the_effective_number_of_examples_counts_their_weights() -> None:
    """Of gradients of equal size it is (sum w)^2 / sum w^2."""
    G = torch.randn(60, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G = G / torch.linalg.matrix_norm(G, keepdim=True)
    w = np.linspace(0.1, 3, 60)
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(G, torch.tensor(w)))
    found = kp.estimate(H, "shampoo-squared", kind="population")
    assert found.n_eff == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-12)
