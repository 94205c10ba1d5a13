"""The page of several runs: their numbers in cells of text, one figure, one HTML file."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pandas as pd
from matplotlib.figure import Figure

from kronecker_probe.errors import RunDirectoryError
from kronecker_probe.plots.comparison import plot_comparison
from kronecker_probe.report.comparison import Comparison, Timing, rates_shown, settings_shown
from kronecker_probe.report.template import rendered
from kronecker_probe.table.escaping import link
from kronecker_probe.table.read import last_step, number
from kronecker_probe.tracking.run_directory.files import write_atomically
from kronecker_probe.tracking.run_directory.store import RunStore

ABOUT_RUNS = (
    "lr: the learning rate at the start, of each group. loss: mean over the probe set, at the last "
    "probed step. train loss: of the last batch. seconds: wall time with probes; ms/step: the mean "
    "of steps without a probe."
)
ABOUT_LAYERS = (
    "in use: the preconditioner that the optimizer applies. rule: the rule that it follows, fresh, "
    "undamped and not cut into blocks, on the gradient samples of H. optimal: the best Kronecker "
    "product, which bounds every other one (diagonal and eigenvalue-corrected matrices are no "
    "Kronecker products, and may lie above). Numbers of the sample; each run measures H at its own "
    "weights."
)


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
_COSINES = ("in_use_cosine", "rule_cosine", "optimal_cosine")  # in the order of:
LAYER_HEAD = ("optimizer", "in use", "rule", "optimal")


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
            cosines = (
                _cell(_last(at, f"{one.replace(' ', '_')}_cosine"), 3) for one in LAYER_HEAD[1:]
            )
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
        rates_shown(store),
        "-" if probed is None else str(probed),
        _cell(_last(of, "probe_loss"), 4),
        _cell(_last(of, "train_loss"), 4),
        _cell(_last(of, "test_accuracy"), 4),
        _cell(timing.seconds, 1),
        _cell(a_step, 1),
        store.status,
        settings_shown(store) or "-",
    ]


def _last(rows: pd.DataFrame, metric: str) -> float:
    of = rows[rows["metric"] == metric].sort_values("step")["value"]
    return float(of.iloc[-1]) if len(of) else math.nan


def _cell(value: float, places: int) -> str:
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
    page = rendered(
        "comparison.html.j2",
        name=comparison.path.resolve().name,
        summary=summary,
        about_runs=ABOUT_RUNS,
        about_layers=ABOUT_LAYERS,
        image=base64.b64encode(buffer.getvalue()).decode(),
        links={
            name: link([name, "report.html"])
            for name in summary.optimizers
            if (comparison.path / name / "report.html").is_file()
        },
    )
    files = {
        "comparison.csv": table.to_csv(index=False).encode(),
        "comparison.png": buffer.getvalue(),
        "report.html": page,
    }
    for name, data in files.items():
        write_atomically(comparison.path / name, data, inside=comparison.path)
    return summary, [comparison.path / name for name in files]
