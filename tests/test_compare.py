"""kp.compare: every number is the metric function's own, and what has no number says why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.quality.compare import Scores
from tests import oracle

APPROXIMATIONS = ("optimal", "shampoo-squared", "kfac", "shampoo", "eigen-corrected", "diagonal")
METRICS: dict[str, Callable[..., float]] = {
    "cosine": kp.cosine_similarity,
    "relative_error": kp.relative_error,
    "best_scale_error": kp.best_scale_error,
    "best_scale": kp.best_scale,
}
DTYPES = {
    "parameter": "string", "m": "Int64", "n": "Int64", "n_examples": "Int64", "n_columns": "Int64",
    "n_positions": "Int64", "target": "string", "approximation": "string", "metric": "string",
    "index": "Int64", "kind": "string", "value": "float64", "stderr": "float64", "low": "float64",
    "high": "float64", "interval": "string", "n_eff": "float64", "copies": "Int64",
    "rule": "string", "block_size": "Int64", "epsilon": "float64", "reason": "string",
    "note": "string",
}  # fmt: skip
# float64 sums in another order; the same number in a relative error comes out of a root
SAME = 1e-12
ORACLE = 1e-7


class Net(nn.Module):
    """A layer without shared positions, one with, dropout, a norm, and a frozen parameter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.spare = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.drop(self.conv(x).relu()).flatten(1)))


@pytest.fixture(scope="module")
def samples() -> kp.Capture:
    torch.manual_seed(0)
    batch = torch.randn(12, 1, 3, 3), torch.randint(3, (12,))
    data = batch[0].double(), batch[1]
    layers = ("conv.weight", "head.weight", "spare")
    return kp.capture(Net().double(), nn.CrossEntropyLoss(), data, layers=layers)


@pytest.fixture(scope="module")
def scores(samples: kp.Capture) -> Scores:
    return kp.compare(samples)


def factors(seed: int = 0, n_examples: int = 7) -> kp.GradientSamples:
    generator = torch.Generator().manual_seed(seed)
    d, a = (torch.randn(n_examples, k, generator=generator, dtype=torch.float64) for k in (3, 4))
    return kp.GradientSamples.from_factors(d, a)


def value(table: pd.DataFrame, kind: str = "plugin", **where: str) -> float:
    """The one number there; rows about the sample matrix itself have no kind."""
    rows = table[table["kind"].fillna("plugin") == kind]
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def all_say(rows: pd.DataFrame, pattern: str) -> bool:
    """Whether there are rows, and each has a note that matches."""
    return len(rows) > 0 and bool(rows["note"].fillna("").str.contains(pattern).all())


# ---------------------------------------------------------------- the table


def test_the_table_has_one_schema_whatever_was_scored(samples: kp.Capture) -> None:
    matrices = kp.GradientSamples.from_matrices(torch.ones(2, 3, 4))
    for scores in (
        kp.compare(samples),
        kp.compare(samples, []),
        kp.compare(matrices, "optimal", singular_values=0),
        kp.compare(kp.GradientSamples.from_matrices(torch.zeros(2, 3, 4))),
    ):
        assert scores.table.dtypes.astype(str).to_dict() == DTYPES
        assert list(scores.table) == list(DTYPES)


def test_no_number_is_there_twice(scores: Scores) -> None:
    key = ["parameter", "approximation", "metric", "index", "kind"]
    assert not scores.table.duplicated(key).any()
    measured = scores.table[scores.table["approximation"].notna()]
    counts = measured.groupby("parameter").size().to_dict()
    assert counts == dict.fromkeys(["conv.weight", "head.weight"], 6 * 4 * 2)


def test_rows_say_what_was_measured(samples: kp.Capture, scores: Scores) -> None:
    shapes = {"conv.weight": (2, 4, 12, 3, 4), "head.weight": (3, 8, 12, 3, 1)}
    sizes = ["m", "n", "n_examples", "n_columns", "n_positions"]
    for name, shape in shapes.items():
        rows = scores.table[scores.table["parameter"] == name]
        assert set(rows[sizes].itertuples(index=False, name=None)) == {shape}
        assert set(rows["target"]) == {"ggn"}
    approximated = scores.table["approximation"].notna()
    assert set(scores.table.loc[approximated, "kind"]) == {"plugin", "population"}
    rest = scores.table[~approximated & scores.table["kind"].notna()]
    assert set(rest["kind"]) == {"population"}
    assert set(rest["metric"]) == {"norm", "noise_floor"}


