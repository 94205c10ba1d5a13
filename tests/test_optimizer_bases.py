"""When bases are tested and refreshed, and what becomes of second moments then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kronecker_probe import optim
from kronecker_probe.optim.preconditioners.eigenbasis import kept
from tests.optimizer_cases import step_of

# One formula in another order of operations, float64
ROUNDING = 1e-12
# Row sums after three rounds of scaling to two marginals
SCALED = 0.02


def drifting(shape: tuple[int, int], steps: int, speed: float, seed: int = 0) -> list[torch.Tensor]:
    """Gradients whose covariance turns by ``speed`` a step."""
    rng = np.random.default_rng(seed)
    m, n = shape
    left, right = np.diag(2.0 ** -np.arange(m)), np.diag(2.0 ** -np.arange(n))
    turn = rng.standard_normal((m, m))
    turn = np.linalg.qr(np.eye(m) + speed * (turn - turn.T))[0]
    frame, found = np.eye(m), []
    for _ in range(steps):
        frame = turn @ frame
        found.append(torch.tensor(frame @ left @ rng.standard_normal(shape) @ right))
    return found


def state_of(gradients: list[torch.Tensor], preset: Any, **options: Any) -> dict[str, Any]:
    _, optimizer, param = step_of(gradients, preset=preset, betas=(0.0, 0.95), **options)
    return optimizer.state[param]


@pytest.mark.parametrize("preset", [optim.Shampoo, optim.EShampoo])
@pytest.mark.parametrize("solver", ["eigh", "qr"])
def test_bases_are_tested_at_the_interval_and_refreshed_where_they_must_be(
    preset: Any, solver: str
) -> None:
    """Each factor by itself: one that does not turn passes its tests, the other fails them."""
    rng = np.random.default_rng(0)
    skew = rng.standard_normal((5, 5))
    turn = np.linalg.qr(np.eye(5) + 0.02 * (skew - skew.T))[0]
    frame = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    gradients = []
    for _ in range(41):
        frame = turn @ frame
        # all right directions at once: G^T G is diagonal in every step
        gradients.append(torch.tensor(frame[:, :4] * 2.0 ** -np.arange(4.0)))
    basis = {"frequency": 4, "start": 1, "tolerance": 0.1, "solver": solver, "max_iterations": 3}
    state = state_of(gradients, preset, basis=basis)
    assert state["tests"].tolist() == [[11, 11]]
    refreshes = state["refreshes"][0].tolist()
    assert 2 <= refreshes[0] < 11
    assert refreshes[1] == 0  # the identity is its basis, exactly
    assert state["refreshed"].tolist() == [[41, 41]]
    iterations = state["iterations"][0].tolist()
    assert iterations[1] == 0
    if solver == "qr":
        assert refreshes[0] <= iterations[0] <= 3 * refreshes[0]
    else:
        assert iterations[0] == 0


@pytest.mark.parametrize("preset", [optim.Shampoo, optim.EShampoo])
@pytest.mark.parametrize("solver", ["eigh", "qr"])
def test_a_tested_basis_is_within_its_tolerance(preset: Any, solver: str) -> None:
    gradients = drifting((6, 4), 60, 0.02)
    basis = {
        "frequency": 1,
        "start": 1,
        "tolerance": 0.1,
        "solver": solver,
        "max_iterations": 50,
    }
    state = state_of(gradients, preset, basis=basis)
    for side in (0, 1):
        Q, A = state[f"basis_{side}"][0], state[f"factor_{side}"][0]
        B = Q.T @ A @ Q
        off = torch.linalg.matrix_norm(B - torch.diag(B.diagonal()))
        assert float(off / torch.linalg.matrix_norm(B)) <= 0.1
        torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype))
    tests, refreshes = state["tests"][0], state["refreshes"][0]
    assert (refreshes < tests).all()
    assert (refreshes > 0).all()


def test_eigenvalues_of_a_basis_that_passes_its_test_are_renewed() -> None:
    """A factor that only grows keeps its basis, and its root must not keep its size."""
    diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    gradients = [10.0**k * diagonal for k in range(4)]
    options: dict[str, Any] = {"magnitude": {"grafting": "none"}, "betas": (0.0, 0.5)}
    tested, optimizer, param = step_of(
        gradients, basis={"frequency": 1, "tolerance": 0.1}, **options
    )
    always, *_ = step_of(gradients, basis={"frequency": 1}, **options)
    torch.testing.assert_close(tested, always, rtol=ROUNDING, atol=ROUNDING)
    assert optimizer.state[param]["refreshes"].tolist() == [[0, 0]]
    assert optimizer.state[param]["tests"].tolist() == [[4, 4]]


@pytest.mark.parametrize("preset", [optim.Shampoo, optim.EShampoo, optim.SOAP])
def test_staggered_blocks_take_turns(preset: Any) -> None:
    """All start together; then each block has its own step, and no step has all of them."""
    param = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    basis = {"frequency": 4, "start": 2, "stagger": True}
    optimizer = preset([param], lr=1e-3, basis=basis, shapes={"block_size": 4})
    before, turns = None, []
    for step in range(1, 15):
        generator = torch.Generator().manual_seed(step)
        param.grad = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        optimizer.step()
        counts = optimizer.state[param]["refreshes"][:, 0].tolist()
        if before is not None:
            turns.append([b - a for a, b in zip(before, counts, strict=True)])
        before = counts
    assert turns[0] == [1, 1, 1, 1]
    for turn in turns[1:]:
        assert sum(turn) == 1
    assert [sum(column) for column in zip(*turns, strict=True)] == [4, 4, 4, 4]


def marginals(state: dict[str, Any], side: int) -> torch.Tensor:
    """diag(Q^T A Q) over b = 1 - beta2^t, in units of second moments."""
    Q, A = state[f"basis_{side}"][0], state[f"factor_{side}"][0]
    return (Q.T @ A @ Q).diagonal()


@pytest.mark.parametrize("carry", ["keep", "transport"])
@pytest.mark.parametrize("solver", ["eigh", "qr"])
@pytest.mark.parametrize("shape", [(6, 4), (3, 9)])
def test_marginals_are_those_of_the_factors_after_a_refresh(
    carry: str, solver: str, shape: tuple[int, int]
) -> None:
    """With one beta2 the sums of diag(Q^T E[g g^T] Q) along a side are diag(Q^T L Q)."""
    gradients = drifting(shape, 31, 0.1)
    basis = {"frequency": 10, "start": 1, "carry": carry, "solver": solver}
    corrected = state_of(gradients, optim.EShampoo, basis={**basis, "marginals": True})
    plain = state_of(gradients, optim.EShampoo, basis=basis)
    assert corrected["refreshed"].tolist() == [[31, 31]]
    for state, holds in ((corrected, True), (plain, False)):
        moment = state["second_moment"][0]
        rows = (moment.sum(1) / marginals(state, 0) - 1).abs().max()
        columns = (moment.sum(0) / marginals(state, 1) - 1).abs().max()
        assert (float(rows) < SCALED) is holds
        assert (float(columns) < ROUNDING) is holds  # they are scaled last


def test_marginals_bring_second_moments_nearer_to_the_exact_ones() -> None:
    """Against diag((Q_L kron Q_R)^T E[g g^T] (Q_L kron Q_R)), over ten runs."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(10):
        gradients = drifting((6, 4), 31, 0.1, seed)
        for scaled, error in errors.items():
            state = state_of(
                gradients, optim.EShampoo, basis={"frequency": 10, "marginals": scaled}
            )
            H = sum(
                0.05 * 0.95 ** (30 - t) * torch.outer(g.reshape(-1), g.reshape(-1))
                for t, g in enumerate(gradients)
            )
            Q = torch.kron(state["basis_0"][0], state["basis_1"][0])
            exact = (Q.T @ H @ Q).diagonal()
            found = state["second_moment"][0].reshape(-1)
            error.append(float((found - exact).norm() / exact.norm()))
    assert np.median(errors[True]) < np.median(errors[False])


