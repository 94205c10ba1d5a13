"""Population estimates with closed forms, against enumeration over distinct indices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe.quality.estimates import estimator as estimator_module
from kronecker_probe.quality.estimates import grouped
from kronecker_probe.quality.estimates.closed_forms import PRODUCTS, Grams
from kronecker_probe.quality.estimates.estimator import Estimator
from kronecker_probe.quality.estimates.examples import Examples
from kronecker_probe.quality.estimates.replicates import jackknife
from kronecker_probe.quality.metrics.catalog import ESTIMABLE
from tests import estimate_oracle as oracle

# float64 sums of positive terms in another order
SAME = 1e-10
CLOSED = ("shampoo-squared", "tkfac", "kfac", "kfac-reduce", "left-only", "right-only",
          "identity", "diagonal")  # fmt: skip
METRICS = ESTIMABLE


@pytest.fixture
def outspoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates from few draws, too: the algebra holds for any number."""
    monkeypatch.setattr(estimator_module, "abstention", lambda n, n_eff: "")


def draw(n_examples: int, columns: int, m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(n_examples, columns, m, generator=generator, dtype=torch.float64)
    a = torch.randn(n_examples, n, generator=generator, dtype=torch.float64)
    return d * (1 + a[:, :1, None].abs()), a + 0.5


def samples_of(d: Tensor, a: Tensor, weights: Tensor | None = None) -> kp.GradientSamples:
    return kp.GradientSamples.from_factors(d[:, :, None], a[:, None], weights)


def enumerated(name: str, d: Tensor, a: Tensor, weights: Tensor | None) -> oracle.Products:
    """The draws of ``name`` as the definition has them."""
    dn, an = d.numpy(), a.numpy()
    (m, n), count = (dn.shape[2], an.shape[1]), len(an)
    moments = oracle.second_moments(dn, an)
    outer_d, outer_a = np.einsum("icm,icp->imp", dn, dn), np.einsum("in,ip->inp", an, an)
    ones = [np.broadcast_to(np.eye(k), (count, k, k)) for k in (m, n)]
    left = outer_d * (an**2).sum(1)[:, None, None]
    right = outer_a * (dn**2).sum((1, 2))[:, None, None]
    w = np.full(count, 1 / count) if weights is None else weights.numpy()
    sides = {
        "shampoo-squared": (left, right, True), "tkfac": (left, right, True),
        "kfac": (outer_d, outer_a, False), "kfac-reduce": (outer_d, outer_a, False),
        "left-only": (left, ones[1] / n, False), "right-only": (ones[0] / m, right, False),
    }  # fmt: skip
    order = 2 if name.endswith("only") else 3
    return oracle.Products(moments, *sides[name][:2], w, sides[name][2], order)


WEIGHTS = [None, torch.tensor([0.3, 1.2, 0.7, 2.0, 0.1, 1.0, 0.9], dtype=torch.float64)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weighted"])
@pytest.mark.parametrize("name", ["shampoo-squared", "kfac", "left-only", "right-only"])
def test_every_replicate_is_the_enumeration_over_distinct_draws(
    name: str, weights: Tensor | None
) -> None:
    d, a = draw(7, 2, 2, 3)
    H = kp.SecondMoment(samples_of(d, a, weights))
    draws = Examples(H)
    grams = Grams.of(draws, H)
    assert grams is not None
    side = {"left-only": 0, "right-only": 1}.get(name)
    found = grams.products([PRODUCTS[name]])[0] if side is None else grams.one_sided(side)
    whole = enumerated(name, d, a, weights)
    for place, part in enumerate([whole, *(whole.without(i) for i in range(7))]):
        numbers = (found.cross[place], found.target[place], found.approximation[place])
        assert [float(x) for x in numbers] == pytest.approx(part.triple(), rel=SAME)


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["shampoo-squared", "tkfac", "kfac", "kfac-reduce", "left-only"])
def test_an_estimate_is_the_jackknife_over_refits_without_each_draw(name: str, metric: str) -> None:
    d, a = draw(6, 2, 2, 3, seed=1)
    whole = enumerated(name, d, a, None)
    values = [oracle.metric_value(metric, *part.triple())
              for part in (whole, *(whole.without(i) for i in range(6)))]  # fmt: skip
    value, stderr, df = oracle.jackknife(values[0], values[1:])
    found = kp.estimate(kp.SecondMoment(samples_of(d, a)), name, metric)
    assert (found.value, found.stderr) == pytest.approx((value, stderr), rel=1e-8, abs=1e-12)
    if stderr > 1e-12:  # left-only has the best scale 1, whatever the draws
        assert found.df == pytest.approx(df, rel=1e-8)
    assert (found.metric, found.approximation, found.kind) == (metric, name, "population")


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weighted"])
def test_identity_diagonal_norm_and_trace_are_their_enumerations(weights: Tensor | None) -> None:
    d, a = draw(7, 2, 2, 3, seed=2)
    moments = oracle.second_moments(d.numpy(), a.numpy())
    w = np.full(7, 1 / 7) if weights is None else weights.numpy()
    H = kp.SecondMoment(samples_of(d, a, weights))

    def pairs(kept: list[int], form: Callable[[int, int], float]) -> float:
        return oracle.distinct_mean(len(kept), 2, w[kept], lambda i, j: form(kept[i], kept[j]))

    def values(metric_of: Callable[[list[int]], float]) -> tuple[float, float, float]:
        everything = list(range(7))
        rest = [metric_of([j for j in everything if j != i]) for i in everything]
        return oracle.jackknife(metric_of(everything), rest)

    def squared_norm(kept: list[int]) -> float:
        return pairs(kept, lambda i, j: float((moments[i] * moments[j]).sum()))

    def of_diagonal(kept: list[int]) -> float:
        square = pairs(kept, lambda i, j: float(np.diag(moments[i]) @ np.diag(moments[j])))
        return math.sqrt(square / squared_norm(kept))

    def of_identity(kept: list[int]) -> float:
        square = pairs(kept, lambda i, j: float(np.trace(moments[i]) * np.trace(moments[j]) / 6))
        return math.sqrt(square / squared_norm(kept))

    def trace(kept: list[int]) -> float:
        return w.sum() * float(np.average([np.trace(moments[i]) for i in kept], weights=w[kept]))

    expected = {
        ("diagonal", "cosine"): values(of_diagonal),
        ("identity", "cosine"): values(of_identity),
        (None, "norm"): values(lambda kept: w.sum() * math.sqrt(squared_norm(kept))),
        (None, "trace"): values(trace),
    }
    for (name, metric), numbers in expected.items():
        found = kp.estimate(H, name, metric)
        assert (found.value, found.stderr, found.df) == pytest.approx(numbers, rel=1e-8), name


def test_distinct_indices_make_every_inner_product_unbiased() -> None:
    """Over all samples of four from a population of three unequal draws, exactly."""
    d, a = draw(3, 2, 2, 2, seed=3)
    chances = np.array([0.5, 0.3, 0.2])
    whole = enumerated("kfac", d, a, None)
    H, left, right = (
        np.average(x, axis=0, weights=chances) for x in (whole.moments, whole.left, whole.right)
    )
    truth = (
        float((H * np.kron(left, right)).sum()),
        float((H**2).sum()),
        float((left**2).sum()) , float((right**2).sum()),
    )  # fmt: skip
    mean = np.zeros(3)
    for chosen in itertools.product(range(3), repeat=4):
        index = torch.tensor(chosen)
        target = kp.SecondMoment(samples_of(d[index], a[index]))
        grams = Grams.of(Examples(target), target)
        assert grams is not None
        one = grams.products([PRODUCTS["kfac"]])[0]
        side = grams.one_sided(0)  # |L|^2 / n of L = E[|a|^2 S] is unbiased likewise
        numbers = [float(one.cross[0]), float(one.target[0]), float(side.cross[0])]
        mean += math.prod(chances[list(chosen)]) * np.array(numbers)
    scaled = enumerated("left-only", d, a, None).left
    one_sided = float((np.average(scaled, axis=0, weights=chances) ** 2).sum()) / 2
    np.testing.assert_allclose(mean, [*truth[:2], one_sided], rtol=SAME)


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize("name", CLOSED)
def test_the_order_of_the_draws_does_not_matter(name: str) -> None:
    d, a = draw(9, 2, 3, 4, seed=4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    one, other = (
        kp.estimate(kp.SecondMoment(samples_of(x, y)), name)
        for x, y in ((d, a), (d[order], a[order]))
    )
    assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr), rel=1e-9)


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize("name", CLOSED)
def test_neither_the_scale_nor_draws_of_weight_zero_matter(name: str) -> None:
    d, a = draw(9, 2, 3, 4, seed=5)
    weights = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    plain = kp.estimate(kp.SecondMoment(samples_of(d, a, weights)), name, "relative_error")
    scaled = kp.estimate(kp.SecondMoment(samples_of(d, a, 7 * weights)), name, "relative_error")
    junk_d, junk_a = draw(4, 2, 3, 4, seed=6)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    more = samples_of(
        torch.cat([d, 1e6 * junk_d])[order],
        torch.cat([a, junk_a])[order],
        torch.cat([weights, torch.zeros(4, dtype=torch.float64)])[order],
    )
    padded = kp.estimate(kp.SecondMoment(more), name, "relative_error")
    for other in (scaled, padded):
        assert (other.value, other.stderr) == pytest.approx((plain.value, plain.stderr), rel=1e-8)
        assert (other.n, other.n_eff) == (9, pytest.approx(plain.n_eff))


