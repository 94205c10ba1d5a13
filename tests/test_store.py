"""The run store: whole parts or none, exact numbers, nothing of the user's ever deleted."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from kronecker_probe.errors import InvalidInputError, RunDirectoryError, UnknownNameError
from kronecker_probe.table import schema
from kronecker_probe.tracking.run_directory.store import RunStore
from tests.synthetic_tables import COLUMNS, frame, probe, quality

ROOT = Path(__file__).parents[1]
CONFIG = {"workload": "digits-mlp", "optimizer": {"lr": 0.01, "betas": [0.9, 0.99]}, "steps": 100}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "run", CONFIG, seed=3, device="cpu")


def part(step: int) -> pd.DataFrame:
    return probe(step, ["0.weight", "2.weight"], since=max(0, step - 2))


def files(directory: Path) -> set[str]:
    """All files but that of the lock, which stays."""
    found = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    return found - {"run.lock"}


# ---------------------------------------------------------------- the table


def test_a_part_is_one_flat_parquet_file_that_others_read(store: RunStore) -> None:
    written = store.write_part(20, part(20))
    assert written == store.path / "measurements" / "step-000020.parquet"
    assert files(store.path) == {"run.json", "measurements/step-000020.parquet"}
    column = pq.ParquetFile(written).metadata.row_group(0).column(0)
    assert column.compression == "SNAPPY"
    plain = pd.read_parquet(written)
    assert tuple(plain.columns) == COLUMNS
    assert plain["value"].sum() == pytest.approx(part(20)["value"].sum(), rel=1e-15)
    assert pq.read_schema(written).field("value").type == "double"
    assert pq.ParquetFile(written).read()["value"].null_count == 0  # NaN is NaN, not null


def test_parts_come_back_sorted_by_step_with_the_schema_dtypes(store: RunStore) -> None:
    steps = [1_000_000, 20, 999_999, 0, 12_345_678]
    for step in steps:
        store.write_part(step, frame(quality(step, "a", {"optimal": 0.9})))
    table = store.read()
    assert store.steps() == sorted(steps)
    assert table["step"].drop_duplicates().tolist() == sorted(steps)
    expected = frame([]).dtypes
    pd.testing.assert_series_equal(table.dtypes.astype(str), expected.astype(str))
    assert (store.measurements / "step-12345678.parquet").is_file()


def test_rows_of_earlier_steps_inside_a_part_are_sorted_in(store: RunStore) -> None:
    store.write_part(2, part(2))
    store.write_part(4, part(4)[::-1])
    table = store.read()
    assert table["step"].is_monotonic_increasing
    losses = table[table["metric"] == "train_loss"]
    assert losses["step"].tolist() == [1, 2, 3, 4]


def test_an_empty_run_reads_as_an_empty_table_with_dtypes(store: RunStore) -> None:
    pd.testing.assert_frame_equal(store.read(), frame([]))
    assert store.steps() == []


ERROR_BARS = ("stderr", "low", "high", "n_eff")
whole = st.none() | st.integers(1, 2**63 - 1)
size = st.none() | st.floats(min_value=0.0, allow_subnormal=True)
end = st.none() | st.floats(allow_subnormal=True)


def ordered(row: dict[str, object]) -> dict[str, object]:
    """The same row with an interval whose ends are in order."""
    low, high = row["low"], row["high"]
    turned = low is not None and high is not None and low > high  # type: ignore[operator]
    return row | {"low": high, "high": low} if turned else row


def code(*allowed: str) -> st.SearchStrategy[str | None]:
    return st.none() | st.sampled_from(allowed)


text = st.none() | st.text(max_size=8)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "step": st.integers(0, 2**63 - 1),
            "metric": st.text(max_size=8),
            "value": st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True),
        }
        | dict.fromkeys(("m", "n", "n_examples", "n_columns", "n_positions", "index"), whole)
        | dict.fromkeys(("copies", "block_size"), whole)
        | dict.fromkeys(("parameter", "approximation", "rule", "note"), text)
        | dict.fromkeys(("stderr", "n_eff", "epsilon"), size)
        | dict.fromkeys(("low", "high"), end)
        | {
            "target": code("ggn", "trajectory"),
            "kind": code("plugin", "population"),
            "interval": code("root", "bracket"),
            "reason": code("few-examples", "undefined"),
        }
    ).map(ordered),
    max_size=6,
)


@hypothesis.settings(max_examples=50)
@hypothesis.given(rows=ROWS, step=st.integers(0, 10**12))
def test_round_trip_is_exact(rows: list[dict[str, object]], step: int) -> None:
    data = schema.to_parquet(pd.DataFrame(rows, columns=list(COLUMNS), dtype=object), step)
    table = schema.from_parquet(data, step)
    assert len(table) == len(rows)
    for number, row in enumerate(rows):
        for name in COLUMNS:
            stored, given_ = table[name].iloc[number], row[name]
            if name in ("value", "epsilon", *ERROR_BARS):
                given_ = math.nan if given_ is None else given_
                bits = np.array([stored, given_], dtype="float64").view("int64")
                assert bits[0] == bits[1] or (math.isnan(stored) and math.isnan(given_))
            else:
                assert (stored is pd.NA and given_ is None) or stored == given_


@pytest.mark.parametrize("missing", ERROR_BARS)
def test_a_part_with_some_error_bars_only_is_foreign(store: RunStore, missing: str) -> None:
    data = schema.to_parquet(part(20), 20)
    sink = pa.BufferOutputStream()
    pq.write_table(pq.read_table(pa.BufferReader(data)).drop_columns([missing]), sink)
    with pytest.raises(ValueError, match=f"missing columns: {missing}"):
        schema.from_parquet(sink.getvalue().to_pybytes(), 20)


def test_a_run_below_a_folder_named_like_a_setting_gains_no_column(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "lr=0.1" / "seed=0", CONFIG)
    store.write_part(0, part(0))
    assert tuple(store.read().columns) == COLUMNS


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.drop(columns="kind"), "missing: kind"),
        (lambda t: t.assign(extra=1), "unknown: extra"),
        (lambda t: t.assign(step=0.5), "'step'"),
        (lambda t: t.assign(m=1.5), "'m'"),
        (lambda t: t.assign(value="high"), "'value'"),
        (lambda t: t.assign(metric=None), "'metric'"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_by_column(
    store: RunStore, change: object, named: str
) -> None:
    with pytest.raises(InvalidInputError, match=named):
        store.write_part(0, change(part(0)))  # type: ignore[operator]
    assert store.steps() == []


def test_negative_step_is_refused(store: RunStore) -> None:
    with pytest.raises(InvalidInputError, match="-1"):
        store.write_part(-1, part(0))


def test_writing_a_step_again_replaces_it(store: RunStore) -> None:
    store.write_part(20, part(20))
    store.write_part(20, frame(quality(20, "a", {"optimal": 0.5})))
    assert store.steps() == [20]
    assert len(store.read()) == 4


# ---------------------------------------------------------------- run.json


def test_run_json_records_what_the_run_was_made_with(store: RunStore) -> None:
    record = json.loads((store.path / "run.json").read_text())
    assert record["config"] == CONFIG
    assert (record["seed"], record["device"], record["status"]) == (3, "cpu", "running")
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"kronecker_probe", "numpy", "pyarrow"} <= set(record["versions"])
    opened = RunStore.open(store.path)
    assert opened.config == CONFIG
    assert opened.record == record


def test_commit_is_that_of_the_checkout_and_marks_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *words]
        return subprocess.run(
            command, cwd=checkout, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RunStore.create(tmp_path / "outside", {}).record["commit"] is None
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    git("init", "-q")
    (checkout / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag does not hide the hash")
    monkeypatch.chdir(checkout)
    head = git("rev-parse", "HEAD")
    assert RunStore.create(tmp_path / "clean", {}).record["commit"] == head
    (checkout / "code.py").write_text("a = 2\n")
    assert RunStore.create(tmp_path / "changed", {}).record["commit"] == head + "-dirty"


def test_status_and_reason_are_stored(store: RunStore) -> None:
    store.set_status("failed", "the loss is nan at step 40")
    opened = RunStore.open(store.path)
    assert (opened.status, opened.record["reason"]) == ("failed", "the loss is nan at step 40")
    opened.set_status("done")
    assert RunStore.open(store.path).record["reason"] is None
    with pytest.raises(UnknownNameError, match="interrupted"):
        store.set_status("interupted")


@pytest.mark.parametrize("value", [object(), math.nan, {1, 2}])
def test_an_option_that_is_no_json_is_named(tmp_path: Path, value: object) -> None:
    with pytest.raises(InvalidInputError, match="'lr'"):
        RunStore.create(tmp_path / "run", {"lr": value})
    assert not (tmp_path / "run").exists()


def test_open_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"nowhere.*not a directory"):
        RunStore.open(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match=r"no run\.json"):
        RunStore.open(tmp_path)


def test_a_newer_format_is_refused(store: RunStore) -> None:
    path = store.path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kronecker_probe_run": 99}))
    with pytest.raises(RunDirectoryError, match=r"99.*upgrade"):
        RunStore.open(store.path)


# ---------------------------------------------------------------- create, overwrite, resume


def test_another_run_is_refused_with_both_remedies(store: RunStore) -> None:
    store.write_part(0, part(0))
    before = {name: (store.path / name).read_bytes() for name in files(store.path)}
    with pytest.raises(RunDirectoryError, match=r"--resume.*--overwrite") as caught:
        RunStore.create(store.path, {"workload": "other"})
    assert str(store.path) in str(caught.value)
    assert {name: (store.path / name).read_bytes() for name in files(store.path)} == before


def test_overwrite_deletes_the_run_and_only_the_run(store: RunStore) -> None:
    store.write_part(0, part(0))
    store.write_part(20, part(20))
    own = {
        "report.html",
        "measurements/step-000040.parquet.bad",
        "checkpoints/step-000020.safetensors",
        "figures/trajectory.png",
        "figures/ladder.svg",
    }
    users = {
        "notes.md",
        "report.pdf",
        "mine/step-000020.parquet",
        "measurements/export.csv",
        "checkpoints/pretrained.safetensors",
        "figures/slides.png",
    }
    for name in own | users:
        (store.path / name).parent.mkdir(exist_ok=True)
        (store.path / name).write_text(name)
    new = RunStore.create(store.path, {"workload": "other"}, overwrite=True)
    assert files(store.path) == users | {"run.json"}
    assert new.steps() == []
    assert RunStore.open(store.path).config == {"workload": "other"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("foreign", ["thesis.tex", "run.json"])
def test_a_directory_of_other_files_is_always_refused(
    tmp_path: Path, foreign: str, overwrite: bool
) -> None:
    (tmp_path / foreign).write_text('{"name": "of another tool"}')
    (tmp_path / ".cache.123.tmp").write_text("theirs too")
    with pytest.raises(RunDirectoryError, match="another path"):
        RunStore.create(tmp_path, CONFIG, overwrite=overwrite)
    assert files(tmp_path) == {foreign, ".cache.123.tmp"}


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunStore.create(tmp_path / "run", CONFIG, overwrite=True)
    with pytest.raises(RunDirectoryError, match="Not a directory"):
        RunStore.create(tmp_path / "run" / "below", CONFIG)


def test_a_run_killed_before_its_first_file_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / ".run.json.4711.tmp").write_text('{"half": ')
    RunStore.create(tmp_path, CONFIG)
    assert files(tmp_path) == {"run.json"}


def test_resume_needs_the_same_options_and_names_those_that_differ(store: RunStore) -> None:
    store.set_status("interrupted", "by the user")
    same = {"steps": 100, "workload": "digits-mlp", "optimizer": {"betas": (0.9, 0.99), "lr": 0.01}}
    assert RunStore.resume(store.path, same).status == "running"
    other = {"workload": "digits-mlp", "optimizer": {"lr": 0.02, "betas": (0.9, 0.99)}, "new": "x"}
    with pytest.raises(RunDirectoryError) as caught:
        RunStore.resume(store.path, other)
    message = str(caught.value)
    assert "optimizer.lr: 0.01 in the run, 0.02 now" in message
    assert "steps: 100 in the run, absent now" in message
    assert 'new: absent in the run, "x" now' in message
    assert "betas" not in message
    assert "workload" not in message


# ---------------------------------------------------------------- damaged parts


@pytest.mark.parametrize("kept", [0, 1, 4, 0.5, -1])
def test_a_truncated_part_is_named_and_the_rest_is_kept(store: RunStore, kept: float) -> None:
    for step in (0, 20, 40):
        store.write_part(step, part(step))
    path = store.part_path(20)
    whole_part = path.read_bytes()
    rest = whole_part[: int(len(whole_part) * kept)] if 0 < kept < 1 else whole_part[: int(kept)]
    path.write_bytes(rest)
    assert [store.has_part(step) for step in (0, 20, 40, 60)] == [True, False, True, False]
    assert store.steps() == [0, 40]
    with pytest.raises(RunDirectoryError, match=r"step-000020\.parquet.*--resume"):
        store.read()
    with pytest.warns(RuntimeWarning, match=r"step-000020\.parquet"):
        table = store.read(strict=False)
    expected = pd.concat([part(0), part(40)])["value"]
    assert sorted(table["value"].dropna()) == sorted(expected.dropna())
    assert path.read_bytes() == rest  # reading changes nothing

    resumed = RunStore.resume(store.path, CONFIG)
    assert (store.measurements / "step-000020.parquet.bad").read_bytes() == rest
    assert not path.exists()
    assert resumed.damaged() == {}
    resumed.write_part(20, part(20))
    assert len(resumed.read()) == sum(len(part(step)) for step in (0, 20, 40))


def test_damaged_files_are_moved_aside_without_replacing_older_ones(store: RunStore) -> None:
    for content in (b"first", b"second"):
        store.part_path(20).write_bytes(content)
        store.write_part(20, part(20))
    kept = {p.read_bytes() for p in store.measurements.glob("*.bad")}
    assert kept == {b"first", b"second"}
    assert store.steps() == [20]


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.grid)])
def test_no_flipped_bit_changes_a_number_unseen(every: int) -> None:
    rng = np.random.default_rng(5)
    data = schema.to_parquet(part(20), 20)
    whole_part = schema.from_parquet(data, 20)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")  # has no checksum of its own
    places = [(int(place), int(rng.integers(8))) for place in rng.choice(footer, 200)[::every]]
    places += [(place, 3) for place in range(footer, len(data), every)]
    refused = 0
    for place, bit in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        try:
            pd.testing.assert_frame_equal(
                schema.from_parquet(bytes(flipped), 20), whole_part, check_exact=True
            )
        except ValueError:
            refused += 1
    assert refused > len(places) / 3  # the rest is statistics and the like


def foreign_parts() -> dict[str, tuple[pd.DataFrame | bytes, str]]:
    table = part(20)
    return {
        "text": (b"step,value\n20,1.0\n" * 20, "not a whole Parquet file"),
        "other table": (pd.DataFrame({"a": [1]}), "missing columns: step"),
        "more columns": (table.assign(extra=1), "unknown columns: extra"),
        "other type": (table.assign(value="1.0"), "value is"),
    }


@pytest.mark.parametrize("kind", foreign_parts())
def test_a_foreign_part_is_named_with_what_is_wrong(store: RunStore, kind: str) -> None:
    content, reason = foreign_parts()[kind]
    store.write_part(0, part(0))
    if isinstance(content, bytes):
        store.part_path(20).write_bytes(content)
    else:
        content.to_parquet(store.part_path(20))
    assert reason in store.damaged()["measurements/step-000020.parquet"]
    with pytest.raises(RunDirectoryError, match=r"step-000020\.parquet"):
        store.read()
    assert not store.has_part(20)


def test_a_part_copied_to_another_step_cannot_count_twice(store: RunStore) -> None:
    path = store.write_part(20, part(20))
    store.part_path(40).write_bytes(path.read_bytes())
    (store.measurements / "step-20.parquet").write_bytes(path.read_bytes())
    damaged = store.damaged()
    assert "step 20, not of step 40" in damaged["measurements/step-000040.parquet"]
    assert "is named step-000020.parquet" in damaged["measurements/step-20.parquet"]
    assert store.steps() == [20]


# ---------------------------------------------------------------- full disk, no permission


def test_full_disk_leaves_no_part_and_what_was_there(store: RunStore) -> None:
    """The kernel itself cuts the write off, by the limit on the size of a file."""
    store.write_part(0, part(0))
    before = (store.path / "run.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # bytes
    try:
        with pytest.raises(RunDirectoryError, match=r"step-000020\.parquet.*too large.*free space"):
            store.write_part(20, part(20))
        with pytest.raises(RunDirectoryError, match=r"run\.json"):
            store.set_status("failed", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(store.path) == {"run.json", "measurements/step-000000.parquet"}
    assert (store.path / "run.json").read_bytes() == before
    pd.testing.assert_series_equal(store.read()["value"], part(0)["value"])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "permissions"),
        (errno.EIO, "choose another"),
    ],
)
def test_a_failed_write_names_path_cause_and_remedy(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    old = frame(quality(20, "a", {"optimal": 0.5}))
    store.write_part(20, old)

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunDirectoryError) as caught:
        store.write_part(20, part(20))
    monkeypatch.undo()
    message = str(caught.value)
    assert str(store.part_path(20)) in message
    assert os.strerror(number) in message
    assert remedy in message
    assert files(store.measurements) == {"step-000020.parquet"}
    assert len(store.read()) == len(old)


def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(RunDirectoryError, match="/proc/no-such-place"):
        RunStore.create("/proc/no-such-place/run", CONFIG)


def test_a_part_is_on_the_disk_before_it_is_visible(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("fsync directory" if is_directory else "fsync file")
        fsync(descriptor)

    def seen_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    store.write_part(20, part(20))
    assert events == ["fsync file", "rename", "fsync directory"]


# ---------------------------------------------------------------- kill -9

KILLED_HALFWAY = """
import builtins, os, signal, sys
from kronecker_probe.tracking.run_directory.store import RunStore
from tests.synthetic_tables import probe
store = RunStore.open(sys.argv[1])
real = builtins.open
class Half:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, data):
        self.file.write(data[: len(data) // 2]); self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
def half(path, mode="r", *more, **options):
    file = real(path, mode, *more, **options)
    return Half(file) if "w" in mode and ".tmp" in str(path) else file
if sys.argv[2] == "halfway": builtins.open = half
else: os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
store.write_part(20, probe(20, ["0.weight", "2.weight"], since=18))
"""

WRITE_FOREVER = """
import sys
from kronecker_probe.tracking.run_directory.store import RunStore
from tests.synthetic_tables import probe
store = RunStore.resume(sys.argv[1], {})
tables = {s: probe(s, ["0.weight", "2.weight"], since=s - 2) for s in range(0, 40, 2)}
step = max(store.steps(), default=-2)
print("ready", flush=True)
while True:
    step += 2
    table = tables[step % 40].copy()
    table["step"] = step
    store.write_part(step, table)
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["halfway", "before the rename"])
def test_kill_in_the_middle_of_writing_leaves_no_part(store: RunStore, moment: str) -> None:
    store.write_part(0, part(0))
    process = python(KILLED_HALFWAY, str(store.path), moment)
    assert process.wait(60) == -signal.SIGKILL
    leftover = [name for name in files(store.measurements) if name.endswith(".tmp")]
    assert len(leftover) == 1
    assert store.steps() == [0]
    assert not store.has_part(20)
    pd.testing.assert_series_equal(store.read()["value"], part(0)["value"])
    assert RunStore.resume(store.path, CONFIG).steps() == [0]
    assert files(store.measurements) == {"step-000000.parquet"}


def test_a_leftover_is_cleaned_by_the_next_write(store: RunStore) -> None:
    (store.measurements / ".step-000020.parquet.4711.tmp").write_bytes(b"half")
    store.write_part(40, part(40))
    assert files(store.measurements) == {"step-000040.parquet"}


def test_kill_at_any_moment_leaves_whole_parts_and_resume_goes_on(tmp_path: Path) -> None:
    path = RunStore.create(tmp_path / "run", {}).path
    rng = np.random.default_rng()  # another moment in every run of the tests
    for _ in range(2):
        before = len(list((path / "measurements").glob("*.parquet")))
        process = python(WRITE_FOREVER, str(path))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while len(list((path / "measurements").glob("*.parquet"))) == before:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.1)))
        process.kill()
        process.wait(60)
        store = RunStore.open(path)
        assert store.damaged() == {}
        table = store.read()
        steps = store.steps()
        assert steps == list(range(0, 2 * len(steps), 2))  # none missing, none twice
        assert len(steps) > before
        counts = table.groupby("step").size()
        assert counts.to_dict() == {
            s: len(probe(s % 40, ["a", "b"], since=s % 40 - 2)) for s in steps
        }


# ---------------------------------------------------------------- no torch


def test_the_store_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'safetensors'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import kronecker_probe as kp\n"
        "store = kp.RunStore.create(sys.argv[1], {'lr': 0.1})\n"
        "from tests.synthetic_tables import probe\n"
        "store.write_part(0, probe(0, ['a']))\n"
        "assert len(kp.RunStore.resume(sys.argv[1], {'lr': 0.1}).read()) > 10\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert python(code, str(tmp_path / "run")).wait(60) == 0
