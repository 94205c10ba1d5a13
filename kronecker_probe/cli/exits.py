"""How a command ends: done, by an error, Ctrl-C or SIGTERM, and what it says then; no torch."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from kronecker_probe.cli.terminal import errors
from kronecker_probe.errors import (
    InvalidInputError,
    KroneckerProbeError,
    MemoryBudgetError,
    RunDirectoryError,
)
from kronecker_probe.table.escaping import for_terminal

if TYPE_CHECKING:
    from kronecker_probe.tracking.training import Training

DONE, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors on purpose become one line and an exit code; others keep their traceback."""
    try:
        with terminable():
            yield
    except KeyboardInterrupt as stop:
        errors.print("[yellow]Interrupted.[/] What had been stored is intact.")
        raise typer.Exit(ending(stop)) from None
    except KroneckerProbeError as error:
        errors.print(f"[red]Error:[/] {for_terminal(error)}", soft_wrap=True)
        raise typer.Exit(FAILED) from None


@contextmanager
def usage_checked() -> Iterator[None]:
    """Errors of the arguments themselves, before any work was done."""
    try:
        yield
    except (InvalidInputError, RunDirectoryError, MemoryBudgetError) as error:
        errors.print(f"[red]Error:[/] {for_terminal(error)}", soft_wrap=True)
        raise typer.Exit(USAGE) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as a job scheduler sends it: it ends a run as Ctrl-C does."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises :class:`_Terminated` inside, so that the run notes how it ended."""
    if threading.current_thread() is not threading.main_thread():  # which alone takes signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ending(stop: KeyboardInterrupt) -> int:
    """The exit code of a command that was stopped so."""
    return TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED


@contextmanager
def resumable(training: Training) -> Iterator[None]:
    """On Ctrl-C and SIGTERM, say where the run stands and which command goes on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        given = [one for one in sys.argv[1:] if one not in ("--overwrite", "--resume")]
        again = shlex.join(["kronecker-probe", *given, "--resume"])
        errors.print(
            f"[yellow]Interrupted[/] at step {training.tracker.steps_taken}. Nothing measured is "
            f"lost; go on with\n  {for_terminal(again)}",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(ending(stop)) from None
