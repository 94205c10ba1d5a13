"""The verb: samples x approximations x metrics -> one tidy table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kronecker_probe.approximations import (
    ALIASES,
    APPROXIMATIONS,
    DEFAULT_APPROXIMATIONS,
    approximate,
    resolve,
)
from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
    UnsupportedError,
    unknown_name,
)
from kronecker_probe.gradients.coverage import Capture
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.quality.estimates.estimate import check_kinds
from kronecker_probe.quality.estimates.estimator import Estimator, check_refits
from kronecker_probe.quality.metrics.catalog import (
    ESTIMABLE,
    METRICS,
    ChosenMetric,
    resolve_metric,
)
from kronecker_probe.quality.rows import (
    Row,
    absent_row,
    description,
    estimate_row,
    joined,
    skipped_row,
    to_table,
    undefined_rows,
)
from kronecker_probe.quality.scores import Scores
from kronecker_probe.table.codes import Reason, ReasonCode, code_of, reason_of
from kronecker_probe.table.read import NEGLIGIBLE

__all__ = ["Row", "Scores", "absent_row", "approximation_names", "compare", "to_table"]


@dataclass(frozen=True)
class _Request:
    """What is asked of every layer."""

    names: tuple[str, ...]
    metrics: tuple[str, ...]
    extra_metrics: tuple[ChosenMetric, ...]
    kinds: tuple[str, ...]
    refits: int | None
    singular_values: int


def compare(
    samples: Mapping[str, GradientSamples] | GradientSamples,
    approximations: str | Sequence[str] | None = None,
    *,
    metrics: str | Sequence[str] | None = None,
    estimates: str | Sequence[str] = ("plugin", "population"),
    refits: int | None = None,
    singular_values: int = 8,
    extra: Mapping[str, Mapping[str, Operator]] | None = None,
) -> Scores:
    """Score approximations of each parameter's second moment.

    Args:
        samples: What ``kp.capture`` returned, any mapping of names to samples, or one set.
        approximations: A name or spec ("divergence:q=0", "optimal:rank=2"), or several; None for
            the six of DEFAULT_APPROXIMATIONS. What the samples cannot carry ("kfac" without
            factors) is a row without a value, whose note says why.
        metrics: Names or specs of metrics; None for "cosine", "relative_error",
            "best_scale_error" and "best_scale". All others ("trace_ratio", "kl_divergence",
            "direction:power=0.5", ...) are of the sample matrix only.
        estimates: The kinds: "plugin" (the sample matrix itself), "held-out" (factors of half of
            the data on the other half), "population" (the limit of infinitely many data). See
            ``kp.estimate``.
        refits: As for ``kp.estimate``: how the population estimates of fitted approximations get
            their error bars.
        singular_values: How many leading singular values of R(H) to list; 0 for none.
        extra: Operators of your own: parameter name -> name -> operator. Only their shape counts,
            not their scale, so they get "cosine", "best_scale_error" and, times their best scale,
            "direction"; as they are not fitted
            to these samples, their population estimates are plain means, and they have no
            "held-out" kind.

    Returns:
        The table.

    Raises:
        InvalidInputError: No samples, or something else in their place; or an operator of
            ``extra`` that has the name of any approximation or another shape.
        UnknownNameError: An approximation, metric or kind, or a parameter of ``extra``, that is
            not there.
    """
    if type(singular_values) is not int or singular_values < 0:
        raise InvalidInputError(f"singular_values={singular_values!r}; give 0 (for none) or more.")
    check_refits(refits)
    plain, others = chosen_metrics(metrics)
    names, kinds = approximation_names(approximations), check_kinds(estimates)
    request = _Request(names, plain, others, kinds, refits, singular_values)
    layers = _layers(samples)
    extra = {} if extra is None else extra
    _check_extra(extra, layers)
    draws = samples.target if isinstance(samples, Capture) else None
    note = samples.note if isinstance(samples, Capture) else ""
    rows: list[Row] = []
    for parameter, one in layers.items():
        found = _layer_rows(one, request, extra.get(parameter, {}))
        told = "; ".join(part for part in (note, _truncation(one)) if part)
        rows += joined(description(parameter, one, draws, told), found)
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


def chosen_metrics(
    metrics: str | Sequence[str] | None,
) -> tuple[tuple[str, ...], tuple[ChosenMetric, ...]]:
    """The metrics with estimates, and the others; the first kind for None.

    Raises:
        UnknownNameError: No such metric or option.
        InvalidInputError: A malformed spec, a bad value of an option, or none at all.
    """
    if metrics is None:
        return ESTIMABLE, ()
    if not isinstance(metrics, str | Iterable):
        raise InvalidInputError(f"metrics={metrics!r}; name one or several.")
    named = [metrics] if isinstance(metrics, str) else metrics
    chosen = list({one.name: one for one in map(resolve_metric, named)}.values())
    if not chosen:
        raise InvalidInputError("No metric is asked for; name some, or leave metrics out.")
    others = tuple(one for one in chosen if one.metric.form is None)
    return tuple(one.name for one in chosen if one.metric.form is not None), others


def _layers(
    samples: Mapping[str, GradientSamples] | GradientSamples,
) -> Mapping[str, GradientSamples]:
    if isinstance(samples, GradientSamples):
        return {"samples": samples}
    if not isinstance(samples, Mapping):
        raise InvalidInputError(
            f"compare got a {type(samples).__name__}; give the samples of kp.capture, "
            "GradientSamples, or a mapping of names to them."
        )
    if not samples:
        raise InvalidInputError("compare got no samples; capture at least one parameter.")
    return samples


def _check_extra(
    extra: Mapping[str, Mapping[str, Operator]],
    layers: Mapping[str, GradientSamples],
) -> None:
    form = "give a mapping of parameter names to mappings of names to operators"
    if not isinstance(extra, Mapping):
        raise InvalidInputError(f"compare got extra= of type {type(extra).__name__}; {form}.")
    for parameter, operators in extra.items():
        if not isinstance(parameter, str) or parameter not in layers:
            raise unknown_name("parameter of extra", str(parameter), layers)
        if not isinstance(operators, Mapping):
            raise InvalidInputError(
                f"extra for {parameter!r} is a {type(operators).__name__}; {form}."
            )
        for name, operator in operators.items():
            _check_operator(parameter, name, operator, layers[parameter].shape)


def _check_operator(parameter: str, name: object, operator: object, shape: tuple[int, int]) -> None:
    if not isinstance(name, str):
        raise InvalidInputError(
            f"extra for {parameter!r} names an operator {name!r}; give a string."
        )
    if name.partition(":")[0] in (*APPROXIMATIONS, *ALIASES):
        raise InvalidInputError(
            f"extra for {parameter!r} has the name {name!r} of an approximation; rename it."
        )
    if not isinstance(operator, Operator):
        raise InvalidInputError(
            f"extra for {parameter!r} has a {type(operator).__name__} as {name!r}; give an "
            "operator (a matrix [mn, mn] becomes one by kp.DenseOperator)."
        )
    if operator.shape != shape:
        (m, n), (r, s) = shape, operator.shape
        raise InvalidInputError(
            f"extra for {parameter!r} has an operator {name!r} on {r} x {s} matrices; the layer "
            f"is {m} x {n}."
        )


def _truncation(samples: GradientSamples) -> str:
    """What the rows of truncated draws say; nothing where it does not matter."""
    if samples.dropped_energy <= NEGLIGIBLE:
        return ""
    rank = "" if samples.n_positions is None else f" to rank {samples.n_positions}"
    return (
        f"truncation{rank} dropped {100 * samples.dropped_energy:.2g} % of the energy: cosines "
        "are those of the truncated H, as a rule too high"
    )


def _layer_rows(
    samples: GradientSamples, request: _Request, extra: Mapping[str, Operator]
) -> list[Row]:
    """One layer's; where it does not fit into memory, the others are measured all the same."""
    try:
        return _measured_rows(SecondMoment(samples), request, extra)
    except MemoryBudgetError as error:
        names = (*request.names, *extra)
        return [row for name in names for row in _undefined(name, request, reason_of(error))]


