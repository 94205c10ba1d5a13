"""The README's Python snippets run, one after the other, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import kronecker_probe as kp

README = Path(__file__).parent.parent / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_snippets_run() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = snippets()
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    factory = names["factory"]
    assert callable(factory)
    assert isinstance(factory(0), kp.Workload)
    scores = names["scores"]
    assert isinstance(scores, kp.Scores)
    assert list(scores.pivot().index) == ["0.weight", "2.weight"]
    tracker = names["tracker"]
    assert isinstance(tracker, kp.Tracker)
    assert sorted(set(tracker.table["step"])) == list(range(42))
    probed = tracker.table[tracker.table["metric"] == "cosine"]["step"]
    assert sorted(set(probed)) == [0, 20, 40, 41]


def test_shell_commands_exist() -> None:
    from typer.testing import CliRunner

    from kronecker_probe.cli.app import app

    used = set(re.findall(r"^kronecker-probe (\w+)", README.read_text("utf-8"), flags=re.MULTILINE))
    assert used == {"workloads", "track", "measure", "report", "analyze"}
    for command in used:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
