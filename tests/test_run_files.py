"""Damaged, foreign and linked files of a run: one clear error, and nothing outside is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kronecker_probe.errors import InvalidInputError, RunDirectoryError
from kronecker_probe.report.run_page import write_report
from kronecker_probe.tracking.run_directory.files import write_atomically
from kronecker_probe.tracking.run_directory.store import RunStore
from tests.synthetic_tables import probe

ROOT = Path(__file__).parents[1]
CONFIG = {"workload": "digits-mlp", "lr": 0.1, "settings": ["basis.frequency=2"], "steps": 8}


def run(path: Path) -> RunStore:
    store = RunStore.create(path, CONFIG, seed=3, device="cpu")
    store.note_rates([0.1])
    store.write_part(0, probe(0, ["0.weight"]))
    store.set_status("interrupted", "by the user")
    return store


# ---------------------------------------------------------------- run.json


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# JSON texts that no field may hold, with the fields whose type they are
WRONG = {
    "null": ("reason", "seed", "device", "commit", "learning_rates"),
    "true": (),
    "-3": ("seed",),
    "1e999": (),
    "NaN": (),
    "1" + "0" * 30: ("kronecker_probe_run",),  # a newer format, which the test of it refuses
    '"text"': ("reason", "device", "commit"),
    '"\\ud800"': (),
    "[]": ("learning_rates",),
    "[[-1]]": (),
    "{}": ("versions", "machine", "config"),
    '{"a": 1}': ("config",),
    nested(40): (),
    nested(10_000): (),
}
FIELDS = (
    "kronecker_probe_run", "created", "status", "reason", "seed", "device", "commit", "versions",
    "machine", "config", "learning_rates",
)  # fmt: skip
OPTIONAL = ("learning_rates",)


def damages() -> Iterator[tuple[str, str]]:
    """Each field dropped, and replaced by each JSON text that does not fit it."""
    for field in FIELDS:
        if field not in OPTIONAL:
            yield field, ""
        for text, fitting in WRONG.items():
            if field not in fitting:
                yield field, text


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return run(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize(
    ("field", "text"), list(damages()), ids=lambda value: value[:12] or "absent"
)
def test_a_damaged_field_of_run_json_is_named(sound: RunStore, field: str, text: str) -> None:
    path = sound.path / "run.json"
    before = path.read_bytes()
    content = json.loads(before)
    assert set(content) == set(FIELDS)
    value = content.pop(field)
    damaged = json.dumps(content)
    if text:
        damaged = f'{damaged[:-1]}, "{field}": {text}}}'
    path.write_text(damaged)
    try:
        for read in (RunStore.open, lambda p: RunStore.resume(p, CONFIG), write_report):
            with pytest.raises(RunDirectoryError, match=r"run\.json.*choose another path") as told:
                read(sound.path)
            whole_file = ("nested", "number", "encoded", "JSON")  # no value of any field
            assert field in str(told.value) or any(word in str(told.value) for word in whole_file)
            assert len(str(told.value)) < 600
        with pytest.raises(RunDirectoryError, match=r"run\.json"):
            RunStore.create(sound.path, CONFIG, overwrite=True)
    finally:
        path.write_bytes(before)
    assert value == json.loads(before)[field]


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"null", b"{", b'{"a": 1}'])
def test_a_run_json_that_is_none_is_named(sound: RunStore, data: bytes) -> None:
    path = sound.path / "run.json"
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        with pytest.raises(RunDirectoryError, match=r"run\.json.*choose another path"):
            RunStore.open(sound.path)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("text", [t for t in WRONG if t not in ("1e999", "NaN", '"\\ud800"')])
@pytest.mark.parametrize("option", [*CONFIG, "other"])
def test_config_is_any_json_that_is_not_too_deep(sound: RunStore, option: str, text: str) -> None:
    """The options are the user's: whatever they are, reading and reporting goes on."""
    path = sound.path / "run.json"
    before = path.read_bytes()
    content = json.loads(before)
    content["config"].pop(option, None)
    rest = json.dumps(content["config"])[:-1]
    del content["config"]
    path.write_text(f'{json.dumps(content)[:-1]}, "config": {rest}, "{option}": {text}}}}}')
    try:
        if len(text) > 31 and text.startswith("["):
            with pytest.raises(RunDirectoryError, match="nested deeper"):
                RunStore.open(sound.path)
            return
        assert RunStore.open(sound.path).config[option] == json.loads(text)
        with pytest.raises(RunDirectoryError, match=f"options differ.*{option}"):
            RunStore.resume(sound.path, CONFIG)
    finally:
        path.write_bytes(before)


