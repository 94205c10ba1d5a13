"""Inverse p-th roots of damped positive semidefinite matrices, each with its residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.linalg.damping import Damping, eigenvalue_bound
from kronecker_probe.linalg.eigenbasis import eigh_each
from kronecker_probe.linalg.minimax import minimax_inverse_root
from kronecker_probe.linalg.newton import newton_inverse_root
from kronecker_probe.linalg.precision import full_precision
from kronecker_probe.linalg.residuals import root_residual

# Eigenvalues of the root are then off by 5% / p in the mean square: far below what a factor's own
# eigenvalues are off by as estimates, and above the rounding of float32 in usual conditions.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Roots:
    """Inverse roots of a batch of matrices.

    Attributes:
        values: X = (A + epsilon I)^(-1/p), [..., d, d]. Of use only where ``ok``: otherwise it can
            be anything, and is NaN for a matrix that is not finite.
        residual: ||X^floor(p/2) (A + epsilon I) X^ceil(p/2) - I||_F / sqrt(d), [...], float64,
            formed from A and X in float64 (:func:`~kronecker_probe.linalg.residuals.root_residual`
            says how); infinite where there is no number.
        iterations: [...], of the attempt that gave the values; 0 for an eigendecomposition.
        epsilon: What was added to the diagonal, [...].
        retried: Whether the values come from the second attempt, in float64, [...].
        ok: Whether the residual is within the tolerance, [...].
    """

    values: Tensor
    residual: Tensor
    iterations: Tensor
    epsilon: Tensor
    retried: Tensor
    ok: Tensor


@dataclass(frozen=True)
class _Attempt:
    """Roots of [b, d, d], and the matrix that was added to make A positive semidefinite."""

    values: Tensor
    iterations: Tensor
    epsilon: Tensor
    raised: tuple[Tensor, Tensor] | None = None


_Solver = Callable[[Tensor, Damping], _Attempt]


def inverse_root_eigh(
    A: Tensor, p: float, damping: Damping | None = None, *, tolerance: float = TOLERANCE
) -> Roots:
    """(A + epsilon I)^(-1/p) by eigendecomposition.

    Eigenvalues below zero, which a PSD matrix has by rounding only, are set to zero before epsilon
    is added; the residual is that of the matrix so raised.
    Matrices on which the solver fails, or whose residual exceeds the tolerance, are solved once
    more in float64 (Distributed Shampoo, arXiv 2309.06497, retries after failures only; in float32
    the solver can return small eigenvalues that are off by far more than themselves).

    Args:
        A: [..., d, d]; only the symmetric part counts. float16 and bfloat16 are widened, and
            their roots are float32.
        p: Any real number >= 1: the exponent is -1/p, in [-1, 0).
        damping: None means the default :class:`~kronecker_probe.linalg.damping.Damping`.
        tolerance: Of the residual. ``math.inf`` retries failures of the solver only.

    Raises:
        InvalidInputError: p < 1, the tolerance is not positive, or the matrices are not square.
        UnsupportedError: The dtype is not a real floating one.
    """
    if not 1.0 <= p < math.inf:
        raise InvalidInputError(f"p of an inverse root must be finite and at least 1; got {p!r}.")
    return _solve(A, p, damping, tolerance, partial(_eigh, p=p))


def inverse_root_newton(
    A: Tensor,
    p: int,
    damping: Damping | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = 100,
) -> Roots:
    """(A + epsilon I)^(-1/p) by coupled Newton iteration (Guo and Higham 2006).

    See :func:`~kronecker_probe.linalg.newton.newton_inverse_root`. The host waits for the device
    once per iteration. Arguments, retry and errors as in :func:`inverse_root_eigh`, with p a
    positive integer and ``max_iterations`` a cap on each matrix of the batch.
    """
    _check_integer("p", p)
    _check_integer("max_iterations", max_iterations)
    return _solve(A, p, damping, tolerance, partial(_newton, p=p, max_iterations=max_iterations))


def inverse_root_minimax(
    A: Tensor, p: int, damping: Damping | None = None, *, tolerance: float = TOLERANCE
) -> Roots:
    """(A + epsilon I)^(-1/p) by matrix products alone, the same ones for the whole batch.

    See :func:`~kronecker_probe.linalg.minimax.minimax_inverse_root`: it needs about a third of
    the products of coupled Newton iteration. The number of iterations follows from the smallest
    epsilon / lambda_max of the batch (never below the machine epsilon of the arithmetic). The
    host waits for the device twice per call: for that number, and to know whether any failed.
    Arguments, retry and errors as in :func:`inverse_root_eigh`, with p a positive integer.
    """
    _check_integer("p", p)
    return _solve(A, p, damping, tolerance, partial(_minimax, p=p))


def _solve(
    A: Tensor, p: float, damping: Damping | None, tolerance: float, solver: _Solver
) -> Roots:
    _check(A, tolerance)
    batch, d = A.shape[:-2], A.shape[-1]
    with torch.no_grad(), full_precision([A.device.type]):
        wide = A if A.dtype == torch.float64 else A.float()
        H = ((wide + wide.mT) / 2).reshape(-1, d, d)
        finite = H.isfinite().flatten(1).all(1)
        H = torch.where(finite[:, None, None], H, torch.eye(d, dtype=H.dtype, device=H.device))
        damping = damping or Damping()
        attempt, residual = _attempt(H, damping, p, solver)
        values, iterations, epsilon = attempt.values, attempt.iterations, attempt.epsilon
        failing = ~(residual <= tolerance)
        retried = torch.zeros_like(failing)
        if H.dtype != torch.float64 and bool(failing.any()):
            rows = failing.nonzero()[:, 0]
            again, remaining = _attempt(H[rows].double(), damping, p, solver)
            better = remaining < residual[rows]
            rows = rows[better]
            values[rows] = again.values[better].to(values.dtype)
            epsilon[rows] = again.epsilon[better].to(epsilon.dtype)
            iterations[rows], residual[rows] = again.iterations[better], remaining[better]
            retried[rows] = True
        values = torch.where(finite[:, None, None], values, math.nan)
        residual = torch.where(finite, residual, math.inf)
    return Roots(
        values.view(A.shape),
        residual.view(batch),
        iterations.view(batch),
        torch.where(finite, epsilon, math.nan).view(batch),
        retried.view(batch),
        (residual <= tolerance).view(batch),
    )


def _attempt(H: Tensor, damping: Damping, p: float, solver: _Solver) -> tuple[_Attempt, Tensor]:
    """Roots of damped H and their residuals."""
    attempt = solver(H, damping)
    wide, added = H.double(), attempt.epsilon.double()[:, None, None]

    def apply(Z: Tensor) -> Tensor:
        image = wide @ Z + added * Z
        if attempt.raised is None:
            return image
        vectors, raise_by = attempt.raised
        basis = vectors.double()
        return image + basis @ (raise_by.double().unsqueeze(-1) * (basis.mT @ Z))

    return attempt, root_residual(apply, attempt.values, p)


def _eigh(H: Tensor, damping: Damping, *, p: float) -> _Attempt:
    values, vectors, solved = eigh_each(H)
    if damping.unit == "largest":
        epsilon = damping.epsilon * values[:, 0].clamp_min(0)
    else:
        epsilon = damping.of(H)
    damped = values.clamp_min(0) + epsilon[:, None]
    # both sides get half of the power: X is symmetric PSD by construction
    half = vectors * damped.pow(-0.5 / p).unsqueeze(-2)
    roots = torch.where(solved[:, None, None], half @ half.mT, math.nan)
    iterations = torch.zeros(len(H), dtype=torch.long, device=H.device)
    below = values.clamp_max(0).neg()
    raised = (vectors, below) if bool(below.any()) else None
    return _Attempt(roots, iterations, epsilon, raised)


def _newton(H: Tensor, damping: Damping, *, p: int, max_iterations: int) -> _Attempt:
    epsilon = damping.of(H)
    B, scale = _scaled(H, epsilon)
    X, iterations = newton_inverse_root(B, p, max_iterations)
    return _Attempt(X * scale.pow(-1 / p)[:, None, None], iterations, epsilon)


def _minimax(H: Tensor, damping: Damping, *, p: int) -> _Attempt:
    epsilon = damping.of(H)
    B, scale = _scaled(H, epsilon)
    lowest = float((epsilon / scale).min()) if len(H) else 1.0
    lower = min(max(lowest, torch.finfo(H.dtype).eps), 1.0)
    X, iterations = minimax_inverse_root(B, p, lower)
    counts = torch.full((len(H),), iterations, dtype=torch.long, device=H.device)
    return _Attempt(X * scale.pow(-1 / p)[:, None, None], counts, epsilon)


def _scaled(H: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """H + epsilon I divided by an upper bound of its eigenvalues, and the bound."""
    # the bound holds to rounding; the margin keeps every eigenvalue below 1
    bound = 1.01 * (eigenvalue_bound(H) + epsilon)
    scale = torch.where(bound > 0, bound, 1.0)
    B = H / scale[:, None, None]
    B.diagonal(dim1=-2, dim2=-1).add_((epsilon / scale)[:, None])
    return B, scale


def _check(A: Tensor, tolerance: float) -> None:
    if not A.dtype.is_floating_point or A.dtype.itemsize < 2:
        raise UnsupportedError(
            f"Inverse roots need float16, bfloat16, float32 or float64; got {A.dtype}. Convert "
            "the matrix first."
        )
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] < 1:
        raise InvalidInputError(
            f"Expected square matrices [..., d, d], d >= 1; got {list(A.shape)}."
        )
    if not tolerance > 0:
        raise InvalidInputError(f"tolerance of a root must be positive; got {tolerance!r}.")


def _check_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(
            f"{name} must be a positive integer here; got {value!r}. Other real roots need the "
            "eigendecomposition (inverse_root_eigh)."
            if name == "p"
            else f"{name} must be a positive integer; got {value!r}."
        )
