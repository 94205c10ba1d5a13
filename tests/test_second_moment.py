"""Every method of the target, on every route, against the dense oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    UnknownNameError,
    UnsupportedError,
)
from kronecker_probe.linalg import gram
from tests import oracle
from tests.cases import (
    CASES,
    Case,
    as_numpy,
    assert_close,
    dense,
    factors_case,
    matrices_case,
)
from tests.grid import Checks, on_every_route
from tests.tolerances import ENTRIES, FLOAT32, SCALAR, SPECTRUM

# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("case", CASES, ids=str)
def test_samples(case: Case) -> None:
    with Checks() as check:
        for one in (describe_themselves, form_their_matrices, keep_their_weights):
            check("the samples", one, case)


def describe_themselves(case: Case) -> None:
    samples = case.samples()
    n_examples, n_columns = case.G.shape[:2]
    assert tuple(samples.shape) == case.shape
    assert len(samples) == samples.n_examples == n_examples
    assert samples.n_columns == n_columns
    if case.inputs is not None:
        assert samples.n_positions == (case.inputs.shape[1] if case.inputs.ndim == 3 else 1)
    assert samples.weights.dtype == torch.float64
    np.testing.assert_array_equal(as_numpy(samples.weights), case.weights)


def form_their_matrices(case: Case) -> None:
    samples, n_examples = case.samples(), len(case.G)
    for start, stop in (
        (0, n_examples),
        (0, 1),
        (n_examples - 1, n_examples),
        (n_examples // 3, n_examples // 2 + 1),
    ):
        block = samples.matrices(start, stop)
        assert block.dtype == torch.float64
        assert_close(as_numpy(block), case.G[start:stop], ENTRIES, scale=np.linalg.norm(case.G))


def keep_their_weights(case: Case) -> None:
    """In a subset."""
    if case.given_weights is None:
        case = case.with_(given_weights=case.weights)
    index = np.array([len(case.G) - 1, 0])
    H = kp.SecondMoment(case.samples().subset(torch.as_tensor(index)))
    expected = oracle.second_moment(case.G[index], case.weights[index])
    assert_close(dense(H), expected, ENTRIES, scale=oracle.norm(case.H))


# ---------------------------------------------------------------- the target


@on_every_route()
def test_every_quantity(case: Case, route: str) -> None:
    H = case.operator(route)
    with Checks() as check:
        for one in (
            norm_and_trace,
            dense_and_diagonal,
            apply,
            apply_to_an_empty_batch,
            apply_to_a_float32_matrix,
            inner_products,
            scipy_view,
            kronecker_spectrum,
            leading_singular_values,
        ):
            check(route, one, case, H)
        if "sample" in case.routes and route != "parameter":
            check(route, spectrum_of_unshared_factors_is_complete, case, H)


@on_every_route()
def test_leading_singular_values_by_themselves(case: Case, route: str) -> None:
    leading_singular_values(case, case.operator(route))  # without what the norm left behind


def norm_and_trace(case: Case, H: kp.SecondMoment) -> None:
    assert tuple(H.shape) == case.shape
    assert_close(H.norm(), oracle.norm(case.H), SCALAR)
    assert_close(H.trace(), np.trace(case.H), SCALAR)
    # by the Gram identity
    g = (np.sqrt(case.weights)[:, None, None, None] * case.G).reshape(-1, len(case.H))
    assert_close(H.norm() ** 2, np.sum((g @ g.T) ** 2), SCALAR)


def dense_and_diagonal(case: Case, H: kp.SecondMoment) -> None:
    assert_close(dense(H), case.H, ENTRIES)
    assert_close(as_numpy(H.diagonal()), np.diag(case.H).reshape(case.shape), ENTRIES)


def apply(case: Case, H: kp.SecondMoment) -> None:
    rng = np.random.default_rng(20240617)
    for batch in ((), (1,), (2, 3)):
        X = rng.standard_normal((*batch, *case.shape))
        product = H.apply(torch.tensor(X))
        bound = oracle.norm(case.H) * np.linalg.norm(X)
        assert_close(as_numpy(product), oracle.apply(case.H, X), ENTRIES, scale=bound)


def apply_to_an_empty_batch(case: Case, H: kp.SecondMoment) -> None:
    X = torch.zeros(0, *case.shape, dtype=torch.float64)
    assert H.apply(X).shape == X.shape


def apply_to_a_float32_matrix(case: Case, H: kp.SecondMoment) -> None:
    X = np.random.default_rng(20240617).standard_normal(case.shape).astype(np.float32)
    product = as_numpy(H.apply(torch.tensor(X)))
    bound = oracle.norm(case.H) * float(np.linalg.norm(X))
    assert_close(product, oracle.apply(case.H, X.astype(np.float64)), FLOAT32, scale=bound)


def inner_products(case: Case, H: kp.SecondMoment) -> None:
    """With itself, and with the same on another route."""
    assert_close(H.inner(H), oracle.norm(case.H) ** 2, SCALAR)
    assert_close(H.inner(case.operator("parameter")), oracle.norm(case.H) ** 2, SCALAR)


def scipy_view(case: Case, H: kp.SecondMoment) -> None:
    view, size = H.to_scipy(), len(case.H)
    assert isinstance(view, LinearOperator)
    assert view.shape == (size, size)
    assert view.dtype == np.float64
    rng = np.random.default_rng(20240617)
    x, X = rng.standard_normal(size), rng.standard_normal((size, 2))
    bound = oracle.norm(case.H) * float(np.linalg.norm(X))
    assert_close(view @ x, case.H @ x, ENTRIES, scale=bound)
    assert_close(view @ X, case.H @ X, ENTRIES, scale=bound)
    assert_close(view.rmatvec(x), case.H @ x, ENTRIES, scale=bound)


def kronecker_spectrum(case: Case, H: kp.SecondMoment) -> None:
    spectrum = H.kronecker_spectrum()
    assert spectrum.ndim == 1
    assert spectrum.dtype == torch.float64
    assert spectrum.device.type == "cpu"
    values, expected = as_numpy(spectrum), oracle.kronecker_spectrum(case.H, case.shape)
    m, n = case.shape
    assert np.all(values >= 0)
    assert np.all(np.diff(values) <= 0)
    assert 1 <= len(values) <= min(m * m, n * n)
    assert_close(values, expected[: len(values)], SPECTRUM, scale=expected[0])
    assert_close(values[0], expected[0], SCALAR)


def leading_singular_values(case: Case, H: kp.SecondMoment) -> None:
    expected = oracle.kronecker_spectrum(case.H, case.shape)
    for k in (1, 2, 3):
        values = as_numpy(H.kronecker_spectrum(k))
        assert 1 <= len(values) <= k
        assert_close(values, expected[: len(values)], SPECTRUM, scale=expected[0])
        left_out = expected[len(values) : k]  # fewer than k only where the rest is zero
        assert_close(left_out, np.zeros_like(left_out), SPECTRUM, scale=expected[0])


def spectrum_of_unshared_factors_is_complete(case: Case, H: kp.SecondMoment) -> None:
    m, n = case.shape
    values = as_numpy(H.kronecker_spectrum())
    assert len(values) == min(len(case.G), m * m, n * n)
    assert_close(np.sum(values**2), H.norm() ** 2, SCALAR)


def test_scipy_view_serves_an_eigensolver() -> None:
    case = factors_case("", 30, 5, 4)
    values = eigsh(case.operator().to_scipy(), k=3, which="LA", return_eigenvectors=False)
    expected = np.linalg.eigvalsh(case.H)[-3:]
    assert_close(np.sort(values), expected, SCALAR)


# ---------------------------------------------------------------- the Kronecker spectrum


def test_automatic_route_keeps_the_spectrum_of_unshared_factors_complete() -> None:
    rng = np.random.default_rng(0)
    d, a = torch.tensor(rng.standard_normal((2, 700, 24)))
    H = kp.SecondMoment(kp.GradientSamples.from_factors(d, a))
    values = as_numpy(H.kronecker_spectrum())
    assert_close(np.sum(values**2), H.norm() ** 2, SCALAR)


def test_repeated_singular_values_are_all_listed() -> None:
    """A single G has singular values s_i s_j, each of i != j twice."""
    case = matrices_case("", 1, 4, 3)
    s = np.linalg.svd(case.G[0, 0], compute_uv=False)
    expected = np.sort(np.outer(s, s).reshape(-1))[::-1]
    for route in case.routes:
        assert_close(as_numpy(case.operator(route).kronecker_spectrum(4)), expected[:4], SPECTRUM)


@pytest.mark.parametrize("k", [0, -1])
@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_spectrum_of_no_values_is_refused(route: str, k: int) -> None:
    with pytest.raises(InvalidInputError, match=str(k)):
        factors_case("", 6, 4, 3).operator(route).kronecker_spectrum(k)


# ---------------------------------------------------------------- routes and plans


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_half_steps_of_another_shape_are_refused(route: str) -> None:
    H = factors_case("", 7, 5, 4).operator(route)
    for given in (torch.eye(3), torch.randn(4, 5), torch.ones(4), H.left_factor):
        for step in (H.left_step, lambda V: H.quadratic_forms(None, V)):
            with pytest.raises(InvalidInputError, match=r"right matrix.*needs \[4, 4\]"):
                step(given)
    for given in (torch.eye(3), H.right_factor):
        for step in (H.right_step, lambda U: H.quadratic_forms(U, None)):
            with pytest.raises(InvalidInputError, match=r"left matrix.*needs \[5, 5\]"):
                step(given)


def test_sample_route_needs_unshared_factors() -> None:
    for case in (matrices_case("", 4, 3, 2), factors_case("", 4, 3, 2, positions=2)):
        with pytest.raises(UnsupportedError, match=r"'sample'.*T = 1.*'(auto|parameter)'"):
            case.operator("sample")


def test_unknown_route_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'denze'.*Did you mean 'dense'"):
        factors_case("", 4, 3, 2).operator("denze")


def test_plan_prints_its_routes() -> None:
    text = str(factors_case("", 6, 4, 3).operator().plan())
    for route in ("sample", "parameter", "dense"):
        assert route in text


# ---------------------------------------------------------------- sums in chunks


@on_every_route(case for case in CASES if len(case.G) <= 60)
def test_chunk_size_changes_nothing(
    case: Case, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small layers fit one chunk; large ones are summed in many."""
    with Checks() as check:
        for elements in (1, 100):
            monkeypatch.setattr(gram, "CHUNK_ELEMENTS", elements)
            check(f"chunks of {elements}", sums_in_chunks, case, case.operator(route))


