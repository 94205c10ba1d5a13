"""Several runs of one workload side by side: their numbers, one figure, one page; no torch."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from kronecker_probe.comparison_figure import plot_comparison
from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.tables import last_step, number
from kronecker_probe.tracking.files import naming, write_atomically
from kronecker_probe.tracking.store import RunStore

FILE = "comparison.json"
COLUMNS = ("optimizer", "step", "parameter", "metric", "value")
# of a row without a parameter
_LOGGED = {"train_loss", "probe_loss", "probe_accuracy", "test_accuracy"}


@final
@dataclass(frozen=True)
class Timing:
    """What a run took.

    Attributes:
        seconds: In all, with probes.
        steps: Steps that were not probed.
        step_seconds: What those took.
    """

    seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        """Of a run that was interrupted and went on."""
        return Timing(
            self.seconds + other.seconds,
            self.steps + other.steps,
            self.step_seconds + other.step_seconds,
        )


@final
class Comparison:
    """A directory with a run for each of several optimizers, named after them.

    Args:
        path: The directory.
        timings: What each run took, in the order of the optimizers.
    """

    def __init__(self, path: Path, timings: dict[str, Timing]) -> None:
        self.path = path
        self.timings = timings

    @classmethod
    def open(cls, path: Path) -> Comparison:
        """The comparison that lies at ``path``.

        Raises:
            RunDirectoryError: There is none, or its file cannot be read.
        """
        file = path / FILE
        if not file.is_file():
            raise RunDirectoryError(f"No comparison at {path}: it has no {FILE}.")
        with naming("read", file):
            text = file.read_text()
        try:
            timings = {name: Timing(**one) for name, one in json.loads(text)["runs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirectoryError(f"{file} cannot be read: {error}.") from error
        return cls(path, timings)

    @classmethod
    def holds(cls, path: Path) -> bool:
        """Whether a comparison lies at ``path``."""
        return (path / FILE).is_file()

    def save(self) -> None:
        """Write the file that tells the runs.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        with naming("create", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        runs = {name: vars(timing) for name, timing in self.timings.items()}
        write_atomically(self.path / FILE, json.dumps({"runs": runs}, indent=1).encode())

    def stores(self) -> dict[str, RunStore]:
        """The runs that were started."""
        paths = {name: self.path / name for name in self.timings}
        return {
            name: RunStore.open(path)
            for name, path in paths.items()
            if (path / "run.json").is_file()
        }

    def table(self) -> pd.DataFrame:
        """Losses, accuracies and the cosines of live of all runs, a row a number.

        Returns:
            Columns optimizer, step, parameter, metric and value; "live_cosine" is that of what the
            optimizer holds, "rule_cosine" that of the rule that it follows, fresh, undamped and
            whole. Cosines are those of the sample.
        """
        parts = [_numbers(store.read(strict=False), name) for name, store in self.stores().items()]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS])


def _numbers(table: pd.DataFrame, optimizer: str) -> pd.DataFrame:
    logged = table[table["parameter"].isna() & table["metric"].isin(_LOGGED)]
    live = table[(table["approximation"] == "live") & (table["metric"] == "cosine")]
    live = live[live["kind"] == "plugin"].assign(metric="live_cosine")
    rule = table[table["metric"] == "live_fresh"]
    # 1 - cos^2 of a rule whose factors are positive, as its cosine with H is
    cosines = (1.0 - rule["value"]).clip(lower=0.0).pow(0.5)
    rule = rule.assign(metric="rule_cosine", value=cosines)
    rows = pd.concat([logged, live, rule], ignore_index=True)
    rows = rows[rows["value"].notna()].assign(optimizer=optimizer)
    return rows[[*COLUMNS]]


@final
@dataclass(frozen=True)
class Summary:
    """The comparison in cells of text.

    Attributes:
        head: Column names of ``rows``.
        rows: One a run: optimizer, last probed step, loss, accuracy, seconds, status.
        layers: One a layer: its name, and a cell for each optimizer.
        optimizers: The optimizers.
    """

    head: tuple[str, ...]
    rows: list[list[str]]
    layers: list[list[str]]
    optimizers: list[str]


def summarize(comparison: Comparison) -> Summary:
    """The numbers at the last probed step of each run."""
    table = comparison.table()
    stores = comparison.stores()
    rows, cells = [], dict[str, dict[str, str]]()
    for name, store in stores.items():
        of = table[table["optimizer"] == name]
        timing = comparison.timings[name]
        probed = last_step(store.read(strict=False))
        a_step = 1e3 * timing.step_seconds / timing.steps if timing.steps else math.nan
        rows.append(
            [
                name,
                "-" if probed is None else str(probed),
                _told(_last(of, "probe_loss"), 4),
                _told(_last(of, "train_loss"), 4),
                _told(_last(of, "test_accuracy"), 4),
                _told(timing.seconds, 1),
                _told(a_step, 1),
                store.status,
            ]
        )
        now = of[of["step"] == probed]
        for layer in now["parameter"].dropna().unique():
            at = now[now["parameter"] == layer]
            live, rule = (_told(_last(at, one), 3) for one in ("live_cosine", "rule_cosine"))
            cells.setdefault(str(layer), {})[name] = f"{live} | {rule}"
    head = (
        "optimizer",
        "step",
        "loss",
        "train loss",
        "test accuracy",
        "seconds",
        "ms a step",
        "run",
    )
    layers = [[layer, *(of.get(name, "-") for name in stores)] for layer, of in cells.items()]
    return Summary(head, rows, layers, list(stores))


def _last(rows: pd.DataFrame, metric: str) -> float:
    of = rows[rows["metric"] == metric].sort_values("step")["value"]
    return float(of.iloc[-1]) if len(of) else math.nan


def _told(value: float, places: int) -> str:
    return "-" if math.isnan(value) else number(value, places)


def write_comparison(comparison: Comparison) -> tuple[Summary, list[Path]]:
    """Write ``comparison.csv``, ``comparison.png`` and ``report.html`` beside the runs.

    Returns:
        The numbers, and the files written.

    Raises:
        RunDirectoryError: No run has measurements yet, or a file cannot be written.
    """
    table = comparison.table()
    if table.empty:
        raise RunDirectoryError(f"The runs in {comparison.path} hold no measurements yet.")
    summary = summarize(comparison)
    figure = Figure()
    plot_comparison(table, figure=figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    page = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            name=comparison.path.resolve().name,
            summary=summary,
            image=base64.b64encode(buffer.getvalue()).decode(),
            linked=[
                name
                for name in summary.optimizers
                if (comparison.path / name / "report.html").is_file()
            ],
        )
    )
    files: dict[str, Any] = {
        "comparison.csv": table.to_csv(index=False).encode(),
        "comparison.png": buffer.getvalue(),
        "report.html": page.encode(),
    }
    for name, data in files.items():
        write_atomically(comparison.path / name, data)
    return summary, [comparison.path / name for name in files]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
