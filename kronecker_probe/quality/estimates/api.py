"""``kp.estimate`` and ``kp.samples_needed``."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from kronecker_probe.approximations import approximate, resolve
from kronecker_probe.errors import InvalidInputError, UnsupportedError, unknown_name
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.quality.estimates.estimate import MIN_N_EFF, Estimate, check_kinds
from kronecker_probe.quality.estimates.estimator import TARGET_METRICS, Estimator
from kronecker_probe.quality.metrics.catalog import ESTIMABLE

# Of the standard error now to the one wanted: more examples than its square are no plan.
LARGEST_RATIO = 1e6


def estimate(
    H: SecondMoment,
    approximation: str | Operator | None = None,
    metric: str = "cosine",
    kind: str = "population",
    *,
    refits: int | None = None,
    **options: Any,
) -> Estimate:
    """A quality number with its standard error.

    "population" is the limit of infinitely many examples. Approximations that are sample means
    (Shampoo^2, K-FAC, TKFAC, left-only, right-only, diagonal, identity) have U-statistics over
    distinct examples, without any coincident-index term; for shared positions these are incomplete,
    over 16 groups. Fitted ones (optimal, Shampoo's roots, the trace-power family,
    eigenvalue-corrected) are scored in sample against |H|^2 over distinct examples. The jackknife
    over examples (for fitted ones over refits without a group of them) corrects the bias and gives
    the standard error. "held-out" is the quality of factors fitted to half of the examples, scored
    on the other half, cross-fitted. "plugin" is the sample matrix itself, without an error bar.
    Under about 30 effective examples the value is NaN and the note says why.

    Args:
        H: The target.
        approximation: A name or spec, as for ``kp.approximate``; or an operator that was not
            fitted to these examples (kinds "plugin" and "population"); None for the metrics "norm"
            and "trace" of H itself.
        metric: "cosine", "relative_error", "best_scale_error" or "best_scale"; or "norm", "trace".
            The errors are estimated as squares.
        kind: "plugin", "held-out" or "population".
        refits: For fitted approximations, the groups of examples of their jackknife, at least 4; 0
            for a bracket from two halves, held-out to in-sample; None for 8, or a bracket where
            shared positions make refits expensive, and for a sum of r products where fewer than
            30 r examples are effective. KL (``q`` < 1/2) abstains where an eigenvector of its
            factors rests on fewer than 5.
        options: Options of the approximation (``q``, ``rank``, ``block_size``).

    Raises:
        UnknownNameError: No such approximation, option, metric or kind.
        UnsupportedError: The samples lack what the approximation needs.
        InvalidInputError: H is no SecondMoment, or the arguments do not fit each other.

    Example:
        >>> kp.estimate(H, "shampoo-squared")  # doctest: +SKIP
        Estimate(population cosine of shampoo-squared: 0.912 ± 0.008; N=512, N_eff=301)
    """
    (kind,) = check_kinds([kind])
    if metric not in (*ESTIMABLE, *TARGET_METRICS):
        raise unknown_name("metric of estimate", metric, (*ESTIMABLE, *TARGET_METRICS))
    estimator = Estimator(H, refits)
    if metric in TARGET_METRICS:
        return _of_target(estimator, approximation, metric, kind, options)
    if approximation is None:
        raise InvalidInputError(f"The metric {metric!r} needs an approximation; name one.")
    if isinstance(approximation, Operator):
        return _of_operator(estimator, approximation, metric, kind, options)
    label = resolve(approximation, **options).label
    if kind == "plugin":
        return estimator.plugin(label, approximate(H, label), [metric])[0]
    return estimator.estimates([label], [metric], kind)[label][0]


def _of_target(
    estimator: Estimator,
    approximation: str | Operator | None,
    metric: str,
    kind: str,
    options: dict[str, Any],
) -> Estimate:
    if approximation is not None or options:
        raise InvalidInputError(
            f"The metric {metric!r} is about H itself; leave out {approximation!r}."
        )
    if kind == "held-out":
        raise InvalidInputError(f"The metric {metric!r} has no held-out kind; use 'population'.")
    return estimator.of_target(metric, kind)


def _of_operator(
    estimator: Estimator, operator: Operator, metric: str, kind: str, options: dict[str, Any]
) -> Estimate:
    if options:
        raise InvalidInputError(f"An operator takes no options; got {', '.join(options)}.")
    if kind == "held-out":
        raise InvalidInputError(
            "An operator has no held-out kind, which fits factors; use 'population'."
        )
    label = type(operator).__name__
    if kind == "plugin":
        return estimator.plugin(label, operator, [metric])[0]
    return estimator.of_operator(label, operator, [metric])[0]


def samples_needed(
    H: SecondMoment,
    stderr: float = 0.01,
    approximation: str = "shampoo-squared",
    metric: str = "cosine",
    **options: Any,
) -> int:
    """About how many examples bring the standard error of a population estimate to ``stderr``.

    It extrapolates the standard error of these examples as 1 / sqrt(N) and the effective number of
    examples as N, of which at least 30 are needed. It is a forecast from a standard error that is
    itself known to some 20% at 50 effective examples, which the answer squares: take twice as many
    to be sure. Where the quality is nearly perfect the error falls faster, and fewer do.

    Args:
        H: The target, with at least 30 effective examples.
        stderr: The standard error wanted; of the squared error for the errors.
        approximation: A name or spec.
        metric: As for :func:`estimate`.
        options: As for :func:`estimate`.

    Raises:
        InvalidInputError: ``stderr`` is not positive, or so small that no examples would do.
        UnsupportedError: There is no standard error to extrapolate; the message says why.
    """
    if isinstance(stderr, bool) or not isinstance(stderr, Real) or not 0 < stderr < math.inf:
        raise InvalidInputError(f"samples_needed got stderr={stderr!r}; give a positive number.")
    of_target = metric in TARGET_METRICS
    found = estimate(H, None if of_target else approximation, metric, "population", **options)
    if math.isnan(found.stderr):
        raise UnsupportedError(
            f"samples_needed has no standard error of {found.approximation or 'H'} to extrapolate: "
            f"{found.note}."
        )
    ratio = found.stderr / float(stderr)
    if not ratio < LARGEST_RATIO:
        raise InvalidInputError(
            f"stderr={stderr!r} is out of reach: with {found.n} examples it is {found.stderr:.2g}."
        )
    wanted = found.n * ratio**2
    return math.ceil(max(wanted, found.n * MIN_N_EFF / found.n_eff))
