"""Measurement tables made up for tests of the store, the figures and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

APPROXIMATIONS = (
    "optimal", "shampoo-squared", "kfac", "shampoo", "eigen-corrected", "diagonal", "in-use",
)  # fmt: skip
COLUMNS = (
    "step", "parameter", "m", "n", "n_examples", "n_columns", "n_positions", "target",
    "approximation", "metric", "index", "kind", "value", "stderr", "low", "high", "interval",
    "n_eff", "copies", "rule", "block_size", "epsilon", "reason", "note",
)  # fmt: skip
NO_LIVE = "no preconditioner yet: first refresh at step 10"


def frame(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """Rows given by their non-null columns, in the documented dtypes."""
    table = pd.DataFrame(
        [{name: row.get(name) for name in COLUMNS} for row in rows], columns=COLUMNS
    )
    whole = ["m", "n", "n_examples", "n_columns", "n_positions", "index", "copies", "block_size"]
    text = ["parameter", "target", "approximation", "metric", "kind", "interval", "rule", "reason",
            "note"]  # fmt: skip
    return table.astype(
        {"step": "int64"}
        | dict.fromkeys(["value", "stderr", "low", "high", "n_eff", "epsilon"], "float64")
        | dict.fromkeys(whole, "Int64")
        | dict.fromkeys(text, "string")
    )


def quality(
    step: int, parameter: str, scores: dict[str, float], **more: object
) -> list[dict[str, object]]:
    """The rows that a probe writes for one parameter: approximation -> cosine."""
    common = {"step": step, "parameter": parameter, "m": 64, "n": 128, "n_examples": 512,
              "n_columns": 10, "n_positions": 1, "target": "ggn"} | more  # fmt: skip
    rows: list[dict[str, object]] = []
    for approximation, cosine in scores.items():
        row = common | {"approximation": approximation, "kind": "plugin"}
        error = math.sqrt(max(0.0, 1 - cosine**2)) if cosine == cosine else math.nan
        rows += [row | {"metric": "cosine", "value": cosine},
                 row | {"metric": "best_scale_error", "value": error}]  # fmt: skip
        if approximation != "in-use":
            rows += [row | {"metric": "relative_error", "value": error * 1.05},
                     row | {"metric": "best_scale", "value": cosine}]  # fmt: skip
    return rows


def estimated(
    parameter: str, cosines: dict[str, float], stderr: float, step: int = 0, less: float = 0.02
) -> list[dict[str, object]]:
    """Cosines with population estimates, each plug-in number ``less`` below its estimate."""
    common: dict[str, object] = {"step": step, "parameter": parameter, "m": 64, "n": 128,
                                 "n_examples": 512, "target": "ggn",
                                 "metric": "cosine"}  # fmt: skip
    rows: list[dict[str, object]] = []
    for name, value in cosines.items():
        row = common | {"approximation": name}
        bar = {"stderr": stderr, "low": value - 2 * stderr, "high": value + 2 * stderr}
        rows += [row | {"kind": "plugin", "value": value - less},
                 row | {"kind": "population", "value": value} | bar]  # fmt: skip
    return rows


def spectrum(
    step: int, parameter: str, values: Sequence[float], norm: float
) -> list[dict[str, object]]:
    """The rows about a parameter's target: its norm and its Kronecker singular values."""
    row = {"step": step, "parameter": parameter, "m": 64, "n": 128, "target": "ggn"}
    return [
        row | {"metric": "norm", "value": norm},
        row | {"metric": "trace", "value": 3 * norm},
        *(row | {"metric": "singular_value", "index": i, "value": v} for i, v in enumerate(values)),
    ]


def training(steps: Sequence[int], accuracy: bool = True) -> list[dict[str, object]]:
    """Logged training steps with a falling loss."""
    rows: list[dict[str, object]] = []
    for step in steps:
        ripple = 1 + 0.15 * math.sin(1.7 * step)
        rows.append({"step": step, "metric": "train_loss",
                     "value": 0.05 + 2.25 * math.exp(-step / 60) * ripple})  # fmt: skip
        if accuracy:
            rows.append({"step": step, "metric": "train_accuracy",
                         "value": 0.98 - 0.88 * math.exp(-step / 50)})  # fmt: skip
    return rows


def probe(
    step: int, parameters: Sequence[str], since: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """One realistic part: layers that drift apart in quality, a live state from step 10 on."""
    rows = training(range(step if since is None else since + 1, step + 1))
    progress = 1 - math.exp(-step / 120)
    rows += [
        {"step": step, "metric": "probe_loss", "value": 0.06 + 2.24 * math.exp(-step / 65)},
        {"step": step, "metric": "probe_accuracy", "value": 0.97 - 0.86 * math.exp(-step / 55)},
        {"step": step, "parameter": "norm.weight", "metric": "skipped", "value": math.nan,
         "note": "LayerNorm weights are not measured"},
    ]  # fmt: skip
    for number, parameter in enumerate(parameters):
        noise = np.random.default_rng([seed, number, step]).normal(scale=0.003, size=7)
        top = 0.975 - 0.015 * number - 0.05 * progress
        gaps = np.array([0, 0.004 + 0.03 * progress * (number + 1) / len(parameters),
                         0.02 + 0.05 * progress, 0.10 + 0.06 * progress, -0.008,
                         0.45 - 0.1 * progress, 0.06 + 0.03 * progress])  # fmt: skip
        cosines = top - gaps + noise * (np.arange(7) > 0)
        scores = dict(zip(APPROXIMATIONS, cosines.tolist(), strict=True))
        if step < 10:
            scores["in-use"] = math.nan
        part = quality(step, parameter, scores, m=64 + number)
        for row in part:
            if row["approximation"] == "in-use" and step < 10:
                row["note"] = NO_LIVE
        rows += part
        decay = 10.0 ** (-np.arange(60) / (6 + 2 * number))
        rest = math.sqrt(1 / top**2 - 1) / np.linalg.norm(decay[1:])
        values = 7e-3 * np.concatenate([[1.0], decay[1:] * rest])
        rows += spectrum(step, parameter, values.tolist(), float(np.linalg.norm(values)))
    return frame(rows)


def run_table(parameters: Sequence[str], steps: Sequence[int]) -> pd.DataFrame:
    """A whole run: a part per probed step, with the training steps in between."""
    since = [None, *steps[:-1]]
    parts = [probe(step, parameters, last) for step, last in zip(steps, since, strict=True)]
    return pd.concat(parts, ignore_index=True)
