"""Further approximations: relatives of K-FAC and of Shampoo, one-sided ones and baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kronecker_probe as kp
from tests import approximation_oracle as more
from tests import oracle
from tests import reference_fixture as fixture
from tests.cases import CASES, Case, assert_close, dense, factors_case
from tests.grid import Checks, on_every_route
from tests.oracle import Array
from tests.tolerances import ENTRIES, INEQUALITY, PRINTED, SCALAR, ZERO_ERROR

BY_MATRIX = {
    "shampoo-squared-sequential": more.sequential,
    "left-only": more.left_only,
    "right-only": more.right_only,
    "identity": more.identity,
}
BY_FACTORS = ("kfac-reduce", "tkfac", "ekfac")
FACTORED = tuple(case for case in CASES if case.factored)


def expected(case: Case, name: str) -> Array:
    if name in BY_MATRIX:
        return BY_MATRIX[name](case.H, case.shape)
    assert case.output_grads is not None
    assert case.inputs is not None
    factors = case.output_grads, case.inputs, case.weights
    if name == "ekfac":
        return more.ekfac(case.H, *factors)
    return {"kfac-reduce": more.kfac_reduce, "tkfac": more.tkfac}[name](*factors)


@on_every_route()
def test_every_quantity(case: Case, route: str) -> None:
    H = case.operator(route)
    with Checks() as check:
        for name in (*BY_MATRIX, *(BY_FACTORS if case.factored else ())):
            check(name, against_the_oracle, case, H, name)


def against_the_oracle(case: Case, H: kp.SecondMoment, name: str) -> None:
    P = kp.approximate(H, name)
    matrix = expected(case, name)
    if name == "ekfac" and not distinct_kfac_eigenvalues(case):
        # the basis is not determined, so neither is the operator; the oracle's is another
        assert P.trace() == pytest.approx(np.trace(case.H), rel=SCALAR)
        return
    assert_close(dense(P), matrix, ENTRIES)
    assert P.norm() == pytest.approx(oracle.norm(matrix), rel=SCALAR)
    assert P.trace() == pytest.approx(np.trace(matrix), rel=SCALAR)
    cross = oracle.inner(case.H, matrix)
    assert H.inner(P) == pytest.approx(cross, rel=SCALAR)


def distinct_kfac_eigenvalues(case: Case) -> bool:
    assert case.output_grads is not None
    assert case.inputs is not None
    for factor in oracle.kfac_factors(case.output_grads, case.inputs, case.weights):
        values = np.linalg.eigvalsh(factor)
        if np.any(np.diff(values[values > 1e-12 * values[-1]]) < 1e-6 * values[-1]):
            return False
    return True


# ---------------------------------------------------------------- K-FAC with shared positions


class DeepLinear(nn.Module):
    """Three linear layers over positions; pooled in front of the last one, or never."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool = pool
        self.first = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        self.second = nn.Linear(4, 3, bias=False, dtype=torch.float64)
        self.last = nn.Linear(3, 2, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x))
        if self.pool == "mean":
            h = h.mean(dim=1)
        elif self.pool == "sum":
            h = h.sum(dim=1)
        return self.last(h)


