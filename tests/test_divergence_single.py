"""The trace-power family where large float32 layers iterate in float32 first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.approximations import divergence
from kronecker_probe.approximations.half_steps import half_steps
from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.second_moment.routes import alternation
from tests.cases import as_numpy, assert_close

# What a fit to float32 draws may lose: its tolerance, over one minus a rate of at most .9.
FITTED = 10 * divergence.TOLERANCE_OF_SINGLE


@pytest.fixture(autouse=True)
def _single(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternation, "SINGLE_FLOPS", 0.0)


def draws(count: int, condition: float) -> kp.GradientSamples:
    """Float32 draws whose sides have condition numbers about ``condition``, squared."""
    rng = np.random.default_rng(0)
    d = rng.standard_normal((count, 3, 8)) * np.geomspace(1, 1 / condition, 8)
    a = rng.standard_normal((count, 3, 6)) * np.geomspace(1, 1 / condition, 6)
    return kp.GradientSamples.from_factors(torch.tensor(d).float(), torch.tensor(a).float())


def doubled(samples: kp.GradientSamples) -> kp.GradientSamples:
    return kp.GradientSamples.from_factors(*(x.double() for x in samples.tensors))


@pytest.mark.parametrize("q", [0, 0.5, 1.5])
@pytest.mark.parametrize("condition", [1.0, 300.0])
def test_float32_and_float64_iterations_agree(q: float, condition: float) -> None:
    samples = draws(40, condition)
    target, exact = (kp.SecondMoment(one, route="parameter") for one in (samples, doubled(samples)))
    assert half_steps(target, q).single
    assert not half_steps(exact, q).single
    found, expected = (kp.approximate(one, "divergence", q=q) for one in (target, exact))
    for side in ("left", "right"):
        one, other = (as_numpy(getattr(P, side)) for P in (found, expected))
        # in the metric of the factor itself: its small directions count like the large ones
        root = np.linalg.inv(np.linalg.cholesky(other))
        assert_close(root @ one @ root.T, np.eye(len(one)), FITTED)
    assert found.scale == pytest.approx(expected.scale, rel=FITTED)
    assert found.info["residual"] <= divergence.TOLERANCE_OF_SINGLE


def test_too_few_draws_are_refused_in_float32_too() -> None:
    with pytest.raises(UnsupportedError, match="minimizer"):
        kp.approximate(kp.SecondMoment(draws(1, 1.0), route="parameter"), "divergence", q=0)
