"""Where the error lies: trace, extreme eigenvalues, the split into basis and eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from kronecker_probe.approximations import as_operator
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.spectral_form import (
    BlockForm,
    CoordinateForm,
    KroneckerForm,
    SpectralForm,
    exact_form,
)
from kronecker_probe.quality.metrics.metric import Metric, Values
from kronecker_probe.quality.metrics.undefined import UndefinedError, check_pair, warn_undefined
from kronecker_probe.table.codes import ReasonCode

# Matrices up to this size are decomposed rather than iterated on.
DENSE_SIZE = 64
TOLERANCE = 1e-9
# Neighbouring eigenvalues of a basis closer than this, relative to the largest, span a plane in
# which rounding chooses the eigenvectors.
DEGENERATE = 1e-10


def trace_ratio(target: Operator, approximation: Operator | str) -> float:
    """Tr P / Tr H, the ratio of the mean eigenvalues.

    Args:
        target: H.
        approximation: P, or the name of an approximation of H.

    Returns:
        A float; NaN with an UndefinedMetricWarning when H is zero or P is not finite.

    Raises:
        InvalidInputError: The shapes differ.
    """
    try:
        return compute_trace_ratio(target, as_operator(target, approximation))
    except UndefinedError as reason:
        return warn_undefined("trace_ratio", reason)


def compute_trace_ratio(target: Operator, approximation: Operator) -> float:
    """:func:`trace_ratio`, raising UndefinedError where it gives NaN."""
    check_pair(target, approximation)
    return approximation.trace() / target.trace()


@dataclass(frozen=True)
class ErrorSpectrum:
    """The extreme eigenvalues of H - P.

    Attributes:
        highest: The largest eigenvalue: what P misses of H.
        lowest: The smallest one, negative where P exceeds H.
        target: |H|_2, the largest eigenvalue of H.
        residual: The worst |A v - lambda v| of the eigenpairs found, over the largest |lambda|
            of its matrix; an eigenvalue lies within that distance of the one reported.
    """

    highest: float
    lowest: float
    target: float
    residual: float

    @property
    def largest(self) -> float:
        """The largest |eigenvalue|: |H - P|_2."""
        return max(abs(self.highest), abs(self.lowest))

    @property
    def relative(self) -> float:
        """|H - P|_2 / |H|_2."""
        return self.largest / self.target


def error_spectrum(target: Operator, approximation: Operator | str) -> ErrorSpectrum:
    """The extreme eigenvalues of H - P, matrix-free (Lanczos, by ARPACK).

    Args:
        target: H.
        approximation: P, or the name of an approximation of H.

    Returns:
        Both ends of the spectrum, with |H|_2; NaN with an UndefinedMetricWarning when H is zero.

    Raises:
        InvalidInputError: The shapes differ.
    """
    try:
        return compute_error_spectrum(target, as_operator(target, approximation))
    except UndefinedError as reason:
        nan = warn_undefined("error_spectrum", reason)
        return ErrorSpectrum(nan, nan, nan, nan)


def largest_error_eigenvalue(
    target: Operator, approximation: Operator | str, *, relative: bool = False
) -> float:
    """|H - P|_2, the largest |eigenvalue| of the error.

    Args:
        target: H.
        approximation: P, or the name of an approximation of H.
        relative: In units of |H|_2.

    Returns:
        A float; NaN with an UndefinedMetricWarning when H is zero. :func:`error_spectrum` also
        gives the signed extremes and the residual.

    Raises:
        InvalidInputError: The shapes differ.
    """
    try:
        found = compute_error_spectrum(target, as_operator(target, approximation))
    except UndefinedError as reason:
        return warn_undefined("largest_error_eigenvalue", reason)
    return found.relative if relative else found.largest


def compute_error_spectrum(target: Operator, approximation: Operator) -> ErrorSpectrum:
    """:func:`error_spectrum`, raising UndefinedError where it gives NaN."""
    check_pair(target, approximation)
    scale = target.trace()  # eigenvalues of order one, whatever the loss
    (h, p), size = (o.to_scipy() for o in (target, approximation)), math.prod(target.shape)

    def difference(x: np.ndarray) -> np.ndarray:
        return np.asarray((h @ x - p @ x) / scale)

    def alone(x: np.ndarray) -> np.ndarray:
        return np.asarray(h @ x / scale)

    lowest, highest, residual = _extremes(difference, size, both=True)
    _, top, rest = _extremes(alone, size, both=False)
    return ErrorSpectrum(
        float(highest * scale), float(lowest * scale), float(top * scale), max(residual, rest)
    )


def _extremes(
    matmat: Callable[[np.ndarray], np.ndarray], size: int, *, both: bool
) -> tuple[float, float, float]:
    """(lowest or 0, highest, relative residual) of a symmetric matrix-free map."""
    if size <= DENSE_SIZE:
        matrix = matmat(np.eye(size))
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        return float(values[0]), float(values[-1]), 0.0
    start = np.random.default_rng(0).standard_normal(size)
    if not np.any(matmat(start)):  # of a generic vector: the zero matrix
        return 0.0, 0.0, 0.0
    linear = LinearOperator(shape=(size, size), dtype=np.dtype(np.float64), matvec=matmat)
    which: Literal["BE", "LA"] = "BE" if both else "LA"
    k = 2 if both else 1
    try:
        values, vectors = eigsh(
            linear, k=k, which=which, v0=start, tol=TOLERANCE, ncv=min(size, 40)
        )
    except ArpackNoConvergence as error:
        if len(error.eigenvalues) < k:
            why = "Lanczos did not converge to the extreme eigenvalues"
            raise UndefinedError(why, ReasonCode.NOT_CONVERGED) from error
        values, vectors = error.eigenvalues, np.real(error.eigenvectors)
    except ArpackError as error:
        raise UndefinedError(f"Lanczos failed: {error}", ReasonCode.NOT_CONVERGED) from error
    residuals = np.linalg.norm(matmat(vectors) - vectors * values, axis=0)
    residual = float(residuals.max() / np.abs(values).max())
    return float(values.min()) if both else 0.0, float(values.max()), residual


@dataclass(frozen=True)
class ErrorSplit:
    """|H - P|^2 = basis^2 + eigenvalues^2, both relative to |H|, in the eigenbasis Q of P.

    Attributes:
        basis: |offdiag(Q^T H Q)| / |H|, the off-diagonal mass. Where P is singular and holds
            fewer eigenvectors than mn, what H has beside them counts here.
        eigenvalues: |diag(Q^T H Q) - D| / |H|.
        degenerate: Whether eigenvalues of P (of one of its factors) coincide to rounding on
            directions that H sees: the basis, hence the split, is then one of many.
    """

    basis: float
    eigenvalues: float
    degenerate: bool

    @property
    def total(self) -> float:
        """|H - P| / |H|."""
        return math.hypot(self.basis, self.eigenvalues)


def split_error(target: Operator, approximation: Operator | str) -> ErrorSplit:
    """The error of P, split into the error of its basis and that of its eigenvalues.

    For any orthonormal Q, |H - Q D Q^T|^2 = |offdiag(Q^T H Q)|^2 + |diag(Q^T H Q) - D|^2. The
    basis error is what a better basis, refreshed more often, can repair; the eigenvalue error
    is what eigenvalue correction removes (Eschenhagen et al., 2025; George et al., 2018). It
    comes from squared norms, so that a basis error below about 1e-8 is rounding.

    Args:
        target: H.
        approximation: P: a Kronecker, eigen or diagonal operator, or blocks of them; any other
            PSD operator up to mn = 4096; or the name of an approximation of H.

    Returns:
        The split; NaN with an UndefinedMetricWarning when H is zero.

    Raises:
        UnsupportedError: P is a large operator without exact eigenvalues.
        InvalidInputError: The shapes differ, or P is not PSD.
    """
    try:
        return compute_split(target, as_operator(target, approximation))
    except UndefinedError as reason:
        nan = warn_undefined("split_error", reason)
        return ErrorSplit(nan, nan, False)


def off_diagonal_mass(target: Operator, approximation: Operator | str) -> float:
    """|offdiag(Q^T H Q)| / |H| in the eigenbasis Q of P (a Kronecker product): its basis error.

    Args:
        target: H.
        approximation: P, as for :func:`split_error`.

    Returns:
        A float in [0, 1]; NaN with an UndefinedMetricWarning when H is zero. See
        :func:`split_error` for degenerate and singular P.

    Raises:
        UnsupportedError: P is a large operator without exact eigenvalues.
        InvalidInputError: The shapes differ, or P is not PSD.
    """
    try:
        return compute_split(target, as_operator(target, approximation)).basis
    except UndefinedError as reason:
        return warn_undefined("off_diagonal_mass", reason)


def compute_split(target: Operator, approximation: Operator) -> ErrorSplit:
    """:func:`split_error`, raising UndefinedError where it gives NaN."""
    check_pair(target, approximation)
    form = exact_form(approximation)
    norm = target.norm()
    diagonal = form.diagonal_of(target) / norm
    basis = max(0.0, 1.0 - float(diagonal @ diagonal))
    eigenvalues = float((diagonal - form.values / norm).norm())
    return ErrorSplit(math.sqrt(basis), eigenvalues, _is_degenerate(form, diagonal))


def _is_degenerate(form: SpectralForm, seen: Tensor) -> bool:
    """Whether eigenvectors that H sees are arbitrary: eigenvalues of P that coincide.

    Args:
        form: Of P.
        seen: q_k^T H q_k.
    """
    if form.values.numel() == 0 or isinstance(form, CoordinateForm):
        return False
    if isinstance(form, BlockForm):
        parts = [one for _, _, one in form.parts]
        split = torch.split(seen, [one.values.numel() for one in parts])
        return any(_is_degenerate(one, mass) for one, mass in zip(parts, split, strict=True))
    sides = [(form.values[:, None], seen[:, None])]
    if isinstance(form, KroneckerForm):
        shape = (form.left.rank, form.right.rank)
        values, mass = form.values.view(shape), seen.view(shape)
        sides = [(values, mass), (values.T, mass.T)]
    floor = DEGENERATE * float(form.values.max())
    for values, mass in sides:
        # two rows that are equal throughout may be rotated into one another
        order = values.sum(dim=1).argsort(descending=True)
        gaps = (values[order][1:] - values[order][:-1]).abs().amax(dim=1)
        shares = mass.abs().sum(dim=1)[order]
        pairs = torch.minimum(shares[1:], shares[:-1])
        if bool(((gaps <= floor) & (pairs > DEGENERATE * float(shares.sum()))).any()):
            return True
    return False


def _trace_ratio(target: Operator, approximation: Operator) -> Values:
    return {"trace_ratio": (compute_trace_ratio(target, approximation), None)}


def _largest_error(target: Operator, approximation: Operator) -> Values:
    found = compute_error_spectrum(target, approximation)
    return {"largest_error_eigenvalue": (found.relative, None)}


def _off_diagonal_mass(target: Operator, approximation: Operator) -> Values:
    return {"off_diagonal_mass": (compute_split(target, approximation).basis, None)}


def _eigenvalue_error(target: Operator, approximation: Operator) -> Values:
    return {"eigenvalue_error": (compute_split(target, approximation).eigenvalues, None)}


METRICS = (
    Metric("trace_ratio", _trace_ratio, scaled=True),
    Metric("largest_error_eigenvalue", _largest_error, scaled=True),
    Metric("off_diagonal_mass", _off_diagonal_mass, scaled=False),
    Metric("eigenvalue_error", _eigenvalue_error, scaled=True),
)
