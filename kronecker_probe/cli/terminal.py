"""What the command line prints: the progress bar, the table, the findings. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kronecker_probe.table.escaping import for_terminal
from kronecker_probe.table.metric_info import metric_info
from kronecker_probe.table.read import (
    KIND_NAMES,
    error_told,
    is_bracket,
    last_step,
    number,
    number_of,
    ordered,
    short,
)

if TYPE_CHECKING:
    from kronecker_probe.report.comparison import Comparison
    from kronecker_probe.tracking.training import Progress

console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)
# Findings that are printed; the report has all.
FINDINGS = 5
# Column heads where the usual name would not fit 80 columns.
HEADS = {"optimal": "optimal", "eigen-corrected": "eigen-corr."}


@contextmanager
def progress_shown(steps: int) -> Iterator[Callable[[Progress], None]]:
    """Shows how far a training is; yields the function to call after every step.

    In a terminal a bar with loss, the last test accuracy and its step, and time left; elsewhere,
    about every tenth of the steps, a plain line on standard error.
    """
    if not console.is_terminal:
        yield _lines(steps)
        return
    columns = (
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]}"),
        progress.TextColumn("test accuracy {task.fields[accuracy]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=steps, loss="-", accuracy="-")

        def show(state: Progress) -> None:
            bar.update(task, completed=state.step, loss=f"{state.loss:.4f}", accuracy=_share(state))

        yield show


def _lines(steps: int) -> Callable[[Progress], None]:
    started, told = time.monotonic(), -1

    def show(state: Progress) -> None:
        nonlocal told
        tenth = state.step * 10 // steps
        if tenth > told:
            told = tenth
            show_line(
                f"step {state.step} of {steps}, loss {state.loss:.4f}, "
                f"test accuracy {_share(state)}, {time.monotonic() - started:.0f} s",
                errors,
            )

    return show


def _share(state: Progress) -> str:
    """The accuracy with the step at which it was measured: only probed steps are."""
    if math.isnan(state.accuracy):
        return "-"
    return f"{state.accuracy:.3f} (step {state.tested_at})"


def show_line(text: str, to: Console | None = None) -> None:
    """Print text as it is, on one line however long: no markup, no control characters."""
    (to or console).print(for_terminal(text), soft_wrap=True, highlight=False)


def show_probes(steps: Sequence[int]) -> None:
    """Say before a training starts which steps it will probe."""
    told = ", ".join(map(str, steps))
    show_line(f"probes at steps {told} ({len(steps)})", errors)


def show_run(directory: Path) -> None:
    """Write figures and report of a stored run, and print tables, findings and paths."""
    from kronecker_probe.report.run_page import write_report
    from kronecker_probe.tracking.run_directory.store import RunStore

    paths = write_report(directory)
    store = RunStore.open(directory)
    show_table(store.read(strict=False), asked="metrics" in store.config)
    for figure in paths.figures:
        show_line(f"figure  {figure}")
    show_line(f"report  {paths.report}")


def show_comparison(comparison: Comparison) -> None:
    """Write the figure and the report of several runs, and print their table and the paths."""
    from kronecker_probe.report.comparison_page import ABOUT_LAYERS, ABOUT_RUNS, write_comparison

    summary, paths = write_comparison(comparison)
    layers = [
        ["" if number else layer, *row]
        for layer, rows in summary.layers.items()
        for number, row in enumerate(rows)
    ]
    _show_cells("Training", summary.head, summary.rows, ABOUT_RUNS)
    for name, why in summary.failures.items():
        console.print(
            f"{for_terminal(name)} failed: {for_terminal(why)}", soft_wrap=True, highlight=False
        )
    if layers:
        title = "Cosine to H at the last probed step"
        _show_cells(title, ("layer", *summary.layer_head), layers, ABOUT_LAYERS)
    for path in paths:
        console.print(
            f"{path.suffix[1:]:<6}  {for_terminal(path)}", soft_wrap=True, highlight=False
        )


def _show_cells(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], about: str) -> None:
    """Cells in as many tables as the width asks for, each with the first column."""
    width = max(console.width, 80)
    sizes = [
        2 + max(len(word) for word in (*name.split(), *(row[place] for row in rows)))
        for place, name in enumerate(head)
    ]
    wide = Console(width=width, emoji=False)
    wide.print(f"[bold]{title}[/]", highlight=False)
    for turn, places in enumerate(_split(sizes, width)):
        if turn:
            wide.print()
        shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)  # 2 a column
        for place in places:
            # what no table has room for is text: names of layers and settings, which may break
            whole = sizes[place] <= width // 3
            left = head[place] in ("layer", "optimizer", "settings")
            name = head[place].replace(" ", "\n")
            align: Literal["left", "right"] = "left" if left else "right"
            shown.add_column(name, justify=align, no_wrap=whole, overflow="fold")
        for row in rows:
            shown.add_row(*(for_terminal(row[place]) for place in places))
        wide.print(shown, highlight=False)
    wide.print(about, highlight=False)


def _split(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Columns by table: in order, the first one in each, as many as fit ``width``."""
    tables: list[list[int]] = [[0]]
    for place, size in list(enumerate(sizes))[1:]:
        used = sum(min(sizes[other], width // 3) for other in tables[-1])
        if len(tables[-1]) > 1 and used + min(size, width // 3) > width:
            tables.append([0])
        tables[-1].append(place)
    return tables


def show_table(table: pd.DataFrame, *, asked: bool = False) -> None:
    """The numbers at the last probed step, one table per metric, and the findings.

    Args:
        table: a measurement table.
        asked: whether the metrics were asked for by name: then all of them are printed, and
            otherwise the cosine alone.
    """
    from kronecker_probe.table.read import at_step

    now = at_step(table, None)
    scored = now[now["approximation"].notna()]
    defined = scored.loc[scored["value"].notna(), "metric"].unique().tolist()
    metrics = defined if asked or "cosine" not in defined else ["cosine"]
    for place, metric in enumerate(metrics or scored["metric"].unique()[:1]):
        if place:
            console.print()
        title, shown, legend = _table(now, str(metric))
        # never narrower than its numbers need: rich would cut their last digits without a mark
        needed = Console(width=1000).measure(shown).minimum
        wide = Console(width=max(console.width, 80, needed), emoji=False)
        # not as rich's title and caption, which wrap at the width of a narrow table
        wide.print(title, shown, *legend, sep="\n", highlight=False)
    _show_findings(table)


def _show_findings(table: pd.DataFrame) -> None:
    """One line per code of the diagnosis, the most urgent ones."""
    from kronecker_probe.findings.diagnose import diagnose

    sentences = diagnose(table).summary()
    if sentences:
        console.print("[bold]Findings[/]")
    for sentence in sentences[:FINDINGS]:
        show_line(f"- {sentence}")
    if (more := len(sentences) - FINDINGS) > 0:
        console.print(f"  and {more} more: kp.diagnose, or the report", highlight=False)


def _table(now: pd.DataFrame, metric: str) -> tuple[str, Table, list[str]]:
    """One metric at one step: a row for each layer and kind, with the errors under the numbers.

    Returns:
        The title, the table, and the lines that say what its signs mean.
    """
    rows = now[(now["metric"] == metric) & now["approximation"].notna()]
    if "kind" not in rows:
        rows = rows.assign(kind="plugin")
    records = rows.to_dict("records")
    names, absent = _defined(rows, ordered(rows["approximation"]))
    kinds = _kinds(rows)
    # the floor is that of plug-in numbers
    floors = _floors(now) if metric == "cosine" and "plugin" in kinds else {}
    step = last_step(now)
    what = "cosine to H" if metric == "cosine" else metric_info(metric).axis
    what = f"{what[:1].upper()}{what[1:]}"
    title = f"{what}{'' if step is None else f' at step {step}'}"
    about = _data_told(rows)
    title = f"[bold]{for_terminal(f'{title}: {_kinds_told(rows, kinds)}{about}')}[/]"
    shown = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("layer", overflow="fold", min_width=8)
    for name in names:
        shown.add_column(
            HEADS.get(name) or for_terminal(short(name)), justify="right", no_wrap=True
        )
    if floors:
        shown.add_column("floor", justify="right", no_wrap=True)
    for parameter in rows["parameter"].unique():
        of = [row for row in records if row["parameter"] == parameter]
        floor = [floors.get(parameter, "-")] if floors else []
        if len(kinds) > 1:
            shown.add_row(for_terminal(parameter))
        for kind in kinds:
            cells = {row["approximation"]: _cell(row) for row in of if row["kind"] == kind}
            if len(kinds) > 1 and set(cells.values()) <= {"-"}:
                continue  # all abstain
            head = KIND_NAMES[kind] if len(kinds) > 1 else for_terminal(parameter)
            beside = floor if kind == "plugin" else [""] * len(floor)
            shown.add_row(head, *(cells.get(name, "-") for name in names), *beside)
    legend = _legend(records, kinds, bool(floors))
    if not metric_info(metric).estimable:
        legend.append("of the sample matrix only: this metric has no population or held-out form")
    return title, shown, [for_terminal(line) for line in legend + absent]


def _defined(rows: pd.DataFrame, names: list[str]) -> tuple[list[str], list[str]]:
    """The approximations with a number somewhere, and a line about each of the others."""
    valued = set(rows.loc[rows["value"].notna(), "approximation"])
    if not valued:
        return names, []
    lines = []
    for name in (name for name in names if name not in valued):
        notes = rows.loc[(rows["approximation"] == name) & rows["note"].notna(), "note"]
        why = str(notes.iloc[0]) if len(notes) else "no reason noted"
        more = " (other layers: the like)" if notes.nunique() > 1 else ""
        lines.append(f"{short(name)}: undefined in every layer: {why}{more}")
    return [name for name in names if name in valued], lines


def _data_told(rows: pd.DataFrame) -> str:
    """The target, its label draws and the number of data: "; fisher, 2 label draws, N = 200"."""
    targets = [str(one) for one in rows["target"].dropna().unique()] if "target" in rows else []
    parts = [", ".join(targets)] if targets else []
    if "fisher" in targets and "n_columns" in rows:
        parts += [f"{n} label draw{'s' * (n != 1)}" for n in _range(rows["n_columns"])]
    if "n_examples" in rows:
        parts += [f"N = {n}" for n in _range(rows["n_examples"])]
    return f"; {', '.join(parts)}" if parts else ""


def _range(column: pd.Series[Any]) -> list[Any]:
    """The one value of a column as a list, or "least to most"; empty without any."""
    found = sorted({int(value) for value in column.dropna()})
    return found if len(found) < 2 else [f"{found[0]} to {found[-1]}"]


def _kinds(rows: pd.DataFrame) -> list[str]:
    """The kinds with values, the best first; all kinds where nothing is defined."""
    for some in (rows[rows["value"].notna()], rows):
        found = [kind for kind in KIND_NAMES if (some["kind"] == kind).any()]
        if found:
            return found
    return ["plugin"]


def _kinds_told(rows: pd.DataFrame, kinds: list[str]) -> str:
    names = [KIND_NAMES[kind] for kind in kinds]
    told = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    silent = [k for k in KIND_NAMES if k not in kinds and (rows["kind"] == k).any()]
    abstain = ", ".join(KIND_NAMES[kind] for kind in silent)
    return told + (f" numbers ({abstain} estimates abstain)" if silent else " numbers")


def _floors(now: pd.DataFrame) -> dict[str, str]:
    rows = now[(now["metric"] == "noise_floor") & now["value"].notna()]
    return {str(row["parameter"]): f"{row['value']:.3f}" for row in rows.to_dict("records")}


def _legend(records: list[dict[Any, Any]], kinds: list[str], floors: bool) -> list[str]:
    """What the signs in the cells mean, as far as there are any."""
    shown = [row for row in records if not math.isnan(row["value"])]
    bars = [row for row in shown if math.isnan(number_of(row)[1])]
    bars = [row for row in bars if not math.isnan(number_of(row)[2])]
    told = []
    if any(not math.isnan(number_of(row)[1]) for row in shown):
        told.append("±: standard error")
    if any(is_bracket(row) for row in bars):
        told.append("[ ] b: bracket, held-out to in-sample")
    if any(not is_bracket(row) for row in bars):
        told.append("[ ]: 95% interval")
    if floors and "plugin" in kinds:
        told.append("floor: the plug-in cosine that H itself would get at this number of draws")
    return told


def _cell(row: dict[Any, Any]) -> str:
    """A number, and under it its error, without the zeros before the points."""
    value, stderr, low, high = number_of(row)
    if math.isnan(value):
        return "-"
    if not math.isnan(stderr):
        return f"{number(value)}\n±{_bare(error_told(stderr))}"
    if math.isnan(low):
        return number(value)
    # on two lines, so that seven of them fit 80 columns
    mark = "b" if is_bracket(row) else ""
    return f"{number(value)}\n\\[{_bare(number(low))},\n{_bare(number(high))}]{mark}"


def _bare(text: str) -> str:
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