def test_draws_without_factors_have_no_positions_and_no_name() -> None:
    table = kp.compare(kp.GradientSamples.from_matrices(torch.randn(5, 2, 3))).table
    assert table["n_positions"].isna().all()
    assert table["target"].isna().all()
    assert set(table["parameter"]) == {"samples"}


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", APPROXIMATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_every_number_is_that_of_the_metric_function(
    samples: kp.Capture, scores: Scores, name: str, metric: str
) -> None:
    for parameter, one in samples.items():
        H = kp.SecondMoment(one)
        direct = METRICS[metric](H, kp.approximate(H, name))
        found = value(scores.table, parameter=parameter, approximation=name, metric=metric)
        assert found == pytest.approx(direct, rel=SAME, abs=SAME)


def test_the_numbers_are_those_of_dense_matrices() -> None:
    rng = np.random.default_rng(3)
    d, a, w = rng.normal(size=(9, 3)), rng.normal(size=(9, 4)), rng.uniform(0.5, 2, 9)
    H = oracle.second_moment(oracle.columns(d, a), w)
    dense = {
        "optimal": oracle.optimal(H, (3, 4)),
        "shampoo-squared": oracle.shampoo_squared(H, (3, 4)),
        "kfac": oracle.kfac(d, a, w),
        "shampoo": oracle.shampoo(H, (3, 4)),
        "eigen-corrected": oracle.eigen_corrected(H, (3, 4)),
        "diagonal": oracle.diagonal(H),
    }
    given = kp.GradientSamples.from_factors(*map(torch.from_numpy, (d, a, w)))
    table = kp.compare({"w": given}, singular_values=5).table
    for name, P in dense.items():
        for metric in METRICS:
            expected = getattr(oracle, metric)(H, P)
            found = value(table, approximation=name, metric=metric)
            assert found == pytest.approx(expected, abs=ORACLE), (name, metric)
    assert value(table, metric="norm") == pytest.approx(oracle.norm(H))
    assert value(table, metric="trace") == pytest.approx(np.trace(H))
    spectrum = table[table["metric"] == "singular_value"]
    assert spectrum["index"].tolist() == [0, 1, 2, 3, 4]
    expected = oracle.kronecker_spectrum(H, (3, 4))[:5]
    np.testing.assert_allclose(spectrum["value"], expected, rtol=ORACLE)


def test_the_first_singular_value_over_the_norm_is_the_cosine_of_the_optimum(
    scores: Scores,
) -> None:
    for parameter in ("conv.weight", "head.weight"):
        rows = scores.table[scores.table["parameter"] == parameter]
        first = value(rows[rows["index"] == 0], metric="singular_value")
        cosine = value(rows, approximation="optimal", metric="cosine")
        assert first / value(rows, metric="norm") == pytest.approx(cosine, rel=1e-10)


@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_as_many_singular_values_as_asked_for_or_as_there_are(count: int) -> None:
    table = kp.compare(factors(n_examples=4), "kfac", singular_values=count).table
    found = table[table["metric"] == "singular_value"]["value"]
    assert len(found) == min(count, 4)  # R(H) of four rank-one draws has rank four
    assert found.is_monotonic_decreasing


# ---------------------------------------------------------------- which approximations


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, list(APPROXIMATIONS)),
        ("kfac", ["kfac"]),
        (["shampoo", "optimal"], ["shampoo", "optimal"]),
        (("optimal", "optimal"), ["optimal"]),
        ([], []),
    ],
)
def test_the_approximations_asked_for_in_their_order(
    asked: list[str] | None, given: list[str]
) -> None:
    scores = kp.compare(factors(), asked)
    cosines = scores.table[scores.table["metric"] == "cosine"]
    for kind in ("plugin", "population"):
        assert cosines.loc[cosines["kind"] == kind, "approximation"].tolist() == given
    assert scores.pivot().columns.tolist() == given
    assert repr(scores)


