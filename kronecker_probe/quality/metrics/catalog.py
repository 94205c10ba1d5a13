"""Every metric by name, with its options; ``kp.register_metric`` adds those of users."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, final

from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
    UnsupportedError,
    unknown_name,
)
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.quality.metrics import directions, divergences, frobenius, spectral
from kronecker_probe.quality.metrics.metric import Metric, Values
from kronecker_probe.quality.metrics.undefined import UndefinedError, check_pair
from kronecker_probe.table.codes import code_of
from kronecker_probe.table.metric_info import Better, MetricInfo, add_metric_info
from kronecker_probe.table.specs import (
    Spec,
    check_new_name,
    options_by_signature,
    read_options,
    split_spec,
)

Formula = TypeVar("Formula", bound=Callable[..., float])

_METRICS: dict[str, Metric] = {
    metric.name: metric
    for module in (frobenius, spectral, divergences, directions)
    for metric in module.METRICS
}
METRICS = MappingProxyType(_METRICS)
"""Name -> metric: each file of this folder lists its own."""

ESTIMABLE = tuple(name for name, metric in METRICS.items() if metric.form is not None)
"""The metrics with population and held-out estimates; what a comparison shows by default."""

SQUARED = frozenset(name for name, metric in METRICS.items() if metric.squared)
"""The metrics that are estimated as squares."""


@final
@dataclass(frozen=True)
class ChosenMetric:
    """A metric with the values of its options.

    Attributes:
        metric: What it is.
        spec: Its name with every option.
    """

    metric: Metric
    spec: Spec

    @property
    def name(self) -> str:
        """The canonical "name" or "name:option=value,...", with every option."""
        return self.spec.label

    @property
    def columns(self) -> tuple[str, ...]:
        """Its values as the table names them, each with the options."""
        return tuple(f"{name}{self.spec.suffix}" for name in self.metric.gives)

    def rows(
        self, target: SecondMoment, approximation: Operator, *, any_scale: bool = False
    ) -> list[dict[str, Any]]:
        """Its values as rows with the keys metric, value, stderr and note.

        Args:
            target: H.
            approximation: P.
            any_scale: Whether the scale of P means nothing; its best multiple counts then.

        What is undefined or unsupported for this pair is NaN, and the note says why.
        """
        try:
            formula = (self.metric.rescaled if any_scale else None) or self.metric.formula
            values = formula(target, approximation, **dict(self.spec.options))
        except (UndefinedError, UnsupportedError, MemoryBudgetError, InvalidInputError) as reason:
            return [
                {"metric": name, "value": math.nan, "reason": code_of(reason), "note": str(reason)}
                for name in self.columns
            ]
        return [
            {"metric": name, "value": values[short][0], "stderr": values[short][1], "note": None}
            for name, short in zip(self.columns, self.metric.gives, strict=True)
        ]


def resolve_metric(spec: str) -> ChosenMetric:
    """A metric by name, with options: "direction:power=0.5,damping=0.001".

    Args:
        spec: One of the names of :data:`METRICS`, with options after a colon.

    Raises:
        UnknownNameError: No such metric or option.
        InvalidInputError: A malformed spec, or a bad value.
    """
    name, given = split_spec("metric", str(spec))
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    metric = METRICS[name]
    return ChosenMetric(metric, Spec(name, read_options("metric", name, given, metric.options)))


def register_metric(
    name: str,
    *,
    label: str | None = None,
    unit: str = "",
    better: Better | None = None,
    limits: tuple[float | None, float | None] = (None, None),
    drawing: Literal["linear", "log"] = "linear",
    scaled: bool = True,
) -> Callable[[Formula], Formula]:
    """Register a metric, which ``kp.compare``, the tracker, figures and report then know by name.

    The decorated function gets two operators of one shape, H and its approximation P, and returns
    a float. H is neither zero nor infinite. Its keyword-only parameters with numbers as defaults
    are options of its spec, "name:option=value". Where it is undefined it raises
    ``kp.errors.UnsupportedError("why")``, which becomes a row without a value. It is measured for
    the sample only, without estimates.

    Args:
        name: Letters, digits, - and _.
        label: In words, as on an axis; by default ``name``.
        unit: Of the values; "" for pure numbers.
        better: "higher" or "lower"; None where neither is.
        limits: The smallest and the largest possible value; None for no bound.
        drawing: The scale of its axis.
        scaled: Whether it depends on the scale of P: it is not measured then for the
            preconditioner in use, whose scale means nothing.

    Raises:
        InvalidInputError: The name is taken or malformed, or an option has no number as default.

    Example:
        >>> @kp.register_metric("trace_error", better="lower")  # doctest: +SKIP
        ... def trace_error(H, P):
        ...     return abs(P.trace() / H.trace() - 1)
    """
    check_new_name("metric", name, METRICS)

    def register(function: Formula) -> Formula:
        def formula(target: Operator, approximation: Operator, **options: float) -> Values:
            check_pair(target, approximation)
            return {name: (float(function(target, approximation, **options)), None)}

        options = options_by_signature(function)
        words = label or name.replace("_", " ")
        add_metric_info(MetricInfo(name, words, unit, better, limits, drawing))
        _METRICS[name] = Metric(name, formula, scaled, options=options)
        return function

    return register
