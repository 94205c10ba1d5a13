"""The analyses of the optimizer family, at reduced length: tables obey the theory."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analyses import overhead, purifying, root_free
from analyses.purifying import tables as purifying_tables
from analyses.root_free import precision as precision
from analyses.root_free.sentences import breaking
from kronecker_probe.cli.analysis import Script
from kronecker_probe.cli.app import app
from kronecker_probe.linalg.inverse_roots import TOLERANCE

pytestmark = pytest.mark.figures

# float32 updates and eigenbases of the same factors, found by the same program
SAME = 1e-4
# a mean over a few hundred random gradients
NOISE = 0.15
# float64 runs of 8 steps in two coordinates; those that differ do so by O(1)
INVARIANT, DIFFERENT = 1e-9, 0.1
# bfloat16 has 8 bits; the iteration as it is stops at 10 units of these, in the largest entry
HALVED = 3e-2
ACCURATE = {precision.FULL: SAME, precision.HALF: 10 * HALVED, precision.BEST: HALVED}
AGES = (0, 15)


@pytest.fixture(scope="module")
def purified() -> pd.DataFrame:
    shapes = ((16, 16), (32, 16), (16, 32))
    preset = purifying.Preset(1, shapes, 60, 20, 1, AGES, 30, (1e-2,), (1, 10), (0.02, 0.5))
    return purifying.collect(preset)


@pytest.fixture(scope="module")
def rootless() -> pd.DataFrame:
    steps = {root_free.CNN: 6, root_free.GPT: 4}
    return root_free.collect(root_free.Preset(1, 2, steps, (1, 16), 300, 64, 8, (1e-1, 1e-6)))


def drifted(table: pd.DataFrame, measured: str) -> pd.DataFrame:
    rows = table[(table["part"] == "drift") & (table["measured"] == measured)]
    wide = rows.set_index(["age", "parameter", "variant"])["value"].unstack("variant")
    assert len(wide) == 3 * len(AGES)
    return wide


def test_white_noise_gives_the_magnitudes_of_theory(purified: pd.DataFrame) -> None:
    errors = purifying_tables.magnitude_errors(purified)
    assert len(errors) == 3 * len(purifying_tables.MAGNITUDES)
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
    for other in (purifying_tables.GRAFTED, "EShampoo", "EShampoo, marginals matched"):
        assert (basis[other] / basis["Shampoo"] - 1).abs().max() < SAME
    assert (cosine[purifying_tables.GRAFTED] - cosine["Shampoo"]).abs().max() < SAME


def test_correction_repairs_eigenvalues_and_grafting_lengths(purified: pd.DataFrame) -> None:
    values = drifted(purified, "eigenvalue_error").loc[AGES[-1]]
    assert (values["EShampoo"] < values[purifying_tables.GRAFTED]).all()
    length = drifted(purified, "length").loc[AGES[-1]].map(math.log).abs()
    assert (length[purifying_tables.GRAFTED] < length["Shampoo"]).all()


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
    by = ["workload", "method"]
    rates = trials.groupby(by)["lr"].agg(tuple)
    assert set(rates.index) == set(
        itertools.product((root_free.CNN, root_free.GPT), root_free.METHODS)
    )
    assert rates.nunique() == 1
    low, high = root_free.RATES
    assert trials["lr"].between(low, high).all()
    best = trials.loc[trials.groupby(by)["value"].idxmin()].set_index(by)["lr"]
    curves = rootless[(rootless["part"] == "training") & (rootless["measured"] == "loss")]
    assert root_free.SEARCH_SEED not in set(curves["seed"])
    for case, lr in curves.groupby(by)["lr"]:
        assert (lr == best[case]).all()


def test_bfloat16_runs_have_the_rate_that_float32_found(rootless: pd.DataFrame) -> None:
    runs = rootless[rootless["part"] == "precision"]
    found = root_free.best_rates(rootless, root_free.GPT)
    assert (runs["lr"] == runs["method"].map(found)).all()
    losses = root_free.by_precision(rootless, "loss")
    pairs = {(method, damping) for method, damping, _ in losses.dropna(how="all").index}
    assert {("Shampoo", 1e-1), ("Shampoo", 1e-6), ("RootFreeShampoo", 1e-6)} < pairs
    # from the same start, after four steps
    change = root_free.changes(rootless).xs("InverseFreeShampoo", level="method")["bfloat16"]
    assert 0 < change.abs().max() < HALVED
    residuals = root_free.by_precision(rootless, "log10_residual").xs("Shampoo", level="method")
    wide, narrow = (residuals.xs(damping, level="damping").iloc[0] for damping in (1e-1, 1e-6))
    assert wide["float32"] < math.log10(SAME)
    assert wide["bfloat16"] < math.log10(TOLERANCE) < narrow["bfloat16"]


def test_changes_are_relative_and_broken_runs_infinite() -> None:
    losses = {"float32": (2.0, 2.0), "bfloat16": (2.02, math.inf), precision.BEST: (1.9, 2.2)}
    rows = [
        {"part": "precision", "method": "Shampoo", "damping": 1e-3, "measured": "loss"}
        | {"precision": how, "seed": seed, "value": value}
        for how, values in losses.items()
        for seed, value in enumerate(values)
    ]
    found = root_free.changes(pd.DataFrame(rows)).droplevel(["method", "damping"])
    assert found["bfloat16"].tolist() == pytest.approx([0.01, math.inf])
    assert found[precision.BEST].tolist() == pytest.approx([-0.05, 0.1])
    assert breaking(pd.DataFrame(rows), precision.BEST) == [1e-3]


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("how", [precision.FULL, precision.HALF, precision.BEST])
def test_roots_are_those_of_a_decomposition(p: int, how: str) -> None:
    generator = torch.Generator().manual_seed(p)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(1.0, 1e-3, 24, dtype=torch.float64) * 7.0  # the largest
    A = (basis * values) @ basis.mT
    expected = (basis * (values + 0.1 * 7.0).pow(-1 / p)) @ basis.mT
    roots, residual = precision.inverse_roots(A.float()[None], p, 0.1, how)
    error = (roots[0].double() - expected).norm() / expected.norm()
    assert error < ACCURATE[how]
    assert residual[0] < ACCURATE[how]


def test_bfloat16_has_no_decomposition_and_its_iteration_diverges() -> None:
    with pytest.raises(RuntimeError, match="BFloat16"):
        torch.linalg.eigh(torch.eye(3, dtype=torch.bfloat16))
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    A = (rows @ rows.mT)[None]  # of rank 8: its damped null space is below bfloat16's rounding
    exact, half, best = (
        float(precision.inverse_roots(A, 4, 1e-4, how)[1])
        for how in (precision.FULL, precision.HALF, precision.BEST)
    )
    assert exact < TOLERANCE / 10
    assert TOLERANCE < best < half


@pytest.mark.parametrize("method", ["RootFreeShampoo", "Shampoo"])
def test_written_roots_are_those_that_the_optimizer_finds(method: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer = precision._with_roots(method, list(model.named_parameters()), 0.0, 1e-2, 1)
    torch.nn.functional.cross_entropy(model(torch.randn(32, 5)), torch.randint(3, (32,))).backward()
    optimizer.step()  # by eigendecomposition
    found = {
        (name, key): tensor.clone()
        for name, param in model.named_parameters()
        for key, tensor in optimizer.state[param].items()
        if key.startswith("root_")
    }
    assert len(found) == (4 if method == "RootFreeShampoo" else 6)
    for name, key in found:
        optimizer.state[model.get_parameter(name)][key].zero_()
    precision.write_roots(optimizer, precision.FULL)
    for (name, key), expected in found.items():
        written = optimizer.state[model.get_parameter(name)][key]
        assert (written - expected).norm() < SAME * expected.norm(), (name, key)


@pytest.mark.parametrize(
    ("script", "table", "panels"),
    [(purifying.SCRIPT, "purified", 8), (root_free.SCRIPT, "rootless", 12)],
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


@pytest.mark.parametrize(
    "script", [purifying.SCRIPT, root_free.SCRIPT, overhead.SCRIPT], ids=lambda one: one.name
)
def test_the_index_says_what_the_kept_table_says(script: Script) -> None:
    figures = Path(__file__).parents[1] / "figures"
    index = (figures / "README.md").read_text("utf-8")
    for sentence in script.sentences(pd.read_csv(figures / f"{script.name}.csv")):
        assert sentence.rstrip(".") in index
