"""(H + d)^-p g beside (P + d)^-p g, against scipy, in closed form, and with bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    NonFiniteError,
    UndefinedMetricWarning,
    UnsupportedError,
)
from kronecker_probe.operators import spectral_form
from tests.cases import (
    Case,
    factors_case,
    matrices_case,
    rank_deficient,
)
from tests.grid import Checks, on_every_case
from tests.oracle import Array
from tests.test_spectral_metrics import kronecker_exact

POWERS = (0.25, 0.5, 1.0)
# Roots of matrices with a condition number of up to 1e6.
ROOTS = 1e-9
# Lanczos stops at a bound of 1e-8 on the relative error of a direction.
LANCZOS = 1e-7


def truth(H: Array, P: Array, g: Array, d: float) -> tuple[Array, Array]:
    """Cosines and length ratios [k, powers], by scipy's roots."""
    flat, eye = g.reshape(len(g), -1), np.eye(len(H))
    cosines, ratios = [], []
    for p in POWERS:
        on_h, on_p = (
            flat @ np.real(scipy.linalg.fractional_matrix_power(A + d * eye, -p)) for A in (H, P)
        )
        a, b = np.linalg.norm(on_h, axis=1), np.linalg.norm(on_p, axis=1)
        cosines.append((on_h * on_p).sum(axis=1) / (a * b))
        ratios.append(b / a)
    return np.array(cosines).T, np.array(ratios).T


def fresh(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(3).standard_normal((count, *shape)))


@on_every_case()
def test_agreement_equals_scipy(case: Case) -> None:
    H = case.operator()
    with Checks() as check:
        for name in case.approximations:
            check(name, equals_scipy, case, name, H, kp.approximate(H, name))


def equals_scipy(case: Case, name: str, H: kp.SecondMoment, P: Any) -> None:
    g = fresh(case.shape)
    found = kp.direction_agreement(H, P, g, damping=1e-3)
    d = 1e-3 * np.trace(case.H) / len(case.H)
    assert found.damping == pytest.approx(d)
    assert found.error == 0.0
    cosines, ratios = truth(case.H, case.dense(name), g.numpy(), d)
    np.testing.assert_allclose(found.cosines.numpy(), cosines, rtol=0, atol=ROOTS)
    np.testing.assert_allclose(found.length_ratios.numpy(), ratios, rtol=ROOTS)


@pytest.mark.parametrize(
    "case",
    [
        factors_case("T1", 30, 6, 5),
        factors_case("T3", 20, 6, 4, positions=3),
        matrices_case("matrices", 20, 5, 6),
        rank_deficient(30, 6, 5, 2),
        factors_case("C3", 12, 6, 5, columns=3, positions=1),
    ],
    ids=str,
)
def test_lanczos_agrees_with_the_exact_route(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    g = fresh(case.shape)
    H = case.operator()
    exact = kp.direction_agreement(H, kp.approximate(H, "shampoo-squared"), g)
    monkeypatch.setattr(spectral_form, "EXACT_SIZE", 4)
    other = case.operator()
    found = kp.direction_agreement(other, kp.approximate(other, "shampoo-squared"), g)
    assert 0 < found.error <= 1e-8 or found.error == 0.0
    np.testing.assert_allclose(found.cosines, exact.cosines, rtol=0, atol=LANCZOS)
    np.testing.assert_allclose(found.length_ratios, exact.length_ratios, rtol=LANCZOS)


@pytest.mark.parametrize("name", ["optimal", "shampoo-squared", "eigen-corrected"])
def test_a_kronecker_target_is_followed_exactly(name: str) -> None:
    H = kronecker_exact(4, 3).operator()
    found = kp.direction_agreement(H, kp.approximate(H, name))
    np.testing.assert_allclose(found.cosines, 1, atol=ROOTS)
    np.testing.assert_allclose(found.length_ratios, 1, atol=1e-7)


def test_a_scale_changes_the_length_by_its_power() -> None:
    """Where the damping is far below both spectra: |(cP)^-p g| = c^-p |P^-p g|."""
    H = kronecker_exact(4, 3).operator()
    P = kp.approximate(H, "shampoo-squared")
    scaled = kp.KroneckerOperator(P.left, P.right, 16 * P.scale)
    found = kp.direction_agreement(H, scaled, damping=1e-10)
    np.testing.assert_allclose(found.cosines, 1, atol=1e-7)
    expected = np.tile([16**-p for p in POWERS], (found.n_gradients, 1))
    np.testing.assert_allclose(found.length_ratios, expected, rtol=1e-6)


def test_large_damping_leaves_every_gradient_as_it_is() -> None:
    H = factors_case("", 9, 4, 3).operator()
    found = kp.direction_agreement(H, kp.approximate(H, "shampoo"), damping=1e8)
    np.testing.assert_allclose(found.cosines, 1, atol=1e-12)
    np.testing.assert_allclose(found.length_ratios, 1, atol=1e-6)


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6))
def test_rotations_and_units_change_nothing(seed: int, scale: float) -> None:
    case = factors_case("", 9, 4, 3, seed=seed)
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (4, 3))
    assert case.output_grads is not None
    assert case.inputs is not None
    turned = case.with_(output_grads=case.output_grads @ U * scale, inputs=case.inputs @ V)
    g = rng.standard_normal((2, 4, 3))
    found = []
    for one, gradients in ((case, g), (turned, scale**3 * U.T @ g @ V)):
        H = one.operator()
        P = kp.approximate(H, "shampoo-squared")
        found.append(kp.direction_agreement(H, P, torch.tensor(gradients)))
    np.testing.assert_allclose(found[0].cosines, found[1].cosines, atol=1e-8)
    np.testing.assert_allclose(found[0].length_ratios, found[1].length_ratios, rtol=1e-7)
    assert float(found[0].cosines.min()) < 1 - 1e-4  # there was something to see


