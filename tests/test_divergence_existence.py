"""Where KL (q = 0) has no unique minimizer, and other divergences that cannot be fitted."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnsupportedError
from tests import approximation_oracle as more
from tests import oracle
from tests.cases import Case, as_numpy, assert_close, dense, factors_case
from tests.test_divergence import FITTED, QS, any_case, fit


def test_kl_of_too_few_unshared_draws_is_refused() -> None:
    case = factors_case("", 6, 6, 6)
    with pytest.raises(UnsupportedError, match=r"q=0.*too few.*N=6 .*6 x 6.*q > 0"):
        fit(case, 0)
    assert fit(case, 0.5).info["residual"] <= 1e-11


def test_kl_of_too_few_shared_draws_is_refused() -> None:
    case = factors_case("", 2, 6, 4, positions=8)
    with pytest.raises(UnsupportedError, match=r"m\^2 \+ n\^2 - N C m n <= 1.*it is 4.*N=2"):
        fit(case, 0)


@pytest.mark.parametrize(("m", "n"), [(3, 3), (4, 3), (3, 5), (1, 4), (4, 2)])
@pytest.mark.parametrize("positions", [1, 6])
def test_kl_is_refused_where_the_plain_iteration_diverges(m: int, n: int, positions: int) -> None:
    """From one draw up: a fit that is given is stationary, and enough draws always give one."""
    given = []
    for n_examples in (1, 2, 3, 4, 5, 6, 12, 30):
        case = factors_case("", n_examples, m, n, positions=positions, seed=n_examples)
        try:
            P = fit(case, 0)
        except UnsupportedError:
            given.append(False)
            continue
        given.append(True)
        L, R = P.scale * as_numpy(P.left), as_numpy(P.right)
        image = oracle.rearrange(case.H, (m, n)) @ oracle.matrix_power(R, -1.0).reshape(-1)
        assert_close(image.reshape(m, m) / np.linalg.matrix_rank(R), L, 1e-7)
    assert all(given[-2:])


@pytest.mark.parametrize("positions", [1, 6])
def test_kl_of_generic_draws_exists_exactly_where_the_count_says(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Derksen and Makam (2021) for full matrices; N >= max(m, n) + [m = n > 1] for rank one."""
    from kronecker_probe.approximations import divergence as module

    monkeypatch.setattr(module, "MAX_ROUNDS", 20000)  # at the threshold it takes thousands
    for m, n, n_examples in np.ndindex(4, 4, 6):
        case = factors_case("", n_examples + 1, m + 1, n + 1, positions=positions, seed=n_examples)
        ranks = [
            int(np.linalg.matrix_rank(factor(case.H, case.shape)))
            for factor in (oracle.left_factor, oracle.right_factor)
        ]
        if positions == 1:
            square = ranks[0] == ranks[1] > 1
            exists = n_examples + 1 >= max(ranks) + square
        else:
            excess = ranks[0] ** 2 + ranks[1] ** 2 - (n_examples + 1) * ranks[0] * ranks[1]
            exists = excess <= 1 and not (excess == 0 and math.gcd(*ranks) > 1)
        try:
            found = fit(case, 0).info["residual"] <= 1e-9
        except UnsupportedError:
            found = False
        assert found == exists, (case.shape, n_examples + 1, ranks)


@pytest.mark.parametrize("n_examples", [2, 20])
def test_kl_of_identical_draws(n_examples: int) -> None:
    """Identical rank-one draws are one Kronecker product; others leave a continuum of fits."""
    one = factors_case("", 1, 4, 3)
    assert one.output_grads is not None
    assert one.inputs is not None
    repeated = Case(
        "identical",
        output_grads=np.repeat(one.output_grads, n_examples, axis=0),
        inputs=np.repeat(one.inputs, n_examples, axis=0),
    )
    assert_close(dense(fit(repeated, 0)), repeated.H, FITTED)
    matrix = np.random.default_rng(8).standard_normal((1, 3, 3))
    with pytest.raises(UnsupportedError, match=r"q=0 \(KL\)"):
        fit(Case("identical", matrices=np.repeat(matrix, n_examples, axis=0)), 0)


def test_kl_of_draws_in_two_separate_blocks_is_refused() -> None:
    """Plenty of draws, but the two blocks can trade scale: minimizers form a continuum."""
    rng = np.random.default_rng(9)
    G = np.zeros((40, 4, 4))
    G[:20, :2, :2] = rng.standard_normal((20, 2, 2))
    G[20:, 2:, 2:] = rng.standard_normal((20, 2, 2))
    with pytest.raises(UnsupportedError, match="continuum"):
        fit(Case("blocks", matrices=G), 0)
    assert fit(Case("blocks", matrices=G), 0.5).info["residual"] <= 1e-11


def test_kl_without_enough_draws_in_a_subspace_is_refused() -> None:
    """20 draws, of which all but one share their input: counting does not see it."""
    case = factors_case("", 20, 5, 3)
    assert case.inputs is not None
    inputs = case.inputs.copy()
    inputs[2:] = inputs[2]
    with pytest.raises(UnsupportedError, match=r"q=0 \(KL\)"):
        fit(case.with_(inputs=inputs), 0)


@pytest.mark.parametrize("q", [*QS, 2.0])
@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_of_zero_is_zero(route: str, q: float) -> None:
    samples = kp.GradientSamples.from_factors(torch.zeros(5, 4), torch.ones(5, 3))
    P = kp.approximate(kp.SecondMoment(samples, route=route), "divergence", q=q)
    assert P.norm() == 0


@pytest.mark.parametrize("q", [-0.1, 2.1, math.nan, math.inf, "x", None, True])
def test_bad_q_is_refused(q: object) -> None:
    H = factors_case("", 6, 3, 2).operator()
    with pytest.raises(InvalidInputError, match=r"divergence.*q.*0 to 2"):
        kp.approximate(H, "divergence", q=q)


def test_unconverged_fits_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from kronecker_probe.approximations import divergence as module

    monkeypatch.setattr(module, "MAX_ROUNDS", 2)
    case = factors_case("", 12, 4, 3)
    with pytest.warns(RuntimeWarning, match=r"q=0.5.*4 x 3.*2 rounds.*residual"):
        P = fit(case, 0.5)
    assert P.info["rounds"] == 2
    assert P.info["residual"] > 1e-6
    with pytest.raises(UnsupportedError, match="no minimizer was found, 2 rounds"):
        fit(case, 0)


@given(any_case(), st.integers(0, 2**32 - 1))
def test_kl_is_refused_or_no_worse_than_any_other_product(case: Case, seed: int) -> None:
    try:
        P = fit(case, 0)
    except UnsupportedError:
        return
    bases = [np.linalg.eigh(as_numpy(factor)) for factor in (P.left, P.right)]
    ranges = [vectors[:, values > 1e-9 * values[-1]] for values, vectors in bases]
    inside = partial(np.linalg.multi_dot)
    both = np.kron(*ranges)
    H, fitted = both.T @ case.H @ both, both.T @ dense(P) @ both
    rng = np.random.default_rng(seed)
    roots = [rng.standard_normal((basis.shape[1],) * 2) for basis in ranges]
    rival = np.kron(*(inside([root, root.T]) for root in roots))
    assume(np.linalg.cond(rival) < 1e8)
    least = more.trace_power_divergence(H, fitted, 0)
    assert least <= more.trace_power_divergence(H, rival, 0) + 1e-6 * (1 + abs(least))
