"""Metrics of an approximation that is given by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    UndefinedMetricWarning,
    UnknownNameError,
    UnsupportedError,
)

METRICS: dict[str, Callable[..., Any]] = {
    "trace_ratio": kp.trace_ratio,
    "error_spectrum": lambda H, P: kp.error_spectrum(H, P).relative,
    "largest_error_eigenvalue": kp.largest_error_eigenvalue,
    "split_error": lambda H, P: kp.split_error(H, P).total,
    "off_diagonal_mass": kp.off_diagonal_mass,
    "kl_divergence": lambda H, P: kp.kl_divergence(H, P).value,
    "stein_divergence": lambda H, P: kp.stein_divergence(H, P).value,
    "direction_agreement": lambda H, P: float(kp.direction_agreement(H, P).cosines.mean()),
}
every = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())


def target(scale: float = 1.0) -> kp.SecondMoment:
    generator = torch.Generator().manual_seed(3)
    d, a = (torch.randn(40, size, generator=generator) * scale for size in (4, 3))
    return kp.SecondMoment(kp.GradientSamples.from_factors(d, a))


@every
@pytest.mark.parametrize("spec", ["kfac", "shampoo", "divergence:q=1/2"])
def test_a_name_stands_for_the_operator(metric: Callable[..., Any], spec: str) -> None:
    H = target()
    assert metric(H, spec) == metric(H, kp.approximate(H, spec))
    assert metric(H, spec) != metric(H, "identity")


@every
def test_what_is_neither_names_both_ways(metric: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"got a Tensor.*give an operator.*or the name"):
        metric(target(), torch.eye(12))
    with pytest.raises(InvalidInputError, match=r"got a str for the target H"):
        metric("kfac", target())


@every
def test_other_errors_are_those_of_approximate(metric: Callable[..., Any]) -> None:
    H = target()
    with pytest.raises(UnknownNameError, match="kfac"):
        metric(H, "kfca")
    with pytest.raises(InvalidInputError, match=r"is fitted to samples.*DenseOperator"):
        metric(kp.DenseOperator(H.to_dense(), H.shape), "kfac")
    matrices = kp.SecondMoment(kp.GradientSamples.from_matrices(torch.randn(9, 4, 3)))
    with pytest.raises(UnsupportedError, match="K-FAC"):
        metric(matrices, "kfac")


@every
@pytest.mark.filterwarnings("ignore:.*mean of empty")
def test_of_a_zero_target_it_is_undefined(metric: Callable[..., Any]) -> None:
    with pytest.warns(UndefinedMetricWarning, match="H = 0"):
        value = metric(target(0.0), "kfac")
    assert value != value


def test_the_target_is_checked_before_the_gradients() -> None:
    with pytest.raises(InvalidInputError, match="for the target H"):
        kp.direction_agreement("kfac", target(), torch.randn(2, 4, 3))  # type: ignore[arg-type]
