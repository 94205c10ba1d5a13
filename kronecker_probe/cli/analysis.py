"""What every analysis script does: options, a table that is kept, and the figure of that table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure


@final
@dataclass(frozen=True)
class Script:
    """One question: how it is measured, drawn and answered.

    Attributes:
        name: File stem of the table and the figure.
        question: The first line of ``--help``.
        presets: Frozen dataclasses by name, with a field ``seeds``; "quick" and "default".
        collect: A preset to the table, one number a row.
        draw: The table to the figure.
        sentences: The table to what is to be concluded.
    """

    name: str
    question: str
    presets: Mapping[str, Any]
    collect: Callable[[Any], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]
    sentences: Callable[[pd.DataFrame], Sequence[str]]

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run it: ``--preset quick|default``, ``--out FOLDER``, ``--seeds COUNT``."""
        preset, out = self._options(arguments)
        stem = out / self.name
        collected = self.collect(preset)
        collected.to_csv(stem.with_suffix(".csv"), index=False, float_format="%.6f")
        table = pd.read_csv(stem.with_suffix(".csv"))  # the figure shows the table that is kept
        self.save(self.draw(table), stem)
        print(*self.sentences(table), sep="\n")
        print(*(stem.with_suffix(kind) for kind in (".csv", ".png", ".svg")), sep="\n")

    def save(self, figure: Figure, stem: Path) -> None:
        """PNG and SVG, the same bytes for the same table."""
        figure.savefig(stem.with_suffix(".png"), dpi=150)
        with mpl.rc_context({"svg.hashsalt": self.name}):
            figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})

    def _options(self, arguments: Sequence[str] | None) -> tuple[Any, Path]:
        parser = argparse.ArgumentParser(description=self.question)
        parser.add_argument(
            "--preset",
            choices=self.presets,
            default="default",
            help="quick: under a minute; default: what figures/ shows (default: %(default)s)",
        )
        parser.add_argument(
            "--out",
            type=Path,
            default=Path("figures"),
            help="folder for the table and the figure (default: %(default)s)",
        )
        parser.add_argument("--seeds", type=int, help="how many, from 0 (default: the preset's)")
        chosen = parser.parse_args(arguments)
        preset = self.presets[chosen.preset]
        if chosen.seeds is not None:
            if chosen.seeds < 1:
                parser.error(f"--seeds {chosen.seeds}: give at least 1")
            preset = replace(preset, seeds=chosen.seeds)
        try:
            chosen.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # before the work, not after it
            parser.error(f"--out {chosen.out} is no folder that can be written: {error}")
        return preset, chosen.out