def test_float32_data_give_the_numbers_of_their_rounded_values() -> None:
    case = factors_case("", 9, 5, 4).cast(torch.float32)
    found = []
    for one in (case, case.with_(dtype=torch.float64)):
        H = one.operator()
        P = kp.approximate(H, "shampoo-squared")
        found.append(kp.direction_agreement(H, P, fresh((5, 4)).float()))
    np.testing.assert_allclose(found[0].cosines, found[1].cosines, atol=1e-9)
    assert found[0].cosines.dtype == torch.float64


# ---------------------------------------------------------------- means, defaults


def test_the_table_is_the_mean_with_its_spread() -> None:
    H = factors_case("", 40, 4, 3).operator()
    found = kp.direction_agreement(H, kp.approximate(H, "shampoo"), n_gradients=7)
    assert found.n_gradients == 7
    table = found.table.set_index("power")
    assert list(table.index) == list(POWERS)
    for k, power in enumerate(POWERS):
        for name, values in (("cosine", found.cosines), ("length_ratio", found.length_ratios)):
            column = values[:, k].numpy()
            row = table.loc[power]
            assert row[name] == pytest.approx(np.mean(column))
            assert row[f"{name}_std"] == pytest.approx(np.std(column, ddof=1))
            assert row[f"{name}_stderr"] == pytest.approx(np.std(column, ddof=1) / math.sqrt(7))
    assert "7 gradients" in repr(found)


def test_one_power_and_one_gradient() -> None:
    H = factors_case("", 40, 4, 3).operator()
    P, g = kp.approximate(H, "kfac"), fresh((4, 3), 1)
    one = kp.direction_agreement(H, P, g[0], powers=0.5)
    several = kp.direction_agreement(H, P, g)
    assert one.cosines.shape == (1, 1)
    assert float(one.cosines) == pytest.approx(float(several.cosines[0, 1]), rel=1e-12)
    assert math.isnan(one.table["cosine_std"].iloc[0])


def test_draws_are_scored_by_default_and_the_seed_chooses_them() -> None:
    H = factors_case("", 40, 4, 3).operator()
    P = kp.approximate(H, "kfac")
    first, again, other = (kp.direction_agreement(H, P, seed=seed) for seed in (0, 0, 1))
    assert first.n_gradients == 16
    assert torch.equal(first.cosines, again.cosines)
    assert not torch.equal(first.cosines, other.cosines)


# ---------------------------------------------------------------- undefined numbers, bad input

ZERO = kp.DiagonalOperator(torch.zeros(3, 2, dtype=torch.float64))
ONE = kp.DiagonalOperator(torch.ones(3, 2, dtype=torch.float64))
G = torch.ones(1, 3, 2)


def test_zero_target_and_zero_gradients_have_no_direction() -> None:
    with pytest.warns(UndefinedMetricWarning, match="H = 0"):
        found = kp.direction_agreement(ZERO, ONE, G)
    assert found.n_gradients == 0
    assert found.table["cosine"].isna().all()
    assert "undefined: H = 0" in repr(found)
    with pytest.warns(UndefinedMetricWarning, match="the gradient is zero"):
        found = kp.direction_agreement(ONE, ONE, 0 * G)
    assert found.n_gradients == 0
    assert found.note == "the gradient is zero: no direction is defined"
    assert found.note in repr(found)
    with pytest.warns(UndefinedMetricWarning, match="all gradients are zero"):
        kp.direction_agreement(ONE, ONE, torch.cat([0 * G, 0 * G]))
    assert kp.direction_agreement(ONE, ONE, torch.cat([0 * G, G])).n_gradients == 1
    assert float(kp.direction_agreement(ONE, ZERO, G, powers=1).cosines) == pytest.approx(1)


@pytest.mark.parametrize("powers", [0, -0.5, 1.5, math.nan, (), (0.5, 2), "half", None, True])
def test_powers_outside_are_refused(powers: object) -> None:
    with pytest.raises(InvalidInputError, match="powers"):
        kp.direction_agreement(ONE, ONE, G, powers=powers)


@pytest.mark.parametrize("damping", [0, -1.0, math.nan, math.inf, "1e-3"])
def test_a_bad_damping_is_refused(damping: object) -> None:
    with pytest.raises(InvalidInputError, match="damping"):
        kp.direction_agreement(ONE, ONE, G, damping=damping)


@pytest.mark.parametrize(
    "gradients",
    [torch.ones(2, 3), torch.ones(0, 3, 2), torch.ones(1, 1, 3, 2), torch.ones(3, 2).int(), [1.0]],
    ids=["transposed", "none", "4-D", "integers", "list"],
)
def test_bad_gradients_are_refused(gradients: object) -> None:
    with pytest.raises(InvalidInputError, match="gradients"):
        kp.direction_agreement(ONE, ONE, gradients)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(NonFiniteError):
        kp.direction_agreement(ONE, ONE, G / 0)
    with pytest.raises(InvalidInputError, match="n_gradients"):
        kp.direction_agreement(ONE, ONE, n_gradients=0)
    with pytest.raises(InvalidInputError, match="gradients="):
        kp.direction_agreement(ONE, ONE)  # no draws to take
    indefinite = kp.DenseOperator(torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -1])), (3, 2))
    with pytest.raises(InvalidInputError, match="not PSD"):
        kp.direction_agreement(ONE, indefinite, G)


def test_a_large_unstructured_approximation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_form, "EXACT_SIZE", 4)
    P = kp.DenseOperator(torch.eye(6), (3, 2))
    with pytest.raises(UnsupportedError, match="no exact roots"):
        kp.direction_agreement(ONE, P, G)
