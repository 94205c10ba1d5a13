"""Held eigenbases: the criterion, warm QR and eigh refreshes, against numpy in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.linalg.basis_refresh import (
    off_diagonal_share,
    refresh_by_eigh,
    renewed,
    warm_qr,
)


def tolerance(dtype, n):
    """A product or an orthogonal factorization is good to c n eps of its norm."""
    return 30 * n * torch.finfo(dtype).eps


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def rotation(rng, n, angle):
    """exp of a random skew matrix of the given norm."""
    skew = rng.standard_normal((n, n))
    skew = skew - skew.T
    if n == 1:
        return np.eye(1)
    values, vectors = np.linalg.eigh(1j * skew * angle / np.linalg.norm(skew))
    return (vectors * np.exp(-1j * values) @ vectors.conj().T).real


def perturbed(seed, n, angle, condition=100.0, dtype=torch.float64):
    """A matrix and a descending basis that is turned by a small angle from its eigenbasis."""
    rng = np.random.default_rng(seed)
    true = orthogonal(rng, n)
    A = (true * np.geomspace(1.0, 1 / condition, n)) @ true.T
    Q = true @ rotation(rng, n, angle)
    return torch.tensor(A).to(dtype), torch.tensor(Q).to(dtype)


def share(A, Q):
    """The criterion by its definition in float64: relative error of Q diag(Q^T A Q) Q^T."""
    A, Q = A.double().numpy(), Q.double().numpy()
    kept = (Q * np.diag(Q.T @ A @ Q)) @ Q.T
    return np.linalg.norm(A - kept) / np.linalg.norm(A)


def one_qr_step(A, Q):
    """X = Q^T A Q = Q' R, the new basis Q Q': in the order in which the columns are given."""
    A, Q = A.double().numpy(), Q.double().numpy()
    return torch.tensor(Q @ np.linalg.qr(Q.T @ A @ Q)[0])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 30),
    angle=st.floats(0.0, 2.0),
    exponent=st.integers(-25, 25),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_share_is_the_relative_error_of_the_basis(seed, n, angle, exponent, dtype):
    A, Q = perturbed(seed, n, angle, dtype=dtype)
    found, diagonal = off_diagonal_share(10.0**exponent * A, Q)
    slack = tolerance(dtype, n)
    assert float(found) == pytest.approx(share(A, Q), abs=slack)
    expected = 10.0**exponent * np.diag(
        Q.double().numpy().T @ A.double().numpy() @ Q.double().numpy()
    )
    assert np.abs(diagonal.numpy() - expected).max() <= slack * 10.0**exponent


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3])
def test_share_has_no_noise_floor_in_float32(size):
    n = 300
    A = torch.diag(torch.linspace(1, 2, n, dtype=torch.float64))
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise + noise.T).fill_diagonal_(0)
    A = (A + size * A.norm() / noise.norm() * noise).float()
    eye = torch.eye(n)
    assert float(off_diagonal_share(A, eye)[0]) == pytest.approx(share(A, eye), rel=1e-3)


def test_share_of_zero_of_nan_and_of_batches():
    A, Q = perturbed(0, 5, 0.3)
    stack = torch.stack([A, 0 * A, A, 2 * A]).reshape(2, 2, 5, 5)
    stack[1, 0, 2, 2] = math.nan
    found, diagonal = off_diagonal_share(stack, Q.expand_as(stack))
    assert diagonal.shape == (2, 2, 5)
    assert found[0, 1] == 0
    assert found[1, 0].isnan()
    assert float(found[0, 0]) == pytest.approx(share(A, Q), rel=1e-10)
    torch.testing.assert_close(found[0, 0], found[1, 1])


@pytest.mark.parametrize("seed", range(40))
def test_ascending_order_ruins_qr_iteration_and_descending_order_does_not(seed):
    A, Q = perturbed(seed, 24, 0.1 + 0.01 * seed)
    before = share(A, Q)
    assert 0.005 < before < 0.3
    assert share(A, one_qr_step(A, Q)) < before < share(A, one_qr_step(A, Q.flip(-1)))
    # the iteration sorts, whatever the order of the columns it is handed
    for held in (Q, Q.flip(-1), Q[:, torch.randperm(24)]):
        found = warm_qr(A, held, 0.0)
        assert float(found.share_before) == pytest.approx(before, rel=1e-8)
        assert float(found.share_after) < before
        assert (found.diagonal.diff() <= 0).all()


def test_one_iteration_is_a_step_of_the_qr_algorithm():
    A, Q = perturbed(0, 12, 0.2)
    found, expected = warm_qr(A, Q, 0.0).vectors, one_qr_step(A, Q)
    overlap = (found.T @ expected).abs()
    # equal up to signs and, after the step, the order of the columns
    assert (overlap.amax(0) - 1).abs().max() < tolerance(torch.float64, 12)
    assert (overlap.amax(1) - 1).abs().max() < tolerance(torch.float64, 12)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 24),
    angle=st.floats(0.0, 3.0),
    exponent=st.integers(-12, 12),
    limit=st.sampled_from([0.0, 0.01, 0.1]),
    iterations=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_refreshed_bases(seed, n, angle, exponent, limit, iterations, dtype):
    A, Q = perturbed(seed, n, angle, dtype=dtype)
    A = 10.0**exponent * A
    slack = tolerance(dtype, n)
    eigh, warm = refresh_by_eigh(A, Q, limit), warm_qr(A, Q, limit, iterations)
    for found in (eigh, warm):
        assert found.ok
        V = found.vectors.double()
        assert (V.T @ V - torch.eye(n, dtype=torch.float64)).abs().max() < slack
        assert float(found.share_after) == pytest.approx(share(A, V), abs=slack)
        assert bool(found.refreshed) == (float(found.share_before) > limit)
        if found.refreshed:
            assert (found.diagonal.diff() <= slack * found.diagonal[0]).all()
        else:
            assert torch.equal(found.vectors, Q)
    assert float(eigh.share_after) <= max(limit, slack)
    assert int(eigh.iterations) == 0
    count = int(warm.iterations)
    assert (count > 0) == bool(warm.refreshed)
    assert count <= iterations
    if count < iterations:
        assert float(warm.share_after) <= limit + slack


def test_matrices_that_meet_the_tolerance_are_untouched_bit_for_bit():
    pairs = [perturbed(seed, 16, angle) for seed, angle in enumerate([1e-3, 0.5, 2e-3, 1.0])]
    A, Q = (torch.stack(part).reshape(2, 2, 16, 16) for part in zip(*pairs, strict=True))
    for refresh in (refresh_by_eigh, lambda A, Q, t: warm_qr(A, Q, t, 50)):
        found = refresh(A, Q, 0.01)
        assert found.refreshed.tolist() == [[False, True], [False, True]]
        assert torch.equal(found.vectors[:, 0], Q[:, 0])
        assert (found.share_after[:, 1] <= 0.01).all()
        assert torch.equal(found.share_after[:, 0], found.share_before[:, 0])
        assert (found.share_before[:, 1] > 0.01).all()
        for i, j in itertools.product(range(2), range(2)):
            alone = refresh(A[i, j], Q[i, j], 0.01)
            torch.testing.assert_close(alone.vectors, found.vectors[i, j])
            assert alone.iterations == found.iterations[i, j]


def test_qr_iterations_stop_at_the_tolerance_and_reach_eigh():
    A, Q = perturbed(1, 16, 0.4, condition=1e4)
    counts = [int(warm_qr(A, Q, limit, 200).iterations) for limit in (0.1, 0.01, 1e-3, 1e-8)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    last = warm_qr(A, Q, 1e-12, 500)
    values = np.linalg.eigvalsh(A.numpy())[::-1]
    np.testing.assert_allclose(last.diagonal.numpy(), values, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("where", ["matrix", "basis"])
def test_a_matrix_or_basis_that_is_not_finite_keeps_its_basis_and_spares_the_others(where):
    pairs = [perturbed(seed, 10, 0.5, dtype=torch.float32) for seed in range(3)]
    A, Q = (torch.stack(part) for part in zip(*pairs, strict=True))
    (A if where == "matrix" else Q)[1, 2, 3] = math.nan
    for refresh in (refresh_by_eigh, warm_qr):
        found = refresh(A, Q, 0.01)
        assert found.ok.tolist() == [True, False, True]
        assert found.refreshed.tolist() == [True, False, True]
        assert torch.equal(found.vectors[1].nan_to_num(7.0), Q[1].nan_to_num(7.0))
        alone = refresh(A[2], Q[2], 0.01)
        torch.testing.assert_close(found.vectors[2].abs(), alone.vectors.abs())


@pytest.mark.parametrize("outcome", ["float32", "both"])
def test_a_failing_solver_is_retried_in_float64_and_then_keeps_the_basis(monkeypatch, outcome):
    A, Q = perturbed(0, 10, 0.5, dtype=torch.float32)
    solve = torch.linalg.eigh

    def eigh(matrix):
        if matrix.dtype == torch.float32 or outcome == "both":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    found = refresh_by_eigh(A, Q)
    assert bool(found.ok) == bool(found.refreshed) == (outcome == "float32")
    if outcome == "float32":
        assert share(A, found.vectors) < tolerance(torch.float32, 10)
    else:
        assert torch.equal(found.vectors, Q)
        assert torch.equal(found.share_after, found.share_before)


def test_rank_deficient_zero_and_one_by_one_matrices():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((12, 3))
    A = torch.tensor(np.stack([factor @ factor.T, np.zeros((12, 12))])).float()
    Q = torch.tensor(np.stack([orthogonal(rng, 12)] * 2)).float()
    for refresh in (refresh_by_eigh, lambda A, Q: warm_qr(A, Q, 1e-5, 30)):
        found = refresh(A, Q)
        assert found.ok.all()
        assert found.refreshed.tolist() == [True, False]
        assert found.share_after[0] <= 1e-5
        gram = found.vectors.mT @ found.vectors
        assert (gram - torch.eye(12)).abs().max() < tolerance(torch.float32, 12)
        one = refresh(torch.tensor([[3.0]]), torch.tensor([[-1.0]]))
        assert not one.refreshed
        assert one.diagonal.tolist() == [3.0]


def test_basis_stays_orthogonal_over_many_refreshes():
    rng = np.random.default_rng(0)
    A, Q = perturbed(0, 16, 0.3, dtype=torch.float32)
    for _ in range(300):
        turn = torch.tensor(rotation(rng, 16, 0.05)).float()
        A = turn @ A @ turn.T
        Q = warm_qr((A + A.T) / 2, Q, 0.0).vectors
    assert (Q.T @ Q - torch.eye(16)).abs().max() < 10 * torch.finfo(torch.float32).eps


def test_a_callers_reduced_precision_does_not_reach_the_bases():
    A, Q = perturbed(0, 32, 0.3, dtype=torch.float32)
    expected = warm_qr(A, Q, 0.0, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = warm_qr(A, Q, 0.0, 3)
        assert torch.equal(off_diagonal_share(A, Q)[0], expected.share_before)
    assert torch.equal(found.vectors, expected.vectors)


def test_bad_arguments_are_refused():
    A = torch.eye(3)
    for refresh in (warm_qr, refresh_by_eigh):
        for limit in (-0.1, 1.0, math.nan):
            with pytest.raises(InvalidInputError, match="tolerance"):
                refresh(A, A, limit)
        for Q in (torch.eye(4), torch.eye(3).double(), torch.eye(3)[None]):
            with pytest.raises(InvalidInputError, match="one shape and dtype"):
                refresh(A, Q, 0.1)
        with pytest.raises(UnsupportedError, match="bfloat16"):
            refresh(A.bfloat16(), A.bfloat16(), 0.1)
    with pytest.raises(InvalidInputError, match="square"):
        off_diagonal_share(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InvalidInputError, match="max_iterations"):
        warm_qr(A, A, 0.1, 0)


@pytest.mark.parametrize("iterations", [None, 1, 3])
def test_without_a_test_the_bases_are_the_same(iterations: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(3, 8, 20, generator=generator, dtype=torch.float64)
    A = X @ X.mT
    Q = torch.linalg.qr(torch.randn(3, 8, 8, generator=generator, dtype=torch.float64))[0]
    found = renewed(A, Q, iterations)
    tested = refresh_by_eigh(A, Q) if iterations is None else warm_qr(A, Q, 0.0, iterations)
    overlap = (found.vectors.mT @ tested.vectors).abs()
    assert torch.allclose(overlap, torch.eye(8, dtype=torch.float64).expand_as(overlap), atol=1e-9)
    assert torch.allclose(found.diagonal, tested.diagonal, rtol=1e-9)
    assert found.refreshed.all()
    assert found.share_before.isnan().all()


@pytest.mark.parametrize("iterations", [None, 1])
def test_without_a_test_a_matrix_that_is_not_finite_keeps_its_basis(iterations: int | None) -> None:
    A = torch.eye(3).repeat(2, 1, 1)
    A[0, 1, 1] = math.nan
    Q = torch.eye(3).flip(0).repeat(2, 1, 1)
    found = renewed(A, Q, iterations)
    assert found.ok.tolist() == [False, True]
    assert torch.equal(found.vectors[0], Q[0])


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_basis_without_quotients_is_the_same_in_the_order_of_the_old_ones(
    iterations: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2, 9, 40, generator=generator, dtype=torch.float64)
    A = X @ X.mT
    Q = torch.linalg.qr(torch.randn(2, 9, 9, generator=generator, dtype=torch.float64))[0]
    full = renewed(A, Q, iterations)
    fast = renewed(A, Q, iterations, quotients=False)
    quotients = (fast.vectors * (A @ fast.vectors)).sum(-2)
    order = quotients.argsort(dim=-1, descending=True)
    ordered = fast.vectors.gather(-1, order[:, None].expand_as(A))
    torch.testing.assert_close(ordered, full.vectors)
    assert bool((fast.diagonal >= 0).all())
    settled = renewed(A, full.vectors, 60, quotients=False)
    values = torch.linalg.eigvalsh(A).flip(-1)  # close ones converge slowly
    torch.testing.assert_close(settled.diagonal, values, rtol=1e-3, atol=0)
