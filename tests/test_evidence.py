"""Known populations, the coverage table and its criteria, and the analysis of honest numbers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

import kronecker_probe as kp
from analyses import honest_numbers
from benchmarks import acceptance, estimate_coverage
from benchmarks.populations import (
    CLUSTERED,
    GAUSSIAN,
    HEAVY,
    POPULATIONS,
    Exact,
    Inputs,
    Pool,
    Teacher,
    simplex,
    softmax_columns,
)
from kronecker_probe.gradients.samples.base import FactoredSamples
from tests import oracle

# Quadrature of smooth functions against closed forms; with Student-t tails it converges as a power
# of the number of radii.
QUADRATURE, HEAVY_QUADRATURE = 1e-7, 1e-4
# The coarsest quadrature of a softmax against an independent one.
SOFTMAX = 1e-4
# float64 sums in another order.
EXACT = 1e-10
# Means of K draws against their limit: this many times the distance of means of halves, / 2, which
# has the same distribution but for its size (the same, if the limit is right).
HALVES = 2.0

TEACHERS = [name for name, one in POPULATIONS.items() if isinstance(one, Teacher)]
EXACTS = [name for name, one in POPULATIONS.items() if isinstance(one, Exact)]
POOLS = [name for name, one in POPULATIONS.items() if isinstance(one, Pool)]


def dense(samples: kp.GradientSamples) -> np.ndarray:
    """H of weighted draws: sum_c d d^T kron a a^T where there is one position, else G by G."""
    m, n = samples.shape
    assert isinstance(samples, FactoredSamples)
    if samples.n_positions > 1:
        G = samples.matrices().flatten(2) * samples.weights.sqrt()[:, None, None]
        flat = G.flatten(0, 1).numpy()
        return flat.T @ flat
    d, a = samples.output_grads[:, :, 0].double(), samples.inputs[:, 0].double()
    S = (d.mT @ d * samples.weights[:, None, None]).flatten(1)
    R = S.T @ (a[:, :, None] * a[:, None]).flatten(1)
    return R.view(m, m, n, n).transpose(1, 2).reshape(m * n, m * n).numpy()


# ------------------------------------------------------------------------------ populations


def test_the_corners_of_a_simplex_have_mean_0_and_covariance_1() -> None:
    corners = simplex(7)
    assert corners.shape == (8, 7)
    assert torch.allclose(corners.mean(0), torch.zeros(7, dtype=torch.float64), atol=EXACT)
    assert torch.allclose(corners.T @ corners / 8, torch.eye(7, dtype=torch.float64), atol=EXACT)


@pytest.mark.parametrize(
    ("inputs", "tolerance"),
    [(GAUSSIAN, QUADRATURE), (CLUSTERED, QUADRATURE), (HEAVY, HEAVY_QUADRATURE)],
    ids=["gaussian", "clustered", "heavy"],
)
def test_quadrature_has_the_second_moment_of_the_inputs(inputs: Inputs, tolerance: float) -> None:
    x, weights = inputs.quadrature(64, 16)
    assert float(weights.sum()) == pytest.approx(1.0, abs=QUADRATURE)
    found, expected = (x.T * weights) @ x, inputs.second_moment()
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("inputs", [GAUSSIAN, CLUSTERED, HEAVY])
def test_inputs_have_their_second_moment(inputs: Inputs) -> None:
    x = inputs.sample(200_000, torch.Generator().manual_seed(0))
    one, other = (part.T @ part / len(part) for part in x.chunk(2))
    scatter = float((one - other).norm()) / 2
    assert float(((one + other) / 2 - inputs.second_moment()).norm()) < HALVES * scatter


def test_student_t_inputs_have_its_degrees_of_freedom() -> None:
    """|A^-1 x|^2 / n is F-distributed with n and df degrees of freedom."""
    x = HEAVY.sample(20_000, torch.Generator().manual_seed(0))
    y = torch.linalg.solve(HEAVY.scatter, x.T).square().mean(0)
    expected = torch.distributions.FisherSnedecor(12.0, 5.0).sample((100_000,))
    for share in (0.1, 0.5, 0.9, 0.99):
        assert float(y.quantile(share)) == pytest.approx(float(expected.quantile(share)), rel=0.1)


def test_softmax_columns_are_the_expectation_over_labels() -> None:
    p = torch.softmax(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), 1).double()
    d = softmax_columns(p)[:, :, 0]
    expected = sum(
        p[:, y, None, None] * (e := p - torch.eye(4)[y])[:, :, None] * e[:, None] for y in range(4)
    )
    assert torch.allclose(d.mT @ d, expected, atol=EXACT)


def test_the_normal_teacher_agrees_with_gauss_hermite_quadrature() -> None:
    """R(H) = E[vec(S(z)) vec(E[x x^T | z])^T] over two normal variables, by another rule."""
    teacher = POPULATIONS["teacher"]
    assert isinstance(teacher, Teacher)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    share = np.outer(weights, weights).reshape(-1) / weights.sum() ** 2
    A, centre = teacher.inputs.scatter.numpy(), teacher.inputs.centres.numpy()[0]
    seen = centre + grid @ A[:, :2].T
    p = teacher.probabilities(torch.from_numpy(seen)).numpy()
    S = np.einsum("ka,ab->kab", p, np.eye(10)) - p[:, :, None] * p[:, None]
    X = seen[:, :, None] * seen[:, None] + A[:, 2:] @ A[:, 2:].T
    H = np.einsum("k,kac,kbd->abcd", share, S, X, optimize=True).reshape(120, 120)
    assert oracle.norm(dense(teacher.limit()) - H) / oracle.norm(H) < SOFTMAX


@pytest.mark.parametrize("name", TEACHERS)
def test_finer_quadrature_changes_nothing(name: str) -> None:
    truths = estimate_coverage.truths(name)
    assert (truths["truth_error"] < SOFTMAX * truths["truth"].clip(lower=1)).all()


@pytest.mark.parametrize("name", [*TEACHERS, *EXACTS, *POOLS])
def test_samples_approach_the_limit(name: str) -> None:
    population = POPULATIONS[name]
    generator = torch.Generator().manual_seed(0)
    one, other = (dense(population.sample(20_000, generator)) for _ in range(2))
    H = dense(population.limit())
    assert oracle.norm((one + other) / 2 - H) < HALVES * oracle.norm(one - other) / 2


@pytest.mark.parametrize("name", EXACTS)
def test_kronecker_populations_are_kronecker_products(name: str) -> None:
    population = POPULATIONS[name]
    assert isinstance(population, Exact)
    b = population.output_factor().numpy()
    expected = np.kron(b @ b.T, population.inputs.second_moment().numpy())
    assert oracle.norm(dense(population.limit()) - expected) < EXACT * oracle.norm(expected)
    truths = estimate_coverage.truths(name).set_index(["approximation", "metric"])["truth"]
    exact = [
        "optimal", "optimal:rank=2", "shampoo-squared", "shampoo-squared-sequential", "kfac",
        "divergence:q=0", "divergence:q=0.5", "eigen-corrected", "ekfac",
    ]  # fmt: skip
    for label in exact:
        assert truths[label, "cosine"] == pytest.approx(1.0, abs=1e-8)
        assert truths[label, "relative_error"] == pytest.approx(0.0, abs=1e-8)
    for label in set(estimate_coverage.UNSHARED) - set(exact):
        assert truths[label, "cosine"] < 0.95


@pytest.mark.parametrize("name", ["teacher-heavy", "kronecker", "mlp-hidden"])
def test_truths_agree_with_dense_formulas(name: str) -> None:
    population = POPULATIONS[name]
    H, shape = dense(population.limit(2)), (10, 12)
    L, R = oracle.left_factor(H, shape), oracle.right_factor(H, shape)
    singular = oracle.kronecker_spectrum(H, shape)
    expected = {
        "optimal": singular[0] / np.linalg.norm(singular),
        "optimal:rank=2": np.linalg.norm(singular[:2]) / np.linalg.norm(singular),
        "shampoo-squared": oracle.cosine(H, np.kron(L, R)),
        "left-only": oracle.cosine(H, np.kron(L, np.eye(12))),
        "right-only": oracle.cosine(H, np.kron(np.eye(10), R)),
        "identity": oracle.cosine(H, np.eye(120)),
        "diagonal": oracle.cosine(H, oracle.diagonal(H)),
    }
    truths = estimate_coverage.truths(name).set_index(["approximation", "metric"])["truth"]
    for label, value in expected.items():
        assert truths[label, "cosine"] == pytest.approx(value, abs=1e-8)
    error = oracle.relative_error(H, np.kron(L, R) / np.trace(H)) ** 2
    assert truths["shampoo-squared", "relative_error"] == pytest.approx(error, abs=1e-8)


def test_a_pool_is_its_own_population() -> None:
    for name in POOLS:
        pool = POPULATIONS[name].limit()
        drawn = POPULATIONS[name].sample(50, torch.Generator().manual_seed(0))
        assert torch.equal(drawn.weights, torch.full((50,), 1 / 50, dtype=torch.float64))
        rows = {tuple(row) for row in pool.inputs.flatten(1).tolist()}
        assert {tuple(row) for row in drawn.inputs.flatten(1).tolist()} <= rows
    assert POPULATIONS["mlp-hidden"].limit().n_columns == 10
    assert POPULATIONS["shared-patches"].limit().n_positions == 4


# -------------------------------------------------------------------------- coverage table


def test_every_approximation_is_measured() -> None:
    measured = {label.partition(":")[0] for label in estimate_coverage.SHARED}
    assert measured == set(kp.APPROXIMATIONS)


def test_draws_depend_on_the_repetition_alone() -> None:
    one, same, other = (estimate_coverage.draw("teacher", 64, k) for k in (3, 3, 4))
    assert torch.equal(one.inputs, same.inputs)
    assert not torch.equal(one.inputs, other.inputs)


def test_rows_are_what_estimate_gives() -> None:
    H = kp.SecondMoment(estimate_coverage.draw("teacher", 128, 0))
    labels = ["shampoo-squared", "kfac", "left-only", "optimal", "shampoo"]
    rows = list(estimate_coverage.estimates(H, labels))
    assert len(rows) == len(labels) * len(estimate_coverage.METRICS) * 3
    for row in rows:
        one = kp.estimate(H, row["approximation"], row["metric"], row["kind"])
        low, high = one.interval(0.95)
        given = [row[name] for name in ("value", "stderr", "low", "high", "n_eff")]
        expected = [one.value, one.stderr, low, high, one.n_eff]
        assert given == pytest.approx(expected, rel=1e-8, abs=1e-10, nan_ok=True)


def test_halves_have_unit_weight_and_score_against_the_population() -> None:
    samples = estimate_coverage.draw("mlp-hidden", 64, 0)
    half = estimate_coverage.first_half(samples)
    assert float(half.weights.sum()) == pytest.approx(1.0)
    P = kp.approximate(kp.SecondMoment(half), "kfac")
    H = dense(POPULATIONS["mlp-hidden"].limit())
    found = {
        row["metric"]: row["value"]
        for row in estimate_coverage.of_half("mlp-hidden", kp.SecondMoment(half), "kfac")
    }
    matrix = P.to_dense().numpy()
    assert found["cosine"] == pytest.approx(oracle.cosine(H, matrix), abs=1e-8)
    error = oracle.relative_error(H, matrix) ** 2
    assert found["relative_error"] == pytest.approx(error, abs=1e-8)


def made_up_rows(values: list[float], width: float = 0.1) -> pd.DataFrame:
    """Population, plug-in and held-out values at one cell of the population "kronecker"."""
    shared = {
        "population": "kronecker", "n": 64, "approximation": "kfac", "metric": "cosine",
        "bracket": False,
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    for repetition, value in enumerate(values):
        cell = shared | {"repetition": repetition, "n_eff": 60.0 + repetition}
        bounds = {"low": value - width, "high": value + width, "stderr": width / 2}
        rows += [
            cell | {"kind": "population", "value": value} | bounds,
            cell | {"kind": "held-out", "value": 0.9} | bounds,
            cell | {"kind": "plugin", "value": 0.8 + repetition / 100},
            cell | {"kind": "half", "value": 0.85},
        ]
    return pd.DataFrame(rows)


def test_the_summary_is_over_the_repetitions_that_gave_a_number() -> None:
    values = [1.05, 0.95, 1.2, math.nan]
    table = estimate_coverage.summarize(made_up_rows(values)).set_index("kind")
    one, mean = table.loc["population"], np.mean(values[:3])
    assert one["truth"] == pytest.approx(1.0)
    assert one["bias"] == pytest.approx(mean - 1)
    assert one["sd"] == pytest.approx(np.std(values[:3], ddof=1))
    assert one["bias_error"] == pytest.approx(one["sd"] / math.sqrt(3))
    assert one["stderr"] == pytest.approx(0.05)
    assert one["stderr_over_sd"] == pytest.approx(0.05 / one["sd"])
    assert one["coverage"] == pytest.approx(2 / 3)
    assert one["abstained"] == pytest.approx(1 / 4)
    assert one["plugin_bias"] == pytest.approx(0.81 - 1)
    assert one["n_eff"] == pytest.approx(61.5)
    assert table.loc["plugin", "bias"] == pytest.approx(0.815 - 1)
    assert math.isnan(table.loc["plugin", "coverage"])
    assert table.loc["held-out", "truth"] == pytest.approx(0.85)
    assert table.loc["held-out", "bias"] == pytest.approx(0.05)


def test_the_report_has_a_line_for_each_approximation() -> None:
    table = estimate_coverage.summarize(made_up_rows([1.05, 0.95, 1.2, math.nan]))
    (line,) = (line for line in estimate_coverage.report(table) if line.startswith("kfac"))
    assert line.split() == [
        "kfac", "1.000", "|", "-0.185", "+0.050", "+0.067", "0.40", "0.67",
    ]  # fmt: skip


# -------------------------------------------------------------------------------- criteria


CELL = {
    "population": "teacher", "n": 256, "approximation": "kfac", "metric": "cosine",
    "kind": "population", "truth": 0.9, "truth_error": 0.0, "bias": 0.0, "bias_error": 0.001,
    "plugin_bias": -0.09, "sd": 0.02, "stderr": 0.02, "stderr_over_sd": 1.0, "coverage": 0.95,
    "bracketed": 0.0, "abstained": 0.0, "n_eff": 150.0, "repetitions": 200,
}  # fmt: skip
PASS, FAIL, UNDECIDED, ABSTAINED, FREE = (
    acceptance.PASS,
    acceptance.FAIL,
    acceptance.UNDECIDED,
    acceptance.ABSTAINED,
    acceptance.FREE,
)


@pytest.mark.parametrize(
    ("changed", "bias", "coverage"),
    [
        ({}, PASS, PASS),
        ({"bias": 0.0099}, PASS, PASS),
        ({"bias": -0.0101}, FAIL, PASS),
        ({"bias": 0.015, "plugin_bias": -0.16}, PASS, PASS),
        ({"bias": -0.017, "plugin_bias": 0.16}, FAIL, PASS),
        ({"bias": 0.015, "stderr": 0.046}, PASS, PASS),
        ({"bias": 0.5, "n_eff": 49.0}, FREE, PASS),
        ({"coverage": 0.87}, PASS, PASS),
        ({"coverage": 0.865}, PASS, FAIL),
        ({"coverage": 0.5, "n_eff": 40.0, "n": 64}, FREE, FAIL),
        ({"coverage": 0.5, "bias": 0.1, "abstained": 0.95}, ABSTAINED, ABSTAINED),
        ({"coverage": math.nan, "bias": math.nan, "abstained": 1.0}, ABSTAINED, ABSTAINED),
        ({"coverage": math.nan}, PASS, FAIL),
        ({"bias": math.nan}, FAIL, PASS),
    ],
)
def test_closed_forms(changed: dict[str, float], bias: str, coverage: str) -> None:
    (cell,) = acceptance.check(pd.DataFrame([CELL | changed])).to_dict("records")
    assert (cell["rule"], cell["bias_verdict"], cell["coverage_verdict"]) == (
        "closed",
        bias,
        coverage,
    )


@pytest.mark.parametrize(
    ("changed", "bias", "coverage"),
    [
        ({"coverage": 0.1}, PASS, FREE),
        ({"bias": -0.029}, PASS, FREE),
        ({"bias": 0.031}, UNDECIDED, FREE),
        ({"bias": 0.033}, FAIL, FREE),
        ({"bias": 0.033, "n": 64}, FREE, FREE),
        ({"bias": 0.033, "abstained": 0.95}, ABSTAINED, FREE),
        ({"bias": 0.5, "bracketed": 1.0, "coverage": 0.9}, FREE, PASS),
        ({"bias": 0.0, "bracketed": 1.0, "coverage": 0.8}, FREE, FAIL),
        ({"bias": math.nan}, FAIL, FREE),
    ],
)
def test_fitted_ones(changed: dict[str, float], bias: str, coverage: str) -> None:
    row = CELL | {"approximation": "optimal"} | changed
    (cell,) = acceptance.check(pd.DataFrame([row])).to_dict("records")
    assert (cell["rule"], cell["bias_verdict"], cell["coverage_verdict"]) == (
        "fitted",
        bias,
        coverage,
    )


def test_failures_are_named() -> None:
    rows = [CELL, CELL | {"n": 1024, "bias": 0.2}, CELL | {"kind": "plugin", "bias": 0.9}]
    *lines, verdict = acceptance.report(pd.DataFrame(rows))
    assert [line for line in lines if "FAIL bias" in line] == [
        "  FAIL bias: teacher, N = 1024, kfac, cosine: bias +0.2000 +- 0.0010 (limit 0.0100; "
        "plug-in -0.0900), coverage 0.95, standard error over sd 1.00, abstains 0.00, N_eff 150"
    ]
    assert verdict == "1 of 2 cells fail."
    assert list(acceptance.report(pd.DataFrame([CELL])))[-1] == "All of 1 cells meet the criteria."


# -------------------------------------------------------------------------- honest numbers


TINY = honest_numbers.Preset(seeds=3, sizes=(8, 64, 256), truth=2**14)


@pytest.fixture(scope="module")
def honest() -> pd.DataFrame:
    return honest_numbers.collect(TINY)


def test_the_truth_agrees_with_random_inputs_and_dense_formulas() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2**16, 12, generator=generator, dtype=torch.float64)
    x = x * honest_numbers.deviations()
    p = torch.softmax(x @ honest_numbers.model().weight.detach().T, 1)
    S = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).flatten(1)
    R = S.T @ (x[:, :, None] * x[:, None]).flatten(1) / len(x)
    H = R.view(10, 10, 12, 12).transpose(1, 2).reshape(120, 120).numpy()
    L, right = oracle.left_factor(H, (10, 12)), oracle.right_factor(H, (10, 12))
    found = honest_numbers.truth(2**14)
    assert found["shampoo-squared"] == pytest.approx(oracle.cosine(H, np.kron(L, right)), abs=3e-3)
    roots = np.kron(oracle.matrix_power(L, 0.5), oracle.matrix_power(right, 0.5))
    assert found["shampoo"] == pytest.approx(oracle.cosine(H, roots), abs=3e-3)
    singular = oracle.kronecker_spectrum(H, (10, 12))
    assert found["optimal"] == pytest.approx(singular[0] / np.linalg.norm(singular), abs=3e-3)
    K = np.kron(S.mean(0).view(10, 10).numpy(), (x.T @ x / len(x)).numpy())
    assert found["kfac"] == pytest.approx(oracle.cosine(H, K), abs=3e-3)


def test_every_estimate_is_in_the_table(honest: pd.DataFrame) -> None:
    counts = honest[honest["kind"].isin(honest_numbers.KINDS)].groupby("n").size()
    assert dict(counts) == dict.fromkeys(TINY.sizes, 3 * 4 * 3)
    few = honest[(honest["n"] == 8) & (honest["kind"] == "population")]
    assert few["cosine"].isna().all()
    assert honest.loc[honest["kind"] == "truth_error", "cosine"].max() < 1e-3


def test_the_headline_is_computed_from_the_table() -> None:
    rows = [
        {"approximation": name, "kind": "truth", "cosine": 0.9}
        for name in honest_numbers.APPROXIMATIONS
    ]
    biases = {"plugin": {64: -0.2, 256: -0.1, 1024: -0.005}, "population": {256: 0.004, 1024: 0}}
    for repetition in range(10):
        for name in honest_numbers.APPROXIMATIONS:
            for n in (64, 256, 1024):
                cell = {"approximation": name, "n": n, "repetition": repetition}
                rows += [
                    cell | {"kind": kind, "cosine": 0.9 + by_n.get(n, math.nan)}
                    for kind, by_n in biases.items()
                ]
    assert honest_numbers.headline(pd.DataFrame(rows)) == (
        "With 256 data the plug-in cosine is 0.10 to 0.10 too low; the population estimate is "
        "right to 0.004 on average, from there on; the plug-in cosine needs 1024 data to be right "
        "to 0.01"
    )


def test_the_figure_shows_the_truth_and_every_kind(honest: pd.DataFrame) -> None:
    figure = honest_numbers.draw(honest)
    assert len(figure.axes) == len(honest_numbers.APPROXIMATIONS)
    for ax in figure.axes:
        labels = set(ax.get_legend_handles_labels()[1])
        assert labels == {"truth", *honest_numbers.NAMES.values()}