@pytest.mark.parametrize(
    ("call", "nearest"),
    [
        (lambda: kp.compare(factors(), ["optimal", "shampoo_squared"]), "shampoo-squared"),
        (lambda: kp.compare(factors()).pivot("cosin"), "cosine"),
        (lambda: kp.compare(factors()).pivot(kind="populaton"), "population"),
        (lambda: kp.compare(factors(), metrics="cosin"), "cosine"),
        (lambda: kp.compare(factors(), estimates="plug-in"), "plugin"),
        (lambda: kp.compare({"layer": factors()}, extra={"layr": {}}), "layer"),
    ],
    ids=["approximation", "metric of pivot", "kind of pivot", "metric", "kind", "extra"],
)
def test_unknown_names_suggest_the_nearest(call: Callable[[], object], nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean '{nearest}'"):
        call()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "no samples"),
        (torch.ones(2, 3, 4), "got a Tensor"),
        ({"layer": torch.ones(2, 3, 4)}, "Tensor; give GradientSamples"),
        ([factors()], "got a list"),
    ],
)
def test_what_holds_no_samples_is_refused(given: object, told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        kp.compare(given)  # type: ignore[arg-type]


def test_a_negative_count_of_singular_values_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="singular_values=-1"):
        kp.compare(factors(), singular_values=-1)


def test_kfac_of_draws_without_factors_is_a_row_without_value() -> None:
    given = kp.GradientSamples.from_matrices(torch.randn(6, 3, 4, dtype=torch.float64))
    scores = kp.compare({"mine": given, "layer": factors()})
    plugin = scores.table[scores.table["kind"] == "plugin"]
    rows = plugin[plugin["approximation"] == "kfac"]
    without, there = rows[rows["parameter"] == "mine"], rows[rows["parameter"] == "layer"]
    assert without["metric"].tolist() == list(METRICS)
    assert without["value"].isna().all()
    assert all_say(without, "from_factors")
    assert there["value"].notna().all()
    others = plugin[plugin["approximation"].isin(set(APPROXIMATIONS) - {"kfac"})]
    assert others["value"].notna().all()
    assert math.isnan(scores.pivot().loc["mine", "kfac"])
    assert scores.pivot().loc["layer", "kfac"] > 0


# ---------------------------------------------------------------- operators of one's own

ONE = kp.DiagonalOperator(torch.ones(3, 4))


def test_extra_operators_get_the_metrics_that_do_not_depend_on_scale() -> None:
    given = factors()
    H = kp.SecondMoment(given)
    left, right = torch.eye(3).double(), torch.diag(torch.arange(1.0, 5.0)).double()
    mine = kp.KroneckerOperator(left, right)
    scaled = kp.KroneckerOperator(left, 1e6 * right)
    extra = {"layer": {"mine": mine, "scaled": scaled}}
    table = kp.compare({"layer": given, "other": factors(1)}, ["optimal"], extra=extra).table
    for name in ("mine", "scaled"):
        rows = table[table["approximation"] == name]
        assert rows["parameter"].unique().tolist() == ["layer"]
        assert rows["metric"].tolist() == ["cosine", "best_scale_error"] * 2
        assert rows["kind"].tolist() == ["plugin"] * 2 + ["population"] * 2
        for metric in ("cosine", "best_scale_error"):
            expected = METRICS[metric](H, mine)
            assert value(rows, metric=metric) == pytest.approx(expected, rel=SAME)


def test_an_extra_operator_cannot_pass_for_an_approximation() -> None:
    extra = {"layer": {"optimal": kp.DiagonalOperator(torch.ones(3, 4))}}
    for names in (None, ["kfac"]):  # asked for or not
        with pytest.raises(InvalidInputError, match=r"extra for 'layer'.*'optimal'.*rename"):
            kp.compare({"layer": factors()}, names, extra=extra)
    with pytest.raises(InvalidInputError, match=r"'optimal:rank=2' of an approximation"):
        kp.compare({"layer": factors()}, extra={"layer": {"optimal:rank=2": ONE}})