def _undefined(name: str, request: _Request, reason: Reason) -> list[Row]:
    others = [name for one in request.extra_metrics for name in one.columns]
    rows = undefined_rows(name, request.metrics, request.kinds, reason)
    return rows + undefined_rows(name, others, ["plugin"], reason)


def _measured_rows(
    target: SecondMoment, request: _Request, extra: Mapping[str, Operator]
) -> list[Row]:
    fits: dict[str, Operator] = {}
    reasons: dict[str, Reason] = {}
    for name in request.names:
        try:
            fits[name] = approximate(target, name)
        except (UnsupportedError, MemoryBudgetError) as error:
            reasons[name] = reason_of(error)
    estimator = Estimator(target, request.refits, fits)
    rows = _target_rows(target, request.singular_values)
    if "population" in request.kinds:
        rows += _population_rows(estimator)
    rest = [kind for kind in request.kinds if kind != "plugin"]
    found = {kind: estimator.estimates(list(fits), request.metrics, kind) for kind in rest}
    for name in request.names:
        if name in reasons:
            rows += _undefined(name, request, reasons[name])
            continue
        if "plugin" in request.kinds:
            plugin = estimator.plugin(name, fits[name], request.metrics)
            rows += [estimate_row(one) for one in plugin]
        rows += [estimate_row(one) for kind in rest for one in found[kind][name]]
        rows += _extra_metric_rows(target, name, fits[name], request.extra_metrics)
    for name, operator in extra.items():
        try:
            rows += _operator_rows(estimator, target, name, operator, request)
        except MemoryBudgetError as error:
            rows += _undefined(name, request, reason_of(error))
    return rows


