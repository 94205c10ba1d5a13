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

from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.plots.comparison import plot_comparison
from kronecker_probe.table.read import last_step, number
from kronecker_probe.tracking.run_directory.files import naming, write_atomically
from kronecker_probe.tracking.run_directory.store import RunStore

FILE = "comparison.json"
# what each row of the table says
COLUMNS = ("optimizer", "lr", "settings", "step", "parameter", "m", "n", "metric", "value")
ABOUT_RUNS = (
    "lr: the learning rate at the start, of each group. loss: mean over the probe set, at the last "
    "probed step. train loss: of the last batch. seconds: wall time with probes; ms/step: the mean "
    "of steps without a probe."
)
ABOUT_LAYERS = (
    "live: what the optimizer holds. rule: the rule that it follows, fresh, undamped and whole, on "
    "the draws of H. optimal: the best Kronecker product, which bounds every other one (diagonal "
    "and eigenvalue-corrected matrices are none, and may lie above). Numbers of the sample; each "
    "run measures H at its own weights."
)
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
        write_atomically(
            self.path / FILE, json.dumps({"runs": runs}, indent=1).encode(), inside=self.path
        )

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
            The columns of :data:`COLUMNS`: optimizer, its learning rate and settings as text, step,
            parameter, its shape m and n, metric and value. "in_use_cosine" is that of what the
            optimizer holds, "rule_cosine" that of the rule that it follows, fresh, undamped and
            whole, "optimal_cosine" that of the best Kronecker product. Cosines are those of the
            sample.
        """
        parts = [
            _numbers(store.read(strict=False)).assign(
                optimizer=name, lr=rate_told(store), settings=settings_told(store)
            )[[*COLUMNS]]
            for name, store in self.stores().items()
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS])


def rate_told(store: RunStore) -> str:
    """The learning rates with which a run started; of older runs, what was asked for."""
    asked = store.config.get("lr")
    rates = store.record.get("learning_rates") or ([] if asked is None else [asked])
    return ", ".join(f"{rate:g}" for rate in rates) or "default"


def settings_told(store: RunStore) -> str:
    """The settings of a run's optimizer, "" without any."""
    return ", ".join(store.config.get("settings") or ())


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    logged = table[table["parameter"].isna() & table["metric"].isin(_LOGGED)]
    cosines = table[(table["metric"] == "cosine") & (table["kind"] == "plugin")]
    live, optimal = (
        cosines[cosines["approximation"] == name].assign(metric=f"{name}_cosine")
        for name in ("in-use", "optimal")
    )
    rule = table[table["metric"] == "in_use_fresh"]
    # 1 - cos^2 of a rule whose factors are positive, as its cosine with H is
    fresh = (1.0 - rule["value"]).clip(lower=0.0).pow(0.5)
    rule = rule.assign(metric="rule_cosine", value=fresh)
    rows = pd.concat([logged, live, rule, optimal], ignore_index=True)
    return rows[rows["value"].notna()]


@final
@dataclass(frozen=True)
class Summary:
    """The comparison in cells of text.

    Attributes:
        head: Column names of ``rows``.
        rows: One a run: optimizer, learning rate, last probed step, losses, accuracy, times,
            status, settings.
        layer_head: Column names of the rows of ``layers``, after the layer.
        layers: The rows of each layer, one a run: optimizer, and its cosines to H.
        optimizers: The optimizers.
        failures: Those that failed, and why.
    """

    head: tuple[str, ...]
    rows: list[list[str]]
    layer_head: tuple[str, ...]
    layers: dict[str, list[list[str]]]
    optimizers: list[str]
    failures: dict[str, str]


HEAD = (
    "optimizer",
    "lr",
    "step",
    "loss",
    "train loss",
    "test accuracy",
    "seconds",
    "ms/step",
    "run",
    "settings",
)
LAYER_HEAD = ("optimizer", "in-use", "rule", "optimal")


def summarize(comparison: Comparison) -> Summary:
    """The numbers at the last probed step of each run."""
    table = comparison.table()
    stores = comparison.stores()
    rows, layers = [], dict[str, dict[str, list[str]]]()
    for name, store in stores.items():
        of = table[table["optimizer"] == name]
        probed = last_step(store.read(strict=False))
        rows.append(_run_row(name, store, comparison.timings[name], of, probed))
        now = of[of["step"] == probed]
        for layer in now["parameter"].dropna().unique():
            at = now[now["parameter"] == layer]
            cosines = (_told(_last(at, f"{one}_cosine"), 3) for one in LAYER_HEAD[1:])
            layers.setdefault(str(layer), {})[name] = [name, *cosines]
    failures = {
        name: str(store.record.get("reason") or "no reason noted")
        for name, store in stores.items()
        if store.status == "failed"
    }
    absent = ["-"] * len(LAYER_HEAD[1:])
    each = {
        layer: [of.get(name, [name, *absent]) for name in stores] for layer, of in layers.items()
    }
    return Summary(HEAD, rows, LAYER_HEAD, each, list(stores), failures)


def _run_row(
    name: str, store: RunStore, timing: Timing, of: pd.DataFrame, probed: int | None
) -> list[str]:
    """The cells of a run, in the order of :data:`HEAD`."""
    a_step = 1e3 * timing.step_seconds / timing.steps if timing.steps else math.nan
    return [
        name,
        rate_told(store),
        "-" if probed is None else str(probed),
        _told(_last(of, "probe_loss"), 4),
        _told(_last(of, "train_loss"), 4),
        _told(_last(of, "test_accuracy"), 4),
        _told(timing.seconds, 1),
        _told(a_step, 1),
        store.status,
        settings_told(store) or "-",
    ]


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
    plot_comparison(table, failed=summary.failures, figure=figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    page = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            name=comparison.path.resolve().name,
            summary=summary,
            about_runs=ABOUT_RUNS,
            about_layers=ABOUT_LAYERS,
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
        write_atomically(comparison.path / name, data, inside=comparison.path)
    return summary, [comparison.path / name for name in files]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
