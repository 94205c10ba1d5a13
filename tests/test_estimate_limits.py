"""Where estimates abstain, are exact, or carry a warning; requests that make no sense."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, MemoryBudgetError
from kronecker_probe.operators.second_moment import planner

# relative rounding of float64 sums and roots
SAME = 1e-12


def factors(count: int = 128, m: int = 4, n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(count, m, generator=generator, dtype=torch.float64)
    return d, torch.randn(count, n, generator=generator, dtype=torch.float64)


def test_a_datum_that_only_the_factors_see_silences_kfac_alone() -> None:
    d, a = factors()
    d[0] *= 1e3
    a[0] = 0.0  # so that G_0 = 0
    H = kp.SecondMoment(kp.GradientSamples.from_factors(d, a))
    for name in ("kfac", "ekfac"):
        found = kp.estimate(H, name)
        assert found.value != found.value
        assert found.n_eff == pytest.approx(1, abs=1e-3)
        assert "N_eff" in found.note
    others = kp.estimate(H, "shampoo-squared")
    assert others.n_eff > 30
    assert others.value == others.value


def test_the_effective_number_of_shared_factors_sums_over_positions() -> None:
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(60, 1, 2, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(60, 2, 4, generator=generator, dtype=torch.float64)
    d[0] *= 40
    a[0] *= 1 / 40
    found = kp.estimate(kp.SecondMoment(kp.GradientSamples.from_factors(d, a)), "kfac")
    sizes = d.square().sum(dim=(1, 2, 3))
    expected = float(sizes.sum() ** 2 / sizes.square().sum())
    assert found.n_eff == pytest.approx(expected, rel=SAME)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5)])
@pytest.mark.parametrize("name", ["optimal", "shampoo-squared", "shampoo-squared-sequential"])
def test_a_product_gives_any_second_moment_of_vectors(name: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    G = torch.randn(64, *shape, generator=generator, dtype=torch.float64)
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(G))
    found = kp.estimate(H, name)
    assert found.value == pytest.approx(1, abs=SAME)
    assert found.interval() == pytest.approx((1, 1), abs=SAME)
    assert kp.estimate(H, name, "relative_error").value == pytest.approx(0, abs=SAME)


@pytest.mark.parametrize(("shape", "exact", "other"), [
    ((5, 1), "left-only", "right-only"), ((1, 5), "right-only", "left-only"),
])  # fmt: skip
def test_of_vectors_one_side_is_exact_and_the_other_is_not(
    shape: tuple[int, int], exact: str, other: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    G = torch.randn(64, *shape, generator=generator, dtype=torch.float64)
    G *= torch.tensor([4.0, 2, 1, 1, 1], dtype=torch.float64).view(shape)
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(G))
    assert kp.estimate(H, exact).value == pytest.approx(1, abs=SAME)
    assert kp.estimate(H, other).value < 0.9


def test_copies_of_data_are_told() -> None:
    d, a = factors()
    clean = kp.SecondMoment(kp.GradientSamples.from_factors(d, a))
    assert kp.estimate(clean, metric="norm").note == ""
    d[[7, 9, 50]], a[[7, 9, 50]] = d[3].clone(), a[3].clone()
    d[90:95] = 0.0  # data without gradients are no copies of each other
    copied = kp.SecondMoment(kp.GradientSamples.from_factors(d, a))
    assert "3 of 128 examples have the same gradients" in kp.estimate(copied, metric="norm").note
    rows = kp.compare(copied.samples, "kfac").table.query("metric == 'norm'")
    assert rows["note"].str.contains("same gradients").sum() == 1


FEW = [(20, "N = 20 examples"), (200, "a few examples carry")]


@pytest.mark.parametrize(("count", "told"), FEW)
def test_few_data_and_few_that_carry_all_are_told_apart(count: int, told: str) -> None:
    d, a = factors(count)
    if count > 30:
        d[:3] *= 100
    else:
        d, a = d / d.norm(dim=1, keepdim=True), a / a.norm(dim=1, keepdim=True)
    note = kp.estimate(kp.SecondMoment(kp.GradientSamples.from_factors(d, a)), "kfac").note
    assert told in note


def test_a_layer_that_does_not_fit_is_told_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = planner.make_plan

    def limited(samples: kp.GradientSamples, *rest: object) -> object:
        if samples.shape == (4, 3):
            raise MemoryBudgetError("needs 200.00 GB")
        return plan(samples, *rest)

    monkeypatch.setattr("kronecker_probe.operators.second_moment.target.make_plan", limited)
    layers = {
        "large": kp.GradientSamples.from_factors(*factors()),
        "small": kp.GradientSamples.from_factors(*factors(m=2)),
    }
    scores = kp.compare(layers, ["kfac", "shampoo"], metrics=["cosine", "trace_ratio"])
    large = scores.table.query("parameter == 'large'")
    assert large["value"].isna().all()
    assert set(large["metric"]) == {"cosine", "trace_ratio"}
    assert large["note"].str.contains("200.00 GB").all()
    assert scores.pivot().loc["small"].notna().all()


@pytest.mark.parametrize(("options", "told"), [
    ({"estimates": ()}, "No kind of estimate"),
    ({"estimates": 3}, "estimates=3"),
    ({"estimates": None}, "estimates=None"),
    ({"metrics": ()}, "No metric"),
    ({"metrics": 3}, "metrics=3"),
    ({"metrics": "cosine:power=2"}, "no option"),
    ({"singular_values": "a"}, "singular_values='a'"),
])  # fmt: skip
def test_requests_for_nothing_or_of_a_wrong_type_are_refused(
    options: dict[str, object], told: str
) -> None:
    call: Callable[..., object] = kp.compare
    with pytest.raises(InvalidInputError, match=told):
        call(kp.GradientSamples.from_factors(*factors(40)), **options)


def test_any_real_number_is_a_standard_error_but_not_one_out_of_reach() -> None:
    H = kp.SecondMoment(kp.GradientSamples.from_factors(*factors()))
    assert kp.samples_needed(H, np.float32(0.01)) == kp.samples_needed(H, float(np.float32(0.01)))
    for stderr in (1e-300, float("inf"), 0, -1, True, "a"):
        with pytest.raises(InvalidInputError, match="stderr"):
            kp.samples_needed(H, stderr)  # type: ignore[arg-type]


def test_no_error_where_the_norm_of_h_has_no_estimate() -> None:
    d = torch.eye(40, dtype=torch.float64)
    a = torch.eye(40, dtype=torch.float64)
    d[1], a[1] = d[0] + 1e-3 * d[2], a[0] + 1e-3 * a[2]  # one pair of draws meets, no other
    H = kp.SecondMoment(kp.GradientSamples.from_factors(d, a))
    for metric in ("cosine", "relative_error", "best_scale_error"):
        for kind in ("population", "held-out"):
            found = kp.estimate(H, "shampoo-squared", metric, kind)
            assert found.value != found.value
            assert "not positive" in found.note
