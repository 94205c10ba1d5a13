"""The verb: samples x approximations x metrics -> one tidy table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import pandas as pd

from kronecker_probe.approximations import DEFAULT_APPROXIMATIONS, approximate, resolve
from kronecker_probe.errors import InvalidInputError, UnsupportedError, unknown_name
from kronecker_probe.gradients.capture import Capture
from kronecker_probe.gradients.samples import GradientSamples
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment import SecondMoment
from kronecker_probe.quality.metrics import InnerProducts

METRICS = ("cosine", "relative_error", "best_scale_error", "best_scale")
# Metrics that say nothing about an operator whose scale is not that of H.
SCALED_METRICS = ("relative_error", "best_scale")

COLUMNS = (
    "parameter", "m", "n", "n_data", "n_columns", "n_positions", "draws",
    "approximation", "metric", "index", "kind", "value", "note",
)  # fmt: skip

_DTYPES: dict[str, Any] = {
    **dict.fromkeys(("m", "n", "n_data", "n_columns", "n_positions", "index"), "Int64"),
    "step": "int64",
    "value": "float64",
}

Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Scores:
    """Quality numbers of one set of samples.

    Attributes:
        table: One row a number; columns parameter, m, n, n_data, n_columns, n_positions, draws,
            approximation, metric, index, kind, value, note. Rows without an approximation
            describe the target ("norm", "trace", "singular_value" with its index); "skipped"
            rows name the parameters that were not measured and say why.
    """

    table: pd.DataFrame

    def pivot(self, metric: str = "cosine") -> pd.DataFrame:
        """Parameters x approximations of one metric.

        Raises:
            UnknownNameError: No such metric.
        """
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)
        rows = self.table[self.table["metric"] == metric]
        wide = rows.pivot_table(
            index="parameter", columns="approximation", values="value", sort=False, dropna=False
        )
        return wide.rename_axis(index=None, columns=metric)

    def plot(self, **options: Any) -> Any:
        """The ladder figure: every approximation, a row a parameter; returns its Axes."""
        from kronecker_probe.plots import plot_ladder

        return plot_ladder(self.table, **options)

    def __repr__(self) -> str:
        return self.pivot().to_string(float_format="{:.4f}".format)

    def _repr_html_(self) -> str:
        return self.pivot().to_html(float_format="{:.4f}".format)


def compare(
    samples: Mapping[str, GradientSamples] | GradientSamples,
    approximations: str | Sequence[str] | None = None,
    *,
    singular_values: int = 8,
    extra: Mapping[str, Mapping[str, Operator]] | None = None,
) -> Scores:
    """Score approximations of each parameter's second moment.

    Args:
        samples: What ``kp.capture`` returned, any mapping of names to samples, or one set.
        approximations: A name or spec ("divergence:q=0", "optimal:rank=2"), or several; None for
            the six of DEFAULT_APPROXIMATIONS. What the samples cannot carry ("kfac" without
            factors) is a row without a value, whose note says why.
        singular_values: How many leading singular values of R(H) to list; 0 for none.
        extra: Operators of your own: parameter name -> name -> operator. Only their shape counts,
            not their scale, so they get "cosine" and "best_scale_error".

    Returns:
        The table of plug-in numbers: those of the sample matrix itself.

    Raises:
        InvalidInputError: No samples, or something else in their place; or an operator of
            ``extra`` that has the name of an approximation or another shape.
        UnknownNameError: An approximation, or a parameter of ``extra``, that is not there.
    """
    names = approximation_names(approximations)
    if singular_values < 0:
        raise InvalidInputError(f"singular_values={singular_values}; give 0 (for none) or more.")
    if isinstance(samples, GradientSamples):
        samples = {"samples": samples}
    if not isinstance(samples, Mapping):
        raise InvalidInputError(
            f"compare got a {type(samples).__name__}; give the samples of kp.capture, "
            "GradientSamples, or a mapping of names to them."
        )
    if not samples:
        raise InvalidInputError("compare got no samples; capture at least one parameter.")
    extra = extra or {}
    for parameter, operators in extra.items():
        if parameter not in samples:
            raise unknown_name("parameter of extra", parameter, samples)
        if taken := sorted(operators.keys() & set(names)):
            raise InvalidInputError(
                f"extra for {parameter!r} has the name {taken[0]!r} of an approximation; rename it."
            )
    draws = samples.draws if isinstance(samples, Capture) else None
    note = samples.note if isinstance(samples, Capture) else ""
    rows: list[Row] = []
    for parameter, one in samples.items():
        target = SecondMoment(one)
        shared = _describe(parameter, one, draws, note)
        found = _target_rows(target, singular_values)
        for name in names:
            found += _approximation_rows(target, name)
        for name, operator in extra.get(parameter, {}).items():
            products = InnerProducts.of(target, operator)
            metrics = [m for m in METRICS if m not in SCALED_METRICS]
            found += _quality_rows(name, products, metrics)
        rows += [shared | row for row in found]
    if isinstance(samples, Capture):
        rows += [skipped_row(name, reason) for name, reason in samples.skipped.items()]
    return Scores(to_table(rows))


def approximation_names(approximations: str | Sequence[str] | None) -> tuple[str, ...]:
    """The labels of the specs asked for, each once; the default six for None.

    Raises:
        UnknownNameError: No such approximation or option.
        InvalidInputError: A malformed spec, or a bad value of an option.
    """
    if approximations is None:
        return DEFAULT_APPROXIMATIONS
    specs = [approximations] if isinstance(approximations, str) else approximations
    return tuple(dict.fromkeys(resolve(spec).label for spec in specs))


def to_table(rows: Sequence[Row], leading: Sequence[str] = ()) -> pd.DataFrame:
    """Rows as a table with all columns, nullable integers and strings."""
    columns = {}
    for name in (*leading, *COLUMNS):
        values = [row.get(name) for row in rows]
        columns[name] = pd.array(values, dtype=_DTYPES.get(name, "string"))
    return pd.DataFrame(columns, columns=[*leading, *COLUMNS])


def skipped_row(parameter: str, reason: str) -> Row:
    """The row of a parameter that was not measured."""
    return {"parameter": parameter, "metric": "skipped", "value": math.nan, "note": reason}


def absent_row(parameter: str, approximation: str, reason: str) -> Row:
    """The row of an approximation that could not be scored."""
    return {
        "parameter": parameter, "approximation": approximation, "metric": "cosine",
        "kind": "plugin", "value": math.nan, "note": reason,
    }  # fmt: skip


def _describe(parameter: str, samples: GradientSamples, draws: str | None, note: str) -> Row:
    m, n = samples.shape
    return {
        "parameter": parameter, "m": m, "n": n, "n_data": samples.n_data,
        "n_columns": samples.n_columns, "n_positions": samples.n_positions, "draws": draws,
        "note": note or None,
    }  # fmt: skip


def _target_rows(target: SecondMoment, singular_values: int) -> list[Row]:
    rows: list[Row] = [
        {"metric": "norm", "value": target.norm()},
        {"metric": "trace", "value": target.trace()},
    ]
    if singular_values > 0 and target.norm() > 0:
        values = target.kronecker_spectrum(singular_values).tolist()
        rows += [
            {"metric": "singular_value", "index": index, "value": value}
            for index, value in enumerate(values)
        ]
    return rows


def _approximation_rows(target: SecondMoment, name: str) -> list[Row]:
    try:
        operator = approximate(target, name)
    except UnsupportedError as error:
        return [
            {"approximation": name, "metric": metric, "kind": "plugin", "value": math.nan,
             "note": str(error)}
            for metric in METRICS
        ]  # fmt: skip
    return _quality_rows(name, InnerProducts.of(target, operator), METRICS)


def _quality_rows(name: str, products: InnerProducts, metrics: Sequence[str]) -> list[Row]:
    rows = []
    for metric in metrics:
        value: float = getattr(products, metric)
        row: Row = {"approximation": name, "metric": metric, "kind": "plugin", "value": value}
        if math.isnan(value):
            row["note"] = products.undefined
        rows.append(row)
    return rows
