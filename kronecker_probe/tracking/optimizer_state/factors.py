"""Rows about the inside of the live optimizer: its factors, and where its error comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.approximations import approximate
from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.linalg.basis_refresh import off_diagonal_share
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.optim import KroneckerOptimizer
from kronecker_probe.optim.engine.inspection import FactorInUse, Inspection
from kronecker_probe.quality.metrics.factor_health import factor_health
from kronecker_probe.quality.metrics.gap import Link, follow
from kronecker_probe.quality.rows import Row
from kronecker_probe.table.codes import Reason, ReasonCode, code_of, reason_of

IN_STATISTICS = "it is within in_use_statistics: second moments are known in the held basis only"
# How each number of a factor is taken over the blocks of a parameter: as the worst, or the mean.
_OVER_BLOCKS: dict[str, Callable[[list[float]], float]] = {
    "factor_rank": min,
    "factor_stable_rank": min,
    "factor_under_floor": max,
    "factor_amplification": max,
    "factor_suggested_epsilon": max,
    "factor_epsilon": max,
    "basis_off_diagonal": max,
    "steps_since_refresh": max,
    "tests": lambda values: math.fsum(values) / len(values),
    "refreshes": lambda values: math.fsum(values) / len(values),
    "refresh_iterations": lambda values: math.fsum(values) / len(values),
}


def inside_rows(
    optimizer: Optimizer, name: str, parameter: Tensor, samples: GradientSamples
) -> list[Row]:
    """Rows about the embedded optimizer's factors of a parameter, and the split of its error.

    Args:
        optimizer: The live one; of others nothing is known.
        name: Of the parameter.
        parameter: The parameter.
        samples: Draws of H.

    Returns:
        Rows without an approximation; none before the first step.
    """
    if not isinstance(optimizer, KroneckerOptimizer):
        return []
    try:
        found = optimizer.inspect(parameter)
    except (UnsupportedError, InvalidInputError):
        return []
    return [
        {"parameter": name} | row for row in (*factor_rows(found.factors), *_split(found, samples))
    ]


def factor_rows(factors: Iterable[FactorInUse]) -> list[Row]:
    """A row a number and side, over all blocks; the side is in ``index``."""
    numbers: dict[tuple[int, str], list[float]] = {}
    notes: dict[int, Reason] = {}
    for one in factors:
        values, note = _numbers(one)
        if note:
            notes.setdefault(one.side, note)
        for metric, value in values.items():
            numbers.setdefault((one.side, metric), []).append(value)
    rows: list[Row] = [
        {"metric": metric, "index": side, "value": float(_OVER_BLOCKS[metric](values))}
        for (side, metric), values in sorted(numbers.items(), key=lambda item: item[0][0])
    ]
    rows += [
        {
            "metric": "factor_rank",
            "index": side,
            "value": math.nan,
            "reason": note.code,
            "note": note,
        }
        for side, note in notes.items()
    ]
    return rows


def _numbers(one: FactorInUse) -> tuple[dict[str, float], Reason]:
    """The numbers of one factor, and why some are missing."""
    values: dict[str, float] = {
        "tests": one.tests, "refreshes": one.refreshes, "refresh_iterations": one.iterations
    }  # fmt: skip
    if one.epsilon is not None:
        values["factor_epsilon"] = one.epsilon
    if one.staleness is not None:
        values["steps_since_refresh"] = one.staleness
    if one.basis is not None:
        share = float(off_diagonal_share(one.factor.double(), one.basis.double())[0])
        if math.isfinite(share):
            values["basis_off_diagonal"] = share
    if not bool(one.factor.isfinite().all()):
        return values, Reason("the factor is not finite", ReasonCode.NOT_FINITE)
    epsilon = one.epsilon or 0.0
    try:
        if one.relative and epsilon:
            epsilon *= float(torch.linalg.eigvalsh(one.factor.double())[-1].clamp_min(0))
        exponent = one.exponent if one.exponent is not None else -0.5
        health = factor_health(one.factor, epsilon, exponent=exponent, dtype=one.dtype)
    except (NonFiniteError, InvalidInputError, UnsupportedError) as error:
        return values, reason_of(error)
    values["factor_rank"] = health.numerical_rank
    values["factor_stable_rank"] = health.stable_rank
    values["factor_under_floor"] = health.below_floor_share
    if one.epsilon:  # without damping roots are pseudo-inverse: nothing is amplified
        values["factor_amplification"] = health.amplification
        suggested = health.suggested_relative_epsilon
        suggested *= 1.0 if one.relative else health.largest
        if suggested > one.epsilon:
            values["factor_suggested_epsilon"] = suggested
    return values, Reason("")


def _split(found: Inspection, samples: GradientSamples) -> list[Row]:
    """The squared error 1 - cos^2 of what is held, cause by cause.

    Along a chain in which one thing changes at a time: the rule on the draws of H (in_use_fresh),
    cut into the optimizer's blocks (in_use_blocking), on its own statistics (in_use_statistics),
    damped (in_use_damping), as old as it is (in_use_staleness). The contributions add up to the
    error of "in-use".
    """
    rule, size = found.rule, found.block_size
    if rule is None:
        return []
    try:
        held = found.in_use()
    except UnsupportedError:
        return []  # the row of "in-use" says why
    target = SecondMoment(samples)
    if held.shape != target.shape:
        return []
    links: list[Link] = [("in_use_fresh", lambda: approximate(target, rule))]
    if size is not None:
        cut = f"{rule}{',' if ':' in rule else ':'}block_size={size}"
        links.append(("in_use_blocking", lambda: approximate(target, cut)))
    absent: list[Row] = []
    try:
        links.append(("in_use_statistics", _made(found.fresh(damped=False))))
        links.append(("in_use_damping", _made(found.fresh(damped=True))))
        links.append(("in_use_staleness", _made(held)))
    except UnsupportedError:
        links.append(("in_use_statistics", found.undamped))
        links.append(("in_use_damping", _made(held)))
        absent = [{"metric": "in_use_staleness", "value": math.nan,
                   "reason": ReasonCode.IN_STATISTICS, "note": IN_STATISTICS}]  # fmt: skip
    except NonFiniteError as error:
        return [{"metric": "in_use_statistics", "value": math.nan, "reason": code_of(error),
                 "note": str(error)}]  # fmt: skip
    rows: list[Row] = [
        {
            "metric": row["component"],
            "value": row["contribution"],
            "note": row["note"],
            "reason": code_of(row["note"]) if math.isnan(row["contribution"]) else None,
        }
        for row in follow(target, links)
    ]
    return rows + absent


def _made(operator: Operator) -> Callable[[], Operator]:
    return lambda: operator