@pytest.mark.parametrize("carry", ["keep", "transport"])
def test_second_moments_follow_columns_that_change_places(carry: str) -> None:
    """Singular values that swap sizes: the bases swap columns, and D with them."""
    rng = np.random.default_rng(0)
    U, V = (torch.tensor(np.linalg.qr(rng.standard_normal((2, 2)))[0]) for _ in range(2))
    entries = [[3.0, 1.0]] * 10 + [[1.0, 30.0]] * 30
    diagonals = [torch.diag(torch.tensor(pair, dtype=torch.float64)) for pair in entries]
    gradients = [U @ diagonal @ V.T for diagonal in diagonals]
    basis = {"frequency": 5, "start": 1, "carry": carry}
    state = state_of(gradients, optim.EShampoo, basis=basis)
    average = torch.zeros(2, 2, dtype=torch.float64)
    for diagonal in diagonals:
        average = 0.95 * average + 0.05 * diagonal.square()
    left, right = U.T @ state["basis_0"][0], V.T @ state["basis_1"][0]
    assert float(left[1, 0].abs()) == pytest.approx(1)  # the second one is the larger now
    found = left.square() @ state["second_moment"][0] @ right.square().T
    torch.testing.assert_close(found, average, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("preset", [optim.SOAP, optim.KLSOAP])
def test_bases_refined_by_one_iteration_stay_descending_and_near(preset: Any) -> None:
    """The ascending order, the unstable fixed point of QR iteration, ends at shares above 1/2."""
    gradients = drifting((8, 8), 120, 0.002)
    state = state_of(gradients, preset, basis={"frequency": 1, "start": 1})
    for side in (0, 1):
        Q, A = state[f"basis_{side}"][0], state[f"factor_{side}"][0]
        B = Q.T @ A @ Q
        assert (B.diagonal().diff() <= 0).all()
        off = torch.linalg.matrix_norm(B - torch.diag(B.diagonal()))
        assert float(off / torch.linalg.matrix_norm(B)) < 0.05


def test_columns_keep_what_they_continue_and_others_the_average() -> None:
    """A null space has any basis: its columns' second moments are mixed as the columns are."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.tensor(0.3, dtype=torch.float64)
    turn = torch.eye(6, dtype=torch.float64)
    turn[0, 0] = turn[1, 1] = angle.cos()
    turn[0, 1], turn[1, 0] = -angle.sin(), angle.sin()
    mixed = torch.full((4, 4), 0.5, dtype=torch.float64) * torch.tensor(
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    )
    turn[2:, 2:] = mixed
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    overlap = turn.mT[order]  # of new columns with old ones
    moments = torch.rand(6, generator=generator, dtype=torch.float64)
    weights = kept(torch.eye(6, dtype=torch.float64)[None], overlap.square()[None], 0)[0]
    found = kept(moments[None, :, None], overlap.square()[None], 0)[0, :, 0]
    assert torch.equal(found[:2], moments[[1, 0]])
    assert torch.allclose(found[2:], moments[2:].mean().expand(4))
    assert torch.allclose(weights.sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("side", [0, 1, 2])
def test_columns_that_all_continue_old_ones_only_change_places(side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    moment = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    size = moment.shape[side + 1]
    orders = torch.stack([torch.randperm(size, generator=generator) for _ in range(2)])
    near = 0.9 * torch.eye(size, dtype=torch.float64)[orders] + 0.1 / size
    found = kept(moment, near, side)
    for block, order in enumerate(orders):
        assert torch.equal(found[block], moment[block].index_select(side, order))


@pytest.mark.parametrize("preset", [optim.EShampoo, optim.SOAP, optim.KLSOAP])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_steps_stay_in_the_space_of_the_gradients(preset: Any, scale: float) -> None:
    """In a null space the rotated gradient is rounding, and Adam would make it of size 1."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 5, generator=generator).double())[0]
    gradients = [
        (torch.randn(60, 5, generator=generator).double() @ basis.T * scale).float()
        for _ in range(25)
    ]
    _, _, param = step_of(gradients, torch.float32, preset)
    W = param.detach().double()
    outside = torch.linalg.norm(W - W @ basis @ basis.T)
    assert outside < 1e-5 * torch.linalg.norm(W)


def test_whiteners_are_damped_in_the_units_of_their_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, 4, generator=generator).double() for _ in range(12)]
    options: dict[str, Any] = {
        "preset": optim.KLSOAP,
        "spectrum": {"relative": True, "epsilon": 1e-3},
        "basis": {"frequency": 2},
    }
    one, _, _ = step_of(gradients, **options)
    other, _, _ = step_of([1e-3 * g for g in gradients], **options)
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_one_huge_gradient_does_not_stop_a_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(12, 8, generator=generator) for _ in range(40)]
    gradients[10][0, 0] *= 3e7
    param = torch.nn.Parameter(torch.zeros(12, 8))
    optimizer = optim.EShampoo([param], lr=1.0)
    lengths = []
    for gradient in gradients:
        before = param.detach().clone()
        param.grad = gradient
        optimizer.step()
        lengths.append(float((param.detach() - before).abs().median()))
    assert lengths[-1] > 0
