"""The report: one HTML file that opens from disk, whatever the run holds."""

from __future__ import annotations

import base64
import html
import html.parser
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.findings.diagnose import diagnose
from kronecker_probe.findings.headlines import headline
from kronecker_probe.report.run_page import write_report
from kronecker_probe.tracking.run_directory.store import RunStore
from tests.synthetic_tables import NO_LIVE, estimated, frame, probe, quality, spectrum

ROOT = Path(__file__).parents[1]
LAYERS = ["0.weight", "2.weight"]
NAMES = ("trajectory", "ladder", "spectrum", "training")
VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
    """What a browser would see: balanced tags, texts, images and everything that is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.images: list[dict[str, str]] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.cells: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {name: value or "" for name, value in attrs}
        self.loaded += [given[name] for name in ("src", "href", "data", "action") if name in given]
        if tag == "img":
            self.images.append(given)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
            return
        if set(self.stack) & {"td", "th"}:
            self.cells[-1][-1] += " ".join(data.split())
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def make_run(path: Path, parts: dict[int, pd.DataFrame], **config: object) -> RunStore:
    store = RunStore.create(path, {"workload": "digits-mlp", "lr": 0.01} | config, seed=7)
    for step, part in parts.items():
        store.write_part(step, part)
    return store


def report(store: RunStore) -> Page:
    return Page(write_report(store.path).report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    parts = {step: probe(step, LAYERS, max(step - 20, 0)) for step in (0, 20, 40)}
    store = make_run(tmp_path_factory.mktemp("report") / "run", parts)
    store.set_status("done")
    return store


@pytest.fixture(scope="module")
def page(run: RunStore) -> Page:
    return report(run)


def test_figures_are_written_as_png_and_svg_and_again_the_same(run: RunStore, page: Page) -> None:
    first = {p: p.read_bytes() for p in (run.report, *run.figures.iterdir())}
    paths = write_report(run.path)
    assert {p: p.read_bytes() for p in first} == first
    assert paths.report == run.path / "report.html"
    expected = [run.path / "figures" / f"{n}.{kind}" for n in NAMES for kind in ("png", "svg")]
    assert list(paths.figures) == expected
    for path in paths.figures:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert image.width > 600
        else:
            assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    stored = {p.name for p in run.path.rglob("*") if p.is_file()}
    assert not [name for name in stored if name.endswith(".tmp")]


def test_the_page_loads_nothing_and_holds_the_figures(page: Page, run: RunStore) -> None:
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.loaded) == len(page.images) == len(NAMES)
    for image, name in zip(page.images, NAMES, strict=True):
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data) == (run.path / "figures" / f"{name}.svg").read_bytes()
        assert len(image["alt"]) > 20


def test_the_page_says_what_was_run_and_what_to_conclude(page: Page, run: RunStore) -> None:
    table = run.read()
    assert headline(table) in page.text
    for sentence in diagnose(table).summary():
        assert sentence in page.text
    assert "digits-mlp: how good is the Kronecker approximation?" in page.text
    assert "3 probed steps, 0 to 40" in page.text
    assert "exact Gauss-Newton matrix" in page.text
    for row in (["lr", "0.01"], ["seed", "7"], ["pyarrow", run.record["versions"]["pyarrow"]]):
        assert row in page.cells
    assert ["norm.weight", "LayerNorm weights are not measured"] in page.cells
    where = "2 times: 0.weight, 2.weight, in use (by the optimizer); step 0"
    assert f"{NO_LIVE} ({where})" in page.text


def test_the_table_holds_the_numbers_of_the_last_step(page: Page, run: RunStore) -> None:
    part = probe(40, LAYERS, 20)
    rows = [cells for cells in page.cells if cells and cells[0] == "K-FAC"]
    assert len(rows) == len(LAYERS)
    for cells, layer in zip(rows, LAYERS, strict=True):
        chosen = part[(part["parameter"] == layer) & (part["approximation"] == "kfac")]
        by_metric = chosen.set_index("metric")["value"]
        wanted = ("cosine", "relative_error", "best_scale_error", "best_scale")
        assert cells[1:5] == [f"{by_metric[metric]:.4f}" for metric in wanted]
    live = next(cells for cells in page.cells if cells and cells[0].startswith("in use"))
    assert live[2] == live[4] == "–"


def test_notes_that_differ_in_numbers_and_place_only_are_told_once(tmp_path: Path) -> None:
    rows = []
    for step in (0, 4, 8):
        for name in ("a", "b"):
            rows += quality(step, name, {"optimal": 0.9, "in-use": math.nan if step < 8 else 0.5})
            note = f"no preconditioner yet: {step} steps were taken (parameter '{name}')"
            if step < 8:
                rows[-1] |= {"note": note}
    rows[0] |= {"note": "of another kind"}
    found = report(make_run(tmp_path / "run", {0: frame(rows)}))
    assert found.text.count("no preconditioner yet") == 1
    told = "(4 times: a, b, in use (by the optimizer); steps 0 and 4, with other numbers"
    assert f"no preconditioner yet: 0 steps were taken {told} elsewhere)" in found.text
    assert "of another kind (a, optimal Kronecker; step 0)" in found.text


def test_a_note_that_all_rows_of_a_layer_share_stands_once_in_the_table(tmp_path: Path) -> None:
    why = "N_eff = 12 of N = 200"
    rows = quality(0, "a", {"optimal": 0.9, "kfac": 0.8}) + quality(0, "b", {"optimal": 0.7})
    rows += quality(0, "b", {"kfac": 0.6})
    rows += [
        {**row, "kind": "population", "value": math.nan, "note": why}
        for row in rows
        if row["parameter"] == "a" or row["approximation"] == "kfac"
    ]
    found = report(make_run(tmp_path / "run", {0: frame(rows)}))
    of_layer = [cells for cells in found.cells if cells and cells[0].startswith("a ")]
    assert [cells[0].count(why) for cells in of_layer] == [1]
    noted = [cells for cells in found.cells if len(cells) > 1 and why in cells[-1]]
    assert len(noted) == 1  # of layer b, where one row has it


def test_the_table_has_error_bars_brackets_and_every_metric(tmp_path: Path) -> None:
    rows = estimated("a", {"optimal": 0.9, "kfac": 0.8}, stderr=0.01)
    rows += [
        {"step": 0, "parameter": "a", "approximation": name, "metric": "trace_ratio",
         "kind": "plugin", "value": value}
        for name, value in (("optimal", 1.25), ("kfac", 0.75))
    ]  # fmt: skip
    for row in rows:
        if row["approximation"] == "kfac" and row.get("kind") == "population":
            row |= {"stderr": None, "interval": "bracket"}
    found = report(make_run(tmp_path / "run", {0: frame(rows)}))
    cells = {row[0]: row[1:] for row in found.cells if row}
    assert cells["approximation P"][:2] == ["cosine similarity to H", "trace ratio Tr P / Tr H"]
    assert cells["optimal Kronecker"][:2] == ["0.900 ± 0.010", "1.2500"]
    assert cells["K-FAC"][:2] == ["0.800 (bracket 0.780 to 0.820)", "0.7500"]
    assert any(row[0].startswith("a (64") and "population numbers" in row[0] for row in found.cells)


def test_markup_in_names_notes_and_options_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    rows = quality(0, evil, {"optimal": 0.9, "kfac": math.nan}, note=f"<b>{evil}</b>")
    rows.append({"step": 0, "parameter": evil, "metric": "skipped", "note": evil})
    store = make_run(tmp_path / "run", {0: frame(rows)}, workload=evil, note=f'"{evil}"&amp;')
    store.set_status("failed", evil)
    found = report(store)
    assert {"script", "b"}.isdisjoint(found.tags)
    assert found.text.count(evil) >= 6
    assert f'"{evil}"&amp;' in found.text


def test_findings_are_a_list_and_the_inside_a_table(tmp_path: Path) -> None:
    cosines = {"optimal": 0.95, "kfac": 0.94, "in-use": 0.3}
    rows = [row for name in ("a", "b") for row in quality(0, name, cosines, target="trajectory")]
    split = {"in_use_fresh": 0.1, "in_use_blocking": 0.5, "in_use_statistics": 0.31}
    about = {"step": 0, "parameter": "a"}
    rows += [about | {"metric": metric, "value": value} for metric, value in split.items()]
    rows += [
        about | {"metric": metric, "value": value, "index": side}
        for side in (0, 1)
        for metric, value in (("factor_rank", 9.0 + side), ("factor_amplification", 4.0 + side),
                              ("steps_since_refresh", 2.0))
    ]  # fmt: skip
    rows.append(about | {"metric": "in_use_rule", "rule": "shampoo"})
    store = make_run(tmp_path / "run", {0: frame(rows)})
    text = write_report(store.path).report.read_text(encoding="utf-8")
    findings = diagnose(store.read()).summary(("warning", "notice", "good"))
    assert len(findings) > 2
    for sentence in findings:
        assert f"<li>{html.escape(sentence, quote=False)}</li>".replace("'", "&#39;") in text
    found = Page(text)
    head = next(cells for cells in found.cells if cells and cells[0] == "layer")
    cells = dict(zip(head, next(c for c in found.cells if c[:2] == ["a", "0.300"]), strict=True))
    assert cells["its rule on H"] == "0.949 Shampoo"  # (1 - .1)^1/2
    assert [cells[f"its {cause} costs"] for cause in ("rule", "blocks", "statistics")] == [
        "0.100", "0.500", "0.310",
    ]  # fmt: skip
    assert (cells["rank of a factor"], cells["amplified"]) == ("9", "5×")
    assert cells["steps since a refresh"] == "2"
    assert "its damping costs" not in cells  # nothing is known of it
    assert ["b", "0.300"] not in [cells[:2] for cells in found.cells]


def test_without_rows_about_the_inside_there_is_no_section(page: Page) -> None:
    assert "Inside the optimizer" not in page.text


def test_one_part_without_training_rows(tmp_path: Path) -> None:
    rows = quality(0, "a", {"optimal": 0.9, "kfac": 0.8}) + spectrum(0, "a", [3.0, 1.0], 4.0)
    store = make_run(tmp_path / "run", {0: frame(rows)})
    found = report(store)
    assert "Not drawn: The table has no losses" in found.text
    assert "1 probed step, 0." in found.text
    assert len(found.images) == 3
    assert not (store.figures / "training.png").exists()


def test_undefined_values_are_told_with_their_reason(tmp_path: Path) -> None:
    undefined = dict.fromkeys(("optimal", "kfac", "in-use"), math.nan)
    rows = quality(0, "dead.weight", undefined, note="H = 0: no gradient reaches it")
    store = make_run(tmp_path / "run", {0: frame(rows)})
    found = report(store)
    kfac = next(cells for cells in found.cells if cells and cells[0] == "K-FAC")
    assert kfac == ["K-FAC", *["undefined"] * 4, ""]
    layer = next(cells for cells in found.cells if cells and cells[0].startswith("dead.weight"))
    assert "H = 0: no gradient reaches it" in layer[0]
    assert "No cosine similarity to H is defined in this table" in found.text
    assert "1.000" not in found.text


def test_only_skipped_parameters(tmp_path: Path) -> None:
    rows = [{"step": 0, "parameter": "a", "metric": "skipped", "note": "no gradient"}]
    found = report(make_run(tmp_path / "run", {0: frame(rows)}))
    assert "No parameter was measured" in found.text
    assert ["a", "no gradient"] in found.cells


def test_a_bad_part_is_left_out_and_named(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {step: probe(step, ["a"]) for step in (20, 40)})
    path = store.part_path(40)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.warns(RuntimeWarning, match=r"step-000040\.parquet"):
        found = report(store)
    assert "1 part file could not be read and is left out" in found.text
    assert "measurements/step-000040.parquet : not a whole Parquet file" in found.text
    assert "Numbers at step 20" in found.text


def test_a_run_without_measurements_is_refused(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {})
    with pytest.raises(RunDirectoryError, match=r"no measurements yet; .*--resume"):
        write_report(store.path)
    store.part_path(0).write_bytes(b"")
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(RunDirectoryError, match=r"measurements/step-000000\.parquet"),
    ):
        write_report(store.path)
    assert not store.report.exists()
    with pytest.raises(RunDirectoryError, match="No run at"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {0: probe(0, ["a"])})
    store.figures.rmdir()
    store.figures.write_text("a file of the user")
    with pytest.raises(RunDirectoryError, match="figures"):
        write_report(store.path)
    assert store.figures.read_text() == "a file of the user"


def test_the_report_needs_no_torch_and_no_window(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", {0: probe(0, ["a"])})
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'safetensors'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from kronecker_probe.report.run_page import write_report\n"
        "assert len(write_report(sys.argv[1]).figures) == 8\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(store.path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