def captured(pool: str, positions: int, reduction: str) -> Any:
    torch.manual_seed(1)
    x = torch.randn(9, positions, 5, dtype=torch.float64)
    y = torch.randn(9, 2) if pool != "none" else torch.randn(9, positions, 2)
    return kp.capture(
        DeepLinear(pool),
        lambda out, target: F.mse_loss(out, target, reduction=reduction),
        (x, y.double()),
        target="ggn",
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("positions", [1, 2, 7])
@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_reduce_is_exact_for_a_pooled_deep_linear_network(
    pool: str, positions: int, reduction: str
) -> None:
    """The reduce setting of 2311.00636: this fixes the normalization, scale included."""
    samples = captured(pool, positions, reduction)
    for name in ("first.weight", "second.weight", "last.weight"):
        H = kp.SecondMoment(samples[name])
        assert kp.relative_error(H, kp.approximate(H, "kfac-reduce")) <= ZERO_ERROR
        if positions > 1 and name != "last.weight":
            assert kp.relative_error(H, kp.approximate(H, "kfac")) > 0.1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_expand_is_exact_for_a_deep_linear_network_with_a_loss_per_position(
    reduction: str,
) -> None:
    samples = captured("none", 4, reduction)
    for name in ("first.weight", "second.weight", "last.weight"):
        H = kp.SecondMoment(samples[name])
        assert kp.relative_error(H, kp.approximate(H, "kfac")) <= ZERO_ERROR


@pytest.mark.parametrize("case", [c for c in FACTORED if not c.shared], ids=str)
def test_reduce_is_kfac_without_shared_positions(case: Case) -> None:
    H = case.operator()
    assert_close(dense(kp.approximate(H, "kfac-reduce")), dense(kp.approximate(H, "kfac")), ENTRIES)


# ---------------------------------------------------------------- TKFAC and its aliases


@on_every_route(case for case in FACTORED if not case.shared)
def test_tkfac_is_shampoo_squared_on_unshared_draws(case: Case, route: str) -> None:
    """TKFAC = TNT = one-step KPSVD = trace-scaled Shampoo^2, each by its own definition."""
    H = case.operator(route)
    assert_close(
        dense(kp.approximate(H, "tkfac")), dense(kp.approximate(H, "shampoo-squared")), ENTRIES
    )


@pytest.mark.parametrize("case", [c for c in FACTORED if not c.shared], ids=str)
def test_one_step_kpsvd_is_shampoo_squared_up_to_scale(case: Case) -> None:
    """One power step on R(H) = sum_i w_i vec(d d^T) vec(a a^T)^T from vec(I), both ways at once."""
    rearranged = oracle.rearrange(case.H, case.shape)
    m, n = case.shape
    left = (rearranged @ np.eye(n).reshape(-1)).reshape(m, m)
    right = (rearranged.T @ np.eye(m).reshape(-1)).reshape(n, n)
    product = np.kron(left, right)
    P = dense(kp.approximate(case.operator(), "shampoo-squared"))
    assert_close(product / oracle.norm(product), P / oracle.norm(P), ENTRIES)


def test_tkfac_of_shared_positions_is_shampoo_squared_of_positions_as_draws() -> None:
    case = factors_case("", 6, 4, 3, positions=3)
    assert case.output_grads is not None
    assert case.inputs is not None
    single = Case(
        "positions",
        output_grads=case.output_grads.reshape(-1, 4),
        inputs=case.inputs.reshape(-1, 3),
        given_weights=np.full(18, 1 / 6),
    )
    P = kp.approximate(case.operator(), "tkfac")
    assert_close(dense(P), dense(kp.approximate(single.operator(), "shampoo-squared")), ENTRIES)
    assert abs(P.trace() / np.trace(case.H) - 1) > 0.05  # positions are correlated here


# ---------------------------------------------------------------- theorems


@on_every_route(FACTORED)
def test_ekfac_is_never_worse_than_kfac(case: Case, route: str) -> None:
    H = case.operator(route)
    better = kp.relative_error(H, kp.approximate(H, "ekfac")) ** 2
    for name in ("kfac", "kfac-reduce") if not case.shared else ("kfac",):
        worse = kp.relative_error(H, kp.approximate(H, name)) ** 2
        assert better <= worse * (1 + INEQUALITY) + INEQUALITY


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_sided_fits_are_the_nearest_of_their_kind(case: Case, rng: np.random.Generator) -> None:
    """Their best scale is 1, and no other factor on that side comes nearer."""
    H = case.operator()
    m, n = case.shape
    for name, size in (("left-only", m), ("right-only", n)):
        P = kp.approximate(H, name)
        assert kp.best_scale(H, P) == pytest.approx(1, rel=SCALAR)
        error = kp.relative_error(H, P) ** 2
        for _ in range(5):
            X = 0.1 * rng.standard_normal((size, size)) * np.sqrt(H.trace())
            other = torch.tensor(X @ X.T)
            sides = (other, torch.eye(n).double()), (torch.eye(m).double(), other)
            rival = kp.KroneckerOperator(*sides[name == "right-only"])
            assert error <= kp.relative_error(H, rival) ** 2 + INEQUALITY


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sequential_is_the_first_round_of_alternating_least_squares(case: Case) -> None:
    (left, right), *_ = oracle.alternating_least_squares(case.H, case.shape, 1)
    H = case.operator()
    P = kp.approximate(H, "shampoo-squared-sequential")
    cosine = oracle.cosine(case.H, np.kron(left, right))
    assert kp.cosine_similarity(H, P) == pytest.approx(cosine, abs=SCALAR)
    assert kp.best_scale(H, P) == pytest.approx(1, rel=SCALAR)


def test_sequential_and_simultaneous_differ_on_the_fixture() -> None:
    samples = kp.GradientSamples.from_matrices(torch.tensor(fixture.SAMPLES))
    H = kp.SecondMoment(samples)
    sequential = kp.cosine_similarity(H, kp.approximate(H, "shampoo-squared-sequential"))
    simultaneous = kp.cosine_similarity(H, kp.approximate(H, "shampoo-squared"))
    assert sequential == pytest.approx(fixture.ALTERNATING_COSINES[0], abs=PRINTED)
    assert simultaneous == pytest.approx(fixture.COSINE["shampoo-squared"], abs=PRINTED)


@pytest.mark.parametrize("name", ["left-only", "right-only", "identity"])
@pytest.mark.parametrize("power", [-0.5, 0.5, 1.0])
def test_powers_of_identity_factors(name: str, power: float) -> None:
    case = factors_case("", 30, 4, 3)
    P = kp.approximate(case.operator(), name)
    assert isinstance(P, kp.KroneckerOperator)
    assert_close(dense(P.power(power)), oracle.matrix_power(dense(P), power), 1e-9)


@pytest.mark.parametrize("name", [*BY_MATRIX, *BY_FACTORS, "optimal:rank=3"])
@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_of_zero_is_zero(route: str, name: str) -> None:
    samples = kp.GradientSamples.from_factors(torch.zeros(5, 4), torch.ones(5, 3))
    P = kp.approximate(kp.SecondMoment(samples, route=route), name)
    assert P.norm() == 0


@pytest.mark.parametrize("name", [*BY_MATRIX, "kfac-reduce", "tkfac", "divergence:q=0.5"])
def test_float32_draws_agree_with_float64(name: str) -> None:
    case = factors_case("", 20, 4, 3, positions=2).cast(torch.float32)
    if name == "divergence:q=0.5":
        matrix = more.alternate(case.H, case.shape, 0.5)
    else:
        matrix = expected(case, name)
    P = kp.approximate(case.operator(), name)
    assert_close(dense(P), matrix, 1e-9)  # the same draws, widened without error


@pytest.mark.parametrize(
    "name",
    [
        *BY_MATRIX,
        "optimal:rank=3",
        "divergence:q=0.5",
        "divergence:q=0",
        "shampoo-squared:block_size=2",
        "optimal:rank=2,block_size=3",
    ],
)
def test_draws_of_an_embedding_are_those_of_its_matrices(name: str) -> None:
    rng = np.random.default_rng(2)
    tokens = torch.tensor(rng.integers(0, 5, (25, 3)))
    d = torch.tensor(rng.standard_normal((25, 2, 3, 4)))
    table = kp.GradientSamples.from_embedding(tokens, d, 5)
    formed = kp.GradientSamples.from_matrices(table.matrices())
    P, Q = (kp.approximate(kp.SecondMoment(one), name) for one in (table, formed))
    assert_close(dense(P), dense(Q), 1e-9)
    H = kp.SecondMoment(table)
    assert kp.cosine_similarity(H, P) == pytest.approx(oracle.cosine(dense(H), dense(Q)), abs=1e-9)
