"""A run directory -> figures (PNG and SVG) and one self-contained HTML report; no torch."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from kronecker_probe import plots
from kronecker_probe.errors import InvalidInputError, RunDirectoryError
from kronecker_probe.findings.diagnose import diagnose
from kronecker_probe.findings.headlines import headline
from kronecker_probe.report.optimizer_table import inside_table
from kronecker_probe.report.template import rendered
from kronecker_probe.table.metric_info import metric_info
from kronecker_probe.table.read import (
    KIND_NAMES,
    at_step,
    kinds,
    label,
    last_step,
    of_best_kind,
    ordered,
    row_told,
    shape,
    steps_told,
)
from kronecker_probe.tracking.run_directory.files import make_directory, write_atomically
from kronecker_probe.tracking.run_directory.store import RunStore

_COLUMNS = ("cosine", "relative_error", "best_scale_error", "best_scale")
# what a note says of the place where it stands, and of how much
_OF_PARAMETER = r" \(parameter '[^']*'\)"
_NUMBER = r"(?<![\w.])\d[\d.e+-]*"
_TARGETS = {
    "ggn": "the exact Gauss-Newton matrix",
    "fisher": "the Fisher matrix (labels sampled from the model)",
    "empirical-fisher": "the empirical Fisher matrix (true labels)",
    "batch-gradient": "the second moment of mini-batch gradients (true labels)",
    "trajectory": "the second moment of the run's own gradients (AdaGrad, full-matrix Adam)",
}
# file name -> (function, heading, what the reader looks at)
_FIGURES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "trajectory": (
        plots.plot_trajectory,
        "Along the run",
        "Cosine similarity to H against the optimizer step. The optimal Kronecker product is the "
        "ceiling of all Kronecker products; only other structures reach the shaded region. "
        "A name with ↓ lies below the panel, at the value given. Whiskers are 95% "
        "intervals: among many lines, those of the optimum and of the closest rule.",
    ),
    "ladder": (
        plots.plot_ladder,
        "At the last probed step",
        "All approximations, best first; each bar is the distance to the optimal Kronecker "
        "product (vertical line). An arrowhead at the edge stands for a value beyond it; the pale "
        "bar under a marker is the 95% interval of an estimate.",
    ),
    "spectrum": (
        plots.plot_spectrum,
        "Kronecker spectrum",
        "Singular values of the rearranged matrix R(H) relative to the largest. The first alone, "
        "over ‖H‖, is the cosine of the optimal Kronecker product of that matrix, here the sample "
        "matrix; the slower the others fall, "
        "the less any one product can capture.",
    ),
    "training": (
        plots.plot_training,
        "Training",
        "Loss and accuracy against the optimizer step; ticks at the bottom mark the probed steps.",
    ),
}


@dataclass(frozen=True)
class ReportPaths:
    """What :func:`write_report` wrote.

    Attributes:
        report: the HTML file.
        figures: the PNG and SVG files, in the order of the report.
    """

    report: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class _Drawn:
    """One figure of the report; ``svg`` is base64, and ``absent`` says why there is none."""

    heading: str
    caption: str
    title: str = ""
    svg: str = ""
    absent: str = ""


def write_report(run_path: str | Path) -> ReportPaths:
    """Draws every figure of a stored run and writes its ``report.html``.

    The report opens from disk without a network: figures and tables are inside. It is a pure
    function of the run directory, so that the same run gives the same bytes. A part that cannot
    be read is left out, with a warning, and the report says so.

    Args:
        run_path: a run directory.

    Raises:
        RunDirectoryError: there is no run, nothing was measured yet, or the files cannot be
            written.
    """
    store = RunStore.open(run_path)
    damaged = store.damaged()
    table = store.read(strict=False)
    if table.empty:
        bad = (
            f" ({len(damaged)} part files cannot be read: {', '.join(damaged)})" if damaged else ""
        )
        raise RunDirectoryError(
            f"{store.path} holds no measurements yet{bad}; train on with --resume, then ask again."
        )
    make_directory(store.figures, inside=store.path)
    drawn, written = [], []
    for name, (plot, heading, caption) in _FIGURES.items():
        one, paths = _draw(store, table, name, plot, heading, caption)
        drawn.append(one)
        written += paths
    write_atomically(store.report, _render(store, table, damaged, drawn), inside=store.path)
    return ReportPaths(store.report, tuple(written))


def _draw(
    store: RunStore,
    table: pd.DataFrame,
    name: str,
    plot: Callable[..., Any],
    heading: str,
    caption: str,
) -> tuple[_Drawn, list[Path]]:
    figure = Figure()  # not pyplot: no global state, no window
    try:
        plot(table, figure=figure)
    except InvalidInputError as error:
        return _Drawn(heading, caption, absent=str(error)), []
    title = " ".join(figure.get_suptitle().split())
    # the layout is computed once for both files: of many panels it takes longer than drawing
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    paths, contents = [], {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        # a fixed salt and no date, so that drawing again gives the same bytes
        with mpl.rc_context({"svg.hashsalt": "kronecker-probe"}):
            figure.savefig(
                buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None
            )
        contents[kind] = buffer.getvalue()
        paths.append(store.figures / f"{name}.{kind}")
        write_atomically(paths[-1], contents[kind], inside=store.path)
    svg = base64.b64encode(contents["svg"]).decode()
    return _Drawn(heading, caption, title=title, svg=svg), paths


def _render(
    store: RunStore, table: pd.DataFrame, damaged: dict[str, str], drawn: list[_Drawn]
) -> bytes:
    record = store.record
    workload = store.config.get("workload")
    found = diagnose(table)
    return rendered(
        "report.html.j2",
        name=str(workload) if workload is not None else store.path.resolve().name,
        record=record,
        config={option: _plain(value) for option, value in store.config.items()},
        machine={**record.get("machine", {}), "device": record.get("device") or "not recorded"},
        versions=record.get("versions", {}),
        damaged=damaged,
        headline=headline(table),
        findings=found.summary(("warning", "notice", "good")),
        abstained=found.summary(("abstained",)),
        targets=[_TARGETS.get(draws, draws) for draws in table["target"].dropna().unique()],
        steps=sorted(set(table.loc[table["approximation"].notna(), "step"].tolist())),
        step=last_step(table),
        metrics=[metric_info(metric).axis for metric in _metrics(table)],
        layers=_layers(table),
        inside=inside_table(table),
        figures=drawn,
        skipped=_skipped(table),
        notes=_notes(table),
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metrics(table: pd.DataFrame) -> list[str]:
    """What the table of numbers has columns for: all that was measured, the usual ones first."""
    scored = table[table["approximation"].notna()]
    defined = scored.loc[scored["value"].notna(), "metric"]
    there = (defined if len(defined) else scored["metric"]).unique().tolist()
    return [m for m in _COLUMNS if m in there] + [m for m in there if m not in _COLUMNS]


def _layers(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Per parameter at the last step: its name and sizes, and a row of cells per approximation."""
    last, metrics = at_step(table, None), _metrics(table)
    told = {
        (row["parameter"], row["approximation"], metric): _cell(row)
        for metric in metrics
        for row in of_best_kind(last, metric).to_dict("records")
    }
    shown = {name: KIND_NAMES[kind] for name, kind in kinds(last).items() if kind}
    layers = []
    scored = last[last["approximation"].notna()]
    undefined = scored[scored["value"].isna() & scored["note"].notna()]
    undefined = undefined.drop_duplicates(["parameter", "approximation"])
    notes = undefined.set_index(["parameter", "approximation"])["note"].to_dict()
    by_layer = dict(iter(last.groupby("parameter", sort=False)))
    for name in scored["parameter"].unique():
        rows = by_layer[name]
        cells = [
            {
                "label": label(approximation),
                "values": [told.get((name, approximation, m), "–") for m in metrics],
                "note": notes.get((name, approximation), ""),
            }
            for approximation in ordered(rows["approximation"].dropna())
        ]
        about = [_sizes(rows), f"{shown[name]} numbers" if name in shown else ""]
        sizes = ", ".join(part for part in about if part)
        shared = _shared_note(cells)
        layers.append({"name": shape(rows, name), "sizes": sizes, "note": shared, "rows": cells})
    return layers


