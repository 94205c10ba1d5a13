"""Estimates of fitted approximations, held-out factors, and what kp.estimate says and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnknownNameError, UnsupportedError
from kronecker_probe.quality.estimates.examples import Examples
from kronecker_probe.quality.estimates.forms import example_forms
from kronecker_probe.quality.metrics.catalog import ESTIMABLE

# float64 sums of positive terms in another order, and iterations that stop near rounding
SAME, FITTED = 1e-10, 1e-6
NAMES = ("optimal", "optimal:rank=2", "shampoo", "eigen-corrected", "ekfac", "divergence:q=0.5",
         "divergence:q=0", "shampoo-squared-sequential", "shampoo:block_size=2")  # fmt: skip


def exact_product(n_examples: int, seed: int = 0) -> kp.GradientSamples:
    """Independent Gaussian d and a: H is a Kronecker product."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(n_examples, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(n_examples, 4, generator=generator, dtype=torch.float64)
    spread = torch.tensor([2.0, 1.0, 0.7, 0.5], dtype=torch.float64)
    return kp.GradientSamples.from_factors(d, a * spread)


def dependent(n_examples: int, seed: int = 0) -> kp.GradientSamples:
    """H is no product: the size of d goes with a. Light tails: N_eff is about N / 2."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.rand(n_examples, 3, generator=generator, dtype=torch.float64) - 0.5
    a = torch.rand(n_examples, 4, generator=generator, dtype=torch.float64) - 0.4
    return kp.GradientSamples.from_factors(d * (0.2 + a[:, :3].abs()), a)


def off_diagonal_square(samples: kp.GradientSamples) -> float:
    g = samples.matrices().flatten(2).numpy()
    count = len(g)
    products = np.einsum("icp,jdp->ijcd", g, g)
    squares = (products**2).sum((2, 3))
    return float((squares.sum() - np.trace(squares)) / (count * (count - 1)))


def equal(samples: kp.GradientSamples) -> kp.SecondMoment:
    """With weights 1/N, whatever it was cut out of."""
    samples.weights = torch.full_like(samples.weights, 1 / len(samples))
    return kp.SecondMoment(samples)


# ---------------------------------------------------------------- the jackknife over refits


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_the_jackknife_over_refits_without_groups(name: str) -> None:
    given = dependent(80)
    H = kp.SecondMoment(given)
    groups = Examples(H).groups(8)
    assert sorted(torch.cat(groups).tolist()) == list(range(80))

    def in_sample(kept: list[int]) -> float:
        part = given.subset(kept)
        target = equal(part)
        P = kp.approximate(target, name)
        return target.inner(P) / P.norm() / math.sqrt(off_diagonal_square(part))

    whole = in_sample(list(range(80)))
    rest = [in_sample([i for i in range(80) if i not in set(group.tolist())]) for group in groups]
    pseudo = np.array([8 * whole - 7 * part for part in rest])
    found = kp.estimate(H, name, refits=8)
    assert found.value == pytest.approx(pseudo.mean(), rel=FITTED)
    assert found.stderr == pytest.approx(pseudo.std(ddof=1) / math.sqrt(8), rel=1e-4)
    assert found.df == 7


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_refits_agree_between_routes_and_weights_of_any_scale(route: str) -> None:
    given = dependent(140)
    expected = kp.estimate(kp.SecondMoment(given), "optimal", "relative_error")
    scaled = given.subset(slice(None))
    scaled.weights = scaled.weights * 50
    for one in (given, scaled):
        found = kp.estimate(kp.SecondMoment(one, route=route), "optimal", "relative_error")
        assert (found.value, found.stderr) == pytest.approx(
            (expected.value, expected.stderr), rel=1e-5
        )


def test_two_halves_give_a_bracket_with_the_held_out_value_inside() -> None:
    H = kp.SecondMoment(dependent(80))
    held_out = kp.estimate(H, "shampoo", kind="held-out")
    for metric in ESTIMABLE:
        found = kp.estimate(H, "shampoo", metric, refits=0)
        low, high = found.interval()
        assert low <= found.value <= high
        assert math.isnan(found.stderr)
        assert "bracket" in found.note
    P = kp.approximate(H, "shampoo")
    in_sample = H.inner(P) / P.norm() / math.sqrt(off_diagonal_square(H.samples))
    cosine = kp.estimate(H, "shampoo", refits=0)
    assert cosine.bracket is not None
    low, high = cosine.bracket
    assert low.value == pytest.approx(_plain(H), rel=SAME)
    assert low.stderr == pytest.approx(held_out.stderr, rel=SAME)
    assert high.value == pytest.approx(in_sample, rel=SAME)
    assert high.stderr == pytest.approx(kp.estimate(H, P).stderr, rel=SAME)
    wide, narrow = cosine.interval(0.95), cosine.interval(0.5)
    assert wide[0] < narrow[0] < low.value < high.value < narrow[1] < wide[1]


def _plain(H: kp.SecondMoment, name: str = "shampoo") -> float:
    """The cross-fitted cosine of halves, from its definition."""
    one, two = Examples(H).groups(2)
    total = 0.0
    for fit, score in ((one, two), (two, one)):
        P = kp.approximate(equal(H.samples.subset(fit)), name)
        total += equal(H.samples.subset(score)).inner(P) / P.norm() / 2
    return total / math.sqrt(off_diagonal_square(H.samples))


@pytest.mark.parametrize("name", ["kfac", *NAMES])
def test_held_out_scores_the_factors_of_one_half_on_the_other(name: str) -> None:
    """Its pseudo-values' mean, from refitted-nothing leave-one-out values."""
    H = kp.SecondMoment(dependent(80, seed=3))
    halves = Examples(H).groups(2)
    given = H.samples
    forms = {}
    for fit, score in (halves, halves[::-1]):
        P = kp.approximate(equal(given.subset(fit)), name)
        dense = P.to_dense().numpy()
        g = given.subset(score).matrices().flatten(2)[:, 0].numpy()
        forms[tuple(score.tolist())] = np.einsum("ip,pq,iq->i", g, dense, g) / P.norm()

    def value(left_out: int | None) -> float:
        means = []
        for score, numbers in forms.items():
            kept = [x for i, x in zip(score, numbers, strict=True) if i != left_out]
            means.append(np.mean(kept))
        rest = given.subset([i for i in range(80) if i != left_out])
        return float(np.mean(means)) / math.sqrt(off_diagonal_square(rest))

    whole = value(None)
    pseudo = np.array([80 * whole - 79 * value(i) for i in range(80)])
    found = kp.estimate(H, name, kind="held-out")
    assert found.value == pytest.approx(pseudo.mean(), rel=FITTED)
    assert found.stderr == pytest.approx(pseudo.std(ddof=1) / math.sqrt(80), rel=1e-5)