@pytest.mark.usefixtures("outspoken")
def test_columns_of_a_datum_are_one_draw_whatever_basis_they_are_in() -> None:
    d, a = draw(8, 3, 4, 5, seed=7)
    rotation = torch.linalg.qr(torch.randn(8, 3, 3, dtype=torch.float64))[0]
    for name in CLOSED[:6]:
        one, other = (
            kp.estimate(kp.SecondMoment(samples_of(x, a)), name) for x in (d, rotation @ d)
        )
        assert (one.n, one.value, one.stderr) == pytest.approx(
            (8, other.value, other.stderr), rel=1e-9
        )
    flat = kp.GradientSamples.from_factors(d.flatten(0, 1), a.repeat_interleave(3, dim=0))
    assert kp.estimate(kp.SecondMoment(flat), "kfac").n == 24  # these would be other draws


@pytest.mark.usefixtures("outspoken")
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    n_examples=st.integers(4, 12),
    columns=st.integers(1, 3),
    m=st.integers(1, 5),
    n=st.integers(1, 5),
    name=st.sampled_from(CLOSED),
    route=st.sampled_from(["sample", "parameter", "dense"]),
    seed=st.integers(0, 99),
)
def test_all_routes_and_parameters_of_one_row_or_column_give_the_same(
    n_examples: int, columns: int, m: int, n: int, name: str, route: str, seed: int
) -> None:
    d, a = draw(n_examples, columns, m, n, seed)
    given = samples_of(d, a)
    one = kp.estimate(kp.SecondMoment(given, route="sample"), name)
    other = kp.estimate(kp.SecondMoment(given, route=route), name)
    assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr), rel=1e-7)
    assert math.isfinite(one.value)


