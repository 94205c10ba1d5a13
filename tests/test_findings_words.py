"""The words of findings, against golden files; every code has words, a golden line and a doc row.

After a change of wording: ``REGENERATE_GOLDEN=1 python -m pytest tests/test_findings_words.py``,
then read the differences of tests/golden and docs/findings.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import kronecker_probe as kp
from kronecker_probe.findings.codes import Code, Remedy
from kronecker_probe.findings.words.phrase import ADVICE, MESSAGES
from tests.test_live_findings import SPLITS

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
COLUMNS = ("step", "parameter", "approximation", "metric", "index", "value", "stderr", "low",
           "high", "kind", "n_examples", "n_eff", "target", "m", "n", "note",
           "interval", "rule", "reason", "copies", "block_size")  # fmt: skip
STEP = 9


def cosines(values: dict[str, float], layer: str = "fc", stderr: float = 0.002,
            **more: Any) -> list[Row]:  # fmt: skip
    row = {"step": STEP, "parameter": layer, "metric": "cosine", "kind": "population",
           "stderr": stderr, "n_examples": 256, "n_eff": 200.0, "m": 8, "n": 6,
           "target": "ggn"} | more  # fmt: skip
    return [row | {"approximation": name, "value": value} for name, value in values.items()]


def about(metric: str, value: float, layer: str | None = "fc", **more: Any) -> Row:
    return {"step": STEP, "parameter": layer, "metric": metric, "value": value} | more


def in_use(split: dict[str, float], **more: Any) -> list[Row]:
    values = {"optimal": 0.95, "shampoo-squared": 0.945, "in-use": 0.3}
    rows = cosines(values, **more) + cosines(values, kind="plugin", stderr=math.nan, **more)
    return rows + [about(metric, value) for metric, value in split.items()]


def follows(rule: str, **more: Any) -> Row:
    return about("in_use_rule", math.nan, rule=rule, **more)


def layers() -> dict[str, list[Row]]:
    """Findings about the quality of a layer, by the table's name."""
    close = {"optimal": 0.95, "kfac": 0.94, "shampoo": 0.8}
    direction = "direction_cosine:power=0.5"
    plugin = {"kind": "plugin", "stderr": math.nan}
    bracket = {"stderr": math.nan, "low": 0.9, "high": 0.98, "interval": "bracket"}
    return {
        "close": cosines(close) + cosines({"optimal": 0.97}, step=0),
        "two rules are close": cosines({"optimal": 0.95, "shampoo-squared": 0.949, "kfac": 0.95}),
        "close to a poor optimum": cosines({"optimal": 0.6, "kfac": 0.6}),
        "close, and something is better": cosines(
            {"optimal": 0.6, "kfac": 0.6, "eigen-corrected": 0.7}
        ),
        "close to an unsure optimum": cosines({"optimal": 0.902, "kfac": 0.9}),
        "far": cosines({"optimal": 0.95, "kfac": 0.8}),
        "uncertain": cosines({"optimal": 0.95, "kfac": 0.94}, stderr=0.03),
        "at the threshold": cosines({"optimal": 0.95, "kfac": 0.9305}, stderr=0.008),
        "uncertain by a bracket": cosines({"optimal": 0.95}, **bracket) + cosines({"kfac": 0.9}),
        "uncertain by a bracket, without steps": [
            {key: value for key, value in row.items() if key != "step"}
            for row in cosines({"optimal": 0.95}, **bracket) + cosines({"kfac": 0.9})
        ],
        "plug-in alone": cosines({"optimal": 0.9, "kfac": 0.8}, **plugin),
        "kinds differ": cosines({"optimal": 0.9}) + cosines({"kfac": 0.8}, **plugin),
        "a second product": [
            *cosines({"optimal": 0.8}), *cosines({"optimal": 0.79}, **plugin),
            about("noise_floor", 0.99), about("norm", 1.25),
            about("singular_value", 1.0, index=0), about("singular_value", 0.5, index=1),
        ],
        "the exponent": cosines({"shampoo-squared": 0.9, "shampoo": 0.7}),
        "the exponent, and its steps": [
            *cosines({"shampoo-squared": 0.9, "shampoo": 0.7}),
            *cosines({"shampoo-squared": 0.95, "shampoo": 0.96}, metric=direction, **plugin),
        ],
        "the scale": cosines({"kfac": 0.9}) + cosines({"kfac": 40.0}, metric="best_scale"),
        "truncated": [*cosines({"kfac": 0.9}), about("dropped_energy", 0.41)],
        "few samples": cosines({"kfac": 0.9}, n_eff=10.0),
        "undefined": cosines({"kfac": math.nan}, note="H = 0"),
        "undefined, though exact": cosines(
            {"kfac": math.nan}, reason="not-independent", note="no sampling error",
            target="trajectory",
        ),
        "undefined at a step": [
            *cosines({"optimal": 0.9}), *cosines({"optimal": math.nan}, step=4, note="H = 0"),
        ],
        "held-out alone": cosines({"kfac": 0.9}, kind="held-out"),
    }  # fmt: skip


