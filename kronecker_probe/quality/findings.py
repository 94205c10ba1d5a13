"""What a finding is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import pandas as pd

LEVELS = ("warning", "notice", "good", "abstained")


@final
@dataclass(frozen=True)
class Finding:
    """One statement about one layer, or about the run.

    Attributes:
        level: "warning" (act), "notice" (worth knowing), "good", or "abstained".
        parameter: The layer; None for the whole run.
        subject: What it is about, for example "distance to the optimum".
        message: The statement with its numbers.
        advice: What to do; empty where nothing is to be done.
        evidence: The numbers that it rests on.
    """

    level: str
    parameter: str | None
    subject: str
    message: str
    advice: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"{self.parameter}: " if self.parameter else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{where}{self.message}{advice}."


@final
@dataclass(frozen=True)
class Diagnosis:
    """All findings about a table, the most urgent first.

    Attributes:
        findings: The findings.
    """

    findings: tuple[Finding, ...]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """One row a finding."""
        columns = ["level", "parameter", "subject", "message", "advice"]
        rows = [[getattr(one, name) for name in columns] for one in self.findings]
        return pd.DataFrame(rows, columns=columns)

    def summary(self, limit: int = 6) -> str:
        """The first findings as one paragraph."""
        shown = " ".join(_capital(str(one)) for one in self.findings[:limit])
        rest = len(self.findings) - limit
        return f"{shown} ({rest} more findings.)" if rest > 0 else shown

    def __str__(self) -> str:
        return "\n".join(f"[{one.level}] {one}" for one in self.findings)

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if " " in text.split(":", maxsplit=1)[0] else text