def test_the_first_order_jackknife_of_the_optimum_is_near_that_over_all_refits() -> None:
    """Each of 200 draws left out and the optimum fitted again, once."""
    given = dependent(200, seed=5)
    H = kp.SecondMoment(given)
    values = []
    for left_out in range(-1, 200):
        part = given.subset([i for i in range(200) if i != left_out])
        target = equal(part)
        sigma = float(target.kronecker_spectrum(1)[0])
        draws = Examples(target)
        values.append(sigma / math.sqrt(float(draws.target_squares[0])))
    pseudo = 200 * values[0] - 199 * np.array(values[1:])
    stderr = pseudo.std(ddof=1) / math.sqrt(200)
    bracket = kp.estimate(H, "optimal", refits=0).bracket
    assert bracket is not None
    # the factors held as they are: the derivative of the cosine in the optimum is zero
    assert bracket[1].stderr == pytest.approx(stderr, rel=0.25)  # of second order
    groups = kp.estimate(H, "optimal")
    assert groups.value == pytest.approx(pseudo.mean(), abs=stderr)
    assert stderr / 2 < groups.stderr < 2 * stderr  # of 8 groups only


@pytest.mark.parametrize(
    "operator",
    [
        kp.KroneckerOperator(torch.eye(3), torch.diag(torch.arange(1.0, 5.0)), 0.7),
        kp.DiagonalOperator(torch.rand(3, 4)),
        kp.EigenOperator(
            torch.linalg.qr(torch.randn(3, 3))[0], torch.linalg.qr(torch.randn(4, 4))[0],
            torch.rand(3, 4),
        ),
        kp.DenseOperator(torch.diag(torch.arange(12.0)), (3, 4)),
    ],
    ids=lambda operator: type(operator).__name__,
)  # fmt: skip
@pytest.mark.parametrize("positions", [None, 1, 3])
def test_forms_are_those_of_dense_matrices(operator: kp.DiagonalOperator, positions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    if positions is None:
        given = kp.GradientSamples.from_matrices(torch.randn(6, 2, 3, 4, generator=generator))
    else:
        shape = (6, 2, positions, 3), (6, positions, 4)
        given = kp.GradientSamples.from_factors(
            *(torch.randn(s, generator=generator) for s in shape)
        )
    g = given.matrices().flatten(2)
    expected = torch.einsum("icp,pq,icq->i", g, operator.to_dense(), g)
    found = example_forms(kp.SecondMoment(given), operator)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_operator_of_ones_own_is_scored_by_plain_means() -> None:
    given = dependent(200)
    H = kp.SecondMoment(given)
    P = kp.KroneckerOperator(torch.eye(3).double(), torch.eye(4).double(), 3.0)
    found = kp.estimate(H, P)
    mean = float(example_forms(H, P).mean()) / P.norm()
    assert found.value == pytest.approx(mean / math.sqrt(off_diagonal_square(given)), abs=0.01)
    assert 0 < found.stderr < 0.1
    identity = kp.estimate(H, "identity")
    assert found.stderr == pytest.approx(identity.stderr, rel=0.02)


# ---------------------------------------------------------------- exact products


@pytest.mark.parametrize("name", ["shampoo-squared", "kfac", "optimal", "divergence:q=0"])
def test_of_an_exact_product_the_errors_are_zero_within_their_error_bars(name: str) -> None:
    H = kp.SecondMoment(exact_product(600, seed=1))
    for metric, truth in (("cosine", 1.0), ("best_scale_error", 0.0), ("relative_error", 0.0)):
        found = kp.estimate(H, name, metric)
        low, high = found.interval(0.999)
        assert low <= truth <= high, metric
        assert found.stderr < 0.05
    plugin = kp.estimate(H, name, kind="plugin")
    assert plugin.value < 0.998  # which would say that H is no product


def test_negative_squared_errors_stay_negative_and_show_as_zero() -> None:
    found = [
        kp.estimate(kp.SecondMoment(exact_product(150, seed)), "kfac", "best_scale_error")
        for seed in range(12)
    ]
    negative = [one for one in found if one.value < 0]
    assert 2 <= len(negative) <= 10  # the truth is 0, so about half are
    assert all(one.display == 0.0 for one in negative)
    cosines = [
        kp.estimate(kp.SecondMoment(exact_product(150, seed)), "kfac").value for seed in range(12)
    ]
    assert max(cosines) > 1  # nothing is clipped


# ---------------------------------------------------------------- what it says and refuses


def test_too_few_effective_draws_are_said_and_nothing_is_estimated() -> None:
    given = dependent(400)
    weights = torch.full((400,), 1e-4, dtype=torch.float64)
    weights[:12] = 1.0
    heavy = given.subset(slice(None))
    heavy.weights = weights
    H = kp.SecondMoment(heavy)
    for kind in ("population", "held-out"):
        for name in ("kfac", "optimal"):
            found = kp.estimate(H, name, kind=kind)
            assert math.isnan(found.value)
            assert math.isnan(found.interval()[0])
            assert found.n == 400
            assert found.n_eff < 30
            assert "N_eff" in found.note
            assert "measure about" in found.note
            assert "undefined" in repr(found)
    assert math.isfinite(kp.estimate(H, "kfac", kind="plugin").value)
    with pytest.raises(UnsupportedError, match="N_eff"):
        kp.samples_needed(H)


def test_a_sum_of_products_gets_a_bracket_where_draws_are_few_for_it() -> None:
    H = kp.SecondMoment(dependent(90))
    found = kp.estimate(H, "optimal", rank=2)
    assert 30 < found.n_eff < 60
    assert found.bracket is not None
    assert math.isnan(found.stderr)
    assert kp.estimate(H, "optimal").bracket is None
    assert kp.estimate(H, "optimal", rank=2, refits=8).bracket is None


def test_kl_abstains_where_an_eigenvector_rests_on_few_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.rand(300, 4, generator=generator, dtype=torch.float64) - 0.5
    a = torch.rand(300, 3, generator=generator, dtype=torch.float64) - 0.5
    d[3:, 3] = 0.0  # three draws alone have the fourth output
    H = kp.SecondMoment(kp.GradientSamples.from_factors(d, a))
    found = kp.estimate(H, "divergence", q=0)
    assert math.isnan(found.value)
    assert "effective examples of 300" in found.note
    dense = kp.SecondMoment(kp.GradientSamples.from_matrices(d[:, :, None] * a[:, None]))
    assert kp.estimate(dense, "divergence", q=0).note == found.note
    assert kp.estimate(H, "divergence", q=0.5).stderr > 0
    assert kp.estimate(H, "optimal").stderr > 0


def test_draws_that_are_the_target_itself_have_no_sampling_error_to_estimate() -> None:
    given = dependent(100)
    given.independent = False
    found = kp.estimate(kp.SecondMoment(given), "kfac")
    assert math.isnan(found.value)
    assert "not independent" in found.note


def test_zero_targets_and_zero_operators_are_undefined() -> None:
    zero = kp.SecondMoment(kp.GradientSamples.from_matrices(torch.zeros(50, 3, 4)))
    for name in ("shampoo-squared", "optimal", "diagonal"):
        assert kp.estimate(zero, name).note.startswith("H = 0")
    nothing = kp.DiagonalOperator(torch.zeros(3, 4))
    found = kp.estimate(kp.SecondMoment(dependent(80)), nothing)
    assert math.isnan(found.value)
    assert found.note


def test_identical_draws_have_no_error() -> None:
    """And a Gram of rank one: every approximation is exact but the roots."""
    g = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(g.expand(40, 3, 4).clone()))
    found = kp.estimate(H, "shampoo-squared")
    assert found.stderr == pytest.approx(0.0, abs=1e-9)
    plugin = kp.estimate(H, "shampoo-squared", kind="plugin")
    assert found.value == pytest.approx(plugin.value, rel=1e-9)
    assert kp.samples_needed(H) == 30  # of equal draws, for N_eff = 30


