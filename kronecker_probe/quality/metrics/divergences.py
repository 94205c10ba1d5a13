"""Divergences between Gaussians with covariances H + d I and P + d I, at a stated damping.

H has at most N C nonzero eigenvalues and P + d I is diagonal in P's eigenbasis, so that both
log-determinants and the trace are exact without an mn x mn matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kronecker_probe.approximations import as_operator
from kronecker_probe.linalg.lanczos import quadratic_log
from kronecker_probe.linalg.memory import require_memory
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.kernels.sample_rows import SampleRows
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.spectral_form import (
    EXACT_SIZE,
    SpectralForm,
    exact_form,
    spectral_form,
)
from kronecker_probe.quality.metrics.metric import POSITIVE_DAMPING, Metric, Values
from kronecker_probe.quality.metrics.undefined import (
    UndefinedError,
    check_pair,
    resolve_damping,
    warn_undefined,
)

# Numbers of the transformed samples that are held at once, 1 GB of float64; beyond, probes.
HELD_ELEMENTS = 1 << 27
# Random vectors of a stochastic log-determinant.
PROBES = 32


@dataclass(frozen=True)
class Divergence:
    """A divergence in nats.

    Attributes:
        value: At least 0, up to rounding; 0 only for H = P.
        stderr: Standard error of a stochastic log-determinant; 0 where it is exact.
        damping: d, in units of H.
    """

    value: float
    stderr: float
    damping: float

    def __float__(self) -> float:
        return self.value


def kl_divergence(
    target: Operator,
    approximation: Operator | str,
    *,
    damping: float = 1e-3,
    relative: bool = True,
) -> Divergence:
    """KL(N(0, H + d I) || N(0, P + d I)), half the log-det divergence (Stein's loss).

    (tr((P + d)^{-1} (H + d)) - mn - log det(H + d) + log det(P + d)) / 2. It is scored as P
    stands: its scale counts. For the other direction exchange the arguments (and give the
    damping in absolute units).

    Args:
        target: H.
        approximation: P, or the name of an approximation of H.
        damping: rho, for d = rho Tr H / (mn); or d itself, in units of H.
        relative: Whether ``damping`` is rho.

    Returns:
        The divergence. It is exact unless both mn and the number N C of samples are above 4096:
        then log det(H + d) is estimated from random vectors, with its standard error. NaN with
        an UndefinedMetricWarning when H is zero.

    Raises:
        InvalidInputError: The damping is not positive, the shapes differ, or P is not PSD.
        UnsupportedError: P is a large operator without exact eigenvalues.
    """
    try:
        operator = as_operator(target, approximation)
        return compute_kl(target, operator, damping=damping, relative=relative)
    except UndefinedError as reason:
        nan = warn_undefined("kl_divergence", reason)
        return Divergence(nan, nan, nan)


def stein_divergence(
    target: Operator,
    approximation: Operator | str,
    *,
    damping: float = 1e-3,
    relative: bool = True,
) -> Divergence:
    """log det((A + B) / 2) - log det(A B) / 2 of A = H + d I and B = P + d I.

    The symmetric Stein divergence (Sra, 2012), also called Jensen-Bregman log-det divergence
    (Cherian et al., 2011); its square root is a metric.

    Args:
        target: H.
        approximation: P, or the name of an approximation of H.
        damping: rho, for d = rho Tr H / (mn); or d itself, in units of H.
        relative: Whether ``damping`` is rho.

    Returns:
        The divergence, exact or with a standard error as for :func:`kl_divergence`, but where
        the gradient samples hold more than 2^27 numbers it is stochastic too. NaN with an
        UndefinedMetricWarning when H is zero.

    Raises:
        InvalidInputError: The damping is not positive, the shapes differ, or P is not PSD.
        UnsupportedError: P is a large operator without exact eigenvalues.
    """
    try:
        operator = as_operator(target, approximation)
        return compute_stein(target, operator, damping=damping, relative=relative)
    except UndefinedError as reason:
        nan = warn_undefined("stein_divergence", reason)
        return Divergence(nan, nan, nan)


def compute_kl(
    target: Operator, approximation: Operator, *, damping: float, relative: bool
) -> Divergence:
    """:func:`kl_divergence`, raising UndefinedError where it gives NaN."""
    check_pair(target, approximation)
    d = resolve_damping(target, damping, relative)
    form = exact_form(approximation)
    size = math.prod(target.shape)
    # all in units of d: log-determinants of matrices >= 1
    trace = form.expectation(lambda v: 1 / (v / d + 1), target) / d
    trace += form.sum_of(lambda v: 1 / (v / d + 1)) - size
    log_p = form.sum_of(lambda v: (v / d).log1p())
    log_h, stderr = _log_det(target, d)
    return Divergence((trace - log_h + log_p) / 2, stderr / 2, d)


def compute_stein(
    target: Operator, approximation: Operator, *, damping: float, relative: bool
) -> Divergence:
    """:func:`stein_divergence`, raising UndefinedError where it gives NaN."""
    check_pair(target, approximation)
    d = resolve_damping(target, damping, relative)
    form = exact_form(approximation)
    log_p = form.sum_of(lambda v: (v / d).log1p())
    log_mean, one = _log_det_mean(target, approximation, form, d)
    log_h, other = _log_det(target, d)
    value = log_mean - (log_h + log_p) / 2
    return Divergence(value, math.hypot(one, other / 2), d)


def _log_det(target: Operator, d: float) -> tuple[float, float]:
    """log det(H / d + I) with its standard error."""
    form = spectral_form(target)
    if form is not None:
        return form.sum_of(lambda v: (v / d).log1p()), 0.0
    return _stochastic(lambda x: target.apply(x) / d, target)


def _log_det_mean(
    target: Operator, approximation: Operator, form: SpectralForm, d: float
) -> tuple[float, float]:
    """log det((H + P) / (2 d) + I), by log det(M) + log det(I + M^{-1/2} H M^{-1/2} / (2 d))."""
    size = math.prod(target.shape)
    base = form.sum_of(lambda v: (v / (2 * d)).log1p())

    def whiten(x: Tensor) -> Tensor:
        return form.apply(lambda v: (v / (2 * d) + 1).rsqrt(), x)

    if isinstance(target, SecondMoment):
        draws = SampleRows(target.samples)
        if draws.count < size and draws.count <= EXACT_SIZE and draws.count * size <= HELD_ELEMENTS:
            require_memory(8 * draws.count * (size + draws.count), "The samples", target.device)
            rows = draws.transformed(whiten)
            return base + _log_det_plus_one(rows @ rows.T / (2 * d)), 0.0
    if size <= EXACT_SIZE:
        mean = (target.to_dense() + approximation.to_dense()) / (2 * d)
        return _log_det_plus_one(mean), 0.0
    log_det, stderr = _stochastic(lambda x: whiten(target.apply(whiten(x))) / (2 * d), target)
    return base + log_det, stderr


def _log_det_plus_one(matrix: Tensor) -> float:
    """log det(I + A) of a PSD A."""
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).clamp_min(0).log1p().sum())


def _stochastic(apply: Callable[[Tensor], Tensor], like: Operator) -> tuple[float, float]:
    """tr log(I + A) and its standard error, from random signs (Ubaru, Chen and Saad, 2017)."""
    m, n = like.shape
    generator = torch.Generator().manual_seed(0)

    def flat(x: Tensor) -> Tensor:
        return apply(x.view(1, m, n)).flatten()

    found = []
    for _ in range(PROBES):
        signs = torch.randint(0, 2, (m * n,), generator=generator).double() * 2 - 1
        found.append(quadratic_log(flat, signs.to(like.device)))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std()) / math.sqrt(PROBES)


def _kl(target: Operator, approximation: Operator, damping: float) -> Values:
    found = compute_kl(target, approximation, damping=damping, relative=True)
    return {"kl_divergence": (found.value, found.stderr)}


def _stein(target: Operator, approximation: Operator, damping: float) -> Values:
    found = compute_stein(target, approximation, damping=damping, relative=True)
    return {"stein_divergence": (found.value, found.stderr)}


METRICS = (
    Metric("kl_divergence", _kl, scaled=True, options=(POSITIVE_DAMPING,)),
    Metric("stein_divergence", _stein, scaled=True, options=(POSITIVE_DAMPING,)),
)
