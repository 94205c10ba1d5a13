"""The analyses, at reduced length: tables obey the theorems, and sentences the tables."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import kronecker_probe as kp
from analyses import shampoo_square
from kronecker_probe.cli.app import app
from tests import oracle
from tests.tolerances import INEQUALITY, ROOT_ENTRIES, SCALAR

pytestmark = pytest.mark.figures

FIGURES = Path(__file__).parents[1] / "figures"
TINY = shampoo_square.Preset(seeds=3, probes=5, probe_sizes=(32, 64), steps=40)
LAYERS = {
    ("digits-logistic", "0.weight"): (2, 64),
    ("digits-mlp", "0.weight"): (128, 64),
    ("digits-mlp", "2.weight"): (64, 128),
    ("digits-mlp", "4.weight"): (10, 64),
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return shampoo_square.collect(TINY)


def values(table: pd.DataFrame, metric: str) -> pd.Series:
    return table[table["metric"] == metric].set_index(shampoo_square.KEYS)["value"]


def test_every_layer_is_measured_once_at_every_probed_step(table: pd.DataFrame) -> None:
    steps = [0, 1, 3, 12, 40]
    assert shampoo_square.log_steps(40, 5) == steps
    wide = shampoo_square.cosines(table)  # fails on duplicates
    expected = {
        (workload, seed, n_examples, parameter, step)
        for (workload, parameter), seed, n_examples, step in itertools.product(
            LAYERS, range(TINY.seeds), TINY.probe_sizes, steps
        )
    }
    assert set(wide.index) == expected
    assert set(wide.columns) == set(shampoo_square.APPROXIMATIONS)
    for metric in shampoo_square.RATIOS:
        assert set(values(table, metric).index) == expected
    shapes = table.dropna(subset="parameter").groupby(["workload", "parameter"])[["m", "n"]]
    assert {key: tuple(one.iloc[0].astype(int)) for key, one in shapes} == LAYERS


def test_no_kronecker_product_beats_the_optimal_one(table: pd.DataFrame) -> None:
    wide = shampoo_square.cosines(table)
    assert wide.gt(0).all(axis=None)
    assert wide["optimal"].le(1 + INEQUALITY).all()
    for name in wide.columns:
        assert wide[name].le(wide["optimal"] + INEQUALITY).all(), name


def test_ratios_are_cosines(table: pd.DataFrame) -> None:
    """sigma_1 / |H| is the cosine of the optimum, and the identity-start ratios lie in [0, 1]."""
    ratio = values(table, "sigma1_ratio")
    optimal = shampoo_square.cosines(table)["optimal"]
    np.testing.assert_allclose(ratio, optimal.reindex(ratio.index), atol=SCALAR)
    for side in ("left", "right"):
        assert values(table, f"identity_start_{side}").between(0, 1 + INEQUALITY).all()


def test_two_classes_make_h_a_kronecker_product(table: pd.DataFrame) -> None:
    """The Hessian of two logits is p (1 - p) [1, -1][1, -1]^T, so that R(H) has rank one."""
    logistic = table[table["workload"] == "digits-logistic"]
    exact = shampoo_square.cosines(logistic)[["optimal", "shampoo-squared"]]
    np.testing.assert_allclose(exact, 1.0, atol=SCALAR)
    for metric in shampoo_square.RATIOS:
        np.testing.assert_allclose(values(logistic, metric), 1.0, atol=SCALAR)


def test_the_model_is_trained_between_probes(table: pd.DataFrame) -> None:
    losses = table[table["metric"] == "loss"].groupby(["workload", "seed", "n_examples"])["value"]
    assert losses.agg(lambda along: along.iloc[-1] < along.iloc[0]).all()


def test_a_seed_decides_the_table(table: pd.DataFrame) -> None:
    again = pd.DataFrame(shampoo_square.run("digits-logistic", 1, TINY))
    first = table[(table["workload"] == "digits-logistic") & (table["seed"] == 1)]
    np.testing.assert_array_equal(again["value"], first["value"])


@pytest.mark.parametrize(("total", "count"), [(1, 2), (10, 20), (400, 20), (1000, 20), (1000, 2)])
def test_log_steps(total: int, count: int) -> None:
    steps = shampoo_square.log_steps(total, count)
    assert steps[0] == 0
    assert steps[1] == 1
    assert steps[-1] == total or count == 2
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert len(steps) <= count


@pytest.mark.parametrize("seed", range(5))
def test_overlap_of_the_factors_is_the_identity_start_ratio(seed: int) -> None:
    """cos(L, U_1) = alpha_1 s_1 / sqrt(sum_i alpha_i^2 s_i^2), from a dense SVD of R(H)."""
    rng = np.random.default_rng(seed)
    m, n = 4, 3
    G = rng.standard_normal((6, m, n)) + 0.5
    R = oracle.rearrange(oracle.second_moment(G[:, None], np.full(6, 1 / 6)), (m, n))
    U, s, Vt = np.linalg.svd(R, full_matrices=False)
    right = Vt @ np.eye(n).reshape(-1) / np.sqrt(n) * s  # alpha_i s_i
    left = U.T @ np.eye(m).reshape(-1) / np.sqrt(m) * s
    found = shampoo_square.ratios(kp.SecondMoment(kp.GradientSamples.from_matrices(
        torch.from_numpy(G)
    )))  # fmt: skip
    assert found["sigma1_ratio"] == pytest.approx(s[0] / np.linalg.norm(s), abs=SCALAR)
    assert found["identity_start_left"] == pytest.approx(
        abs(right[0]) / np.linalg.norm(right), abs=ROOT_ENTRIES
    )
    assert found["identity_start_right"] == pytest.approx(
        abs(left[0]) / np.linalg.norm(left), abs=ROOT_ENTRIES
    )


def synthetic(gaps: dict[tuple[int, int], tuple[float, float]]) -> pd.DataFrame:
    """(seed, step) -> gaps of Shampoo^2 and Shampoo; a smaller probe set says otherwise."""
    rows = []
    for (seed, step), (square, own) in gaps.items():
        for n_examples, factor in ((100, 1.0), (50, 7.0)):
            shared = {
                "workload": "w",
                "seed": seed,
                "n_examples": n_examples,
                "parameter": "a.weight",
            }
            cosines = {
                "optimal": 0.9,
                "shampoo-squared": 0.9 - factor * square,
                "shampoo": 0.9 - factor * own,
            }
            rows += [
                shared | {"step": step, "metric": "cosine", "approximation": name, "value": value}
                for name, value in cosines.items()
            ]
            ratios = {
                "sigma1_ratio": 1 - own,
                "identity_start_left": 1 - square,
                "identity_start_right": 1 - square / 2,
            }
            rows += [
                shared | {"step": step, "metric": name, "value": 1 - factor * (1 - value)}
                for name, value in ratios.items()
            ]
    return pd.DataFrame(rows)


def test_sentences_give_median_and_range_over_seeds() -> None:
    table = synthetic({
        (0, 0): (0.001, 0.02), (0, 1): (0.004, 0.05),
        (1, 0): (0.006, 0.03), (1, 1): (0.002, 0.06),
        (2, 0): (0.009, 0.04), (2, 1): (0.009, 0.04),
    })  # fmt: skip
    said = shampoo_square.headline(table)
    assert "at most 0.006 (0.004–0.009) below" in said
    assert "Shampoo at least 0.030 (0.020–0.040); median (range) of 3 seeds" in said
    why = shampoo_square.explanation(table)
    assert "as low as 0.950 (0.940–0.960);" in why
    assert "nowhere below 0.994 (0.991–0.996)" in why


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([(0.01, 0.03), (0.02, 0.05)], "nearer to the optimal Kronecker product than Shampoo ever"),
        ([(0.01, 0.03), (0.04, 0.05)], "than Shampoo is, at every measurement"),
        ([(0.04, 0.03), (0.04, 0.05)], "in 50% of the measurements"),
    ],
)
def test_the_verdict_follows_the_numbers(gaps: list[tuple[float, float]], verdict: str) -> None:
    table = synthetic({(0, step): pair for step, pair in enumerate(gaps)})
    assert verdict in shampoo_square.headline(table)


def test_the_figure_shows_the_medians_of_the_widest_probe_set(table: pd.DataFrame) -> None:
    figure = shampoo_square.draw(table)
    assert figure.get_suptitle().replace("\n", " ") == shampoo_square.headline(table)
    assert len(figure.axes) == 2 * len(LAYERS)
    largest = table[table["n_examples"] == max(TINY.probe_sizes)]
    for ax, (workload, parameter) in zip(figure.axes, LAYERS, strict=False):
        here = largest[(largest["workload"] == workload) & (largest["parameter"] == parameter)]
        drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
        for name, told in (("shampoo-squared", "Shampoo²"), ("kfac", "K-FAC")):
            over = here[here["approximation"] == name].groupby("step")["value"].median()
            np.testing.assert_array_equal(drawn[told], over)


def test_the_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(shampoo_square.PRESETS, "quick", replace(TINY, steps=3, probe_sizes=(32,)))
    out = tmp_path / "deep" / "figures"
    shampoo_square.SCRIPT.main(["--preset", "quick", "--out", str(out), "--seeds", "1"])
    assert {path.name for path in out.iterdir()} == {
        f"shampoo_square.{kind}" for kind in ("csv", "png", "svg")
    }
    kept = pd.read_csv(out / "shampoo_square.csv")
    assert set(kept["seed"]) == {0}
    assert shampoo_square.headline(kept) in capsys.readouterr().out
    svg = (out / "shampoo_square.svg").read_bytes()
    shampoo_square.SCRIPT.save(shampoo_square.draw(kept), out / "again")
    assert (out / "again.svg").read_bytes() == svg


def test_bad_options_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments, told in (
        (["--seeds", "0"], "--seeds 0: give at least 1"),
        (["--out", str(tmp_path / "file")], "--out"),
        (["--preset", "huge"], "--preset"),
    ):
        with pytest.raises(SystemExit) as exit_:
            shampoo_square.SCRIPT.main(arguments)
        assert exit_.value.code == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_runs_the_quick_preset(tmp_path: Path) -> None:
    arguments = ["analyze", "shampoo-square", "--preset", "quick", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    kept = pd.read_csv(tmp_path / "shampoo_square.csv")
    assert set(kept["seed"]) == {0, 1}


@pytest.mark.skipif(not FIGURES.is_dir(), reason="a source distribution holds no figures")
def test_the_index_of_figures_tells_what_the_kept_table_says() -> None:
    index = (FIGURES / "README.md").read_text(encoding="utf-8")
    kept = pd.read_csv(FIGURES / "shampoo_square.csv")
    assert shampoo_square.headline(kept) in index
    assert shampoo_square.explanation(kept) in index
    wide = shampoo_square.cosines(kept)
    for name in ("shampoo-squared", "kfac"):
        for n_examples in (256, 1438):
            chosen = wide.xs(n_examples, level="n_examples").loc["digits-mlp"]
            worst = (chosen["optimal"] - chosen[name]).groupby("seed").max()
            assert f"{worst.median():.3f} ({worst.min():.3f}–{worst.max():.3f})" in index