def test_an_extra_operator_of_another_shape_is_refused() -> None:
    extra = {"layer": {"mine": kp.DiagonalOperator(torch.ones(4, 3))}}
    with pytest.raises(InvalidInputError, match=r"'layer' .* 'mine' on 4 x 3 .* layer is 3 x 4"):
        kp.compare({"layer": factors()}, extra=extra)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (ONE, "extra= of type DiagonalOperator; give a mapping"),
        ([ONE], "extra= of type list; give a mapping"),
        ({"layer": ONE}, "extra for 'layer' is a DiagonalOperator; give a mapping"),
        ({"layer": [ONE]}, "extra for 'layer' is a list"),
        ({"layer": None}, "extra for 'layer' is a NoneType"),
        ({"layer": {3: ONE}}, "extra for 'layer' names an operator 3; give a string"),
        ({"layer": {"mine": torch.eye(12)}}, "extra for 'layer' has a Tensor as 'mine'; give an"),
        ({3: {"mine": ONE}}, "parameter of extra"),
    ],
)
def test_what_is_no_mapping_to_operators_is_refused(extra: object, says: str) -> None:
    with pytest.raises((InvalidInputError, UnknownNameError), match=re.escape(says)):
        kp.compare({"layer": factors()}, extra=extra)


# ---------------------------------------------------------------- truncated draws


def test_a_truncated_target_says_what_was_dropped() -> None:
    """Rank 1 of two singular values 2 and 1 drops a fifth of the energy, on every row told."""
    p = torch.nn.Parameter(torch.zeros(6, 5))
    window = kp.GradientWindow([("w", p)], size=4, form="low-rank", rank=1)
    whole = kp.GradientWindow([("w", p)], size=4, form="dense")
    for seed in range(4):
        torch.manual_seed(seed)
        u, v = (torch.linalg.qr(torch.randn(side, 2)).Q for side in (6, 5))
        p.grad = u @ torch.diag(torch.tensor([2.0, 1.0])) @ v.T
        window.update()
        whole.update()
    for given in (window.samples(), window.samples()["w"]):
        table = kp.compare(given, ["optimal"]).table
        assert value(table, metric="dropped_energy") == pytest.approx(0.2, rel=1e-5)
        told = table[table["kind"].isna() | (table["kind"] == "plugin")]
        assert all_say(told, r"truncation to rank 1 dropped 20 % of the energy: cosines are")
    exact = kp.compare(whole.samples(), ["optimal"]).table
    assert not (exact["metric"] == "dropped_energy").any()
    assert not exact["note"].str.contains("truncat").any()
    found = {one.subject: one.level for one in kp.diagnose(kp.compare(window.samples()))}
    assert found == {"truncated target": "abstained"}


# ---------------------------------------------------------------- undefined


@pytest.mark.parametrize(
    "given",
    [
        kp.GradientSamples.from_factors(torch.zeros(5, 3), torch.randn(5, 4)),
        kp.GradientSamples.from_factors(torch.randn(5, 2, 3), torch.zeros(5, 2, 4)),
        kp.GradientSamples.from_matrices(torch.zeros(5, 3, 4)),
        kp.GradientSamples.from_factors(torch.randn(5, 3), torch.randn(5, 4), torch.zeros(5)),
    ],
    ids=["zero gradients", "zero inputs, shared", "zero matrices", "zero weights"],
)
def test_no_quality_of_a_zero_target(given: kp.GradientSamples) -> None:
    extra = {"dead": {"mine": kp.DiagonalOperator(torch.ones(3, 4))}}
    scores = kp.compare({"dead": given}, extra=extra)
    quality = scores.table[scores.table["approximation"].notna()]
    decided = quality["metric"].isin(["cosine", "relative_error", "best_scale_error"])
    assert quality.loc[decided, "value"].isna().all()
    assert quality.loc[quality["value"].isna(), "note"].notna().all()
    assert all_say(quality[decided & (quality["approximation"] != "kfac")], "^H = 0")
    assert not (quality["value"] == 1.0).any()
    assert value(scores.table, metric="norm") == 0.0
    assert value(scores.table, metric="trace") == 0.0
    assert not (scores.table["metric"] == "singular_value").any()
    assert scores.pivot().isna().all(axis=None)
    assert scores.shown().isin(["-"]).to_numpy()[:, :-1].all()


