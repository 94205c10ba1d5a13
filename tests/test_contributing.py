"""The examples of CONTRIBUTING.md, run outside of the package."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import kronecker_probe as kp

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MOST_LINES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each Python example as the file that its first line names."""
    folder = tmp_path_factory.mktemp("outside")
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        (folder / block.partition("\n")[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    return folder


def python(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(table: pd.DataFrame, approximation: str, metric: str) -> pd.Series[float]:
    rows = table[(table["approximation"] == approximation) & (table["metric"] == metric)]
    return rows.loc[rows["kind"] == "plugin"].set_index(["step", "parameter"])["value"]


def test_five_extensions_of_less_than_40_lines(folder: Path) -> None:
    files = sorted(folder.glob("*.py"))
    kinds = ("approximation", "layer", "metric", "optimizer", "workload")
    assert [file.stem for file in files] == [f"my_{kind}" for kind in kinds]
    assert all(len(file.read_text().splitlines()) < MOST_LINES for file in files)


def test_four_are_used_by_the_command_line_like_built_in_ones(folder: Path) -> None:
    (command,) = re.findall(r"```sh\n(python -m .*?)```", TEXT, re.DOTALL)
    shown = python(folder, *shlex.split(command.replace("\\\n", " "))[1:])
    run = folder / "runs" / "prototypes"
    table = kp.RunStore.open(run).read()
    for metric in ("cosine", "diagonal_error"):
        values = numbers(table, "ridge:share=0.1", metric)
        layers = ("0.weight", "2.weight")
        assert values.index.tolist() == [(step, layer) for step in (0, 4) for layer in layers]
        assert values.notna().all()
    report = (run / "report.html").read_text(encoding="utf-8")
    plugins = [part for file in sorted(folder.glob("my_*.py")) for part in ("--plugin", file.name)]
    for text in ("Shampoo² + ridge, share=0.1", "error of the diagonal"):
        assert text in report
        assert text in shown or "diagonal" in text
    listed = python(folder, "-m", "kronecker_probe", "workloads", *plugins)
    assert "prototypes" in listed
    assert "nearest prototype, on Gaussian inputs" in listed
    python(folder, "-m", "kronecker_probe", "report", str(run))
    plain = (run / "report.html").read_text(encoding="utf-8")
    assert "ridge, share=0.1" in plain
    assert "diagonal error" in plain


def test_the_state_of_the_optimizer_is_scored(folder: Path) -> None:
    python(folder, "my_optimizer.py")
    values = numbers(kp.RunStore.open(folder / "runs" / "row-adagrad").read(), "in-use", "cosine")
    assert values[0].isna().all()
    assert values[2].between(0.05, 1).all()