def sums_in_chunks(case: Case, H: kp.SecondMoment) -> None:
    assert_close(H.norm(), oracle.norm(case.H), SCALAR)
    assert_close(H.trace(), np.trace(case.H), SCALAR)
    assert_close(dense(H), case.H, ENTRIES)
    assert_close(as_numpy(H.diagonal()), np.diag(case.H).reshape(case.shape), ENTRIES)
    X = np.random.default_rng(0).standard_normal((2, *case.shape))
    bound = oracle.norm(case.H) * float(np.linalg.norm(X))
    assert_close(as_numpy(H.apply(torch.tensor(X))), oracle.apply(case.H, X), ENTRIES, scale=bound)
    assert_close(H.inner(case.operator("parameter")), oracle.norm(case.H) ** 2, SCALAR)
    for name in case.approximations:
        expected = oracle.cosine(case.H, case.dense(name))
        assert kp.cosine_similarity(H, kp.approximate(H, name)) == pytest.approx(
            expected, abs=SCALAR
        )


# ---------------------------------------------------------------- underflow


@pytest.mark.parametrize("size", [1e-90, 1e-130, 1e-170])
def test_a_norm_whose_square_underflows_is_not_zero(size: float) -> None:
    G = torch.randn(30, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit, tiny = (kp.GradientSamples.from_matrices(c * G) for c in (1.0, size))
    expected = kp.SecondMoment(unit).norm() * size**2
    norm = kp.SecondMoment(tiny).norm()
    assert norm > 0
    assert norm == pytest.approx(expected, rel=SCALAR, abs=5e-324)
    notes = kp.compare(tiny, ["optimal", "diagonal"], estimates="plugin").table["note"].dropna()
    assert len(notes)
    assert notes.str.contains("rescale the loss").all()


def test_a_norm_of_zero_is_zero() -> None:
    zeros = torch.zeros(30, 2, 3, dtype=torch.float64)
    ones = torch.ones(30, 2, 4, dtype=torch.float64)
    opposite = torch.stack([ones[:, 0, :3], -ones[:, 0, :3]], dim=1)  # which cancel in each datum
    for d in (zeros, opposite):
        assert kp.SecondMoment(kp.GradientSamples.from_factors(d, ones)).norm() == 0
