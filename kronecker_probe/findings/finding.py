"""What a finding is, and how several of them are printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import pandas as pd

from kronecker_probe.findings.codes import Code, Remedy

LEVELS = ("warning", "notice", "good", "abstained")
# Of findings with one code, those that are printed in full, and how many layers are named then.
IN_FULL, NAMED = 2, 12
# Layers that a sentence of a summary names.
SENTENCE = 4


@final
@dataclass(frozen=True)
class Finding:
    """One statement about one layer, or about the run.

    Attributes:
        level: "warning" (act), "notice" (worth knowing), "good", or "abstained".
        code: What it says; a stable name, documented in ``docs/findings.md``.
        parameter: The layer; None for the whole run.
        evidence: The numbers that it rests on.
        remedy: What to do, as a code; ``Remedy.NONE`` where nothing is to be done.
        message: The statement with its numbers.
        advice: What to do, in words; empty where nothing is to be done.
        details: What the words need besides the evidence: names, and numbers with their errors.
    """

    level: str
    code: Code
    parameter: str | None
    evidence: Mapping[str, float] = field(default_factory=dict)
    remedy: Remedy = Remedy.NONE
    message: str = ""
    advice: str = ""
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def subject(self) -> str:
        """What it is about, for example "distance to the optimum"."""
        return self.code.subject

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
        """One row per finding."""
        columns = ["level", "code", "parameter", "subject", "message", "advice"]
        rows = [[getattr(one, name) for name in columns] for one in self.findings]
        return pd.DataFrame(rows, columns=columns)

    def summary(self, levels: Sequence[str] = LEVELS) -> list[str]:
        """One sentence per code: the first finding, and which other layers have it.

        Args:
            levels: The levels to include.
        """
        sentences = []
        for first, *others in self._alike(levels):
            more = f" (and {_more(others, [first], SENTENCE)})" if others else ""
            sentences.append(f"{str(first).removesuffix('.')}{more}.")
        return sentences

    def __str__(self) -> str:
        """One line per finding; of many with one code the first two, and the others by name."""
        lines = [f"Judged at {self.at}:"] if self.at else []
        for alike in self._alike(LEVELS):
            shown = alike if len(alike) <= IN_FULL + 1 else alike[:IN_FULL]
            lines += [f"[{one.level}] {one}" for one in shown]
            if others := alike[len(shown) :]:
                about = f"[{others[0].level}] {others[0].subject}"
                lines.append(f"{about}: likewise in {_more(others, shown, NAMED)}.")
        return "\n".join(lines)

    def _alike(self, levels: Sequence[str]) -> list[list[Finding]]:
        groups: dict[tuple[str, Code], list[Finding]] = {}
        for one in self.findings:
            if one.level in levels:
                groups.setdefault((one.level, one.code), []).append(one)
        return list(groups.values())

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False)


def _more(others: Sequence[Finding], shown: Sequence[Finding], limit: int) -> str:
    """How many more layers there are, and which, each once."""
    known = {one.parameter for one in shown}
    names = list(dict.fromkeys(one.parameter or "the run" for one in others))
    names = [name for name in names if name not in known] or names
    return f"{len(names)} more: {', '.join(names[:limit])}" + ", ..." * (len(names) > limit)
