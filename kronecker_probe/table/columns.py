"""The columns of the measurement table: names, types, units and allowed codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from kronecker_probe.table.codes import Interval, ReasonCode

TARGETS = ("ggn", "fisher", "empirical-fisher", "batch-gradient", "trajectory")
# Kinds of estimate, in the order in which they are measured.
KINDS = ("plugin", "held-out", "population")


@final
@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its name.
        dtype: Its pandas dtype; the nullable ones are null where the column does not apply.
        about: What it is, with its unit, for the documentation.
        codes: The values that it may have; None for any.
        required: Whether it may not be null.
        least: Its least value; None for any.
    """

    name: str
    dtype: str
    about: str
    codes: frozenset[str] | None = None
    required: bool = False
    least: float | None = None


def _codes(values: Iterable[str]) -> frozenset[str]:
    return frozenset(map(str, values))


COLUMNS = (
    Column("step", "int64", "optimizer steps taken when it was measured", required=True, least=0),
    Column("parameter", "string", "name of the parameter; null for numbers of the whole run"),
    Column("m", "Int64", "rows of the parameter as a matrix (outputs)", least=0),
    Column("n", "Int64", "columns of the parameter as a matrix (inputs)", least=0),
    Column("n_examples", "Int64", "examples N that were measured", least=0),
    Column("n_columns", "Int64", "gradients C per example", least=0),
    Column("n_positions", "Int64", "shared positions T per example, or the rank kept", least=0),
    Column("target", "string", "which gradients H is of", _codes(TARGETS)),
    Column("approximation", "string", "label of P; null for numbers of H or of a factor"),
    Column("metric", "string", "what the value is (docs/metrics.md)", required=True),
    Column("index", "Int64", "of singular values the number, of factors the side (0 left, 1 right)",
           least=0),
    Column("kind", "string", "what the value estimates", _codes(KINDS)),
    Column("value", "float64", "the number; NaN where it is undefined"),
    Column("stderr", "float64", "standard error of the value", least=0.0),
    Column("low", "float64", "lower end of the interval"),
    Column("high", "float64", "upper end of the interval"),
    Column("interval", "string", "what low and high are", _codes(Interval)),
    Column("n_eff", "float64", "effective examples", least=0.0),
    Column("copies", "Int64", "examples with the same gradients as another one", least=0),
    Column("rule", "string", "the approximation that the optimizer follows"),
    Column("block_size", "Int64", "side of the optimizer's blocks; null without blocks", least=1),
    Column("epsilon", "float64", "the optimizer's epsilon in force, in the units of that option",
           least=0.0),
    Column("reason", "string", "why the value is undefined", _codes(ReasonCode)),
    Column("note", "string", "a remark for people; no code reads it"),
)  # fmt: skip
DTYPES = {column.name: column.dtype for column in COLUMNS}
