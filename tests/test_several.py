"""Several optimizers in one call: a run each, and their comparison."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

from kronecker_probe.cli.app import app
from kronecker_probe.cli.several import _Clock
from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.report.comparison import Comparison, Timing
from kronecker_probe.tracking.run_directory.store import RunStore
from kronecker_probe.tracking.training import Progress
from tests.undrawn import undrawn

DONE, FAILED, USAGE = 0, 1, 2
SHORT = ("--steps", "4", "--probes", "3", "--probe-size", "16", "--layers", "0.weight",
         "--lr", "0.01")  # fmt: skip
PAIR = ("--optimizer", "soap", "--optimizer", "rmsprop")

MODULE = """
import torch
from torch import nn
import kronecker_probe as kp

def workload(seed):
    inputs = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(3, 2))
    return kp.Workload(model, nn.CrossEntropyLoss(), (inputs, targets), (inputs, targets),
                       steps=4, batch_size=8, lr=0.01, description="mine")
"""


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    with undrawn():
        yield


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("code")
    (path / "users_several.py").write_text(MODULE)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(path))
    patch.setenv("COLUMNS", "200")
    patch.setenv("TERM", "dumb")
    return "users_several:workload"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def compared(workload: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("several") / "runs"
    result = invoke("track", workload, *PAIR, "--out", out, *SHORT)
    assert result.exit_code == DONE, result.output
    return out, result.output


@pytest.fixture
def copied(compared: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(compared[0], tmp_path / "runs"))


def test_each_optimizer_has_the_run_that_it_would_have_alone(
    compared: tuple[Path, str], workload: str, tmp_path: Path
) -> None:
    out, _ = compared
    assert all((out / name / "report.html").is_file() for name in ("soap", "rmsprop"))
    assert RunStore.open(out / "soap").status == "done"
    # the second one, before which the first has trained
    result = invoke("track", workload, "--optimizer", "rmsprop", "--out", tmp_path / "one", *SHORT)
    assert result.exit_code == DONE, result.output
    pd.testing.assert_frame_equal(
        RunStore.open(out / "rmsprop").read(),
        RunStore.open(tmp_path / "one").read(),
        check_exact=True,
    )


def test_the_numbers_are_those_of_the_runs(compared: tuple[Path, str]) -> None:
    out, printed = compared
    table = pd.read_csv(out / "comparison.csv")
    assert set(table["optimizer"]) == {"soap", "rmsprop"}
    stored = RunStore.open(out / "soap").read()
    for metric in ("probe_loss", "test_accuracy"):
        expected = stored[stored["metric"] == metric].sort_values("step")["value"].to_list()
        of = table[(table["optimizer"] == "soap") & (table["metric"] == metric)]
        assert of.sort_values("step")["value"].to_list() == pytest.approx(expected)
        assert f"{expected[-1]:.4f}" in printed
    live = stored[(stored["approximation"] == "in-use") & (stored["metric"] == "cosine")]
    live = live[(live["kind"] == "plugin") & (live["step"] == 4)]["value"].iloc[0]
    rule = stored[stored["approximation"].eq("eigen-corrected") & stored["metric"].eq("cosine")]
    rule = rule[(rule["kind"] == "plugin") & (rule["step"] == 4)]["value"].iloc[0]
    best = stored[stored["approximation"].eq("optimal") & stored["metric"].eq("cosine")]
    best = best[(best["kind"] == "plugin") & (best["step"] == 4)]["value"].iloc[0]
    cells = rf"soap\s+{live:.3f}\s+{rule:.3f}\s+{best:.3f}"
    assert re.search(cells, printed)
    assert "loss: mean over the probe set" in " ".join(printed.split())
    assert re.search(r"rmsprop.*done", printed)
    assert str(out / "comparison.png") in printed.replace("\n", "")


def test_the_page_embeds_the_figure_and_leads_to_the_runs(compared: tuple[Path, str]) -> None:
    out, _ = compared
    page = (out / "report.html").read_text()
    image = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert image is not None
    assert base64.b64decode(image[1]) == (out / "comparison.png").read_bytes()
    links = re.findall(r'href="([^"]+)"', page)
    assert links == ["./soap/report.html", "./rmsprop/report.html"]
    assert all((out / link).is_file() for link in links)


@pytest.mark.slow
def test_it_is_drawn_again_from_what_is_stored(copied: Path) -> None:
    files = ("comparison.csv", "comparison.png", "report.html")
    before = {name: (copied / name).read_bytes() for name in files}
    for name in files:
        (copied / name).unlink()
    result = invoke("report", copied)
    assert result.exit_code == DONE, result.output
    assert {name: (copied / name).read_bytes() for name in files} == before
    (copied / "comparison.json").write_text("{}")
    broken = invoke("report", copied)
    assert broken.exit_code == USAGE
    assert "comparison.json is damaged" in broken.output


def test_runs_that_are_there_are_not_touched_without_a_word(copied: Path, workload: str) -> None:
    again = invoke("track", workload, *PAIR, "--out", copied, *SHORT)
    assert again.exit_code == USAGE
    assert "soap, rmsprop already" in again.output
    assert "--resume" in again.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--seed", "7"], "seed 0, and that of now is 7"),
        (["--steps", "9"], "steps 4, and that of now is 9"),
        (["--target", "empirical-fisher"], "target 'ggn'"),
    ],
)
def test_runs_that_do_not_compare_are_not_put_into_one_table(
    copied: Path, workload: str, changes: list[str], words: str
) -> None:
    others = ("--optimizer", "sgd", "--optimizer", "adam")
    again = invoke("track", workload, *others, "--out", copied, *SHORT, *changes)
    assert again.exit_code == USAGE
    told = " ".join(again.output.split())
    assert words in told
    assert "would not compare" in told
    assert not (copied / "sgd").exists()


def test_times_are_kept_at_each_probe(compared: tuple[Path, str]) -> None:
    told: list[Timing] = []
    clock = _Clock([0, 2], told.append)
    show = clock.then(lambda _: None)
    for step in (1, 2, 3, 4):
        show(Progress(step, 0.0, 0.0, None))
    assert [one.steps for one in told] == [0, 1]  # after the probed steps 0 and 2
    assert clock.timing().steps == 2


@pytest.mark.slow
def test_resuming_keeps_what_is_done_and_adds_what_is_not(copied: Path, workload: str) -> None:
    before = RunStore.open(copied / "soap").record["created"]
    more = (*PAIR, "--optimizer", "sgd")
    result = invoke("track", workload, *more, "--out", copied, *SHORT, "--resume")
    assert result.exit_code == DONE, result.output
    assert RunStore.open(copied / "soap").record["created"] == before
    assert RunStore.open(copied / "sgd").steps() == [0, 1, 4]
    assert list(Comparison.open(copied).timings) == ["soap", "rmsprop", "sgd"]


@pytest.mark.slow
def test_overwriting_starts_each_anew(copied: Path, workload: str) -> None:
    (copied / "soap" / "mine.txt").write_text("keep")
    longer = [*SHORT, "--overwrite"]
    longer[1] = "5"
    result = invoke("track", workload, *PAIR, "--out", copied, *longer)
    assert result.exit_code == DONE, result.output
    assert RunStore.open(copied / "soap").steps()[-1] == 5
    assert (copied / "soap" / "mine.txt").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--optimizer", "soap", "--optimizer", "soap"], "soap is given twice"),
     (["--optimizer", "soap", "--optimizer", "soup"], "soup"),
     (["--optimizer", "soap", "--optimizer", "sgd", "--set", "basis.frequency=3"],
      "sgd: Setting 'basis.frequency=3' has a section; torch's optimizers have none. For one "
      "optimizer alone write --set NAME:option=value."),
     (["--optimizer", "soap", "--optimizer", "muon", "--set", "basis.frequency=3"], "muon: "),
     ([*PAIR, "--set", "sopa:basis.frequency=3"], "Did you mean 'soap'? Known: rmsprop, soap."),
     (["--optimizer", "soap", "--set", "sgd:lr=1"], "Known: soap."),
     ([*PAIR, "--set", "rmsprop:lr=x"], "rmsprop:lr is 'x'"),
     ([*PAIR, "--resume", "--overwrite"], "choose one")],
)  # fmt: skip
def test_bad_usage_leaves_nothing_behind(
    arguments: list[str], text: str, workload: str, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    result = invoke("track", workload, *arguments, "--out", out, "--steps", "4")
    assert result.exit_code == USAGE, result.output
    assert text in " ".join(result.output.split())
    assert not out.exists()


def test_a_directory_of_something_else_is_refused(
    compared: tuple[Path, str], workload: str, tmp_path: Path
) -> None:
    single = compared[0] / "soap"
    result = invoke("track", workload, *PAIR, "--out", single, *SHORT)
    assert result.exit_code == USAGE
    assert "holds a single run" in " ".join(result.output.split())
    (tmp_path / "mine.txt").write_text("keep")
    result = invoke("track", workload, *PAIR, "--out", tmp_path, *SHORT, "--overwrite")
    assert result.exit_code == USAGE
    assert "no comparison" in " ".join(result.output.split())


def test_a_run_that_diverges_does_not_keep_the_others_from_running(
    workload: str, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    # AdamW's decay multiplies the weights by -1e23 a step; SGD is where the softmax saturates
    pair = ("--optimizer", "adamw", "--optimizer", "sgd")
    result = invoke("track", workload, *pair, "--out", out, *SHORT[:-1], "1e25")
    assert result.exit_code == FAILED, result.output
    assert RunStore.open(out / "adamw").status == "failed"
    assert RunStore.open(out / "sgd").status == "done"
    assert (out / "comparison.csv").is_file()


def test_times_of_a_resumed_run_add_up(tmp_path: Path) -> None:
    both = Timing(2.0, 3, 0.5) + Timing(1.0, 1, 0.25)
    assert both == Timing(3.0, 4, 0.75)
    Comparison(tmp_path / "deep" / "runs", {"soap": both}).save()
    assert Comparison.open(tmp_path / "deep" / "runs").timings == {"soap": both}
    assert json.loads((tmp_path / "deep" / "runs" / "comparison.json").read_text())["runs"]
    with pytest.raises(RunDirectoryError, match=r"no comparison\.json"):
        Comparison.open(tmp_path)


# ---------------------------------------------------------------- rates and settings


def test_rates_are_recorded_once_and_do_not_keep_a_run_from_going_on(
    compared: tuple[Path, str], copied: Path, workload: str
) -> None:
    # as an older version left it: without the entry, and interrupted before its last probe
    run = copied / "rmsprop"
    record = json.loads((run / "run.json").read_text())
    assert record["learning_rates"] == [0.01]
    del record["learning_rates"]
    (run / "run.json").write_text(json.dumps(record))
    again = invoke("track", workload, "--optimizer", "rmsprop", "--out", run, *SHORT, "--resume")
    assert again.exit_code == DONE, again.output
    store = RunStore.open(run)
    assert store.record["learning_rates"] == [0.01]
    store.note_rates([7.0])
    assert RunStore.open(run).record["learning_rates"] == [0.01]
    assert store.config == RunStore.open(compared[0] / "rmsprop").config


def test_each_run_has_its_own_rate_and_settings(workload: str, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    given = ("--set", "soap:basis.frequency=2", "--set", "rmsprop:lr=0.05", "--set",
             "weight_decay=0.125", "--optimizer", "sgd", *SHORT)  # fmt: skip
    result = invoke("track", workload, *PAIR, *given, "--out", out)
    assert result.exit_code == DONE, result.output
    configs = {name: store.config for name, store in Comparison.open(out).stores().items()}
    rates = {name: config["lr"] for name, config in configs.items()}
    assert rates == {"soap": 0.01, "rmsprop": 0.05, "sgd": 0.01}
    assert configs["soap"]["settings"] == ["weight_decay=0.125", "basis.frequency=2"]
    assert configs["sgd"]["settings"] == ["weight_decay=0.125"]
    # and those of one alone, by its own default where nothing is given
    single = ("--optimizer", "sgd", "--set", "sgd:momentum=0.5", *SHORT[:-2])
    result = invoke("track", workload, *single, "--out", tmp_path / "one")
    assert result.exit_code == DONE, result.output
    store = RunStore.open(tmp_path / "one")
    assert store.config["settings"] == ["momentum=0.5"]
    assert store.config["lr"] is None
    assert store.record["learning_rates"] == [torch.optim.SGD([torch.zeros(1)]).defaults["lr"]]