def optimizers() -> dict[str, list[Row]]:
    """Findings about the preconditioner in use, its factors and refreshes."""
    along = {"kind": "plugin", "stderr": math.nan, "target": "trajectory"}
    stale = {"shampoo": 0.8, "in-use": 0.6}
    plain = cosines({"kfac": 0.9}, **along)
    sides = [about("factor_under_floor", 0.4, index=1), about("factor_rank", 6.0, index=1),
             about("factor_amplification", 60.0, index=1),
             about("factor_suggested_epsilon", 2.5e-6, index=1)]  # fmt: skip
    probes: dict[str, list[Row]] = {}
    for name, costs, ages in (("unseen", (0.0, 0.0), (0, 0)), ("free", (0.0, 0.001), (3, 9)),
                              ("cost", (0.0, 0.143), (3, 9))):  # fmt: skip
        probes[f"staleness: {name}"] = [
            row for step, cost, age in zip((20, 40), costs, ages, strict=True) for row in (
                *cosines({"kfac": 0.9}, step=step, **along),
                about("steps_since_refresh", age, step=step, index=0),
                about("refreshes", step // 10, step=step, index=0),
                about("in_use_staleness", cost, step=step))
        ]  # fmt: skip
    return {
        **{f"split: {name}": in_use(split) for name, split in SPLITS.items()},
        "split: statistics of K-FAC": [*in_use(SPLITS["statistics"]), follows("kfac")],
        "epsilon in force": [*in_use(SPLITS["damping"]), about("factor_epsilon", 1e-3, index=0)],
        "its rule": [*cosines({"optimal": 0.95, "shampoo": 0.75, "in-use": 0.74}, **along),
                     follows("shampoo")],
        "below its own rule": [*cosines({"diagonal": 0.2, "in-use": 0.5}, **along),
                               about("in_use_fresh", 0.19), about("in_use_damping", 0.56)],
        "one side": [*in_use({}), about("factor_rank", 4.0, index=1)],
        "unexplained": in_use({}),
        "behind its rule": [*cosines(stale, **along), follows("shampoo")],
        "off its rule": [*cosines(stale, **(along | {"target": "ggn"})), follows("shampoo")],
        **probes,
        "amplified": [*plain, *sides],
        "amplified, and damping costs": [*plain, *sides, about("in_use_damping", 0.3)],
        "amplified in two layers": [
            *plain, *sides, *(row | {"parameter": "fc2"} for row in (*plain, *sides)),
        ],
        "the basis is off": [*plain, about("basis_off_diagonal", 0.62, index=0)],
    }  # fmt: skip


def runs() -> dict[str, list[Row]]:
    """Findings about all layers."""
    poor = cosines({"optimal": 0.8}, "a") + cosines({"optimal": 0.7, "eigen-corrected": 0.8}, "b")
    return {
        "nothing": [],
        "not finite": [about("train_loss", value, None, step=step)
                       for step, value in enumerate((2.3, math.nan))],
        "diverged": [about("probe_loss", value, None, step=step)
                     for step, value in enumerate((2.3, 50.0))],
        "repeated": [*cosines({"kfac": 0.9}), about("norm", 1.0, copies=3, n_examples=256)],
        "skipped": [about("skipped", math.nan, "norm.weight", note="no rule")],
        "all good": cosines({"optimal": 0.95}, "a") + cosines({"optimal": 0.97}, "b"),
        "worst": poor,
        "optimum not measured": cosines({"kfac": 0.5}, "a") + cosines({"kfac": 0.98}, "b"),
        "vector": cosines({"optimal": 1.0}, n=1),
        "no K-FAC": cosines({"kfac": math.nan, "optimal": 0.9}, reason="no-factors"),
    }  # fmt: skip


def diagnosed(tables: dict[str, list[Row]]) -> dict[str, kp.Diagnosis]:
    found = {}
    for name, rows in tables.items():
        columns = [one for one in COLUMNS if one != "step" or all("step" in row for row in rows)]
        found[name] = kp.diagnose(pd.DataFrame(rows, columns=columns))
    return found


GROUPS = {"layers": layers, "optimizers": optimizers, "runs": runs}


def check(path: Path, text: str) -> None:
    if os.environ.get("REGENERATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", list(GROUPS))
def test_the_words_are_the_golden_ones(name: str) -> None:
    parts: list[str] = []
    for title, found in diagnosed(GROUPS[name]()).items():
        lines = [f"{one.level} {one.code} {one.remedy or '-'}\n    {one}" for one in found]
        parts.append(f"# {title}\n" + "\n".join(lines) + "\n")
    check(ROOT / "tests" / "golden" / f"findings_{name}.txt", "\n".join(parts))


def everything() -> Iterable[kp.Finding]:
    return (one for make in GROUPS.values() for found in diagnosed(make()).values()
            for one in found)  # fmt: skip


@pytest.mark.parametrize("which", [lambda one: one.code, lambda one: one.remedy])
def test_every_code_and_remedy_fires(which: Callable[[kp.Finding], Any]) -> None:
    fired = {which(one) for one in everything()}
    missing = set(type(next(iter(fired)))) - fired
    assert missing <= {Remedy.NONE}


def test_every_code_has_words() -> None:
    assert set(MESSAGES) == set(Code)
    assert set(ADVICE) < set(Remedy)


def test_every_code_is_documented() -> None:
    remedies: dict[Code, list[Remedy]] = {code: [] for code in Code}
    for one in everything():
        if one.remedy and one.remedy not in remedies[one.code]:
            remedies[one.code].append(one.remedy)
    lines = [
        "# Findings",
        "",
        "`kp.diagnose` returns findings; each has a `level`, one of these codes, the `evidence` "
        "that it rests on, and a `remedy`.",
        "This page is made from `kronecker_probe/findings/codes.py` by "
        "`tests/test_findings_words.py`.",
        "",
        "| code | subject | meaning | what to do |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{code}` | {code.subject} | {code.about} | "
        f"{'; or '.join(dict.fromkeys(one.about for one in remedies[code])) or '–'} |"
        for code in Code
    ]
    check(ROOT / "docs" / "findings.md", "\n".join(lines) + "\n")
