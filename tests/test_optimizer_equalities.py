"""Members of the family that are other optimizers, or each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kronecker_probe import optim
from tests.optimizer_cases import PRESETS, Problem, break_eigh, step_of

# The same formula in another order of operations, 30 steps in float64.
ROUNDING = 1e-12
FLOAT64 = 1e-11

Build = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def run_both(
    ours: Build,
    theirs: Build,
    shape: tuple[int, ...] = (3, 5),
    steps: int = 30,
    tolerance: float = ROUNDING,
) -> None:
    problem = Problem(shape)
    params = problem.parameter(), problem.parameter()
    optimizers = ours([params[0]]), theirs([params[1]])
    for t in range(steps):
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.zero_grad()
            problem.loss(param, t).backward()
            optimizer.step()
        torch.testing.assert_close(params[0], params[1], rtol=tolerance, atol=tolerance)


DIAGONAL: dict[str, Any] = {
    "shapes": {"max_dim": 1},
    "magnitude": {"grafting": "none"},
    "basis": {"start": 1},
}
NEVER = {"start": 10**9}


def test_the_diagonal_is_adamw() -> None:
    options = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1}
    run_both(
        lambda p: optim.Shampoo(p, epsilon=1e-3, **options, **DIAGONAL),
        lambda p: torch.optim.AdamW(p, eps=1e-3, **options),
    )


@pytest.mark.parametrize("preset", [optim.EShampoo, optim.SOAP, optim.KLSOAP])
def test_corrected_eigenvalues_in_the_identity_basis_are_adam(preset: Any) -> None:
    run_both(
        lambda p: preset(p, lr=0.03, betas=(0.9, 0.99), basis=NEVER),
        lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.9, 0.99), eps=1e-8),
    )


def test_the_diagonal_without_momentum_and_correction_is_rmsprop() -> None:
    run_both(
        lambda p: optim.Shampoo(
            p,
            lr=0.03,
            betas=(0.0, 0.9),
            epsilon=1e-3,
            statistics={"bias_correction": False},
            **DIAGONAL,
        ),
        lambda p: torch.optim.RMSprop(p, lr=0.03, alpha=0.9, eps=1e-3),
    )


def test_the_diagonal_of_a_sum_is_adagrad() -> None:
    run_both(
        lambda p: optim.Shampoo(
            p,
            lr=0.3,
            betas=(0.0, 0.9),
            epsilon=1e-3,
            statistics={"accumulate": "sum"},
            **DIAGONAL,
        ),
        lambda p: torch.optim.Adagrad(p, lr=0.3, eps=1e-3),
    )


def test_before_the_first_refresh_the_grafted_method_runs() -> None:
    run_both(
        lambda p: optim.Shampoo(p, lr=0.03, basis=NEVER),
        lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.9, 0.999), eps=1e-8),
    )
    run_both(
        lambda p: optim.Shampoo(
            p, lr=0.03, betas=(0.0, 0.9), basis=NEVER, magnitude={"grafting": "rmsprop"}
        ),
        lambda p: torch.optim.RMSprop(p, lr=0.03, alpha=0.9, eps=1e-8),
    )
    run_both(
        lambda p: optim.Shampoo(
            p, lr=0.03, betas=(0.0, 0.9), basis=NEVER, magnitude={"grafting": "adagrad"}
        ),
        lambda p: torch.optim.Adagrad(p, lr=0.03, eps=1e-8),
    )


@pytest.mark.parametrize("grafting", ["sgd", "none"])
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_before_the_first_refresh_a_graft_without_memory_is_sgd(grafting: str, mu: float) -> None:
    run_both(
        lambda p: optim.Shampoo(
            p,
            lr=1e-3,
            betas=(0.0, 0.9),
            magnitude={"grafting": grafting},
            basis=NEVER,
            momentum=mu,
            weight_decay=0.1 if mu else 0.0,
        ),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=mu, weight_decay=0.1 if mu else 0.0),
    )


@pytest.mark.parametrize("grafting", ["sgd", "none"])
def test_a_step_leaves_the_gradient_and_the_average_as_they_are(grafting: str) -> None:
    """Where the direction is the average itself, the rate must not be written into it."""
    for betas in ((0.0, 0.9), (0.5, 0.9)):
        param = Problem((3, 5)).parameter()
        optimizer = optim.Shampoo(
            [param], betas=betas, basis=NEVER, magnitude={"grafting": grafting}, momentum=0.5
        )
        for step in (1, 2):
            param.grad = torch.ones_like(param)
            optimizer.step()
            assert torch.equal(param.grad, torch.ones_like(param))
            if betas[0]:
                held = optimizer.state[param]["momentum"]
                assert torch.allclose(held, torch.full_like(held, 1 - 0.5**step))


def test_without_any_root_the_grafted_method_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    break_eigh(monkeypatch, 5)
    with pytest.warns(RuntimeWarning, match="grafted direction"):
        run_both(
            lambda p: optim.Shampoo(p, lr=0.03, basis={"frequency": 2}, failures=100),
            lambda p: torch.optim.Adam(p, lr=0.03),
        )


@pytest.mark.parametrize("shape", [(5, 4), (6,), (1, 4), ()])
@pytest.mark.parametrize("grafting", ["adam", "rmsprop", "adagrad", "sgd"])
def test_grafting_takes_the_norm_of_one_method_and_the_direction_of_the_other(
    shape: tuple[int, ...], grafting: str
) -> None:
    rng = np.random.default_rng(2)
    gradients = [torch.tensor(rng.standard_normal(shape)) for _ in range(12)]
    plain: dict[str, Any] = {"basis": {"frequency": 3}, "betas": (0.9, 0.99)}
    own, *_ = step_of(gradients, magnitude={"grafting": "none"}, **plain)
    never = {"betas": (0.9, 0.99), "basis": NEVER}
    grafted, *_ = step_of(gradients, magnitude={"grafting": grafting}, **plain)
    other, *_ = step_of(gradients, magnitude={"grafting": grafting}, **never)
    expected = own * other.norm() / own.norm()
    torch.testing.assert_close(grafted, expected, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"muon"}))
def test_a_single_block_is_the_whole(name: str) -> None:
    preset = PRESETS[name]
    run_both(
        lambda p: preset(p, lr=1e-3, shapes={"block_size": 5}),
        lambda p: preset(p, lr=1e-3),
        shape=(5, 4),
        tolerance=1e-300,
    )


def test_shampoo_without_memory_is_the_exact_muon() -> None:
    run_both(
        lambda p: optim.Shampoo(
            p,
            lr=0.01,
            betas=(0.0, 0.0),
            epsilon=0.0,
            basis={"frequency": 1},
            magnitude={"grafting": "none"},
        ),
        lambda p: optim.Muon(p, 0.01, 0.0, spectrum={"root": "eigh"}, scale_by_shape=False),
        shape=(4, 4),
        tolerance=FLOAT64,
    )


def test_the_length_of_a_polar_factor_has_no_bias_to_correct() -> None:
    gradient = torch.tensor(np.random.default_rng(0).standard_normal((4, 3)))
    found = [
        step_of(
            [gradient] * 3,
            preset=optim.Muon,
            statistics={"bias_correction": corrects},
            spectrum={"root": "eigh"},
        )[0]
        for corrects in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=ROUNDING, atol=ROUNDING)


def test_soap_averages_in_the_turning_frame_what_eshampoo_averages_in_its_own() -> None:
    """The average turned with complete bases is the parameter-space one, after refreshes too."""
    rng = np.random.default_rng(3)
    gradients = [torch.tensor(rng.standard_normal((5, 4))) for _ in range(23)]
    _, optimizer, param = step_of(
        gradients, preset=optim.SOAP, betas=(0.9, 0.95), basis={"frequency": 4, "start": 3}
    )
    state = optimizer.state[param]
    left, right = state["basis_0"][0], state["basis_1"][0]
    average = torch.zeros(5, 4, dtype=torch.float64)
    for gradient in gradients:
        average = 0.9 * average + 0.1 * gradient
    torch.testing.assert_close(
        left @ state["momentum"][0] @ right.T, average, rtol=ROUNDING, atol=ROUNDING
    )


@pytest.mark.parametrize("preset", [optim.RMSpropRootFree, optim.RootFreeShampoo])
def test_root_free_statistics_do_not_depend_on_the_batch_in_expectation(preset: Any) -> None:
    """Splitting a batch with labels drawn from the model leaves E[s] unchanged.

    A mean-loss batch gradient of B independent zero-mean scores g_i has B E[G o G] = E[g o g] and
    B E[G G^T] = E[g g^T]. The expectation is taken over all sign patterns: g_i = e_i x_i with
    independent signs e_i, which is enumerated exactly.
    """
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((4, 3, 2))

    def expected(size: int) -> dict[str, torch.Tensor]:
        """The mean state over every batch and every pattern of signs."""
        totals: dict[str, torch.Tensor] = {}
        patterns = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
        count = 0
        for signs in patterns:
            for batch in np.split(signs[:, None, None] * scores, 4 // size):
                _, optimizer, param = step_of(
                    [torch.tensor(batch.mean(0))], preset=preset, batch_size=size
                )
                for name, value in optimizer.state[param].items():
                    if name in ("second_moment", "factor_0", "factor_1"):
                        totals[name] = totals.get(name, torch.zeros(())) + value
                count += 1
        return {name: total / count for name, total in totals.items()}

    alone = expected(1)
    assert alone
    for size in (2, 4):
        together = expected(size)
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=ROUNDING, atol=ROUNDING)
