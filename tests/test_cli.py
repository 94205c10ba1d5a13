"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

import kronecker_probe as kp
from kronecker_probe.cli.app import app
from kronecker_probe.tracking.run_directory.checkpoint import load_checkpoint, save_checkpoint
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.training import Training, TrainingOptions
from kronecker_probe.workloads import load_workload
from tests.undrawn import undrawn

DONE, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
ROOT = Path(__file__).parents[1]
LAYERS = ["0.weight", "2.weight", "4.weight"]
FIGURES = {f"{name}.{kind}" for name in ("trajectory", "ladder", "spectrum", "training")
           for kind in ("png", "svg")}  # fmt: skip
SHORT = ("--steps", "4", "--probes", "2", "--probe-size", "16")

MODULE = """
import os, time, torch
from torch import nn
import kronecker_probe as kp

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return x

def workload(seed):
    inputs = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(3, 2), Slow())
    return kp.Workload(model, nn.CrossEntropyLoss(), (inputs, targets), (inputs, targets),
                       steps=30, batch_size=8, lr=0.01, description="mine")

def takes_no_seed():
    return workload(0)

def something_else(seed):
    return nn.Linear(2, 2)

def broken(seed):
    raise RuntimeError("the factory's own trouble")

number = 3
"""


@pytest.fixture(autouse=True)
def _wide_and_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lines that are not wrapped, and no trace of a test's own modules in the next."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before, threads = set(sys.modules), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if name.startswith("users_"):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(autouse=True)
def _undrawn() -> Iterator[None]:
    """All but the run that the module shares."""
    with undrawn():
        yield


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(result: Result) -> str:
    """All output on one line, so that no test depends on where lines break."""
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, and what the command printed."""
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        result = invoke("track", "digits-mlp", "--out", out, *SHORT)
    assert result.exit_code == DONE, result.output
    return out, result.output


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the working directory, under a name of its own for each test."""
    name = f"users_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


# ---------------------------------------------------------------- help


def test_without_a_command_the_help_says_what_there_is() -> None:
    result = invoke()
    for command in ("track", "measure", "report", "workloads", "analyze"):
        assert re.search(rf"^\W*{command} ", result.output, re.MULTILINE)
    assert "0 done, 1 failed" in told(result)
    assert "130 interrupted" in told(result)


OPTIONS = {
    "track": {
        "--out": "Default: runs/WORKLOAD",
        "--steps": "Optimizer steps. Default: the workload's",
        "--batch-size": "Examples per step. Default: the workload's",
        "--lr": "Learning rate. Default: the workload's",
        "--optimizer": "root-free-shampoo",
        "--set": "basis.tolerance=0.1",
        "--precondition-frequency": "Steps between refreshes",
        "--probes": "robed steps",
        "--probe-offset": "all probes but the first and last are moved",
        "--probe-size": "Examples in the fixed probe set",
        "--spacing": "more of them early in the run",
        "--target": "track only). Default: the workload's",
        "--label-draws": "for --target fisher",
        "--target-batch-size": "Default: the training's batch size",
        "--window": "Gradients to keep",
        "--decay": "the optimizer's beta2",
        "--window-memory": "says what they leave out",
        "--window-tolerance": "0 for exact",
        "--layers": "Glob of parameter names; may be repeated. Default: the workload's",
        "--approximations": "Name or spec to score",
        "--metrics": "Metric, as",
        "--estimates": "with error bars",
        "--seed": "batches, probe set and sampled labels",
        "--device": "cuda",
        "--threads": "CPU threads",
        "--resume": "from its checkpoint",
        "--overwrite": "Delete the run",
        "--plugin": "registers approximations",
        "--keep-checkpoints": "the last, or one at every probed step",
    },
    "measure": {
        "--checkpoint": "Default: freshly initialized",
        "--out": "run directory",
        "--probe-size": "Examples in the fixed probe set",
        "--target": "track only). Default: the workload's",
        "--label-draws": "for --target fisher",
        "--target-batch-size": "Default: the training's batch size",
        "--layers": "Glob",
        "--approximations": "Name or spec to score",
        "--metrics": "Metric, as",
        "--estimates": "with error bars",
        "--seed": "sampled labels",
        "--device": "cuda",
        "--threads": "CPU threads",
        "--overwrite": "Delete the run",
        "--plugin": "registers approximations",
    },
    "report": {"--plugin": "may be repeated"},
    "workloads": {"--plugin": "may be repeated"},
    "analyze": {"--preset": "under a minute", "--out": "Folder"},
}
DEFAULTS = {
    "track": {"probes": "21", "optimizer": "shampoo", "device": "cpu",
              "spacing": "early", "keep-checkpoints": "last", "seed": "0"},
    "measure": {"seed": "0"},
    "analyze": {"preset": "default", "out": "figures"},
}  # fmt: skip


