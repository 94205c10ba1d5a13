"""How close an approximation is to its target, from the inner products <H,P>, <H,H>, <P,P>."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kronecker_probe.approximations import as_operator
from kronecker_probe.errors import UndefinedMetricWarning
from kronecker_probe.operators.base import Operator
from kronecker_probe.quality.metrics.metric import Metric, Values
from kronecker_probe.quality.metrics.undefined import LARGEST_NORM, UndefinedError
from kronecker_probe.table.codes import Reason, ReasonCode, code_of


@dataclass(frozen=True)
class InnerProducts:
    """The three numbers that every Frobenius metric needs.

    Attributes:
        cross: <H, P>.
        target: |H|.
        approximation: |P|.
    """

    cross: float
    target: float
    approximation: float

    @staticmethod
    def of(target: Operator, approximation: Operator) -> InnerProducts:
        """Compute them once for all metrics of a pair."""
        return InnerProducts(target.inner(approximation), target.norm(), approximation.norm())

    @property
    def unusable(self) -> str:
        """Why no metric is defined here; empty when some are."""
        if self.target == 0.0:
            return Reason("H = 0: no quality number is defined", ReasonCode.ZERO)
        if not math.isfinite(self.target):
            why = f"|H| = {self.target}: the target is not finite"
            return Reason(why, ReasonCode.NOT_FINITE)
        if not 1.0 / LARGEST_NORM < self.target < LARGEST_NORM:
            why = f"|H| = {self.target:.3g} is beyond what float64 can score; rescale the loss"
            return Reason(why, ReasonCode.OUT_OF_RANGE)
        if not (math.isfinite(self.approximation) and math.isfinite(self.cross)):
            why = f"|P| = {self.approximation}, <H, P> = {self.cross}: P is not finite"
            return Reason(why, ReasonCode.NOT_FINITE)
        return ""

    @property
    def undefined(self) -> str:
        """Why cosine and scale are undefined here; empty when they are defined."""
        if self.unusable:
            return self.unusable
        if self.approximation != 0.0:
            return ""
        return Reason("P = 0: no cosine or scale is defined", ReasonCode.ZERO)

    @property
    def cosine(self) -> float:
        """<H, P> / (|H| |P|)."""
        if self.undefined:
            return math.nan
        return self.cross / self.target / self.approximation

    @property
    def relative_error(self) -> float:
        """|H - P| / |H|."""
        if self.unusable:
            return math.nan
        ratio = self.approximation / self.target
        cross = self.cross / self.target / self.target
        return math.sqrt(max(0.0, 1.0 - 2.0 * cross + ratio * ratio))

    @property
    def best_scale(self) -> float:
        """The c that minimizes |H - c P|: <H, P> / |P|^2."""
        if self.undefined and self.target != 0.0:
            return math.nan
        if self.approximation == 0.0:
            return math.nan
        return self.cross / self.approximation / self.approximation

    @property
    def best_scale_error(self) -> float:
        """|H - c P| / |H| at the best c: sqrt(1 - cos^2)."""
        cosine = self.cosine
        return math.nan if math.isnan(cosine) else math.sqrt(max(0.0, 1.0 - cosine * cosine))


def cosine_similarity(target: Operator, approximation: Operator | str) -> float:
    """cos(H, P) = <H, P> / (|H| |P|) (Morwani et al., 2024, Section 3).

    Args:
        target: H.
        approximation: P, or the name or spec of an approximation of H.

    Returns:
        A float; NaN with an UndefinedMetricWarning when H or P is zero.

    Raises:
        InvalidInputError: The shapes differ, or an argument is of another type.
    """
    return _defined(_products(target, approximation), "cosine")


def relative_error(target: Operator, approximation: Operator | str) -> float:
    """|H - P| / |H| of P as it stands.

    It comes from inner products, so values below about 1e-8 are rounding.

    Args:
        target: H.
        approximation: P, or the name or spec of an approximation of H.

    Returns:
        A float; NaN with an UndefinedMetricWarning when H is zero.

    Raises:
        InvalidInputError: The shapes differ, or an argument is of another type.
    """
    return _defined(_products(target, approximation), "relative_error")


def best_scale(target: Operator, approximation: Operator | str) -> float:
    """The scale c for which c P is closest to H: <H, P> / |P|^2.

    Args:
        target: H.
        approximation: P, or the name or spec of an approximation of H.

    Returns:
        A float; NaN with an UndefinedMetricWarning when P is zero.

    Raises:
        InvalidInputError: The shapes differ, or an argument is of another type.
    """
    return _defined(_products(target, approximation), "best_scale")


def best_scale_error(target: Operator, approximation: Operator | str) -> float:
    """|H - c P| / |H| at the best scale c, which is sqrt(1 - cos^2).

    Args:
        target: H.
        approximation: P, or the name or spec of an approximation of H.

    Returns:
        A float; NaN with an UndefinedMetricWarning when H or P is zero.

    Raises:
        InvalidInputError: The shapes differ, or an argument is of another type.
    """
    return _defined(_products(target, approximation), "best_scale_error")


def _products(target: Operator, approximation: Operator | str) -> InnerProducts:
    return InnerProducts.of(target, as_operator(target, approximation))


def _defined(products: InnerProducts, metric: str) -> float:
    value: float = getattr(products, metric)
    if math.isnan(value):
        warnings.warn(f"{metric}: {products.undefined}.", UndefinedMetricWarning, stacklevel=3)
    return value


def _formula(metric: str) -> Callable[[Operator, Operator], Values]:
    def formula(target: Operator, approximation: Operator) -> Values:
        products = InnerProducts.of(target, approximation)
        value: float = getattr(products, metric)
        if math.isnan(value):
            raise UndefinedError(products.undefined, code_of(products.undefined))
        return {metric: (value, None)}

    return formula


def _cosine_form(cross: Tensor, target: Tensor, approximation: Tensor) -> Tensor:
    return cross / (target * approximation).sqrt()


def _relative_error_form(cross: Tensor, target: Tensor, approximation: Tensor) -> Tensor:
    target = _positive(target)
    return 1.0 - 2.0 * cross / target + approximation / target


def _best_scale_error_form(cross: Tensor, target: Tensor, approximation: Tensor) -> Tensor:
    return 1.0 - cross.square() / (_positive(target) * _positive(approximation))


def _best_scale_form(cross: Tensor, target: Tensor, approximation: Tensor) -> Tensor:
    return cross / _positive(approximation)


def _positive(square: Tensor) -> Tensor:
    """An estimate of a squared norm; NaN where it is none, as the root in a cosine would be."""
    return torch.where(square > 0, square, math.nan)


METRICS = tuple(
    Metric(name, _formula(name), scaled, form=form, squared=squared)
    for name, scaled, form, squared in (
        ("cosine", False, _cosine_form, False),
        ("relative_error", True, _relative_error_form, True),
        ("best_scale_error", False, _best_scale_error_form, True),
        ("best_scale", True, _best_scale_form, False),
    )
)