def _operator_rows(
    estimator: Estimator, target: SecondMoment, name: str, operator: Operator, request: _Request
) -> list[Row]:
    metrics = [metric for metric in request.metrics if not METRICS[metric].scaled]
    rows: list[Row] = []
    plugin = estimator.plugin(name, operator, metrics)  # which checks its shape
    if "plugin" in request.kinds:
        rows += [estimate_row(one) for one in plugin]
    if "population" in request.kinds:
        rows += [estimate_row(one) for one in estimator.of_operator(name, operator, metrics)]
    others = [one for one in request.extra_metrics if not one.metric.scaled or one.metric.rescaled]
    return rows + _extra_metric_rows(target, name, operator, others, any_scale=True)


def _extra_metric_rows(
    target: SecondMoment,
    name: str,
    operator: Operator,
    metrics: Sequence[ChosenMetric],
    *,
    any_scale: bool = False,
) -> list[Row]:
    return [
        {"approximation": name, "kind": "plugin"} | row
        for metric in metrics
        for row in metric.rows(target, operator, any_scale=any_scale)
    ]


def _target_rows(target: SecondMoment, singular_values: int) -> list[Row]:
    rows: list[Row] = [
        {"metric": "norm", "value": target.norm()},
        {"metric": "trace", "value": target.trace()},
    ]
    if target.samples.dropped_energy > 0:
        rows.append({"metric": "dropped_energy", "value": target.samples.dropped_energy})
    if singular_values > 0 and target.norm() > 0:
        try:
            values = target.kronecker_spectrum(singular_values).tolist()
        except MemoryBudgetError as error:
            nothing = {"metric": "singular_value", "index": 0, "value": math.nan}
            return [*rows, nothing | {"reason": ReasonCode.MEMORY, "note": str(error)}]
        rows += [
            {"metric": "singular_value", "index": index, "value": value}
            for index, value in enumerate(values)
        ]
    return rows


def _population_rows(estimator: Estimator) -> list[Row]:
    norm = estimator.of_target("norm", "population")
    floor: Row = {
        "metric": "noise_floor", "kind": "population", "value": estimator.noise_floor(),
        "n_eff": estimator.n_eff, "note": norm.note or None,
    }  # fmt: skip
    if math.isnan(floor["value"]):
        floor["reason"] = code_of(norm.note)
    return [estimate_row(norm), floor]