def test_the_target_of_a_run_of_the_first_format_is_read(sound: RunStore, tmp_path: Path) -> None:
    content = json.loads((sound.path / "run.json").read_text())
    content["kronecker_probe_run"] = 1
    content["config"] = {"workload": "w", "draws": "fisher"}
    (tmp_path / "run.json").write_text(json.dumps(content))
    store = RunStore.resume(tmp_path, {"workload": "w", "target": "fisher"})
    assert store.config == {"workload": "w", "target": "fisher"}
    assert json.loads((tmp_path / "run.json").read_text())["kronecker_probe_run"] == 2


@pytest.mark.parametrize("value", ["\ud800", {"a": ["\udcff"]}, {"\ud800": 1}])
def test_an_option_that_cannot_be_encoded_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidInputError, match="cannot be encoded") as told:
        RunStore.create(tmp_path / "run", {"lr": value})
    str(told.value).encode()
    assert not (tmp_path / "run").exists()


def test_a_reason_that_cannot_be_encoded_is_escaped(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", CONFIG)
    store.set_status("failed", "no file \udcff")
    assert RunStore.open(store.path).record["reason"] == r"no file \udcff"


# ---------------------------------------------------------------- other things in their places


def test_a_directory_in_the_place_of_a_part_is_reported_and_moved_aside(tmp_path: Path) -> None:
    store = run(tmp_path / "run")
    store.part_path(20).mkdir()
    assert store.damaged() == {"measurements/step-000020.parquet": "it is a directory"}
    with pytest.raises(RunDirectoryError, match=r"step-000020\.parquet: it is a directory"):
        store.read()
    store.write_part(20, probe(20, ["a"]))
    assert store.steps() == [0, 20]
    assert (store.measurements / "step-000020.parquet.bad").is_dir()
    store.part_path(40).mkdir()
    assert RunStore.resume(store.path, CONFIG).damaged() == {}


@pytest.mark.parametrize("name", ["run.json", "measurements", "run.lock"])
def test_another_kind_of_file_is_named(tmp_path: Path, name: str) -> None:
    store = run(tmp_path / "run")
    path = store.path / name
    del store  # and its lock
    if path.is_dir():
        path.rename(tmp_path / "elsewhere")
        path.write_text("a file")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(RunDirectoryError, match=name):
        RunStore.resume(tmp_path / "run", CONFIG).read()


# ---------------------------------------------------------------- links


LINKED = [
    "run.json", "run.lock", "report.html", "measurements", "checkpoints", "figures",
    "measurements/step-000000.parquet", "checkpoints/step-000000.safetensors",
    "figures/trajectory.png", "figures/.trajectory.png.1.tmp",
]  # fmt: skip


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every file that a run may have."""
    path = run(tmp_path_factory.mktemp("reported") / "run").path
    write_report(path)
    (path / "checkpoints" / "step-000000.safetensors").write_bytes(b"weights")
    (path / "figures" / ".trajectory.png.1.tmp").write_bytes(b"half")
    return path


def linked(reported: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """A run in which ``name`` is a link to a place outside, and that place."""
    path, outside = folder / "run", folder / "outside"
    shutil.copytree(reported, path)
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    return path, outside


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p): p.read_bytes() for p in files}


@pytest.mark.parametrize("name", LINKED)
def test_overwrite_follows_and_deletes_no_link(reported: Path, tmp_path: Path, name: str) -> None:
    path, outside = linked(reported, tmp_path, name)
    before = contents(outside), contents(path)
    with pytest.raises(RunDirectoryError, match=rf"{name} is a symbolic link \(to "):
        RunStore.create(path, CONFIG, overwrite=True)
    assert (contents(outside), contents(path)) == before
    assert (path / name).is_symlink()


@pytest.mark.parametrize("name", ["run.json", "report.html", "measurements", "figures", "run.lock"])
def test_resume_refuses_links(reported: Path, tmp_path: Path, name: str) -> None:
    path, outside = linked(reported, tmp_path, name)
    before = contents(outside)
    with pytest.raises(RunDirectoryError, match=f"{name} is a symbolic link"):
        RunStore.resume(path, CONFIG)
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["report.html", "figures", "figures/trajectory.png"])
def test_a_report_is_written_through_no_link(reported: Path, tmp_path: Path, name: str) -> None:
    path, outside = linked(reported, tmp_path, name)
    before = contents(outside)
    with pytest.raises(RunDirectoryError, match=f"{name} is a symbolic link"):
        write_report(path)
    assert contents(outside) == before


def test_a_part_is_written_through_no_link(reported: Path, tmp_path: Path) -> None:
    for name in ("measurements/step-000000.parquet", "measurements"):
        path, outside = linked(reported, tmp_path / name.replace("/", "-"), name)
        before = contents(outside)
        with pytest.raises(RunDirectoryError, match=f"{name} is a symbolic link"):
            RunStore.open(path).write_part(0, probe(0, ["b"]))
        assert contents(outside) == before


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("theirs")
    temporary = tmp_path / f".a.json.{os.getpid()}.tmp"
    temporary.symlink_to(tmp_path / "outside")
    with pytest.raises(RunDirectoryError, match=r"a\.json"):
        write_atomically(tmp_path / "a.json", b"ours", inside=tmp_path)
    assert (tmp_path / "outside").read_text() == "theirs"


def test_what_is_not_in_the_directory_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / ".." / ".." / "b", tmp_path.parent / "b", tmp_path):
        with pytest.raises(RunDirectoryError, match="does not lie in"):
            write_atomically(path, b"x", inside=tmp_path)


def test_a_run_directory_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    store = run(tmp_path / "run")
    assert store.path.is_symlink()
    assert RunStore.resume(tmp_path / "disk", CONFIG).steps() == [0]


# ---------------------------------------------------------------- the lock


HOLD = """
import sys, time
from kronecker_probe.tracking.run_directory.store import RunStore
store = RunStore.create(sys.argv[1], {})
print("held", flush=True)
time.sleep(600)
"""


def test_two_writers_with_temporary_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    monkeypatch.setenv("TMPDIR", "/tmp")
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match=rf"process {holder.pid} on .+ is writing"):
            RunStore.resume(tmp_path / "run", {})
        with pytest.raises(RunDirectoryError, match="is writing"):
            RunStore.create(tmp_path / "run", {}, overwrite=True)
    finally:
        holder.kill()
        holder.wait(60)
    store = RunStore.resume(tmp_path / "run", {})  # no lock is stale
    again = RunStore.resume(tmp_path / "run", {})  # nor is it in the way of its own process
    del store
    assert again.status == "running"


def test_a_forked_child_does_not_give_the_lock_back(tmp_path: Path) -> None:
    code = (
        "import gc, os, sys\n"
        "from kronecker_probe.tracking.run_directory.store import RunStore\n"
        "store = RunStore.create(sys.argv[1], {})\n"
        "if os.fork() == 0:\n"
        "    del store\n"
        "    gc.collect()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match="is writing"):
            RunStore.resume(tmp_path / "run", {})
    finally:
        holder.kill()
        holder.wait(60)


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be locked.*no other process"):
        RunStore.create(tmp_path / "run", {})


# ---------------------------------------------------------------- leftovers, names, cost


def test_leftovers_of_killed_writers_go_with_the_next_one(tmp_path: Path) -> None:
    store = run(tmp_path / "run")
    places = ["", "measurements/", "checkpoints/", "figures/"]
    for place in places:
        (store.path / f"{place}.x.png.77.tmp").write_bytes(b"half")
    RunStore.resume(store.path, CONFIG)
    assert not list(store.path.rglob("*.tmp"))
    for place in places:
        (store.path / f"{place}.x.png.77.tmp").write_bytes(b"half")
    RunStore.create(store.path, CONFIG, overwrite=True)
    assert not list(store.path.rglob("*.tmp"))


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"run-\xff")
    assert run(path).steps() == [0]
    assert RunStore.resume(path, CONFIG).steps() == [0]
    with pytest.raises(RunDirectoryError) as told:
        RunStore.create(path, CONFIG)
    str(told.value).encode()
    assert r"run-\udcff" in str(told.value)


def test_a_part_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = run(tmp_path / "run")
    store.write_part(20, probe(20, ["a"]))
    reads: list[str] = []
    read = Path.read_bytes

    def counted(self: Path) -> bytes:
        reads.append(self.name)
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", counted)
    resumed = RunStore.resume(store.path, CONFIG)
    first = resumed.read()
    first["value"] = 0.0  # a copy of its own
    assert len(resumed.read()) == len(first)
    assert resumed.steps() == [0, 20]
    assert resumed.read()["value"].abs().sum() > 0
    assert [name for name in reads if name.endswith("parquet")] == [
        "step-000000.parquet", "step-000020.parquet"
    ]  # fmt: skip
    resumed.write_part(20, probe(20, ["a", "b"]))
    assert set(resumed.read()["parameter"].dropna()) >= {"0.weight", "a", "b"}
    assert reads.count("step-000000.parquet") == 1


@pytest.mark.slow
def test_two_thousand_parts_are_read_in_seconds(tmp_path: Path) -> None:
    store = run(tmp_path / "run")
    rows = probe(0, ["a", "b", "c"])
    for step in range(2000):
        store.write_part(step, rows.assign(step=step))
    started = time.process_time()
    assert len(RunStore.open(store.path).read()) == 2000 * len(rows)
    assert time.process_time() - started < 4
