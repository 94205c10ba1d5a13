"""The analyses of the optimizer family, at reduced length: tables obey the theory."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from analyses import purifying, root_free
from kronecker_probe.cli import app
from kronecker_probe.scripts import Script

# float32 updates and eigenbases of the same factors, found by the same program
SAME = 1e-4
# a mean over a few hundred random gradients
NOISE = 0.15
# float64 runs of 8 steps in two coordinates; those that differ do so by O(1)
INVARIANT, DIFFERENT = 1e-9, 0.1
AGES = (0, 15)


@pytest.fixture(scope="module")
def purified() -> pd.DataFrame:
    shapes = ((16, 16), (32, 16), (16, 32))
    preset = purifying.Preset(1, shapes, 60, 20, 1, AGES, 30, (1e-2,), (1, 10), (0.02, 0.5))
    return purifying.collect(preset)


@pytest.fixture(scope="module")
def rootless() -> pd.DataFrame:
    return root_free.collect(root_free.Preset(1, 2, 6, (1, 16), 300, 64, 8))


def drifted(table: pd.DataFrame, measured: str) -> pd.DataFrame:
    rows = table[(table["part"] == "drift") & (table["measured"] == measured)]
    wide = rows.set_index(["age", "parameter", "variant"])["value"].unstack("variant")
    assert len(wide) == 3 * len(AGES)
    return wide


def test_white_noise_gives_the_magnitudes_of_theory(purified: pd.DataFrame) -> None:
    errors = purifying.magnitude_errors(purified)
    assert len(errors) == 3 * len(purifying.MAGNITUDES)
    assert errors.max() < NOISE
    noise = purified[purified["part"] == "magnitude"]
    wide = noise.set_index(["m", "n", "variant"])["value"].unstack("variant")
    for (m, n), ratio in (wide["Shampoo"] / wide["EShampoo"]).items():
        assert ratio == pytest.approx((m * n) ** -0.25, rel=NOISE)


def test_a_basis_that_was_just_renewed_is_that_of_a_run_that_always_renews(
    purified: pd.DataFrame,
) -> None:
    for measured in ("basis_error", "eigenvalue_error", "length"):
        now = drifted(purified, measured).loc[0]
        always = now["Shampoo, renewed every step"]
        assert (now["Shampoo"] / always - 1).abs().max() < SAME, measured
    now = drifted(purified, "basis_ratio").loc[0]
    assert (now["EShampoo"] - 1).abs().max() < SAME


def test_neither_grafting_nor_correction_touches_bases(purified: pd.DataFrame) -> None:
    basis, cosine = drifted(purified, "basis_error"), drifted(purified, "cosine")
    for other in (purifying.GRAFTED, "EShampoo", "EShampoo, marginals matched"):
        assert (basis[other] / basis["Shampoo"] - 1).abs().max() < SAME
    assert (cosine[purifying.GRAFTED] - cosine["Shampoo"]).abs().max() < SAME


def test_correction_repairs_eigenvalues_and_grafting_lengths(purified: pd.DataFrame) -> None:
    values = drifted(purified, "eigenvalue_error").loc[AGES[-1]]
    assert (values["EShampoo"] < values[purifying.GRAFTED]).all()
    length = drifted(purified, "length").loc[AGES[-1]].map(math.log).abs()
    assert (length[purifying.GRAFTED] < length["Shampoo"]).all()


def test_refreshes_follow_the_rules(purified: pd.DataFrame) -> None:
    rows = purified[(purified["part"] == "refresh") & (purified["measured"] == "refreshes")]
    counts = rows.set_index(["variant", "setting", "parameter", "side"])["value"].unstack("setting")
    assert (counts.loc["interval", 1] == 30).all()
    assert (counts.loc["interval", 10] == 3).all()
    loose, tight = counts.loc["tolerance", 0.5], counts.loc["tolerance", 0.02]
    assert loose.ge(1).all()
    assert tight.le(3).all()  # tests
    assert loose.mean() < tight.mean()


def test_b_undoes_the_batch_at_sampled_labels(rootless: pd.DataFrame) -> None:
    moments = root_free.second_moments(rootless)
    scaled, plain = (moments.xs(name, level="method") for name in root_free.SCALINGS)
    assert (scaled.loc["sampled", "held"] - 1).abs().max() < NOISE
    assert (scaled["held"] / scaled["theory"] - 1).abs().max() < NOISE
    sizes = plain.index.get_level_values("batch_size")
    assert (plain["held"] * sizes / scaled["held"] - 1).abs().max() < SAME
    # at true labels the mean gradient enters
    assert (scaled.loc["true", "theory"].xs(16, level="batch_size") > 1).all()


def test_without_the_root_coordinates_do_not_matter(rootless: pd.DataFrame) -> None:
    far = root_free.distances(rootless)["median"].unstack("step")
    assert set(far.index) == set(root_free.COMPARED)
    for method, row in far.iterrows():
        if root_free.METHODS[method].root:
            assert row.min() > DIFFERENT, method
        else:
            assert row.max() < INVARIANT, method


def test_every_method_has_the_same_search(rootless: pd.DataFrame) -> None:
    trials = rootless[rootless["measured"] == "trial"]
    rates = trials.groupby("method")["lr"].agg(tuple)
    assert set(rates.index) == set(root_free.METHODS)
    assert rates.nunique() == 1
    low, high = root_free.RATES
    assert trials["lr"].between(low, high).all()
    best = trials.loc[trials.groupby("method")["value"].idxmin()].set_index("method")["lr"]
    curves = rootless[rootless["measured"] == "loss"]
    assert root_free.SEARCH_SEED not in set(curves["seed"])
    for method, lr in curves.groupby("method")["lr"]:
        assert (lr == best[method]).all()


@pytest.mark.parametrize(
    ("script", "table", "panels"),
    [(purifying.SCRIPT, "purified", 8), (root_free.SCRIPT, "rootless", 6)],
    ids=["purifying", "root_free"],
)
def test_the_figure_says_the_conclusion(
    script: Script, table: str, panels: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rows = request.getfixturevalue(table)
    figure = script.draw(rows)
    assert len(figure.axes) == panels
    assert all(ax.get_title(loc="left") for ax in figure.axes)
    title, *others = script.sentences(rows)
    assert re.sub(r"\s+", " ", figure.get_suptitle()) == title
    assert "nan" not in " ".join([title, *others])
    script.save(figure, tmp_path / script.name)
    assert (tmp_path / f"{script.name}.png").stat().st_size > 10_000


def test_the_command_line_knows_them() -> None:
    told = CliRunner().invoke(app, ["analyze", "nothing-of-that-name"])
    assert told.exit_code != 0
    for script in (purifying.SCRIPT, root_free.SCRIPT):
        assert script.name.replace("_", "-") in told.output


@pytest.mark.parametrize("script", [purifying.SCRIPT, root_free.SCRIPT], ids=["purifying", "root"])
def test_the_index_says_what_the_kept_table_says(script: Script) -> None:
    figures = Path(__file__).parents[1] / "figures"
    index = (figures / "README.md").read_text("utf-8")
    for sentence in script.sentences(pd.read_csv(figures / f"{script.name}.csv")):
        assert sentence.rstrip(".") in index