def _shared_note(cells: list[dict[str, Any]]) -> str:
    """A note that all rows of a layer have, taken from them; "" if they differ."""
    notes = {cell["note"] for cell in cells}
    if len(cells) < 2 or len(notes) > 1:
        return ""
    for cell in cells:
        cell["note"] = ""
    return str(notes.pop())


def _cell(row: dict[Any, Any]) -> str:
    """The number with its error, and "undefined" for NaN."""
    told = row_told(row)
    return "undefined" if told == "-" else told


def _sizes(rows: pd.DataFrame) -> str:
    """What was measured: "512 data, 10 gradient columns a datum, 49 shared positions"."""
    meanings = {
        "n_examples": "data",
        "n_columns": "gradient columns a datum",
        "n_positions": "shared positions",
    }
    known = {text: rows[column].dropna() for column, text in meanings.items()}
    first = {text: int(values.iloc[0]) for text, values in known.items() if len(values)}
    return ", ".join(f"{size} {text}" for text, size in first.items() if text == "data" or size > 1)


def _skipped(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Parameters that are not measured, each with the last reason given."""
    rows = table[table["metric"] == "skipped"].drop_duplicates("parameter", keep="last")
    reasons = rows["note"].fillna("no reason noted")
    return list(zip(rows["parameter"].astype(str), reasons.astype(str), strict=True))


def _notes(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Notes that differ in no more than numbers and the parameter, each kind once.

    With how often there is one, for how many parameters and steps that is, and which.
    """
    # parameters that were skipped have a table of their own, and a rule's name is no remark
    noted = table[table["note"].notna() & ~table["metric"].isin(["skipped", "in_use_rule"])]
    noted = noted.assign(text=noted["note"].str.replace(_OF_PARAMETER, "", regex=True))
    probed = table.loc[table["note"].notna() | table["approximation"].notna(), "step"].unique()
    notes = []
    for _, rows in noted.groupby(noted["text"].str.replace(_NUMBER, "#", regex=True), sort=False):
        about = rows["parameter"].dropna().unique().tolist() or ["the run"]
        about += [] if rows["approximation"].isna().any() else [
            label(name) for name in ordered(rows["approximation"])
        ]  # fmt: skip
        count = len(rows[["step", "parameter"]].drop_duplicates())
        alike = ", with other numbers elsewhere" if rows["text"].nunique() > 1 else ""
        where = f"{', '.join(about)}; {steps_told(rows['step'], probed)}{alike}"
        times = f"{count} times: " if count > 1 else ""
        notes.append({"text": rows["text"].iloc[0], "where": times + where})
    return notes