@pytest.mark.usefixtures("outspoken")
def test_a_bias_is_measured_like_a_layer_with_inputs_of_one() -> None:
    d = draw(10, 2, 4, 1, seed=8)[0]
    plain = kp.SecondMoment(samples_of(d, torch.ones(10, 1, dtype=torch.float64)))
    shared = kp.GradientSamples.from_factors(
        torch.stack([0.25 * d, 0.75 * d], dim=2), torch.ones(10, 2, 1, dtype=torch.float64)
    )
    formed = kp.GradientSamples.from_matrices(d[..., None])
    row = kp.GradientSamples.from_matrices(d[:, :1].mT.mT)  # 1 x 4
    column = kp.GradientSamples.from_matrices(d[:, :1, :].mT)  # its transpose
    for name, mirrored in (("shampoo-squared", "shampoo-squared"), ("left-only", "right-only")):
        expected = kp.estimate(plain, name)
        for given in (shared, formed):
            found = kp.estimate(kp.SecondMoment(given), name)
            assert (found.value, found.stderr) == pytest.approx(
                (expected.value, expected.stderr), rel=1e-9
            )
        one = kp.estimate(kp.SecondMoment(row), mirrored)
        other = kp.estimate(kp.SecondMoment(column), name)
        assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr), rel=1e-9)


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize("name", ["shampoo-squared", "kfac", "left-only", "diagonal", "identity"])
def test_blocks_are_the_sum_of_their_products(name: str) -> None:
    d, a = draw(9, 2, 4, 3, seed=9)
    H = kp.SecondMoment(samples_of(d, a))
    found = Estimator(H)._means.of(kp.approximations.resolve(name, block_size=2))
    cross, square = torch.zeros(10), torch.zeros(10)
    for rows in (slice(0, 2), slice(2, 4)):
        for columns in (slice(0, 2), slice(2, 3)):
            block = kp.SecondMoment(samples_of(d[:, :, rows], a[:, columns]))
            one = Estimator(block)._means.of(kp.approximations.resolve(name))
            cross, square = cross + one.cross, square + one.approximation
    torch.testing.assert_close(found.cross, cross.double(), rtol=SAME, atol=0)
    torch.testing.assert_close(found.approximation, square.double(), rtol=SAME, atol=0)
    torch.testing.assert_close(found.target, Examples(H).target_squares, rtol=SAME, atol=0)


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize("name", CLOSED)
def test_a_block_of_one_column_adds_up_with_the_others_of_a_shared_layer(name: str) -> None:
    H = kp.SecondMoment(shared(40, 3))
    found = kp.estimate(H, name, block_size=2)  # 3 x 2: one row is left
    assert math.isfinite(found.value)
    assert found.stderr > 0
    d, a = H.samples.tensors
    mirrored = kp.GradientSamples.from_factors(a[:, None], d[:, 0])  # 2 x 3: one column is left
    assert kp.estimate(kp.SecondMoment(mirrored), name, block_size=2).stderr > 0


