"""Damaged run.json and comparison.json, and names that are paths: one error line, no traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kronecker_probe.cli.app import app
from kronecker_probe.cli.several import hold
from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.report.comparison import Comparison, Timing
from kronecker_probe.report.comparison_page import write_comparison
from kronecker_probe.report.run_page import write_report
from kronecker_probe.tracking.run_directory.store import RunStore
from tests.synthetic_tables import frame, quality, training


def make_run(path: Path, **config: Any) -> RunStore:
    store = RunStore.create(path, config, seed=0)
    store.write_part(0, frame([*training([0]), *quality(0, "a", {"optimal": 0.9, "kfac": 0.8})]))
    return store


def make_comparison(path: Path) -> Comparison:
    for name in ("soap", "sgd"):
        make_run(path / name)
    comparison = Comparison(path, {"soap": Timing(1.0, 2, 0.5), "sgd": Timing()})
    comparison.save()
    return comparison


def report(path: Path) -> Result:
    return CliRunner().invoke(app, ["report", str(path)])


def refused(result: Result) -> str:
    """The one line of an error that ends with an exit code."""
    assert result.exit_code in (1, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert all(one.isprintable() for one in line)
    return line


DEEP = '{"a":' * 3000 + "1" + "}" * 3000
WHOLE = {
    "nothing": b"", "no JSON": b"{", "a list": b"[]", "a number": b"5", "null": b"null",
    "binary": bytes(range(256)), "deep": DEEP.encode(), "an empty object": b"{}",
    "NaN": b'{"runs": NaN, "kronecker_probe_run": NaN}',
}  # fmt: skip
FIELDS = [
    ("status", 5), ("status", "odd"), ("status", None), ("created", 1), ("created", "yesterday"),
    ("created", {}), ("seed", "x"), ("seed", 1.5), ("seed", 10**400), ("seed", []),
    ("device", 3), ("commit", []), ("reason", {}), ("versions", None), ("versions", {"a": 1}),
    ("machine", []), ("machine", {"a": None}), ("config", None), ("config", "x"), ("config", [1]),
    ("learning_rates", "x"), ("learning_rates", [None]), ("learning_rates", [-1]),
    ("kronecker_probe_run", "2"), ("kronecker_probe_run", -1), ("kronecker_probe_run", 10**9),
    ("reason", "\ud800"), ("device", "\ud800"),
]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("file", ["run.json", "comparison.json"])
def test_a_file_that_is_no_record_is_one_error(file: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    make_run(path) if file == "run.json" else make_comparison(path)
    (path / file).write_bytes(WHOLE[name])
    assert file in refused(report(path)) or "No run" in refused(report(path))


@pytest.mark.parametrize("file", ["run.json", "comparison.json"])
def test_a_directory_in_place_of_the_record_is_one_error(file: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    make_run(path) if file == "run.json" else make_comparison(path)
    (path / file).unlink()
    (path / file).mkdir()
    refused(report(path))


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_a_field_of_run_json_that_does_not_fit_is_named(
    field: str, value: object, tmp_path: Path
) -> None:
    store = make_run(tmp_path / "run")
    content = json.loads((store.path / "run.json").read_text())
    (store.path / "run.json").write_text(json.dumps(content | {field: value}))
    refused(report(store.path))
    content.pop(field, None)
    (store.path / "run.json").write_text(json.dumps(content))
    if field != "learning_rates":  # older runs have none
        assert field in refused(report(store.path)) or field == "kronecker_probe_run"


@pytest.mark.parametrize("value", [5, "x", [1], {}, None, 1e300, {"a": {"b": [None]}}, "\x1b[2J"])
def test_whatever_a_users_config_holds_is_shown(value: object, tmp_path: Path) -> None:
    options = dict.fromkeys(("lr", "settings", "workload", "metrics", "optimizer"), value)
    make_run(tmp_path / "c" / "soap", **options)
    write_report(tmp_path / "c" / "soap")
    write_comparison(Comparison(tmp_path / "c", {"soap": Timing()}))
    for page in tmp_path.rglob("report.html"):
        assert "\x1b" not in page.read_text()


@pytest.mark.parametrize("timing", [
    5, None, [], {"seconds": "1"}, {"seconds": -1}, {"steps": 1.5}, {"steps": -1},
    {"step_seconds": 1e300}, {"more": 1}, {"seconds": True}, {"steps": 10**30},
])  # fmt: skip
def test_a_time_of_comparison_json_that_is_none_is_refused(timing: object, tmp_path: Path) -> None:
    make_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": {"soap": timing}}))
    assert "runs.soap" in refused(report(tmp_path))


@pytest.mark.parametrize("name", [
    "..", ".", "", "../out", "a/b", "/etc", "javascript:alert(1)", "data:text/html,x", "a\\b",
    "\x1b[2J", "\u202esoap", "\ud800", "soap\n", "x" * 200, ".hidden", "soap?x", "soap#x", "//h",
])  # fmt: skip
def test_an_entry_that_is_no_plain_name_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "inner" / "runs"
    make_comparison(path)
    make_run(tmp_path / "inner" / "out")
    (path / "comparison.json").write_text(json.dumps({"runs": {name: {}}}))
    before = sorted(tmp_path.rglob("*"))
    refused(report(path))
    assert sorted(tmp_path.rglob("*")) == before


def _link(path: Path, to: Path) -> None:
    if path.is_dir():
        path.rmdir()
    os.symlink(to, path)


@pytest.mark.parametrize("what", ["figures", "report.html", "figures/ladder.svg"])
def test_nothing_is_written_through_a_link(what: str, tmp_path: Path) -> None:
    store = make_run(tmp_path / "run")
    target = tmp_path / "target"
    target.mkdir() if what == "figures" else target.write_text("mine")
    _link(store.path / what, target)
    assert "symbolic link" in refused(report(store.path))
    assert list(target.iterdir()) == [] if target.is_dir() else target.read_text() == "mine"


def _entry(path: Path, other: Path) -> None:
    os.symlink(other, path / "adam")
    (path / "comparison.json").write_text('{"runs": {"adam": {}}}')


def _page(path: Path, other: Path) -> None:
    os.symlink(other / "mine", path / "report.html")


@pytest.mark.parametrize("change", [_entry, _page])
def test_nothing_of_a_comparison_is_reached_through_a_link(
    change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    make_comparison(tmp_path / "runs")
    other = make_run(tmp_path / "other").path
    (other / "mine").write_text("mine")
    change(tmp_path / "runs", other)
    assert "symbolic link" in refused(report(tmp_path / "runs"))
    assert (other / "mine").read_text() == "mine"
    assert not (other / "report.html").exists()


def test_an_entry_without_a_run_yet_is_left_out(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)
    Comparison(tmp_path, {**comparison.timings, "adam": Timing()}).save()
    (tmp_path / "adam").mkdir()  # killed before its run.json
    assert list(Comparison.open(tmp_path).stores()) == ["soap", "sgd"]


def test_a_name_that_is_a_path_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"runs": {"../x": {}}}')
    with pytest.raises(RunDirectoryError, match=r"comparison\.json.*\.\./x"):
        Comparison.open(tmp_path)


def test_what_a_killed_comparison_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".comparison.json.1234.tmp"
    make_comparison(tmp_path)
    left.write_text("half")
    held = hold(tmp_path)
    assert not left.exists()
    assert (tmp_path / "run.lock").exists()
    del held
