"""Gives a finding its words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.finding import Finding
from kronecker_probe.findings.words import distance, in_use, optimizer, run

MESSAGES: dict[Code, Callable[[Finding], str]] = (
    run.MESSAGES | distance.MESSAGES | in_use.MESSAGES | optimizer.MESSAGES
)
# Advice that is more than the text of its remedy.
ADVICE: dict[Remedy, Callable[[Finding], str]] = run.ADVICE | in_use.ADVICE | optimizer.ADVICE


def phrased(finding: Finding) -> Finding:
    """The finding with its message and advice."""
    if finding.remedy in ADVICE:
        advice = ADVICE[finding.remedy](finding)
    else:
        advice = finding.remedy.about.format_map({**finding.details, **finding.evidence})
    return replace(finding, message=MESSAGES[finding.code](finding), advice=advice)
