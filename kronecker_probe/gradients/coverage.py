"""What a capture measured: the samples by parameter, and a reason for everything else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import pandas as pd

from kronecker_probe.errors import unknown_name
from kronecker_probe.gradients.samples.base import GradientSamples

# Characters of a reason on one line of the printed coverage.
FOLD = 72


@final
@dataclass(frozen=True)
class Capture(Mapping[str, GradientSamples]):
    """Gradient samples by parameter name, and what was not measured.

    Attributes:
        samples: Parameter name to its samples; "<module>.weight+bias" for a joint [W b].
        skipped: Parameter name to the reason why it is not measured.
        target: "ggn", "fisher" or "empirical-fisher"; "batch-gradient" or "trajectory" of samples
            made from those, or along a run.
        loss: The loss of the batch.
        accuracy: Share of correct labels; None for regression.
        note: How the batch was measured where that differs from training, or "".
        reduction: "mean" or "sum": how the loss combines examples.
        fallback: Name to why it was measured by per-sample gradients and not from its layer's
            inputs and output gradients.
    """

    samples: Mapping[str, GradientSamples]
    skipped: Mapping[str, str]
    target: str
    loss: float
    accuracy: float | None
    note: str
    reduction: str = "mean"
    fallback: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> GradientSamples:
        if name in self.samples:
            return self.samples[name]
        if name in self.skipped:
            raise KeyError(f"{name!r} was skipped: {self.skipped[name]}")
        raise KeyError(str(unknown_name("parameter", name, self.samples)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def coverage(self) -> pd.DataFrame:
        """One row per parameter: measured, fallback or skipped, and why.

        ``print(samples)`` shows the same with its long reasons folded.
        """
        rows = [
            {"parameter": name, "status": "fallback" if name in self.fallback else "measured",
             "shape": f"{s.shape[0]} x {s.shape[1]}",
             "n_examples": s.n_examples, "n_columns": s.n_columns, "n_positions": s.n_positions,
             "reason": "; ".join(filter(None, (self.fallback.get(name), self.note)))}
            for name, s in self.samples.items()
        ]  # fmt: skip
        rows += [
            {"parameter": name, "status": "skipped", "reason": reason}
            for name, reason in self.skipped.items()
        ]
        counts = ("n_examples", "n_columns", "n_positions")
        return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64"))

    def __str__(self) -> str:
        """The coverage as text, with reasons folded at a width of :data:`FOLD`."""
        frame = self.coverage.fillna({"shape": "", "reason": ""})
        columns = [[name, *frame[name]] for name in ("parameter", "status", "shape")]
        widths = [max(map(len, column)) for column in columns]
        lines = []
        for *cells, reason in zip(*columns, ["reason", *frame["reason"]], strict=True):
            start = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            first, *rest = textwrap.wrap(reason, FOLD) or [""]
            lines.append(f"{start}  {first}".rstrip())
            lines += [" " * (len(start) + 2) + line for line in rest]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.coverage.to_html(index=False)
