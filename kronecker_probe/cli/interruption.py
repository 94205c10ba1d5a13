"""How a command ends on Ctrl-C and SIGTERM, and what it says then; no torch."""

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
from rich.markup import escape

from kronecker_probe.cli.terminal import errors

if TYPE_CHECKING:
    from kronecker_probe.tracking.training import Training

INTERRUPTED, TERMINATED = 130, 143


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
            f"lost; go on with\n  {escape(again)}",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(ending(stop)) from None
