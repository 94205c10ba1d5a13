"""The six approximations and the structured operators they return, against the dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnknownNameError, UnsupportedError
from tests import oracle
from tests import reference_fixture as fixture
from tests.cases import (
    APPROXIMATIONS,
    CASES,
    KRONECKER,
    Case,
    as_numpy,
    assert_close,
    dense,
    factors_case,
    matrices_case,
    rank_deficient,
)
from tests.grid import Checks, on_every_route
from tests.oracle import Array
from tests.tolerances import CONDITION, ENTRIES, ROOT_ENTRIES, SCALAR


def entries_tolerance(name: str) -> float:
    return ROOT_ENTRIES if name in ("optimal", "shampoo") else ENTRIES


# ---------------------------------------------------------------- against the oracle


def test_cases_determine_their_optimum() -> None:
    """With a repeated largest singular value the optimum is not unique, and no test can hold it."""
    for case in CASES:
        spectrum = oracle.kronecker_spectrum(case.H, case.shape)
        assert len(spectrum) == 1 or spectrum[1] < 0.99 * spectrum[0], case


@on_every_route()
def test_every_quantity(case: Case, route: str) -> None:
    H = case.operator(route)
    with Checks() as check:
        for name in case.approximations:
            P = kp.approximate(H, name)
            for one in (entries, norm_and_trace, inner_with_the_target, products):
                check(name, one, H, P, case, name)
            if name in KRONECKER:
                check(name, kronecker_factors, H, P, case, name)


def entries(H: kp.SecondMoment, P: Any, case: Case, name: str) -> None:
    expected = case.dense(name)
    assert tuple(P.shape) == case.shape
    actual = dense(P)
    assert_close(actual, expected, entries_tolerance(name))
    assert_close(actual, actual.T, ENTRIES)
    diagonal = np.diag(expected).reshape(case.shape)
    assert_close(as_numpy(P.diagonal()), diagonal, entries_tolerance(name))


def norm_and_trace(H: kp.SecondMoment, P: Any, case: Case, name: str) -> None:
    expected = case.dense(name)
    assert_close(P.norm(), oracle.norm(expected), SCALAR)
    # a trace is linear in the factors, so it has the accuracy of their entries
    assert_close(P.trace(), np.trace(expected), entries_tolerance(name))


def inner_with_the_target(H: kp.SecondMoment, P: Any, case: Case, name: str) -> None:
    """In either order."""
    expected = oracle.inner(case.H, case.dense(name))
    assert_close(H.inner(P), expected, SCALAR)
    assert_close(P.inner(H), expected, SCALAR)


def products(H: kp.SecondMoment, P: Any, case: Case, name: str) -> None:
    """P on a batch, on one matrix, and as scipy sees it."""
    expected = case.dense(name)
    X = np.random.default_rng(20240617).standard_normal((2, 2, *case.shape))
    bound = oracle.norm(expected) * float(np.linalg.norm(X))
    tolerance = entries_tolerance(name)
    result = oracle.apply(expected, X)
    assert_close(as_numpy(P.apply(torch.tensor(X))), result, tolerance, scale=bound)
    assert_close(as_numpy(P.apply(torch.tensor(X[0, 1]))), result[0, 1], tolerance, scale=bound)
    x = X[0, 0].reshape(-1)
    assert_close(P.to_scipy() @ x, result[0, 0].reshape(-1), tolerance, scale=bound)


def kronecker_factors(H: kp.SecondMoment, P: Any, case: Case, name: str) -> None:
    assert isinstance(P, kp.KroneckerOperator)
    assert type(P.scale) is float
    left, right = as_numpy(P.left), as_numpy(P.right)
    m, n = case.shape
    assert left.shape == (m, m)
    assert right.shape == (n, n)
    assert_close(P.scale * np.kron(left, right), case.dense(name), entries_tolerance(name))
    for factor in (left, right):
        assert_close(factor, factor.T, ENTRIES)
        values = np.linalg.eigvalsh(factor)
        assert values[0] >= -ENTRIES * values[-1]  # PSD, and of positive trace


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inner_between_approximations(case: Case) -> None:
    H = case.operator()
    operators = {name: kp.approximate(H, name) for name in case.approximations}
    for first, second in product(case.approximations, repeat=2):
        P, Q = case.dense(first), case.dense(second)
        bound = oracle.norm(P) * oracle.norm(Q)
        tolerance = max(entries_tolerance(first), entries_tolerance(second))
        actual = operators[first].inner(operators[second])
        assert_close(actual, oracle.inner(P, Q), tolerance, scale=bound)


# ---------------------------------------------------------------- their structure


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_optimal_factors_are_unit_and_carry_sigma(route: str) -> None:
    case = factors_case("", 9, 4, 3)
    P = kp.approximate(case.operator(route), "optimal")
    leading = oracle.leading_triple(case.H, case.shape)
    assert_close(P.scale, leading.sigma, SCALAR)
    assert_close(np.linalg.norm(as_numpy(P.left)), 1.0, SCALAR)
    assert_close(np.linalg.norm(as_numpy(P.right)), 1.0, SCALAR)
    assert_close(as_numpy(P.left), leading.left, ROOT_ENTRIES)
    assert_close(as_numpy(P.right), leading.right, ROOT_ENTRIES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eigen_corrected_is_diagonal_in_an_orthonormal_basis(case: Case) -> None:
    P = kp.approximate(case.operator(), "eigen-corrected")
    assert isinstance(P, kp.EigenOperator)
    left, right = as_numpy(P.left_basis), as_numpy(P.right_basis)
    values = as_numpy(P.eigenvalues)
    assert values.shape == (left.shape[1], right.shape[1])
    for basis in (left, right):
        assert_close(basis.T @ basis, np.eye(basis.shape[1]), ENTRIES)
    basis = np.kron(left, right)
    assert_close((basis * values.reshape(-1)) @ basis.T, case.dense("eigen-corrected"), ENTRIES)
    expected = np.einsum("ap,ab,bp->p", basis, case.H, basis)
    assert_close(values.reshape(-1), expected, ENTRIES)
    # descending eigenvalues of L and R
    for factor, vectors in (
        (oracle.left_factor(case.H, case.shape), left),
        (oracle.right_factor(case.H, case.shape), right),
    ):
        order = np.einsum("ap,ab,bp->p", vectors, factor, vectors)
        assert np.all(np.diff(order) <= ENTRIES * order[0])


def test_diagonal_is_a_diagonal_operator() -> None:
    case = factors_case("", 6, 4, 3, positions=2)
    P = kp.approximate(case.operator(), "diagonal")
    assert isinstance(P, kp.DiagonalOperator)
    assert_close(as_numpy(P.values), np.diag(case.H).reshape(case.shape), ENTRIES)


@pytest.mark.parametrize("route", ["parameter", "dense", "auto"])
def test_fixture_factors(route: str) -> None:
    samples = kp.GradientSamples.from_matrices(torch.tensor(fixture.SAMPLES))
    P = kp.approximate(kp.SecondMoment(samples, route=route), "shampoo-squared")
    expected = np.kron(fixture.LEFT, fixture.RIGHT) / fixture.TRACE
    assert_close(dense(P), expected, ENTRIES)
    assert P.trace() == pytest.approx(fixture.TRACE, rel=ENTRIES)


# ---------------------------------------------------------------- operators made by hand


@dataclass(frozen=True)
class Made:
    name: str
    make: Callable[[], kp.DenseOperator]  # any operator of the protocol
    expected: Array
    has_power: bool = True

    def __str__(self) -> str:
        return self.name


def _psd(size: int, seed: int, rank: int | None = None) -> Array:
    X = np.random.default_rng(seed).standard_normal((size, rank or size))
    return X @ X.T


def _basis(size: int, kept: int, seed: int) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0][:, :kept]


def _made() -> tuple[Made, ...]:
    m, n = 4, 3
    t = torch.tensor
    left, right, H = _psd(m, 1), _psd(n, 2), _psd(m * n, 3)
    singular_left, singular_right = _psd(m, 4, rank=2), _psd(n, 5, rank=1)
    values = np.random.default_rng(6).uniform(0.5, 2, (m, n))
    holes = values * (values > 1)
    thin = np.random.default_rng(7).uniform(0.5, 2, (2, 1))
    Q_L, Q_R, q_l, q_r = _basis(m, m, 8), _basis(n, n, 9), _basis(m, 2, 10), _basis(n, 1, 11)
    eigen, thin_eigen = np.kron(Q_L, Q_R), np.kron(q_l, q_r)
    singular = _psd(m * n, 12, rank=5)
    made = [
        Made("kronecker", lambda: kp.KroneckerOperator(t(left), t(right)), np.kron(left, right)),
        Made(
            "kronecker-scaled",
            lambda: kp.KroneckerOperator(t(left), t(right), scale=0.3),
            0.3 * np.kron(left, right),
        ),
        Made(
            "kronecker-singular",
            lambda: kp.KroneckerOperator(t(singular_left), t(singular_right), scale=2.5),
            2.5 * np.kron(singular_left, singular_right),
        ),
        Made(
            "eigen",
            lambda: kp.EigenOperator(t(Q_L), t(Q_R), t(values)),
            (eigen * values.reshape(-1)) @ eigen.T,
        ),
        Made(
            "eigen-singular",
            lambda: kp.EigenOperator(t(Q_L), t(Q_R), t(holes)),
            (eigen * holes.reshape(-1)) @ eigen.T,
        ),
        Made(
            "eigen-thin",
            lambda: kp.EigenOperator(t(q_l), t(q_r), t(thin)),
            (thin_eigen * thin.reshape(-1)) @ thin_eigen.T,
        ),
        Made("diagonal", lambda: kp.DiagonalOperator(t(values)), np.diag(values.reshape(-1))),
        Made(
            "diagonal-singular", lambda: kp.DiagonalOperator(t(holes)), np.diag(holes.reshape(-1))
        ),
        Made("dense", lambda: kp.DenseOperator(t(H), shape=(m, n)), H),
        Made("dense-singular", lambda: kp.DenseOperator(t(singular), shape=(m, n)), singular),
    ]
    for case, route in (
        (matrices_case("matrices", 5, m, n), "parameter"),
        (factors_case("T1", 6, m, n), "sample"),
        (factors_case("T1", 6, m, n, seed=1), "parameter"),
        (factors_case("T1", 6, m, n, seed=2), "dense"),
        (factors_case("C2-T1", 5, m, n, columns=2, positions=1), "sample"),
        (factors_case("C2-T3", 5, m, n, columns=2, positions=3), "parameter"),
    ):
        made.append(
            Made(
                f"target-{case}-{route}",
                lambda c=case, r=route: c.operator(r),
                case.H,
                has_power=False,
            )
        )
    return tuple(made)


MADE = _made()
WITH_POWER = tuple(item for item in MADE if item.has_power)


@pytest.mark.parametrize("item", MADE, ids=str)
def test_methods_of_made_operators(item: Made, rng: np.random.Generator) -> None:
    P = item.make()
    assert tuple(P.shape) == (4, 3)
    assert_close(dense(P), item.expected, ENTRIES)
    assert_close(P.norm(), oracle.norm(item.expected), SCALAR)
    assert_close(P.trace(), np.trace(item.expected), SCALAR)
    assert_close(as_numpy(P.diagonal()), np.diag(item.expected).reshape(4, 3), ENTRIES)
    X = rng.standard_normal((2, 4, 3))
    bound = oracle.norm(item.expected) * float(np.linalg.norm(X))
    result = oracle.apply(item.expected, X)
    assert_close(as_numpy(P.apply(torch.tensor(X))), result, ENTRIES, scale=bound)
    assert_close(P.to_scipy() @ X[0].reshape(-1), result[0].reshape(-1), ENTRIES, scale=bound)


@pytest.mark.parametrize("first", MADE, ids=str)
def test_inner_with_any_other_kind(first: Made) -> None:
    with Checks() as check:
        for second in MADE:
            check(str(second), inner_of_both, first, second)


def inner_of_both(first: Made, second: Made) -> None:
    bound = oracle.norm(first.expected) * oracle.norm(second.expected)
    actual = first.make().inner(second.make())
    assert_close(actual, oracle.inner(first.expected, second.expected), SCALAR, scale=bound)


@pytest.mark.parametrize("item", MADE, ids=str)
def test_inner_of_mismatched_shapes_is_refused(item: Made) -> None:
    P = item.make()
    for other in (
        kp.DiagonalOperator(torch.ones(3, 4, dtype=torch.float64)),  # the same mn
        kp.KroneckerOperator(torch.eye(4).double(), torch.eye(2).double()),
        factors_case("", 3, 2, 2).operator(),
    ):
        with pytest.raises(InvalidInputError, match=r"4.*3"):
            P.inner(other)
        with pytest.raises(InvalidInputError, match=r"4.*3"):
            other.inner(P)


@pytest.mark.parametrize("item", WITH_POWER, ids=str)
@pytest.mark.parametrize("power", [-1.0, -0.5, -0.25, 0.5, 1.0, 2.0])
def test_power(item: Made, power: float, rng: np.random.Generator) -> None:
    Q = item.make().power(power)
    expected = oracle.matrix_power(item.expected, power)
    tolerance = CONDITION * _condition(item.expected)
    if "singular" in item.name and 0 < power < 1:
        tolerance = ROOT_ENTRIES  # the root of an eigenvalue that is zero but for rounding
    assert_close(dense(Q), expected, tolerance)
    X = rng.standard_normal((4, 3))
    bound = oracle.norm(expected) * float(np.linalg.norm(X))
    assert_close(
        as_numpy(Q.apply(torch.tensor(X))), oracle.apply(expected, X), tolerance, scale=bound
    )


def _condition(P: Array) -> float:
    """Of the spectrum above the null space."""
    values = np.linalg.eigvalsh(P)
    kept = values[values > ENTRIES * values[-1]]
    return float(kept[-1] / kept[0])


@pytest.mark.parametrize("name", APPROXIMATIONS)
@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
@pytest.mark.parametrize(
    "case", [rank_deficient(9, 6, 5, 2), factors_case("full", 60, 4, 3)], ids=str
)
def test_inverse_power_of_approximations(case: Case, route: str, name: str) -> None:
    """Penrose: P^-1 inverts on the range and is zero off it; P^-1/2 is its root."""
    P = kp.approximate(case.operator(route), name)
    matrix, inverse, root = dense(P), dense(P.power(-1)), dense(P.power(-0.5))
    tolerance = ROOT_ENTRIES * _condition(matrix)
    assert tolerance < 0.1  # else this case tests nothing
    assert_close(matrix @ inverse @ matrix, matrix, tolerance)
    assert_close(inverse @ matrix @ inverse, inverse, tolerance)
    assert_close(root @ root, inverse, tolerance)
    rank = np.linalg.matrix_rank(case.dense(name), tol=ENTRIES * oracle.norm(matrix))
    assert_close(np.trace(matrix @ inverse), float(rank), tolerance)


# ---------------------------------------------------------------- bad input and degenerate H


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("shampo", "shampoo"), ("optimum", "optimal"), ("k-fac", "kfac"), ("shampoo2", "shampoo")],
)
def test_unknown_approximation_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UnknownNameError, match=f"'{wrong}'.*Did you mean '{right}"):
        kp.approximate(factors_case("", 4, 3, 2).operator(), wrong)


@pytest.mark.parametrize("route", ["auto", "parameter", "dense"])
def test_kfac_of_samples_without_factors_is_refused(route: str) -> None:
    with pytest.raises(UnsupportedError, match=r"(?i)k-?fac.*from_factors"):
        kp.approximate(matrices_case("", 4, 3, 2).operator(route), "kfac")


@pytest.mark.parametrize("name", APPROXIMATIONS)
@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_approximations_of_zero_are_zero(route: str, name: str) -> None:
    samples = kp.GradientSamples.from_factors(torch.zeros(5, 4), torch.ones(5, 3))
    P = kp.approximate(kp.SecondMoment(samples, route=route), name)
    assert P.norm() == 0
    np.testing.assert_array_equal(dense(P), np.zeros((12, 12)))


def test_malformed_operators_are_refused() -> None:
    eye, ones = torch.eye(3).double(), torch.ones(3, 2).double()
    with pytest.raises(InvalidInputError):
        kp.KroneckerOperator(ones, eye)
    with pytest.raises(InvalidInputError):
        kp.KroneckerOperator(eye, ones)
    with pytest.raises(InvalidInputError):
        kp.EigenOperator(eye, eye, ones)
    with pytest.raises(InvalidInputError):
        kp.DiagonalOperator(torch.ones(3).double())
    with pytest.raises(InvalidInputError):
        kp.DenseOperator(eye, shape=(2, 2))