def test_plug_in_is_the_metric_function_without_an_error_bar() -> None:
    H = kp.SecondMoment(dependent(50))
    P = kp.approximate(H, "shampoo")
    found = kp.estimate(H, "shampoo", "relative_error", "plugin")
    assert found.display == pytest.approx(kp.relative_error(H, P), rel=SAME)
    assert found.value == pytest.approx(kp.relative_error(H, P) ** 2, rel=SAME)
    assert math.isnan(found.stderr)
    assert kp.estimate(H, metric="norm", kind="plugin").value == H.norm()


def test_kfac_without_factors_has_no_estimate_and_says_why() -> None:
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(torch.randn(60, 3, 4)))
    found = kp.estimate(H, "kfac")
    assert math.isnan(found.value)
    assert "from_factors" in found.note


def test_a_fit_that_does_not_exist_on_every_part_says_so() -> None:
    """KL needs N m n > m^2 + n^2 - 1 or so, which half of 40 draws of 2 x 60 lack."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(40, 2, 60, generator=generator, dtype=torch.float64)
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(g))
    found = kp.estimate(H, "divergence:q=0", refits=0)
    assert math.isnan(found.value)
    assert "half" in found.note


H80 = kp.SecondMoment(dependent(80))
H150 = kp.SecondMoment(dependent(150))


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: kp.estimate(H80, "kfac", "cosin"), UnknownNameError, "'cosine'"),
        (lambda: kp.estimate(H80, "kfak"), UnknownNameError, "'kfac'"),
        (lambda: kp.estimate(H80, "kfac", kind="plug-in"), UnknownNameError, "'plugin'"),
        (lambda: kp.estimate(H80), InvalidInputError, "needs an approximation"),
        (lambda: kp.estimate(H80, "kfac", "norm"), InvalidInputError, "about H itself"),
        (lambda: kp.estimate(H80, None, "norm", "held-out"), InvalidInputError, "no held-out"),
        (lambda: kp.estimate(H80, "divergence", q=3), InvalidInputError, "q=3"),
        (lambda: kp.estimate(H80, "optimal", refits=2), InvalidInputError, "refits=2"),
        (lambda: kp.estimate(dependent(9), "kfac"), InvalidInputError, "SecondMoment"),
        (lambda: kp.estimate(H80, "kfac").interval(95), InvalidInputError, "level=95"),
        (lambda: kp.samples_needed(H80, stderr=0.0), InvalidInputError, "stderr=0"),
        (lambda: kp.estimate(H80, kp.approximate(H80, "kfac"), q=1), InvalidInputError, "options"),
        (
            lambda: kp.estimate(H80, kp.approximate(H80, "kfac"), kind="held-out"),
            InvalidInputError,
            "no held-out",
        ),
    ],
)
def test_bad_requests_are_refused(
    call: Callable[[], object], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        call()


def test_an_estimate_reads_like_a_number() -> None:
    found = kp.estimate(H150, "divergence", q=1)
    assert found.approximation == "divergence:q=1"
    assert repr(found).startswith("Estimate(population cosine of divergence:q=1: 0.")
    assert f"{found.value:.3f} ± {found.stderr:.3f}; N=150, N_eff=" in repr(found)
    error = kp.estimate(H80, "kfac", "relative_error")
    low, high = error.display_interval()
    assert f"{error.display:.3f} [{low:.3f}, {high:.3f}]" in repr(error)
    wide, narrow = found.interval(0.99), found.interval(0.5)
    assert wide[0] < narrow[0] < found.value < narrow[1] < wide[1]


def test_the_data_needed_go_with_the_square_of_the_error() -> None:
    found = kp.estimate(H80, "shampoo-squared")
    needed = kp.samples_needed(H80, stderr=found.stderr / 4)
    assert needed == pytest.approx(80 * 16, abs=1)
    assert kp.samples_needed(H80, stderr=10.0) == math.ceil(80 * 30 / found.n_eff)
    assert kp.samples_needed(H80, 1e-4, metric="norm") > 80


# ---------------------------------------------------------------- in the table


def test_compare_shows_what_estimate_gives() -> None:
    given = dependent(150)
    H = kp.SecondMoment(given)
    names = ["optimal", "kfac", "shampoo"]
    scores = kp.compare(given, names, estimates=("plugin", "held-out", "population"))
    table = scores.table
    for name in names:
        for kind in ("held-out", "population"):
            for metric in ESTIMABLE:
                expected = kp.estimate(H, name, metric, kind)
                rows = table[
                    (table["approximation"] == name)
                    & (table["kind"] == kind)
                    & (table["metric"] == metric)
                ]
                assert len(rows) == 1
                row = rows.iloc[0]
                assert row["value"] == pytest.approx(expected.display, rel=SAME)
                assert row["n_eff"] == pytest.approx(expected.n_eff)
                assert (row["low"], row["high"]) == pytest.approx(
                    expected.display_interval(), rel=1e-6
                )
    floor = table.loc[table["metric"] == "noise_floor", "value"].item()
    assert floor == pytest.approx(math.sqrt(off_diagonal_square(given)) / H.norm(), rel=SAME)
    population = scores.pivot(kind="population").loc["samples", "kfac"]
    text = repr(scores)
    assert f"{population:.3f} ± " in text
    assert f"{scores.pivot().loc['samples', 'kfac']:.4f}" in text
    assert f"{floor:.3f}" in text


def test_other_metrics_are_rows_of_the_sample_matrix() -> None:
    table = kp.compare(dependent(60), "kfac", metrics=["trace_ratio", "cosine"]).table
    rows = table[table["approximation"] == "kfac"]
    assert rows[["metric", "kind"]].to_numpy().tolist() == [
        ["cosine", "plugin"], ["cosine", "population"], ["trace_ratio", "plugin"],
    ]  # fmt: skip


# ---------------------------------------------------------------- bias and coverage


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shampoo-squared", "kfac", "left-only", "optimal", "shampoo"])
def test_intervals_cover_the_truth_where_plug_in_numbers_are_off(name: str) -> None:
    pool = kp.SecondMoment(dependent(400_000, seed=99))
    truth = kp.estimate(pool, name, kind="plugin").value
    inside, values, plugin, errors = [], [], [], []
    for seed in range(150):
        H = kp.SecondMoment(dependent(160, seed))
        found = kp.estimate(H, name)
        low, high = found.interval()
        inside.append(low <= truth <= high)
        values.append(found.value)
        errors.append(found.stderr)
        plugin.append(kp.estimate(H, name, kind="plugin").value)
    bias, plain = np.mean(values) - truth, np.mean(plugin) - truth
    share = 10 if name in ("shampoo-squared", "kfac", "left-only") else 3
    assert abs(bias) <= max(0.01, abs(plain) / share, np.mean(errors) / 3)
    assert 0.87 <= np.mean(inside) <= 1
