"""Properties over drawn shapes, ranks, scales, weights and dtypes, against the dense oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kronecker_probe as kp
from tests import oracle
from tests.cases import KRONECKER, Case, as_numpy, assert_close, dense
from tests.tolerances import ENTRIES, INEQUALITY, SCALAR, SPECTRUM

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LOG_SCALES = st.integers(-12, 12)  # of each factor, so G = d a^T spans 1e-24 to 1e24


@st.composite
def cases(draw: st.DrawFn, positions: int | None = None) -> Case:
    """Any shape and kind; normal entries from a drawn seed, low rank, heavy tails, odd weights."""
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    n_examples = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_positions = draw(st.integers(1, 4)) if positions is None else positions
    left, right = 10.0 ** draw(LOG_SCALES), 10.0 ** draw(LOG_SCALES)
    weights = draw(
        st.none()
        | st.lists(
            st.just(0.0) | st.floats(1e-3, 1e3), min_size=n_examples, max_size=n_examples
        ).map(np.array)
    )
    assume(weights is None or weights.max() > 0)
    # each datum has a size of its own
    tails = 10 ** (draw(st.sampled_from([0.0, 1.0])) * rng.standard_normal(n_examples))
    if positions is None and draw(st.booleans()):
        G = left * right * tails[:, None, None] * rng.standard_normal((n_examples, m, n))
        case = Case("matrices", matrices=G, given_weights=weights)
    else:
        n_columns = draw(st.integers(1, 3))
        rank_d, rank_a = draw(st.integers(1, m)), draw(st.integers(1, n))
        d = rng.standard_normal((n_examples, n_columns, n_positions, rank_d))
        d = d @ rng.standard_normal((rank_d, m))
        a = rng.standard_normal((n_examples, n_positions, rank_a))
        a = a @ rng.standard_normal((rank_a, n))
        case = Case(
            f"T{n_positions}",
            output_grads=left * tails[:, None, None, None] * d,
            inputs=right * a,
            given_weights=weights,
        )
    return case.cast(draw(st.sampled_from(DTYPES)))


def well_separated(case: Case) -> bool:
    """The eigenvalues of L and R are distinct, so that their eigenbases are determined."""
    for factor in (
        oracle.left_factor(case.H, case.shape),
        oracle.right_factor(case.H, case.shape),
    ):
        values = np.linalg.eigvalsh(factor)
        kept = values[values > 1e-12 * values[-1]]
        if np.any(np.diff(kept) < 1e-4 * values[-1]):
            return False
    return True


@given(cases())
def test_target_matches_the_oracle(case: Case) -> None:
    X = np.random.default_rng(0).standard_normal((2, *case.shape))
    for route in case.routes:
        H = case.operator(route)
        size = oracle.norm(case.H)
        assert_close(H.norm(), size, SCALAR)
        assert_close(H.trace(), np.trace(case.H), SCALAR)
        assert_close(dense(H), case.H, ENTRIES)
        assert_close(as_numpy(H.diagonal()), np.diag(case.H).reshape(case.shape), ENTRIES)
        product = as_numpy(H.apply(torch.tensor(X)))
        bound = size * float(np.linalg.norm(X))
        assert_close(product, oracle.apply(case.H, X), ENTRIES, scale=bound)


@given(cases())
def test_quality_matches_the_oracle_on_every_route(case: Case) -> None:
    separated = well_separated(case)
    for name in case.approximations:
        if name == "eigen-corrected" and not separated:
            continue
        expected = case.dense(name)
        cosine = oracle.cosine(case.H, expected)
        error = oracle.relative_error(case.H, expected) ** 2
        for route in case.routes:
            H = case.operator(route)
            P = kp.approximate(H, name)
            assert P.norm() == pytest.approx(oracle.norm(expected), rel=SCALAR)
            assert kp.cosine_similarity(H, P) == pytest.approx(cosine, abs=SCALAR)
            assert kp.relative_error(H, P) ** 2 == pytest.approx(error, rel=SCALAR, abs=SCALAR)


@given(cases())
def test_kronecker_spectrum_matches_the_oracle(case: Case) -> None:
    expected = oracle.kronecker_spectrum(case.H, case.shape)
    for route in case.routes:
        values = as_numpy(case.operator(route).kronecker_spectrum())
        assert len(values) <= len(expected)
        assert np.all(np.diff(values) <= 0)
        assert values[0] == pytest.approx(expected[0], rel=SCALAR)
        assert_close(values, expected[: len(values)], SPECTRUM, scale=expected[0])
        if "sample" in case.routes:
            left_out = expected[len(values) :]
            assert_close(left_out, np.zeros_like(left_out), SPECTRUM, scale=expected[0])


@given(cases(), st.integers(0, 2**32 - 1))
def test_optimum_is_the_ceiling_of_kronecker_products(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    roots = [rng.standard_normal((size, rng.integers(1, size + 1))) for size in case.shape]
    factors = [torch.tensor(root @ root.T) for root in roots]
    for route in case.routes:
        H = case.operator(route)
        ceiling = kp.cosine_similarity(H, kp.approximate(H, "optimal"))
        assert ceiling <= 1 + SCALAR
        rivals = [kp.approximate(H, name) for name in KRONECKER if name in case.approximations]
        for P in (*rivals, kp.KroneckerOperator(*factors)):
            assert kp.cosine_similarity(H, P) <= ceiling + INEQUALITY


@given(cases())
def test_eigen_corrected_is_at_least_as_near_as_shampoo_squared(case: Case) -> None:
    """Even with repeated eigenvalues: any eigenbasis is one in which Shampoo^2 is diagonal."""
    for route in case.routes:
        H = case.operator(route)
        corrected = kp.relative_error(H, kp.approximate(H, "eigen-corrected"))
        squared = kp.relative_error(H, kp.approximate(H, "shampoo-squared"))
        assert corrected**2 <= squared**2 + INEQUALITY


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
        elements=st.integers(-2, 2).map(float),
    )
)
def test_small_integer_matrices(G: np.ndarray) -> None:
    """Exact zeros, repeated eigenvalues and singular factors, where code paths fork."""
    assume(np.any(G))
    case = Case("integers", matrices=G)
    for route in case.routes:
        H = case.operator(route)
        assert_close(dense(H), case.H, ENTRIES)
        best = kp.approximate(H, "optimal")
        sigma = oracle.kronecker_spectrum(case.H, case.shape)[0]
        # the optimum may not be unique, its value is
        assert kp.cosine_similarity(H, best) == pytest.approx(
            sigma / oracle.norm(case.H), abs=SCALAR
        )
        for name in ("shampoo", "shampoo-squared", "diagonal"):
            expected = oracle.cosine(case.H, case.dense(name))
            actual = kp.cosine_similarity(H, kp.approximate(H, name))
            assert actual == pytest.approx(expected, abs=SCALAR)


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)).flatmap(
        lambda sizes: st.tuples(
            hnp.arrays(np.float64, sizes[:2], elements=st.integers(-2, 2).map(float)),
            hnp.arrays(np.float64, (sizes[0], sizes[2]), elements=st.integers(-2, 2).map(float)),
        )
    )
)
def test_small_integer_factors(factors: tuple[np.ndarray, np.ndarray]) -> None:
    case = Case("integers", output_grads=factors[0], inputs=factors[1])
    assume(np.any(case.H))
    for route in case.routes:
        H = case.operator(route)
        assert_close(H.norm(), oracle.norm(case.H), SCALAR)
        sigma = oracle.kronecker_spectrum(case.H, case.shape)[0]
        best = kp.cosine_similarity(H, kp.approximate(H, "optimal"))
        assert best == pytest.approx(sigma / oracle.norm(case.H), abs=SCALAR)
        for name in ("shampoo", "shampoo-squared", "kfac", "diagonal"):
            expected = oracle.cosine(case.H, case.dense(name))
            actual = kp.cosine_similarity(H, kp.approximate(H, name))
            assert actual == pytest.approx(expected, abs=SCALAR)


@given(cases(positions=1))
def test_matrices_and_factors_are_the_same_samples(case: Case) -> None:
    """G formed by the caller and G left factored give the same quality numbers."""
    assume(case.G.shape[1] == 1)
    factored = case.operator()
    formed = case.with_(
        matrices=case.G[:, 0], output_grads=None, inputs=None, dtype=torch.float64
    ).operator()
    assert_close(formed.inner(factored), factored.norm() ** 2, SCALAR)
    for name in ("optimal", "shampoo", "shampoo-squared", "diagonal"):
        P, Q = kp.approximate(factored, name), kp.approximate(formed, name)
        assert kp.cosine_similarity(factored, Q) == pytest.approx(
            kp.cosine_similarity(formed, P), abs=SCALAR
        )
        assert kp.cosine_similarity(P, Q) == pytest.approx(1, abs=SPECTRUM)
