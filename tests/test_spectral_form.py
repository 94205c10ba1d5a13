"""Exact spectra of structured operators and of draws, against dense matrices."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import scipy.linalg
import torch

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.operators import spectral_form as module
from kronecker_probe.operators.second_moment.kernels.sample_rows import SampleRows
from kronecker_probe.operators.spectral_form import (
    SampleForm,
    SpectralForm,
    exact_form,
    spectral_form,
)
from tests.cases import (
    Case,
    as_numpy,
    assert_close,
    factors_case,
    matrices_case,
)
from tests.grid import Checks, on_every_case
from tests.oracle import Array
from tests.tolerances import ENTRIES, ROOT_ENTRIES, SCALAR, ZERO_ERROR

DAMPING = 1e-2  # in mean eigenvalues of H
every_case = on_every_case()


def rows(case: Case) -> Array:
    """sqrt(w_i) vec(G_ic) as rows."""
    weighted = np.sqrt(case.weights)[:, None, None, None] * case.G
    return weighted.reshape(-1, weighted.shape[2] * weighted.shape[3])


def inverse_power(A: Array, d: float, p: float) -> Array:
    """(A + d I)^p by scipy, p < 0."""
    return np.real(scipy.linalg.fractional_matrix_power(A + d * np.eye(len(A)), p))


def probe(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(8).standard_normal((count, *shape)))


# ---------------------------------------------------------------- draws


@every_case
def test_draws_are_the_rows_of_a_root_of_H(case: Case) -> None:
    draws, X = SampleRows(case.samples()), rows(case)
    assert draws.count == len(X)
    assert_close(as_numpy(draws.gram()), X @ X.T, ENTRIES)
    x = probe(case.shape)
    flat = as_numpy(x).reshape(3, -1)
    assert_close(as_numpy(draws.coefficients(x)), flat @ X.T, ENTRIES)
    c = np.random.default_rng(9).standard_normal((2, len(X)))
    combined = as_numpy(draws.combine(torch.tensor(c))).reshape(2, -1)
    assert_close(combined, c @ X, ENTRIES)
    assert_close(as_numpy(draws.transformed(lambda g: 2 * g)), 2 * X, ENTRIES)


def test_embedding_draws_equal_their_matrices() -> None:
    """Tokens with repetitions within and across data, two columns each."""
    rng = np.random.default_rng(5)
    tokens = torch.tensor(rng.integers(0, 6, (9, 4)))
    d = torch.tensor(rng.standard_normal((9, 2, 4, 3)))
    weights = torch.tensor(rng.uniform(0, 1, 9))
    samples = kp.GradientSamples.from_embedding(tokens, d, 6, weights)
    case = Case("", matrices=as_numpy(samples.matrices()), given_weights=weights.numpy())
    sparse, formed = SampleRows(samples), SampleRows(case.samples())
    assert_close(as_numpy(sparse.gram()), as_numpy(formed.gram()), ENTRIES)
    x, c = probe((6, 3)), torch.tensor(rng.standard_normal((2, 18)))
    assert_close(as_numpy(sparse.coefficients(x)), as_numpy(formed.coefficients(x)), ENTRIES)
    assert_close(as_numpy(sparse.combine(c)), as_numpy(formed.combine(c)), ENTRIES)


def test_a_gram_in_several_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import kronecker_probe.linalg.gram as gram_module

    monkeypatch.setattr(gram_module, "CHUNK_ELEMENTS", 64)
    for case in (
        factors_case("", 9, 4, 3, columns=2, positions=2),
        factors_case("", 9, 3, 2, positions=4),  # formed: T^2 (m + n) > m n
        factors_case("", 9, 40, 30, positions=2),  # from factors
        matrices_case("", 9, 4, 3, columns=2),
    ):
        X = rows(case)
        assert_close(as_numpy(SampleRows(case.samples()).gram()), X @ X.T, ENTRIES)


def test_drawn_gradients_have_the_second_moment_of_H() -> None:
    case = factors_case("", 40, 3, 2, columns=3, positions=1)
    draws = SampleRows(case.samples())

    def gradients(count: int, seed: int) -> Array:
        return np.array([as_numpy(g).reshape(-1) for g in draws.gradients(count, seed)])

    found = np.concatenate([gradients(40, seed) for seed in range(60)])
    # 60 sign patterns of each datum: the standard error of an entry is about 3% of |H|
    assert_close(found.T @ found / len(found), case.H, 0.1)
    assert np.array_equal(gradients(5, 3), gradients(5, 3))
    assert not np.array_equal(gradients(5, 3), gradients(5, 4))
    assert len(gradients(1000, 0)) == 40


# ---------------------------------------------------------------- functions of operators


@every_case
def test_functions_of_an_approximation_equal_scipy(case: Case) -> None:
    H = case.operator()
    with Checks() as check:
        for name in case.approximations:
            form = exact_form(kp.approximate(H, name))
            check(name, functions_equal_scipy, case, name, form)


def functions_equal_scipy(case: Case, name: str, form: SpectralForm) -> None:
    dense = case.dense(name)
    size = len(dense)
    d = DAMPING * np.trace(dense) / size
    x = probe(case.shape)
    for p in (-0.5, -1.0):
        power = inverse_power(dense, d, p)
        found = as_numpy(form.apply(lambda v, p=p: (v + d).pow(p), x)).reshape(3, -1)
        assert_close(found, as_numpy(x).reshape(3, -1) @ power, ROOT_ENTRIES)
    assert form.values.numel() + form.null == size
    log_det = form.sum_of(lambda v: (v / d + 1).log())
    assert log_det == pytest.approx(np.linalg.slogdet(dense / d + np.eye(size))[1], rel=1e-8)
    inverse = np.linalg.inv(dense + d * np.eye(size))
    found_trace = form.expectation(lambda v: 1 / (v + d), case.operator())
    assert found_trace == pytest.approx(np.trace(inverse @ case.H), rel=1e-8)


@pytest.mark.parametrize(
    "spec",
    ["shampoo-squared:block_size=2", "eigen-corrected:block_size=3", "diagonal:block_size=2",
     "optimal:rank=20", "identity", "left-only"],
)  # fmt: skip
@pytest.mark.parametrize(
    "case",
    [factors_case("T1", 30, 5, 4), factors_case("T2", 30, 5, 4, positions=2)],
    ids=str,
)
def test_blocks_and_sums_equal_their_dense_matrices(case: Case, spec: str) -> None:
    H = case.operator()
    P = kp.approximate(H, spec)
    dense, form = as_numpy(P.to_dense()), exact_form(P)
    d = DAMPING * np.trace(case.H) / len(dense)
    x = probe(case.shape)
    found = as_numpy(form.apply(lambda v: (v + d).rsqrt(), x)).reshape(3, -1)
    assert_close(found, as_numpy(x).reshape(3, -1) @ inverse_power(dense, d, -0.5), ROOT_ENTRIES)
    inverse = np.linalg.inv(dense + d * np.eye(len(dense)))
    trace = form.expectation(lambda v: 1 / (v + d), H)
    assert trace == pytest.approx(np.trace(inverse @ case.H), rel=1e-8)
    split = kp.split_error(H, P)
    error = np.linalg.norm(case.H - dense) / np.linalg.norm(case.H)
    assert split.total == pytest.approx(error, abs=ZERO_ERROR)
    assert split.basis == pytest.approx(basis_error(case.H, form), abs=ZERO_ERROR)


def basis_error(H: Array, form: SpectralForm) -> float:
    """|offdiag(Q^T H Q)| / |H| with Q from the form, one column at a time."""
    Q = as_numpy(form.restore(torch.eye(len(H), dtype=torch.float64))).reshape(len(H), -1).T
    assert_close(Q.T @ Q, np.eye(len(H)), SCALAR)
    rotated = Q.T @ H @ Q
    off = rotated - np.diag(np.diag(rotated))
    return float(np.linalg.norm(off) / np.linalg.norm(H))


def test_an_indefinite_sum_of_products_is_refused() -> None:
    H = factors_case("", 20, 6, 5).operator()
    with pytest.raises(InvalidInputError, match=r"not PSD.*one Kronecker product"):
        spectral_form(kp.approximate(H, "optimal:rank=2"))


@every_case
def test_functions_of_H_equal_scipy(case: Case) -> None:
    H, size = case.operator(), len(case.H)
    form = exact_form(H)
    d = DAMPING * np.trace(case.H) / size
    values = np.sort(np.linalg.eigvalsh(case.H))[::-1]
    assert_close(np.sort(as_numpy(form.values))[::-1], values[: len(form.values)], SCALAR)
    x = probe(case.shape)
    for p in (-0.25, -1.0):
        power = inverse_power(case.H, d, p)
        found = as_numpy(form.apply(lambda v, p=p: (v + d).pow(p), x)).reshape(3, -1)
        assert_close(found, as_numpy(x).reshape(3, -1) @ power, SCALAR)
    other = kp.DiagonalOperator(torch.rand(case.shape, dtype=torch.float64))
    inverse = np.linalg.inv(case.H + d * np.eye(size))
    expected = np.trace(inverse @ np.diag(as_numpy(other.values).reshape(-1)))
    assert form.expectation(lambda v: 1 / (v + d), other) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("case", [factors_case("", 9, 6, 4), matrices_case("", 9, 6, 4)], ids=str)
def test_gram_and_dense_eigenvectors_agree(case: Case) -> None:
    H, x = case.operator(), probe(case.shape)
    form = spectral_form(H)
    assert isinstance(form, SampleForm)
    dense = exact_form(kp.DenseOperator(torch.tensor(case.H), case.shape))
    d = 1e-6 * H.trace()
    for f in (lambda v: (v + d).rsqrt(), lambda v: (v + d).log()):
        assert_close(as_numpy(form.apply(f, x)), as_numpy(dense.apply(f, x)), SCALAR)
        assert form.sum_of(f) == pytest.approx(dense.sum_of(f), rel=SCALAR)


def test_the_spectrum_of_H_is_computed_once_and_dies_with_it() -> None:
    H = factors_case("", 9, 6, 4).operator()
    form = spectral_form(H)
    assert spectral_form(H) is form
    dead = weakref.ref(H)
    del H, form
    gc.collect()
    assert dead() is None


def test_a_large_operator_without_structure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_SIZE", 5)
    P = kp.DenseOperator(torch.eye(6, dtype=torch.float64), (2, 3))
    assert spectral_form(P) is None
    with pytest.raises(UnsupportedError, match="2 x 3"):
        exact_form(P)
    assert spectral_form(factors_case("", 8, 4, 3).operator()) is None
    assert spectral_form(factors_case("", 4, 4, 3).operator()) is not None


def test_an_indefinite_or_non_finite_operator_is_refused() -> None:
    matrix = torch.diag(torch.tensor([1.0, -0.5, 2.0, 1.0], dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="not PSD"):
        spectral_form(kp.DenseOperator(matrix, (2, 2)))
    with pytest.raises(InvalidInputError, match="not PSD"):
        spectral_form(kp.KroneckerOperator(matrix[:2, :2], torch.eye(2).double()))
    values = torch.full((2, 2), float("nan"), dtype=torch.float64)
    with pytest.raises(NonFiniteError):
        spectral_form(kp.DiagonalOperator(values))


def test_forms_of_a_zero_operator() -> None:
    H = kp.SecondMoment(kp.GradientSamples.from_factors(torch.zeros(3, 4), torch.ones(3, 2)))
    x = probe((4, 2))
    for operator in (H, kp.approximate(H, "shampoo-squared"), kp.approximate(H, "diagonal")):
        form = exact_form(operator)
        assert form.sum_of(lambda v: v + 1) == pytest.approx(8)
        assert_close(as_numpy(form.apply(lambda v: v + 2, x)), 2 * as_numpy(x), SCALAR)