# ---------------------------------------------------------------- shared positions


def shared(n_examples: int, positions: int, seed: int = 0) -> kp.GradientSamples:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_examples, 2, positions, 3), (n_examples, positions, 2)
    d, a = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shape)
    return kp.GradientSamples.from_factors(d, a)


@pytest.mark.usefixtures("outspoken")
@pytest.mark.parametrize("name", ["shampoo-squared", "kfac", "kfac-reduce", "tkfac"])
@pytest.mark.parametrize("groups", [6, 3])
def test_groups_hold_no_draw_twice(name: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against enumeration over triples of distinct groups; six groups are single draws."""
    monkeypatch.setattr(grouped, "GROUPS", groups)
    given = shared(6, 3)
    H = kp.SecondMoment(given)
    draws = Examples(H)
    found = grouped.Grouped(draws, H).product(name)
    assert isinstance(given.weights, Tensor)
    g = given.matrices().numpy()
    columns = g.reshape(6, 2, -1)
    moments = np.einsum("icp,icq->ipq", columns, columns)
    parts = [kp.approximate(kp.SecondMoment(given.subset([i])), name) for i in range(6)]
    by_trace = name in ("shampoo-squared", "tkfac")
    left = np.stack([6 * p.left.numpy() for p in parts])
    right = np.stack([p.right.numpy() * (6 if by_trace else 1) for p in parts])
    sizes = np.array([6 / p.scale if by_trace else 1.0 for p in parts])
    groups_of = [group.tolist() for group in draws.groups(groups)]

    def means(kept: list[list[int]]) -> tuple[float, float, float]:
        def average(values: np.ndarray) -> list[np.ndarray]:
            return [values[group].sum(axis=0) for group in kept]

        h, l, r = average(moments), average(left), average(right)  # noqa: E741
        index = range(len(kept))
        size = [len(group) for group in kept]
        triples = list(itertools.permutations(index, 3))
        pairs = list(itertools.permutations(index, 2))
        cross = sum(float((h[i] * np.kron(l[j], r[k])).sum()) for i, j, k in triples)
        cross /= sum(size[i] * size[j] * size[k] for i, j, k in triples)
        flat = [i for group in kept for i in group]
        draw_pairs = list(itertools.permutations(flat, 2))
        target = sum(float((moments[i] * moments[j]).sum()) for i, j in draw_pairs)
        sides = [
            sum(float((x[i] * x[j]).sum()) for i, j in pairs)
            / sum(size[i] * size[j] for i, j in pairs)
            for x in (l, r)
        ]
        scale = float(sizes[flat].mean())
        return cross / scale, target / len(draw_pairs), sides[0] * sides[1] / scale**2

    wholes = [groups_of] + [[g for g in groups_of if g is not out] for out in groups_of]
    if groups == 3:
        wholes = wholes[:1]  # two groups have no triples
    for place, kept in enumerate(wholes):
        numbers = (found.cross[place], found.target[place], found.approximation[place])
        assert [float(x) for x in numbers] == pytest.approx(means(kept), rel=SAME)


@pytest.mark.usefixtures("outspoken")
def test_single_positions_agree_between_rows_of_grams_and_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With each draw a group, both are the complete U-statistic."""
    monkeypatch.setattr(grouped, "GROUPS", 12)
    d, a = draw(12, 2, 3, 4, seed=10)
    weights = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.1
    H = kp.SecondMoment(samples_of(d, a, weights))
    draws = Examples(H)
    grams, groups = Grams.of(draws, H), grouped.Grouped(draws, H)
    assert grams is not None
    order = torch.tensor([int(group) for group in draws.groups(12)])
    places = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order])
    for name in ("shampoo-squared", "kfac", "tkfac", "kfac-reduce"):
        one, other = grams.products([PRODUCTS[name]])[0], groups.product(name)
        for part in ("cross", "target", "approximation"):
            torch.testing.assert_close(
                getattr(one, part)[places], getattr(other, part), rtol=1e-9, atol=0
            )
    for side in (0, 1):
        one, other = grams.one_sided(side), groups.one_sided(side)
        torch.testing.assert_close(one.cross[places], other.cross, rtol=1e-9, atol=0)


def test_the_jackknife_of_a_mean_is_its_textbook_standard_error() -> None:
    x = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.cat([x.mean()[None], (x.sum() - x) / 39])
    found = jackknife(values, single=True)
    assert found.value == pytest.approx(float(x.mean()))
    assert found.stderr == pytest.approx(float(x.std() / math.sqrt(40)))
    assert jackknife(values, single=False).df == 39
    same = jackknife(torch.ones(9, dtype=torch.float64), single=True)
    assert (same.value, same.stderr, same.df) == (1.0, 0.0, 7.0)
    assert math.isnan(jackknife(torch.tensor([1.0, math.nan, 1.0]), single=True).value)


def test_the_names_with_closed_forms_are_approximations() -> None:
    known = set(kp.approximations.APPROXIMATIONS)
    assert set(estimator_module.CLOSED_FORMS) == set(CLOSED) <= known
