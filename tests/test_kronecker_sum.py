"""Optimal sums of Kronecker products, their energy, and the operator that holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UndefinedMetricWarning, UnsupportedError
from kronecker_probe.operators.structures.kronecker_sum import SkewTerm
from tests import approximation_oracle as more
from tests import oracle
from tests.cases import CASES, Case, as_numpy, assert_close, dense, factors_case, matrices_case
from tests.grid import Checks, on_every_route
from tests.tolerances import ENTRIES, INEQUALITY, ROOT_ENTRIES, SCALAR, SPECTRUM


def residual_energy(case: Case, rank: int) -> float:
    """|H - P|^2 / |H|^2 of the best sum of that rank."""
    values = oracle.kronecker_spectrum(case.H, case.shape)
    return float((values[rank:] ** 2).sum() / (values**2).sum())


# ---------------------------------------------------------------- the best sum


@on_every_route()
def test_best_sums(case: Case, route: str) -> None:
    H = case.operator(route)
    with Checks() as check:
        for rank in (2, 3, 4, 5):
            P = kp.approximate(H, "optimal", rank=rank)
            check(f"rank {rank}", error_is_that_of_the_truncated_svd, case, H, P, rank)
            check(f"rank {rank}", is_the_truncated_svd_where_unique, case, P, rank)


def error_is_that_of_the_truncated_svd(case: Case, H: kp.SecondMoment, P: Any, rank: int) -> None:
    """Also where singular values repeat, and the sum is not unique."""
    actual = dense(P)
    error = oracle.relative_error(case.H, actual) ** 2
    assert error == pytest.approx(residual_energy(case, rank), abs=SCALAR)
    assert_close(actual, actual.T, ENTRIES)
    assert kp.relative_error(H, P) ** 2 == pytest.approx(error, abs=SCALAR)


def is_the_truncated_svd_where_unique(case: Case, P: Any, rank: int) -> None:
    values = oracle.kronecker_spectrum(case.H, case.shape)
    if rank < len(values) and values[rank] > 0.99 * values[rank - 1]:
        return  # repeated at the cut: any of the sums is as good
    assert_close(dense(P), more.truncated(case.H, case.shape, rank), ROOT_ENTRIES)


def test_shared_positions_and_matrices_have_skew_terms() -> None:
    """A single matrix has s_i s_k twice, once symmetric and once skew."""
    case = matrices_case("", 1, 3, 3)
    s = np.linalg.svd(case.G[0, 0], compute_uv=False)
    assert_close(oracle.kronecker_spectrum(case.H, (3, 3))[1:3], [s[0] * s[1]] * 2, SCALAR)
    P = kp.approximate(case.operator(), "optimal", rank=9)
    assert isinstance(P, kp.KroneckerSum)
    assert (len(P.terms), len(P.skew)) == (6, 3)
    assert_close(dense(P), case.H, ROOT_ENTRIES)


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_rank_one_is_the_optimum_and_too_many_are_h_itself(route: str) -> None:
    case = factors_case("", 5, 4, 3)
    H = case.operator(route)
    first = kp.approximate(H, "optimal:rank=1")
    assert isinstance(first, kp.KroneckerOperator)
    assert first.inner(first) == kp.approximate(H, "optimal").inner(first)
    everything = kp.approximate(H, "optimal", rank=50)
    assert isinstance(everything, kp.KroneckerSum)
    assert everything.rank <= 5
    assert_close(dense(everything), case.H, SPECTRUM)
    assert set(everything.info) == {"rounds", "residual"}


@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[25]], ids=str)
def test_each_term_buys_what_the_energy_says(case: Case) -> None:
    H = case.operator()
    energy = kp.kronecker_energy(H, 4)
    assert energy.dtype == torch.float64
    for rank, share in enumerate(energy.tolist(), start=1):
        P = kp.approximate(H, "optimal", rank=rank)
        assert kp.cosine_similarity(H, P) == pytest.approx(share**0.5, abs=SCALAR)
        assert share == pytest.approx(1 - residual_energy(case, rank), abs=SCALAR)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_energy_ascends_to_one(case: Case) -> None:
    energy = as_numpy(kp.kronecker_energy(case.operator("dense")))
    assert np.all(np.diff(energy) >= 0)
    assert energy[-1] == pytest.approx(1, abs=SCALAR)


def test_energy_of_zero_and_of_a_bad_k() -> None:
    samples = kp.GradientSamples.from_factors(torch.zeros(5, 4), torch.ones(5, 3))
    with pytest.warns(UndefinedMetricWarning, match="H = 0"):
        assert torch.isnan(kp.kronecker_energy(kp.SecondMoment(samples), 2)).all()
    with pytest.raises(InvalidInputError, match="k=0"):
        kp.kronecker_energy(factors_case("", 4, 3, 2).operator(), 0)


def test_sum_of_zero_is_zero() -> None:
    samples = kp.GradientSamples.from_factors(torch.zeros(5, 4), torch.ones(5, 3))
    assert kp.approximate(kp.SecondMoment(samples), "optimal", rank=3).norm() == 0


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    m, n, n_examples = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    positions, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**32 - 1))
    columns = draw(st.integers(1, 2))
    return factors_case("", n_examples, m, n, columns=columns, positions=positions, seed=seed)


@given(small_cases(), st.integers(2, 6))
def test_routes_agree_and_no_rank_loses(case: Case, rank: int) -> None:
    assume(np.any(case.H))
    below = kp.kronecker_energy(case.operator(), 1)[0]
    for route in case.routes:
        H = case.operator(route)
        P = kp.approximate(H, "optimal", rank=rank)
        cosine = kp.cosine_similarity(H, P)
        assert cosine**2 == pytest.approx(1 - residual_energy(case, rank), abs=1e-9)
        assert cosine**2 >= below - INEQUALITY


# ---------------------------------------------------------------- the operator


def test_a_sum_is_indefinite_in_general_and_refuses_powers() -> None:
    case = matrices_case("", 5, 4, 3)
    P = kp.approximate(case.operator(), "optimal", rank=2)
    assert np.linalg.eigvalsh(dense(P))[0] < -1e-3 * oracle.norm(case.H)
    with pytest.raises(UnsupportedError, match=r"power\(-0.5\).*2 Kronecker.*rank 1"):
        P.power(-0.5)  # type: ignore[attr-defined]


def test_malformed_sums_are_refused() -> None:
    two, three = torch.eye(2).double(), torch.eye(3).double()
    with pytest.raises(InvalidInputError, match="at least one"):
        kp.KroneckerSum([])
    with pytest.raises(InvalidInputError, match=r"\(2, 3\).*\(3, 2\)"):
        kp.KroneckerSum([kp.KroneckerOperator(two, three), kp.KroneckerOperator(three, two)])
    with pytest.raises(InvalidInputError, match="one shape"):
        kp.KroneckerSum([kp.KroneckerOperator(two, three)], [SkewTerm(three, two, 1.0)])
