"""What a finding is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import pandas as pd

LEVELS = ("warning", "notice", "good", "abstained")
# Of alike findings, those that are printed in full, and the layers that are named after them.
IN_FULL, NAMED = 2, 12
# Those that a sentence of a summary names.
SENTENCE = 4


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
        at: Which steps of a run they are about; empty for a table without steps.
    """

    findings: tuple[Finding, ...]
    at: str = ""

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

    def summary(self, levels: Sequence[str] = LEVELS) -> list[str]:
        """One sentence a subject: the first finding, and how many layers have the like.

        Args:
            levels: The levels to include.
        """
        groups: dict[tuple[str, str], list[Finding]] = {}
        for one in self.findings:
            if one.level in levels:
                groups.setdefault((one.level, one.subject), []).append(one)
        sentences = []
        for first, *others in groups.values():
            more = f" (and {_more(others, [first], SENTENCE)})" if others else ""
            sentences.append(f"{str(first).removesuffix('.')}{more}.")
        return sentences

    def __str__(self) -> str:
        """A line a finding; of alike ones of many layers the first two, and the others by name."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for one in self.findings:
            groups.setdefault((one.level, one.subject), []).append(one)
        lines = [f"Judged at {self.at}:"] if self.at else []
        for (level, subject), alike in groups.items():
            shown = alike if len(alike) <= IN_FULL + 1 else alike[:IN_FULL]
            lines += [f"[{level}] {one}" for one in shown]
            if others := alike[len(shown) :]:
                lines.append(f"[{level}] {subject}: likewise in {_more(others, shown, NAMED)}.")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False)


def _more(others: Sequence[Finding], shown: Sequence[Finding], limit: int) -> str:
    """How many more layers there are, and which, each once."""
    told = {one.parameter for one in shown}
    names = list(dict.fromkeys(one.parameter or "the run" for one in others))
    names = [name for name in names if name not in told] or names
    return f"{len(names)} more: {', '.join(names[:limit])}" + ", ..." * (len(names) > limit)
