"""Code of the user's own that the command line imports, and what its functions may return."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text
from typer.testing import CliRunner

import kronecker_probe as kp
from kronecker_probe.approximations import registry
from kronecker_probe.cli.app import app
from kronecker_probe.cli.plugins import load_plugins
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.plots.run import plot_ladder
from kronecker_probe.quality.metrics import catalog
from kronecker_probe.table.labels import LABELS
from kronecker_probe.table.metric_info import METRIC_INFO, metric_info
from kronecker_probe.table.read import label
from tests.cases import factors_case
from tests.tolerances import SCALAR

CASE = factors_case("", 300, 4, 3)


@pytest.fixture
def registered() -> Iterator[None]:
    registries: tuple[dict[str, Any], ...] = (
        registry._BUILDS, registry._OPTIONS, LABELS, catalog._METRICS, METRIC_INFO
    )  # fmt: skip
    before = [dict(known) for known in registries]
    yield
    for known, old in zip(registries, before, strict=True):
        known.clear()
        known.update(old)


def ridge(H: kp.SecondMoment, *, share: float = 0.5) -> kp.DiagonalOperator:
    m, n = H.shape
    value = (1 + share) * H.trace() / (m * n)
    return kp.DiagonalOperator(torch.full((m, n), value, dtype=torch.float64))


def trace_gap(H: Any, P: Any, *, power: int = 1) -> float:
    return abs(P.trace() / H.trace() - 1) ** power


@pytest.mark.usefixtures("registered")
def test_an_approximation_and_a_metric_are_measured_like_built_in_ones() -> None:
    assert kp.register_approximation("ridge", label="ridged trace")(ridge) is ridge
    assert kp.register_metric("trace_gap", label="gap of traces", better="lower")(trace_gap)
    metrics = ["cosine", "trace_gap", "trace_gap:power=2"]
    table = kp.compare(
        {"fc.weight": CASE.operator().samples}, ["kfac", "ridge", "ridge:share=2"], metrics=metrics
    ).table
    rows = table[table["approximation"] == "ridge:share=2"].set_index(["metric", "kind"])["value"]
    assert rows["trace_gap:power=1", "plugin"] == pytest.approx(2.0, rel=SCALAR)
    assert rows["trace_gap:power=2", "plugin"] == pytest.approx(4.0, rel=SCALAR)
    assert rows["cosine", "population"] == pytest.approx(rows["cosine", "plugin"], abs=0.5)
    assert label("ridge:share=2") == "ridged trace, share=2"
    assert metric_info("trace_gap:power=2").label == "gap of traces, power=2"
    figure = plot_ladder(table, metric="trace_gap:power=2")[0].figure
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any("ridged trace" in text for text in texts)
    assert "gap of traces, power=2" in texts
    with pytest.raises(UnknownNameError, match=r"option of 'ridge' 'shar'.*Did you mean 'share'"):
        kp.approximate(CASE.operator(), "ridge:shar=2")


@pytest.mark.usefixtures("registered")
def test_bad_registrations_name_the_remedy() -> None:
    for register, taken in ((kp.register_approximation, "kfac"), (kp.register_metric, "cosine")):
        with pytest.raises(InvalidInputError, match=f"'{taken}' already"):
            register(taken)
        with pytest.raises(InvalidInputError, match="can't be named 'a:b'; use letters"):
            register("a:b")
        with pytest.raises(InvalidInputError, match="option how with the default 'x'; give every"):
            register("fine")(lambda H, *, how="x": H)
    kp.register_approximation("number")(lambda H: 3)  # type: ignore[type-var]
    with pytest.raises(InvalidInputError, match="returned a int; return an operator on 4 x 3"):
        kp.approximate(CASE.operator(), "number")


@pytest.mark.usefixtures("registered")
def test_what_does_not_exist_for_the_samples_is_a_row_with_a_note() -> None:
    def never(*operators: Any) -> Any:
        raise kp.errors.UnsupportedError("only for square layers")

    kp.register_approximation("never")(never)
    kp.register_metric("never")(never)
    table = kp.compare(
        CASE.operator().samples, ["never", "kfac"], metrics=["never", "cosine"]
    ).table
    rows = table[(table["approximation"] == "never") | (table["metric"] == "never")]
    assert rows["value"].isna().all()
    assert set(rows["note"]) == {"only for square layers"}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("import missing_module", "No module named 'missing_module'"),
        ("import kronecker_probe as kp; kp.register_metric('cosine')", "'cosine' already"),
        ("def", "raised SyntaxError"),
        (None, "there is no such file"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named(
    code: str | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "broken_extension.py"
    if code is not None:
        file.write_text(code)
    for _ in range(2):  # nothing is left of the first attempt
        result = run("workloads", "--plugin", file)
        assert result.exit_code == 2
        told = " ".join(result.output.split())
        assert "broken_extension.py" in told
        assert words in told
    assert "broken_extension" not in sys.modules


def test_a_plugin_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_extension.py").write_text("LOADED = []\n")
    monkeypatch.chdir(tmp_path)
    load_plugins(["some_extension", "some_extension.py"])  # once
    assert sys.modules.pop("some_extension").LOADED == []
    sys.path.remove(str(tmp_path))
    with pytest.raises(InvalidInputError, match="no module 'some_extensions' among the installed"):
        load_plugins(["some_extensions"])
    (tmp_path / "json.py").write_text("")
    with pytest.raises(InvalidInputError, match="'json' was imported from elsewhere; rename"):
        load_plugins(["json.py"])
