"""The metrics beyond the Frobenius ones, by name, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias, final

from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
    UnsupportedError,
    unknown_name,
)
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.quality.metrics import directions, divergences, spectral
from kronecker_probe.quality.metrics import frobenius as metrics
from kronecker_probe.quality.metrics.undefined import UndefinedError
from kronecker_probe.table.codes import code_of

Cost: TypeAlias = Literal["cheap", "iterative"]
# metric name -> (value, standard error or None)
Values: TypeAlias = Mapping[str, tuple[float, float | None]]


@final
@dataclass(frozen=True)
class MetricFamily:
    """A metric with its options.

    Attributes:
        compute: (H, P, **options) -> its values by name, or UndefinedError.
        gives: The names of these values.
        about: What it is, in a few words.
        cost: "cheap" for a few inner products, "iterative" for an eigendecomposition or Lanczos.
        scaled: Whether it says nothing about an operator whose scale is not that of H.
        defaults: Its options with their default values.
        rescaled: The same of the multiple of P that is nearest to H, for operators of any scale;
            None where that would say nothing.
    """

    compute: Callable[..., Values]
    gives: tuple[str, ...]
    about: str
    cost: Cost
    scaled: bool
    defaults: Mapping[str, float]
    rescaled: Callable[..., Values] | None = None


@final
@dataclass(frozen=True)
class ExtraMetric:
    """A metric with the options chosen.

    Attributes:
        name: The canonical "name" or "name:option=value,...", with every option.
        family: What it is.
        options: The values of its options.
    """

    name: str
    family: MetricFamily
    options: Mapping[str, float]

    @property
    def cost(self) -> Cost:
        """How much it takes."""
        return self.family.cost

    @property
    def scaled(self) -> bool:
        """Whether it says nothing about an operator whose scale is not that of H."""
        return self.family.scaled

    def rows(
        self, target: SecondMoment, approximation: Operator, *, any_scale: bool = False
    ) -> list[dict[str, Any]]:
        """Its values as rows with the keys metric, value, stderr and note.

        Args:
            target: H.
            approximation: P.
            any_scale: Whether P has the scale of something else; its best multiple counts then.

        What is undefined or unsupported for this pair is NaN, and the note says why.
        """
        _, _, suffix = self.name.partition(":")
        names = [f"{name}:{suffix}" if suffix else name for name in self.family.gives]
        try:
            compute = (self.family.rescaled if any_scale else None) or self.family.compute
            values = compute(target, approximation, **self.options)
        except (UndefinedError, UnsupportedError, MemoryBudgetError, InvalidInputError) as reason:
            return [
                {"metric": name, "value": math.nan, "reason": code_of(reason), "note": str(reason)}
                for name in names
            ]
        return [
            {"metric": name, "value": values[short][0], "stderr": values[short][1], "note": None}
            for name, short in zip(names, self.family.gives, strict=True)
        ]


def extra_metric(spec: str) -> ExtraMetric:
    """A metric by name, with options: "direction:power=0.5,damping=0.001".

    Args:
        spec: One of the names of :data:`EXTRA_METRICS`, with options after a colon.

    Raises:
        UnknownNameError: No such metric or option.
        InvalidInputError: An option without a value, or with one that is no number.
    """
    name, colon, listed = spec.partition(":")
    if name not in EXTRA_METRICS:
        raise unknown_name("metric", name, EXTRA_METRICS)
    family = EXTRA_METRICS[name]
    options = dict(family.defaults)
    for part in listed.split(",") if colon else ():
        key, _, text = part.partition("=")
        if key not in options:
            if not options:
                raise InvalidInputError(f"Metric {name!r} has no options; got {listed!r}.")
            raise unknown_name(f"option of metric {name!r}", key, options)
        try:
            options[key] = float(Fraction(text))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise InvalidInputError(
                f"Metric {spec!r}: option {key!r} has the value {text!r}; give a "
                f"number, for example {key}={family.defaults[key]:g}."
            ) from None
    _check(spec, options)
    chosen = ",".join(f"{key}={value:g}" for key, value in options.items())
    return ExtraMetric(f"{name}:{chosen}" if chosen else name, family, options)


def _check(spec: str, options: Mapping[str, float]) -> None:
    damping, power = options.get("damping", 1.0), options.get("power", 1.0)
    if not (math.isfinite(damping) and damping > 0):
        raise InvalidInputError(f"Metric {spec!r}: damping must be positive and finite.")
    if not 0 < power <= 1:
        raise InvalidInputError(f"Metric {spec!r}: power must lie in (0, 1], for H^-power.")
    gradients = options.get("gradients", 1.0)
    if not (gradients >= 1 and float(gradients).is_integer()):
        raise InvalidInputError(f"Metric {spec!r}: gradients must be a positive integer.")


def _trace_ratio(target: Operator, approximation: Operator) -> Values:
    return {"trace_ratio": (spectral.compute_trace_ratio(target, approximation), None)}


def _largest_error(target: Operator, approximation: Operator) -> Values:
    found = spectral.compute_error_spectrum(target, approximation)
    return {"largest_error_eigenvalue": (found.relative, None)}


def _off_diagonal_mass(target: Operator, approximation: Operator) -> Values:
    return {"off_diagonal_mass": (spectral.compute_split(target, approximation).basis, None)}


def _eigenvalue_error(target: Operator, approximation: Operator) -> Values:
    return {"eigenvalue_error": (spectral.compute_split(target, approximation).eigenvalues, None)}


def _kl(target: Operator, approximation: Operator, damping: float) -> Values:
    found = divergences.compute_kl(target, approximation, damping=damping, relative=True)
    return {"kl_divergence": (found.value, found.stderr)}


def _stein(target: Operator, approximation: Operator, damping: float) -> Values:
    found = divergences.compute_stein(target, approximation, damping=damping, relative=True)
    return {"stein_divergence": (found.value, found.stderr)}


def _direction(
    target: Operator,
    approximation: Operator,
    power: float,
    damping: float,
    gradients: float,
    scale: float = 1.0,
) -> Values:
    found = directions.compute_directions(
        target,
        approximation,
        None,
        powers=(power,),
        damping=damping,
        relative=True,
        n_gradients=int(gradients),
        seed=0,
        scale=scale,
    )
    row = found.table.iloc[0]
    return {
        f"direction_{name}": (float(row[name]), float(row[f"{name}_stderr"]))
        for name in ("cosine", "length_ratio")
    }


def _rescaled_direction(target: SecondMoment, approximation: Operator, **options: float) -> Values:
    scale = metrics.best_scale(target, approximation)
    if not scale > 0:
        raise UndefinedError("the best multiple of P is not positive")
    return _direction(target, approximation, **options, scale=scale)


EXTRA_METRICS: dict[str, MetricFamily] = {
    "trace_ratio": MetricFamily(_trace_ratio, ("trace_ratio",), "Tr P / Tr H", "cheap", True, {}),
    "largest_error_eigenvalue": MetricFamily(
        _largest_error,
        ("largest_error_eigenvalue",),
        "|H - P|_2 / |H|_2, the largest eigenvalue of the error",
        "iterative",
        True,
        {},
    ),
    "off_diagonal_mass": MetricFamily(
        _off_diagonal_mass,
        ("off_diagonal_mass",),
        "|offdiag(Q^T H Q)| / |H| in P's Kronecker eigenbasis: the basis error",
        "cheap",
        False,
        {},
    ),
    "eigenvalue_error": MetricFamily(
        _eigenvalue_error,
        ("eigenvalue_error",),
        "|diag(Q^T H Q) - D| / |H|: the rest of the relative error",
        "cheap",
        True,
        {},
    ),
    "kl_divergence": MetricFamily(
        _kl,
        ("kl_divergence",),
        "KL(N(0, H + d I) || N(0, P + d I)), d in mean eigenvalues of H",
        "iterative",
        True,
        {"damping": 1e-3},
    ),
    "stein_divergence": MetricFamily(
        _stein,
        ("stein_divergence",),
        "the symmetric log-det divergence of H + d I and P + d I",
        "iterative",
        True,
        {"damping": 1e-3},
    ),
    "direction": MetricFamily(
        _direction,
        ("direction_cosine", "direction_length_ratio"),
        "(H + d I)^-power g beside (P + d I)^-power g, over draws g of H",
        "iterative",
        True,
        {"power": 0.5, "damping": 1e-3, "gradients": 16},
        _rescaled_direction,
    ),
}
