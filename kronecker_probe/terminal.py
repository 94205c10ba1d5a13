"""What the command line prints: the progress bar, the table, the conclusions. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from kronecker_probe.tracking.training import Progress

console = Console()
errors = Console(stderr=True)
# Column heads where the usual name would not fit 80 columns.
HEADS = {"optimal": "optimal", "eigen-corrected": "eigen-corr."}


@contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[Progress], None]]:
    """A bar with loss, accuracy and time left; yields the function that moves it."""
    columns = (
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]}"),
        progress.TextColumn("accuracy {task.fields[accuracy]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=steps, loss="-", accuracy="-")

        def show(state: Progress) -> None:
            accuracy = "-" if math.isnan(state.accuracy) else f"{state.accuracy:.3f}"
            bar.update(task, completed=state.step, loss=f"{state.loss:.4f}", accuracy=accuracy)

        yield show


def show_run(directory: Path) -> None:
    """Write figures and report of a stored run, and print table, conclusions and paths."""
    from kronecker_probe.report import write_report
    from kronecker_probe.tracking.store import RunStore

    paths = write_report(directory)
    show_table(RunStore.open(directory).read(strict=False))
    for figure in paths.figures:
        console.print(f"figure  {escape(str(figure))}", soft_wrap=True, highlight=False)
    console.print(f"report  {escape(str(paths.report))}", soft_wrap=True, highlight=False)


def show_table(table: pd.DataFrame) -> None:
    """The cosines at the last probed step, a line a layer, and a sentence for each."""
    from kronecker_probe.conclusions import conclusions
    from kronecker_probe.tables import kind_remark, last_step, ordered, scores, short

    step = last_step(table)
    now = table if step is None else table[table["step"] == step]
    wide, remark = scores(now), kind_remark(now)
    if "step" in wide.index.names:
        wide = wide.droplevel("step")
    names = ordered(wide.columns)
    title = f"Cosine to H{'' if step is None else f' at step {step}'}"
    title += f"; {remark}" if remark else ""
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("layer", overflow="fold", min_width=8)
    for name in names:
        shown.add_column(HEADS.get(name) or short(name), justify="right", no_wrap=True)
    for parameter, values in wide.iterrows():
        cells = ["-" if math.isnan(values[name]) else f"{values[name]:.3f}" for name in names]
        shown.add_row(escape(str(parameter)), *cells)
    # never narrower than its numbers need: rich would cut their last digits without a mark
    Console(width=max(console.width, 80)).print(shown)
    for sentence in conclusions(table):
        console.print(f"- {escape(sentence)}", soft_wrap=True, highlight=False)