def test_the_help_names_every_optimizer() -> None:
    from kronecker_probe.optim.build import optimizer_names

    words = told(invoke("track", "--help")).replace("│", " ")
    assert [name for name in optimizer_names() if name not in words.replace("- ", "-")] == []


@pytest.mark.parametrize("command", OPTIONS)
def test_help_says_what_each_option_means_and_its_default(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == DONE
    text = re.sub(r"[│╭╮╰╯─]", " ", result.output)
    rows = re.split(r"\n\s*(?=--)", text)
    found = {row.split()[0]: " ".join(row.split()) for row in rows if row.startswith("--")}
    assert set(found) - {"--help"} == set(OPTIONS[command])  # none without a word here
    for option, meaning in OPTIONS[command].items():
        assert meaning in found[option], option
    for option, default in DEFAULTS.get(command, {}).items():
        assert f"[default: {default}]" in found[f"--{option}"]


@pytest.mark.parametrize("command", OPTIONS)
def test_help_fits_80_columns_and_cuts_no_word(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", None)
    lines = invoke(command, "--help").output.splitlines()
    assert lines
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]
    for option in OPTIONS[command]:
        assert any(f" {option} " in line for line in lines), option


# ---------------------------------------------------------------- track


def test_track_writes_a_run_and_prints_table_findings_and_paths(run: tuple[Path, str]) -> None:
    out, printed = run
    store = RunStore.open(out)
    assert store.status == "done"
    assert store.steps() == [0, 4]
    config = {"workload": "digits-mlp", "steps": 4, "probes": 2, "probe_size": 16, "seed": 0,
              "target": "ggn", "layers": ["*.weight"], "batch_size": 64}  # fmt: skip
    assert config.items() <= store.config.items()
    assert {p.name for p in store.figures.iterdir()} == FIGURES
    assert store.report.is_file()
    assert "Cosine to H at step 4" in printed
    wide = store.read().query("metric == 'cosine' and step == 4 and kind == 'plugin'")
    for layer in LAYERS:
        row = next(line for line in printed.splitlines() if line.strip().startswith(layer))
        values = wide[wide["parameter"] == layer].set_index("approximation")["value"]
        order = ["optimal", "shampoo-squared", "kfac", "shampoo", "eigen-corrected", "diagonal"]
        assert row.split()[1:7] == [f"{values[name]:.3f}" for name in order]
        assert len(row.split()) == 7
    for path in (*(store.figures / name for name in FIGURES), store.report):
        assert str(path) in printed
    assert "\nFindings\n" in printed
    assert "probes at steps 0, 4 (2)" in printed
    assert "test accuracy 0." in printed
    assert "(step 0)" in printed  # the step that the accuracy is of
    assert "in use: undefined in every layer: " in printed  # no refresh of the roots in four steps
    assert "; ggn, N = 16" in printed


def test_the_table_keeps_every_digit_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for columns in ("200", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        shown = invoke("measure", "digits-mlp", "--probe-size", 8).output.splitlines()
        rows.append([line.split() for line in shown if line.strip().startswith(tuple(LAYERS))])
    assert rows[0] == rows[1]
    assert [len(row) for row in rows[0]] == [7, 7, 7]


def test_track_with_the_users_own_workload(module: str, tmp_path: Path) -> None:
    result = invoke("track", f"{module}:workload", "--steps", 2, "--probes", 2)
    assert result.exit_code == DONE, result.output
    store = RunStore.open(tmp_path / "runs" / f"{module}.workload")  # the default directory
    assert store.steps() == [0, 2]
    assert store.config["lr"] == 0.01  # the workload's own
    assert store.config["batch_size"] == 8


@pytest.mark.parametrize(
    ("options", "told_"),
    [
        (["--steps", "0"], "--steps"),
        (["--probes", "1"], "--probes"),
        (["--batch-size", "0"], "--batch-size"),
        (["--probe-size", "0"], "--probe-size"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "lr"),  # by the parser or by the optimizer, as the version has it
        (["--lr", "inf"], "lr is inf"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**80)], "--seed"),
        (["--threads", "0"], "--threads"),
        (["--target", "ggm"], "'ggn', 'fisher', 'empirical-fisher'"),
        (["--keep-checkpoints", "some"], "'last', 'all'"),
        (["--device", "tpu9"], "device='tpu9' cannot be used"),
        (["--layers", "0.wieght"], "Did you mean '0.weight'"),
        (["--label-draws", "2"], "labels are sampled only by 'fisher'"),
        (["--target-batch-size", "2"], "target_batch_size=2 with target='ggn'"),
        (["--window", "9"], "window=9 with target='ggn'"),
        (["--target", "trajectory", "--decay", "1"], "decay=1"),
        (["--target", "trajectory", "--window-tolerance", "1"], "window_tolerance=1"),
        (["--target", "trajectory", "--window-memory", "1kB"], "even at rank 1"),
        (["--resume", "--overwrite"], "choose one"),
        (["--stepz", "3"], "--stepz"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_written(
    tmp_path: Path, options: list[str], told_: str
) -> None:
    result = invoke("track", "digits-logistic", "--out", tmp_path / "run", *options)
    assert result.exit_code == USAGE, result.output
    assert told_ in told(result)
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_every_option_reaches_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stop(workload: kp.Workload, *arguments: object, **options: object) -> None:
        given.update(workload=workload, arguments=arguments, options=options)
        raise kp.errors.InvalidInputError("seen")

    monkeypatch.setattr("kronecker_probe.tracking.training.Training", stop)
    options = TrainingOptions(
        steps=7, batch_size=9, lr=0.5, probes=4, probe_size=11, optimizer="soap",
        settings=("basis.tolerance=0.1", "weight_decay=0.2"),
        spacing="even", target="fisher", layers=("0.*", "2.*"), seed=5, device="cpu", label_draws=2,
        target_batch_size=6, window=8, decay=0.75, window_memory="2MB",
        window_tolerance=0.25, approximations=("kfac", "optimal:rank=2"), metrics=("cosine",),
        estimates=("plugin", "held-out"),
    )  # fmt: skip
    flags = ["--resume", "--keep-checkpoints", "all"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        flag = "set" if field.name == "settings" else field.name.replace("_", "-")
        for one in value if isinstance(value, tuple) else (value,):
            flags += [f"--{flag}", str(one)]
    threads = torch.get_num_threads() + 1
    out = tmp_path / "run"
    result = invoke("track", "digits-mlp", "--out", out, "--threads", threads, *flags)
    assert result.exit_code == USAGE
    assert given["arguments"] == ("digits-mlp", out, options)
    assert given["options"] == {"resume": True, "overwrite": False, "keep_checkpoints": "all"}
    weight = load_workload("digits-mlp", 5).model[0].weight
    assert torch.equal(given["workload"].model[0].weight, weight)
    assert torch.get_num_threads() == threads
    invoke("track", "digits-mlp", "--out", out, "--overwrite")
    assert given["options"] == {"resume": False, "overwrite": True, "keep_checkpoints": "last"}


def test_an_unknown_workload_suggests_the_nearest(tmp_path: Path) -> None:
    for command in ("track", "measure"):
        result = invoke(command, "digit-mlp", "--out", tmp_path / "run")
        assert result.exit_code == USAGE
        assert "Unknown workload" in told(result)
        assert "Did you mean 'digits-mlp'" in told(result)
    assert invoke("track").exit_code == USAGE
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_directory_is_refused_with_both_remedies(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in run[0].rglob("*") if path.is_file()}
    for command in ("track", "measure"):
        result = invoke(command, "digits-mlp", "--out", run[0])
        assert result.exit_code == USAGE
        assert "--resume" in result.output
        assert "--overwrite" in result.output
    (tmp_path / "thesis.txt").write_text("mine")
    for options in ([], ["--overwrite"], ["--resume"]):
        result = invoke("track", "digits-mlp", "--out", tmp_path, *options)
        assert result.exit_code == USAGE
    assert {path: path.read_bytes() for path in run[0].rglob("*") if path.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_resume_with_another_option_names_it(run: tuple[Path, str]) -> None:
    result = invoke("track", "digits-mlp", "--out", run[0], *SHORT, "--resume", "--lr", 0.5)
    assert result.exit_code == USAGE
    assert "lr: 0.001 in the run, 0.5 now" in told(result)


def test_a_diverged_run_ends_with_1_and_can_be_read(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--steps", 20, "--probes", 11, "--probe-size", 8, "--lr", 1e30)
    result = invoke("track", "digits-mlp", "--out", out, *options)
    assert result.exit_code == FAILED
    assert isinstance(result.exception, SystemExit)  # a message, no traceback
    assert "lr=1e+30" in told(result) or "Parameter" in told(result)
    store = RunStore.open(out)
    assert store.status == "failed"
    assert len(store.read()) > 0
    report = invoke("report", out)
    assert report.exit_code == DONE
    assert "failed" in store.report.read_text()


# ---------------------------------------------------------------- the user's module


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":missing", "has no function 'missing'"),
        (":", "has no function ''"),
        (":number", "has no function 'number'"),
        (":something_else", "returned a Linear; a factory takes the seed"),
        (":takes_no_seed", "cannot be called with the seed"),
    ],
)
def test_a_factory_that_is_none_is_refused(module: str, suffix: str, message: str) -> None:
    result = invoke("measure", f"{module}{suffix}")
    assert result.exit_code == USAGE
    assert message in told(result)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_nothing:workload", "No module 'users_nothing'"),
        ("users_nothing.below:workload", "No module 'users_nothing.below'"),
        (":workload", "names no module"),
        ("..above:workload", "names no module"),
        ("users-module.py:workload", "names no module"),
    ],
)
def test_a_module_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("measure", name)
    assert result.exit_code == USAGE
    assert message in told(result)


def test_errors_of_the_users_own_code_keep_their_traceback(module: str, tmp_path: Path) -> None:
    (tmp_path / "users_other.py").write_text("import users\n")  # of a prefix of its own name
    (tmp_path / "users_syntax.py").write_text("def workload(seed:\n")
    for name, error in (
        (f"{module}:broken", RuntimeError),
        ("users_other:workload", ModuleNotFoundError),
        ("users_syntax:workload", SyntaxError),
    ):
        result = invoke("measure", name)
        assert result.exit_code == FAILED
        assert isinstance(result.exception, error), name


def test_a_factory_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / "__init__.py").write_text("")
    (tmp_path / "users_package" / "models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    result = invoke("measure", "users_package.models:workload", "--probe-size", 8)
    assert result.exit_code == DONE, result.output
    assert "0.weight" in result.output


# ---------------------------------------------------------------- measure


def test_measure_prints_the_table_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("measure", "digits-mlp", "--probe-size", 16, "--layers", "[02].*")
    assert result.exit_code == DONE, result.output
    workload = load_workload("digits-mlp", 0)
    scores = kp.compare(kp.capture(workload.model, workload.loss_fn, workload.probe(16, 0)))
    for layer in ("0.weight", "2.weight"):
        row = next(line for line in result.output.splitlines() if line.strip().startswith(layer))
        assert row.split()[1] == f"{scores.pivot().loc[layer, 'optimal']:.3f}"
    assert "4.weight" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_measure_a_checkpoint_is_the_probe_of_the_run(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    checkpoint = run[0] / "checkpoints" / "step-000004.safetensors"
    options = ("--checkpoint", checkpoint, "--out", tmp_path / "one", "--probe-size", 16)
    result = invoke("measure", "digits-mlp", *options)
    assert result.exit_code == DONE, result.output
    store = RunStore.open(tmp_path / "one")
    assert store.status == "done"
    assert store.steps() == [4]
    assert store.config["checkpoint"] == str(checkpoint)
    assert store.report.is_file()
    assert "Cosine to H at step 4" in result.output
    along = RunStore.open(run[0]).read()
    # what a run's optimizer holds is nothing that a checkpoint's weights have
    inside = ("factor_", "basis_", "tests", "refresh", "steps_since_refresh", "in_use_")
    both = [
        table[
            (table["step"] == 4)
            & table["parameter"].notna()
            & (names != "in-use")
            & ~table["metric"].str.startswith(inside)
        ]
        for table in (along, store.read())
        if (names := table["approximation"].fillna("")) is not None
    ]
    pd.testing.assert_frame_equal(*(one.reset_index(drop=True) for one in both))


def test_measure_refuses_what_is_no_checkpoint_of_this_model(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    checkpoint = run[0] / "checkpoints" / "step-000004.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    save_checkpoint(tmp_path / "other.safetensors", {"weights": torch.ones(2)})
    for workload, path, message in (
        ("digits-logistic", checkpoint, "of another model"),
        ("digits-mlp", tmp_path / "nothing.safetensors", "There is no checkpoint"),
        ("digits-mlp", tmp_path / "cut.safetensors", "Cannot read the checkpoint"),
        ("digits-mlp", tmp_path / "other.safetensors", "no checkpoint of a run"),
        ("digits-mlp", run[0] / "run.json", "Cannot read the checkpoint"),
    ):
        result = invoke("measure", workload, "--checkpoint", path, "--out", tmp_path / "one")
        assert result.exit_code == USAGE, result.output
        assert message in told(result)
    assert not (tmp_path / "one").exists()


def test_every_option_reaches_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def stop(*arguments: object, **options: object) -> None:
        given.update(options)
        raise kp.errors.InvalidInputError("seen")

    monkeypatch.setattr("kronecker_probe.tracking.tracker.Tracker", stop)
    flags = ("--probe-size", 11, "--target", "fisher", "--layers", "0.*", "--seed", 5,
             "--label-draws", 2, "--target-batch-size", 6, "--approximations", "kfac",
             "--metrics", "cosine", "--metrics", "trace_ratio",
             "--estimates", "held-out")  # fmt: skip
    result = invoke("measure", "digits-mlp", "--out", tmp_path / "one", "--overwrite", *flags)
    assert result.exit_code == USAGE
    probe = load_workload("digits-mlp", 5).probe(11, 5)
    assert all(map(torch.equal, given.pop("probe"), probe))
    config = {"workload": "digits-mlp", "checkpoint": None, "probe_size": 11}
    assert given == {"out": tmp_path / "one", "target": "fisher", "layers": ("0.*",), "seed": 5,
                     "label_draws": 2, "target_batch_size": 6, "approximations": ("kfac",),
                     "metrics": ("cosine", "trace_ratio"), "estimates": ("held-out",),
                     "config": config, "overwrite": True, "start": 0}  # fmt: skip


def test_measure_overwrite_needs_a_directory() -> None:
    result = invoke("measure", "digits-logistic", "--overwrite")
    assert result.exit_code == USAGE
    assert "--overwrite needs --out" in told(result)


def test_a_measurement_that_fails_is_noted_in_its_run(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    state = load_checkpoint(run[0] / "checkpoints" / "step-000004.safetensors")
    state["model"]["2.weight"][0, 0] = torch.nan
    save_checkpoint(tmp_path / "nan.safetensors", state)
    options = ("--checkpoint", tmp_path / "nan.safetensors", "--out", tmp_path / "one")
    result = invoke("measure", "digits-mlp", *options, "--probe-size", 8)
    assert result.exit_code == FAILED
    assert "'2.weight' holds NaN" in told(result)
    assert RunStore.open(tmp_path / "one").status == "failed"


@pytest.mark.parametrize(
    ("options", "titles", "row"),
    [
        (
            ["--metrics", "trace_ratio"],
            ["Trace ratio Tr P / Tr H at step 0: plug-in numbers; ggn, N = 64"],
            "0.weight",
        ),
        (
            ["--metrics", "best_scale", "--metrics", "relative_error"],
            [
                "Best scale c of c·P at step 0: population and plug-in numbers; ggn, N = 64",
                "Relative error ‖H − P‖ / ‖H‖ at step 0: population and plug-in numbers; "
                "ggn, N = 64",
            ],
            "population",
        ),
        (
            ["--estimates", "held-out"],
            ["Cosine to H at step 0: held-out numbers; ggn, N = 64"],
            "0.weight",
        ),
    ],
)
def test_measure_prints_whatever_was_asked_for(
    options: list[str], titles: list[str], row: str
) -> None:
    layers = ("--layers", "0.weight")
    result = invoke("measure", "digits-mlp", "--probe-size", 64, *layers, *options)
    assert result.exit_code == DONE, result.output
    lines = result.output.splitlines()
    assert [line for line in lines if " at step 0: " in line] == titles
    numbers = [line.split()[1:] for line in lines if line.startswith(row)]
    assert [len([float(cell) for cell in cells]) for cells in numbers] == [6] * len(titles)


# ---------------------------------------------------------------- report, workloads, analyze


def test_report_of_what_is_no_run(run: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    for path, message in (
        (tmp_path / "nowhere", "No run at"),
        (tmp_path, "has no run.json"),
        (run[0] / "run.json", "is not a directory"),
        (tmp_path / "broken", "damaged"),
    ):
        result = invoke("report", path)
        assert result.exit_code == USAGE
        assert message in told(result)
        assert isinstance(result.exception, SystemExit)


def test_report_of_a_run_without_measurements(tmp_path: Path) -> None:
    RunStore.create(tmp_path / "run", {})
    result = invoke("report", tmp_path / "run")
    assert result.exit_code == FAILED
    assert "holds no measurements yet" in told(result)


def test_workloads_lists_all_and_how_to_give_ones_own() -> None:
    result = invoke("workloads")
    assert result.exit_code == DONE
    for name in ("digits-mlp", "digits-logistic", "digits-cnn", "pydoc-gpt"):
        workload = load_workload(name)
        row = next(line for line in result.output.splitlines() if name in line)
        assert workload.description in row
        assert all(f"{n:g}" in row for n in (workload.steps, workload.batch_size, workload.lr))
    assert "package.module:factory" in result.output


def test_analyze_with_an_unknown_name_suggests_the_nearest() -> None:
    result = invoke("analyze", "shampoo-squared")
    assert result.exit_code == USAGE
    assert "Did you mean 'shampoo-square'" in told(result)
    assert invoke("analyze", "shampoo-square", "--preset", "slow").exit_code == USAGE


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("Path(out).mkdir(); Path(out, 'table.csv').write_text(preset)", DONE),
        ("raise kp.errors.InvalidInputError('no [b]good[/b]')", FAILED),
        ("raise KeyboardInterrupt", INTERRUPTED),
    ],
)
def test_analyze_runs_a_script_with_preset_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, code: int
) -> None:
    folder = tmp_path / f"questions_{code}"
    folder.mkdir()
    (folder / "_part.py").write_text("USED = 1\n")  # no analysis of its own
    (folder / "my_question.py").write_text(
        "from pathlib import Path\nimport kronecker_probe as kp\nfrom ._part import USED\n"
        "class SCRIPT:\n"
        "    @staticmethod\n"
        "    def main(arguments):\n"
        "        (_, preset, _, out) = arguments\n"
        f"        {body}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("kronecker_probe.cli.app._analyses", lambda: (folder.name, folder))
    assert invoke("analyze", "-part").exit_code == USAGE
    arguments = list(sys.argv)
    result = invoke("analyze", "my-question", "--preset", "quick", "--out", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert sys.argv == arguments
    if code == DONE:
        assert (tmp_path / "out" / "table.csv").read_text() == "quick"
    if code == FAILED:
        assert "no [b]good[/b]" in told(result)  # a message is text, not markup


# ---------------------------------------------------------------- processes


def command(*arguments: object, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with Python's handling of Ctrl-C."""
    code = (
        f"import signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{before}\nfrom kronecker_probe.cli.app import main; main()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)]
)
def test_ctrl_c_and_sigterm_name_the_command_that_completes_the_run(
    module: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "a run"
    arguments = ("track", f"{module}:workload", "--out", out)
    arguments += ("--probes", 16, "--spacing", "even")
    process = command(*arguments, "--overwrite", SLOW="0.05")
    parts = out / "measurements"
    deadline = time.monotonic() + 60
    while not (parts / "step-000004.parquet").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code, printed
    assert "Interrupted at step" in printed
    assert "step 1 of 30, loss" in printed  # no terminal: plain lines of progress
    assert "Traceback" not in printed
    (again,) = [line for line in printed.splitlines() if line.endswith("--resume")]
    assert shlex.split(again) == ["kronecker-probe", *map(str, arguments), "--resume"]
    store = RunStore.open(out)
    assert store.status == "interrupted"
    kept = store.steps()
    assert kept[:3] == [0, 2, 4]
    assert len(kept) < 16
    result = invoke(*shlex.split(again)[1:])
    assert result.exit_code == DONE, result.output
    store = RunStore.open(out)
    assert store.status == "done"
    assert store.steps() == list(range(0, 31, 2))
    losses = store.read().query("metric == 'train_loss'")
    assert losses["step"].tolist() == list(range(30))
    workload = load_workload(f"{module}:workload")
    options = TrainingOptions(steps=30, batch_size=8, lr=0.01, probes=16)
    Training(workload, "mine", tmp_path / "other", options).run()
    pd.testing.assert_frame_equal(store.read(), RunStore.open(tmp_path / "other").read())


BLOCKED = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'safetensors'}:
            raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, Block())
"""


def test_report_needs_no_torch(run: tuple[Path, str]) -> None:
    store = RunStore.open(run[0])
    before = store.report.read_bytes()
    store.report.unlink()
    for path in store.figures.iterdir():
        path.unlink()
    process = command("report", run[0], before=BLOCKED, COLUMNS="200")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == DONE, printed
    assert store.report.read_bytes() == before  # the same run gives the same bytes
    assert {p.name for p in store.figures.iterdir()} == FIGURES
    for layer in LAYERS:
        row = next(line for line in run[1].splitlines() if line.strip().startswith(layer))
        assert row.strip() in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("report", "nowhere"), USAGE, "No run at nowhere"),
        (("analyze", "shampoo-cube"), USAGE, "Did you mean 'shampoo-square'"),
        (("--help",), DONE, "workloads"),
        (("track", "digits-mlp"), FAILED, "torch is blocked"),
    ],
)
def test_exit_codes_of_the_process(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    """Those of commands that end before torch is needed; the last shows that it is blocked."""
    process = command(*arguments, before=f"import os; os.chdir({str(tmp_path)!r})\n{BLOCKED}")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    assert message in " ".join(printed.split())


def test_the_package_is_a_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "kronecker_probe", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "track" in ran.stdout
    assert "measure" in ran.stdout


def test_run_json_is_plain_json(run: tuple[Path, str]) -> None:
    record = json.loads((run[0] / "run.json").read_text())
    assert record["status"] == "done"
    assert record["config"]["workload"] == "digits-mlp"
