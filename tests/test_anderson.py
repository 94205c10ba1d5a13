"""Anderson acceleration on maps whose fixed points are known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kronecker_probe.linalg.anderson import Anderson

# Distance to the fixed point, relative to its size, that float64 iterations must reach.
REACHED = 1e-10


def linear(size: int, rate: float) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """x -> A x + b with eigenvalues up to ``rate``, and its fixed point."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    A = (Q * torch.linspace(0.1, rate, size, dtype=torch.float64)) @ Q.T
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    fixed = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - A, b)
    return lambda x: A @ x + b, fixed


def images_needed(
    f: Callable[[torch.Tensor], torch.Tensor], fixed: torch.Tensor, accelerated: bool
) -> int:
    x, anderson = torch.zeros_like(fixed), Anderson()
    for count in range(1, 2000):
        image = f(x)
        x = anderson.step(x, image) if accelerated else image
        if torch.linalg.vector_norm(x - fixed) <= REACHED * torch.linalg.vector_norm(fixed):
            return count
    return 2000


def test_a_linear_map_ends_within_its_dimension() -> None:
    """With as much history as dimensions it is GMRES, which ends after that many images."""
    f, fixed = linear(5, 0.95)
    assert images_needed(f, fixed, accelerated=True) <= 5 + 2
    assert images_needed(f, fixed, accelerated=False) > 300


@pytest.mark.parametrize("rate", [0.8, 0.97])
def test_larger_maps_take_a_third_of_the_images(rate: float) -> None:
    f, fixed = linear(60, rate)
    plain = images_needed(f, fixed, accelerated=False)
    assert images_needed(f, fixed, accelerated=True) <= plain / 3


def test_a_nonlinear_map_on_matrices() -> None:
    """Heron's iteration for the square root of 2, damped to converge slowly, entry by entry."""
    x, anderson = torch.full((2, 3), 5.0, dtype=torch.float64), Anderson()
    for _ in range(30):
        x = anderson.step(x, x + 0.2 * ((x + 2 / x) / 2 - x))
    assert x.shape == (2, 3)
    torch.testing.assert_close(x, torch.full_like(x, 2**0.5), rtol=REACHED, atol=0)


def test_growing_residuals_go_back_to_the_best_point() -> None:
    anderson, x = Anderson(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    best = x + torch.tensor([0.1, 0.0])
    assert torch.equal(anderson.step(x, best), best)
    worse = x + torch.tensor([0.0, 5.0])
    assert torch.equal(anderson.step(x, worse), best)
    assert torch.equal(anderson.step(best, worse), worse)  # a plain step, whatever its residual


def test_a_map_that_misleads_it_converges_no_slower_than_plain() -> None:
    """A kink in every direction: combinations across it are no better than chance."""
    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(20, generator=generator, dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        away = x - fixed
        return fixed + torch.where(away > 0, 0.9, 0.3) * away.roll(1)

    plain = images_needed(f, fixed, accelerated=False)
    assert images_needed(f, fixed, accelerated=True) <= 2 * plain


def test_no_history_and_repeated_images_give_the_plain_step() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    anderson = Anderson()
    assert torch.equal(anderson.step(x, 2 * x), 2 * x)
    assert torch.equal(anderson.step(x, 2 * x), 2 * x)  # no change to learn from
