"""How errors end a command: one line and an exit code; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kronecker_probe.cli.interruption import ending, terminable
from kronecker_probe.cli.terminal import errors
from kronecker_probe.errors import (
    InvalidInputError,
    KroneckerProbeError,
    MemoryBudgetError,
    RunDirectoryError,
)
from kronecker_probe.table.escaping import for_terminal

DONE, FAILED, USAGE = 0, 1, 2


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
