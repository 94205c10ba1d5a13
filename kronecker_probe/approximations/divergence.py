"""The trace-power family: Kronecker products that minimize a Bregman divergence from H.

With phi(P) = Tr P^q / (q (q - 1)) the stationary points of D(H, L kron R) are

    L = E[G R^{q-1} G^T] / Tr(R^q),    R = E[G^T L^{q-1} G] / Tr(L^q):

Frobenius at q = 2, von Neumann at q = 1 (a closed form, Shampoo^2), SQ at q = 1/2, and log-det
or KL at q = 0, the maximum-likelihood matrix normal. X -> X^{q-1} contracts the Thompson metric
by |q - 1| and E[G X G^T] expands nothing, so for 0 < q < 2 alternating the two equations has one
fixed point, which is reached at the rate (q - 1)^2 or better whatever the samples. The ends have no
such guarantee: q = 2 has the leading singular vectors of R(H), q = 0 may have no minimizer.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronecker_probe.approximations.existence import (
    check_enough_draws,
    check_unique,
    cholesky,
    no_minimizer,
)
from kronecker_probe.approximations.half_steps import HalfSteps, Step, half_steps
from kronecker_probe.approximations.optimal import leading_kronecker
from kronecker_probe.linalg.anderson import Anderson
from kronecker_probe.linalg.eigenbasis import eigh_descending
from kronecker_probe.operators.factors.factor import Factor, MatrixFactor, SampleFactor
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.kronecker import KroneckerOperator

# Relative change of R by a round at which the iteration has converged; of samples in float32.
TOLERANCE, TOLERANCE_OF_SINGLE = 1e-11, 1e-6
# Likewise of an iteration in float32, before it goes on in float64; which it also does after so
# many rounds without a smaller residual.
SINGLE_TOLERANCE, SINGLE_PATIENCE = 3e-6, 12
# A residual above this is told; at q = 0, where slow may mean never, the fit is refused.
UNCONVERGED, UNCONVERGED_KL = 1e-6, 1e-9
# Rounds without a smaller residual after which rounding is what remains, once it is small; and
# after which nearly singular factors keep it from falling, where it is not.
PATIENCE, STALLED, SMALL = 20, 30, 1e-7
MAX_ROUNDS = 1000
EPS = torch.finfo(torch.float64).eps


def divergence(target: SecondMoment, q: float) -> KroneckerOperator:
    """The Kronecker product of least trace-power divergence from H.

    Where L or R is singular, powers are pseudo-inverse powers and Tr(X^0) is the rank. Both
    factors have unit trace and ``scale`` carries Tr P, except for q = 2, which is
    :func:`~kronecker_probe.approximations.optimal.optimal` itself. ``info`` holds the rounds and
    the residual, the relative change of R by a further round.

    Args:
        target: H.
        q: From 0 to 2: 0 for KL, 1/2 for SQ, 1 for von Neumann, 2 for Frobenius.

    Raises:
        UnsupportedError: q = 0 and the samples have no unique minimizer: there are too few.
    """
    if q == 2:
        return leading_kronecker(target)
    trace = target.trace()
    if trace == 0:
        return KroneckerOperator(target.left_factor, target.right_factor, 0.0)
    steps = half_steps(target, q)
    found = _kl(target, steps) if q == 0 else _solve(steps, q, _start(target, steps))
    if found.residual > UNCONVERGED:
        m, n = target.shape
        warnings.warn(
            f"divergence with q={q:g} of a {m} x {n} second moment stopped after {found.rounds} "
            f"rounds at a residual of {found.residual:.1e}.",
            RuntimeWarning,
            stacklevel=2,
        )
    left, right = found.left.factor, found.right.factor
    sizes = left.trace(), right.trace()
    return KroneckerOperator(
        _scaled(left, 1.0 / sizes[0]),
        _scaled(right, 1.0 / sizes[1]),
        trace * found.scale * sizes[0] * sizes[1],
        {"rounds": float(found.rounds), "residual": found.residual},
    )


@dataclass(frozen=True)
class _FixedPoint:
    """L kron R up to ``scale``, both as images of half steps."""

    left: Step
    right: Step
    scale: float
    rounds: int
    residual: float


def _start(target: SecondMoment, steps: HalfSteps) -> Tensor:
    return torch.eye(steps.ranks[1], dtype=torch.float64, device=target.device)


def _kl(target: SecondMoment, steps: HalfSteps) -> _FixedPoint:
    """The fixed point of q = 0, or the reason why there is none."""
    check_enough_draws(target.samples, steps.ranks)
    try:
        found = _solve(steps, 0.0, _start(target, steps))
        reached = 2 * TOLERANCE_OF_SINGLE if steps.single else UNCONVERGED_KL
        if found.residual <= reached:
            check_unique(target.samples, steps, found.left.reduced, found.right.reduced)
            return found
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        why = "there is no minimizer, the factors collapse"
        raise no_minimizer(target.samples, steps.ranks, why) from error
    why = f"no minimizer was found, {found.rounds} rounds end at a residual of "
    why += f"{found.residual:.1e}, as where there is none or nearly none"
    raise no_minimizer(target.samples, steps.ranks, why)


def _solve(steps: HalfSteps, q: float, start: Tensor) -> _FixedPoint:
    """The fixed point: large layers of float32 samples iterate in float32 before float64."""
    if not steps.single:
        return _iterate(steps, q, start)
    spent = 0
    try:
        rough = _iterate(steps, q, start, torch.float32)
        spent = rough.rounds
        image = rough.right.reduced
        start = image * (len(image) / image.diagonal().sum())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass  # rounding in float32, or no minimizer: float64 tells
    found = _iterate(steps, q, start)
    return replace(found, rounds=found.rounds + spent)


def _iterate(
    steps: HalfSteps, q: float, start: Tensor, dtype: torch.dtype = torch.float64
) -> _FixedPoint:
    """Alternate both equations until R no longer changes, with Anderson acceleration.

    A round takes R, of unit mean eigenvalue, to L and that to the next R. Where the accelerated R
    is not positive definite the plain one takes its place. The pair (L, next R)
    solves the second equation exactly; the residual is what it lacks in the first.
    """
    right, best, idle, rounds = start, math.inf, 0, 0
    acceleration = Anderson()
    tolerance = TOLERANCE_OF_SINGLE if steps.single else TOLERANCE
    tolerance = SINGLE_TOLERANCE if dtype == torch.float32 else tolerance
    while True:
        rounds += 1
        power, right_size = _power(right, q)
        left = steps.left(power.to(dtype))
        power, left_size = _power(left.reduced / right_size, q)
        image = steps.right(power.to(dtype))
        following = image.reduced * (len(right) / image.reduced.diagonal().sum())
        change = torch.linalg.vector_norm(following - right)
        residual = float(change / torch.linalg.vector_norm(following))
        idle = idle + 1 if best <= residual else 0
        best = min(best, residual)
        patience = PATIENCE if best <= SMALL else STALLED
        patience = SINGLE_PATIENCE if dtype == torch.float32 else patience
        if residual <= tolerance or idle >= patience or rounds >= MAX_ROUNDS:
            return _FixedPoint(left, image, 1.0 / (right_size * left_size), rounds, residual)
        right = acceleration.step(right, following)
        if bool(torch.linalg.cholesky_ex(right).info):
            acceleration.forget()
            right = following


def _power(matrix: Tensor, q: float) -> tuple[Tensor, float]:
    """X^{q-1} and Tr(X^q) of a PSD ``matrix`` of full rank."""
    if q == 1:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device), float(
            matrix.diagonal().sum()
        )
    if q == 0:
        return torch.cholesky_inverse(cholesky(matrix)), float(len(matrix))
    values, vectors = eigh_descending(matrix)
    values = values.clamp_min(float(values[0]) * len(values) * EPS)
    return (vectors * values.pow(q - 1)) @ vectors.T, float(values.pow(q).sum())


def _scaled(factor: Factor, scale: float) -> Factor:
    if isinstance(factor, SampleFactor):
        return SampleFactor(factor.rows, factor.weights * scale)
    return MatrixFactor(factor.matrix * scale)