def test_no_cosine_of_a_zero_operator() -> None:
    extra = {"layer": {"nothing": kp.DiagonalOperator(torch.zeros(3, 4))}}
    table = kp.compare({"layer": factors()}, [], extra=extra).table
    rows = table[table["approximation"] == "nothing"]
    assert rows["value"].isna().all()
    assert all_say(rows[rows["kind"] == "plugin"], "^P = 0")


# ---------------------------------------------------------------- skipped, notes


def test_parameters_that_were_not_measured_are_listed_with_the_reason(scores: Scores) -> None:
    skipped = scores.table[scores.table["metric"] == "skipped"].set_index("parameter")
    measured = {"conv.weight", "head.weight"}
    assert set(skipped.index) == {name for name, _ in Net().named_parameters()} - measured
    assert "frozen" in skipped.loc["spare", "note"]
    assert "not selected" in skipped.loc["head.bias", "note"]
    assert skipped["value"].isna().all()
    assert skipped["approximation"].isna().all()
    assert set(scores.pivot().index) == measured


def test_the_table_says_where_the_measurement_differs_from_training() -> None:
    model = Net(dropout=0.25)
    batch = torch.randn(6, 1, 3, 3), torch.randint(3, (6,))
    table = kp.compare(kp.capture(model, nn.CrossEntropyLoss(), batch)).table
    measured = table[table["kind"] == "plugin"]
    assert all_say(measured, r"eval mode.*p=0\.25")
    model.eval()
    quiet = kp.compare(kp.capture(model, nn.CrossEntropyLoss(), batch)).table
    assert quiet.loc[quiet["kind"] == "plugin", "note"].isna().all()


# ---------------------------------------------------------------- looking at it


@pytest.mark.parametrize("metric", METRICS)
def test_pivot_is_the_table_in_wide_form(scores: Scores, metric: str) -> None:
    wide = scores.pivot(metric)
    assert wide.index.tolist() == ["conv.weight", "head.weight"]
    assert wide.columns.tolist() == list(APPROXIMATIONS)
    assert wide.columns.name == metric
    for parameter, row in wide.iterrows():
        for name, found in row.items():
            where = {"parameter": str(parameter), "approximation": str(name), "metric": metric}
            assert found == value(scores.table, **where)


def test_text_and_html_show_the_cosines(scores: Scores) -> None:
    for shown in (repr(scores), scores._repr_html_()):
        assert all(name in shown for name in APPROXIMATIONS)
        for number in scores.pivot().to_numpy().ravel():
            assert f"{number:.4f}" in shown
    assert "<table" in scores._repr_html_()


def test_a_parameter_name_cannot_inject_html() -> None:
    shown = kp.compare({"<script>": factors()}, "optimal")._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


def test_plot_draws_a_panel_for_each_parameter(scores: Scores) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = scores.plot(figure=figure, metric="best_scale_error")
    assert [ax.get_title(loc="left").split()[0] for ax in axes] == ["conv.weight", "head.weight"]
    with pytest.raises(UnknownNameError):
        scores.plot(figure=Figure(), metric="cosin")


def test_scores_are_frozen(scores: Scores) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.table = pd.DataFrame()  # type: ignore[misc]


def test_an_extra_operator_of_any_scale_has_directions_at_its_best_one() -> None:
    given = factors()
    H = kp.SecondMoment(given)
    left, right = torch.eye(3).double(), torch.diag(torch.arange(1.0, 5.0)).double()
    mine = kp.KroneckerOperator(left, right)
    nearest = kp.KroneckerOperator(left, kp.best_scale(H, mine) * right)
    extra = {"layer": {"mine": mine, "scaled": kp.KroneckerOperator(left, 1e6 * right)}}
    metric = "direction:power=0.5"
    found = kp.compare({"layer": given}, ["optimal"], metrics=[metric], extra=extra).table
    expected = kp.direction_agreement(H, nearest, powers=0.5).table.iloc[0]["cosine"]
    for name in ("mine", "scaled"):
        rows = found[found["approximation"] == name]
        (cosine,) = rows[rows["metric"].str.startswith("direction_cosine")]["value"]
        assert cosine == pytest.approx(expected, rel=SAME)
