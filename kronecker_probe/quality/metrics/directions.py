"""What an optimizer feels: do H and P turn a gradient into the same step?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kronecker_probe.approximations import as_operator
from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.linalg.lanczos import damped_powers
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.kernels.sample_rows import SampleRows
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.spectral_form import spectral_form
from kronecker_probe.quality.metrics.frobenius import best_scale
from kronecker_probe.quality.metrics.metric import POSITIVE_DAMPING, Metric, Values
from kronecker_probe.quality.metrics.undefined import (
    UndefinedError,
    check_pair,
    resolve_damping,
    warn_undefined,
)
from kronecker_probe.table.codes import ReasonCode
from kronecker_probe.table.specs import Option

POWERS = (0.25, 0.5, 1.0)
TOLERANCE = 1e-8


@dataclass(frozen=True)
class DirectionAgreement:
    """(H + d I)^{-p} g beside (P + d I)^{-p} g, for several gradients g and powers p.

    Attributes:
        powers: The p.
        cosines: Of the two directions; float64 CPU [gradients, powers].
        length_ratios: |(P + d I)^{-p} g| / |(H + d I)^{-p} g|, likewise; above 1 P's step is
            too long.
        damping: d, in units of H.
        error: Bound on the relative error of (H + d I)^{-p} g; 0 where it comes from an exact
            eigendecomposition.
        note: Why nothing was scored; empty where something was.
    """

    powers: tuple[float, ...]
    cosines: Tensor
    length_ratios: Tensor
    damping: float
    error: float
    note: str = ""

    @property
    def n_gradients(self) -> int:
        """How many gradients were scored; zero gradients have no direction and are left out."""
        return len(self.cosines)

    @property
    def table(self) -> pd.DataFrame:
        """A row a power: means over the gradients, their spread, and the standard errors."""
        rows = []
        for k, power in enumerate(self.powers):
            row: dict[str, float] = {"power": power, "damping": self.damping}
            for name, values in (
                ("cosine", self.cosines[:, k]),
                ("length_ratio", self.length_ratios[:, k]),
            ):
                spread = float(values.std()) if len(values) > 1 else math.nan
                row[name] = float(values.mean()) if len(values) else math.nan
                row[f"{name}_std"] = spread
                row[f"{name}_stderr"] = spread / math.sqrt(max(len(values), 1))
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        shown = self.table[["power", "cosine", "cosine_std", "length_ratio", "length_ratio_std"]]
        text: str = shown.to_string(index=False, float_format="{:.4f}".format)
        if self.note:
            return f"{text}\nundefined: {self.note}"
        return f"{text}\n{self.n_gradients} gradients, d = {self.damping:.3g}"


def direction_agreement(
    target: Operator,
    approximation: Operator | str,
    gradients: Tensor | None = None,
    *,
    powers: float | Sequence[float] = POWERS,
    damping: float = 1e-3,
    relative: bool = True,
    n_gradients: int = 16,
    seed: int = 0,
) -> DirectionAgreement:
    """Agreement in direction and length of (H + d I)^{-p} g and (P + d I)^{-p} g.

    p = 1/2 is full-matrix Adam's power (and that of Shampoo's ideal), p = 1 natural gradient's,
    p = 1/4 half of the first (Eschenhagen et al., 2025; Morwani et al., 2024). P + d I is damped
    on its eigenvalues, not factor by factor. H is exact through the N C x N C Gram of its samples,
    or as an mn x mn matrix, while one of the two is at most 4096; beyond, Lanczos runs until a
    bound on the relative error falls below 1e-8.

    Args:
        target: H.
        approximation: P, with exact eigenvalues; or the name of an approximation of H.
        gradients: g, [m, n] or [k, m, n]; by default some of the gradient samples of H, the C
            columns of an example combined with random signs. These lie in the range of H, where a
            preconditioner fitted to them knows more than it will of the next gradient: for that,
            give fresh gradients.
        powers: p, or several, in (0, 1].
        damping: rho, for d = rho Tr H / (mn); or d itself, in units of H.
        relative: Whether ``damping`` is rho.
        n_gradients: How many gradient samples, where ``gradients`` are not given.
        seed: Of that choice.

    Returns:
        One value a gradient and power, with means and spreads in ``.table``; empty, with an
        UndefinedMetricWarning and a ``note`` that says why, when H or all gradients are zero.

    Raises:
        InvalidInputError: A power outside (0, 1], a damping that is not positive, gradients of
            another shape, or a P that is not PSD.
        UnsupportedError: P, or an H that holds no samples, is too large for exact eigenvalues.
    """
    exponents = _check_powers(powers)
    operator = as_operator(target, approximation)
    given = None if gradients is None else _check_gradients(gradients, target)
    if not isinstance(n_gradients, int) or n_gradients < 1:
        raise InvalidInputError(f"n_gradients={n_gradients!r}; give a positive integer.")
    try:
        return compute_directions(
            target,
            operator,
            given,
            powers=exponents,
            damping=damping,
            relative=relative,
            n_gradients=n_gradients,
            seed=seed,
        )
    except UndefinedError as reason:
        nan = warn_undefined("direction_agreement", reason)
        empty = torch.empty(0, len(exponents), dtype=torch.float64)
        return DirectionAgreement(exponents, empty, empty, nan, nan, str(reason))


def compute_directions(
    target: Operator,
    approximation: Operator,
    gradients: Tensor | None,
    *,
    powers: tuple[float, ...],
    damping: float,
    relative: bool,
    n_gradients: int,
    seed: int,
    scale: float = 1.0,
) -> DirectionAgreement:
    """:func:`direction_agreement` of ``scale`` P, raising UndefinedError where it gives nothing."""
    check_pair(target, approximation)
    d = resolve_damping(target, damping, relative)
    given = _draws(target, n_gradients, seed) if gradients is None else gradients
    cosines, ratios, error = [], [], 0.0
    for g in given:  # one at a time: each is as large as the layer
        size = torch.linalg.vector_norm(g)
        if not size > 0:
            continue
        pairs = zip(
            _inverse_powers(target, g / size, d, powers),
            _inverse_powers(approximation, g / size, d / scale, powers),
            strict=True,
        )
        scored = [(*_agreement(x, y), max(one, other)) for (x, one), (y, other) in pairs]
        cosines.append([cosine for cosine, _, _ in scored])
        ratios.append([ratio for _, ratio, _ in scored])
        error = max(error, *(bound for _, _, bound in scored))
    if not cosines:
        alone = gradients is not None and len(gradients) == 1
        what = "the gradient is" if alone else "all gradients are"
        raise UndefinedError(f"{what} zero: no direction is defined", ReasonCode.ZERO)
    return DirectionAgreement(
        powers,
        torch.tensor(cosines, dtype=torch.float64),
        torch.tensor(ratios, dtype=torch.float64),
        d,
        error,
    )


def _agreement(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The cosine of two steps, and |y| / |x|."""
    a, b = torch.linalg.vector_norm(x), torch.linalg.vector_norm(y)
    # unit vectors first: the product of two steps may leave float64
    return float(((x / a) * (y / b)).sum()), float(b / a)


def _inverse_powers(
    operator: Operator, x: Tensor, d: float, powers: Sequence[float]
) -> Iterator[tuple[Tensor, float]]:
    """d^p (A + d I)^{-p} x, [m, n], for each p, with a bound on its relative error."""
    form = spectral_form(operator)
    if form is not None:
        for image in form.apply_each([_damped_power(d, p) for p in powers], x[None]):
            yield image[0], 0.0
        return
    if not isinstance(operator, SecondMoment):
        m, n = operator.shape
        raise UnsupportedError(
            f"{type(operator).__name__} on {m} x {n} matrices has no exact roots; use a "
            "Kronecker, eigen or diagonal operator."
        )

    def apply(flat: Tensor) -> Tensor:
        return operator.apply(flat.view(1, *operator.shape)).flatten() / d

    solved = damped_powers(apply, x.flatten(), 1.0, powers, tolerance=TOLERANCE)
    for image in solved.values:
        yield image.view(x.shape), solved.error


def _damped_power(d: float, p: float) -> Callable[[Tensor], Tensor]:
    return lambda values: (values / d + 1).pow(-p)


def _draws(target: Operator, count: int, seed: int) -> Iterator[Tensor]:
    if not isinstance(target, SecondMoment):
        raise InvalidInputError(
            f"direction_agreement needs gradients=: a {type(target).__name__} holds no samples."
        )
    return SampleRows(target.samples).gradients(count, seed)


def _check_powers(powers: float | Sequence[float]) -> tuple[float, ...]:
    given = tuple(powers) if isinstance(powers, Sequence) else (powers,)
    for power in given:
        valid = isinstance(power, int | float) and not isinstance(power, bool)
        if not (valid and 0 < power <= 1):
            raise InvalidInputError(f"powers={powers!r}; give p with 0 < p <= 1, for H^-p.")
    if not given:
        raise InvalidInputError("powers= is empty; give at least one, for example 0.5.")
    return tuple(float(power) for power in given)


def _check_gradients(gradients: Tensor, target: Operator) -> Tensor:
    m, n = target.shape
    if not isinstance(gradients, Tensor) or not gradients.dtype.is_floating_point:
        raise InvalidInputError("gradients must be a real floating-point tensor [k, m, n].")
    if gradients.ndim not in (2, 3) or gradients.shape[-2:] != (m, n) or not len(gradients):
        raise InvalidInputError(
            f"gradients are {list(gradients.shape)}; give [{m}, {n}] or [k, {m}, {n}]."
        )
    if not bool(gradients.isfinite().all()):
        raise NonFiniteError("gradients hold NaN or infinite values.")
    one = gradients.detach().reshape(-1, m, n)
    return one.to(device=target.device, dtype=torch.float64)


def _direction(
    target: Operator,
    approximation: Operator,
    power: float,
    damping: float,
    gradients: int,
    scale: float = 1.0,
) -> Values:
    found = compute_directions(
        target,
        approximation,
        None,
        powers=(power,),
        damping=damping,
        relative=True,
        n_gradients=gradients,
        seed=0,
        scale=scale,
    )
    row = found.table.iloc[0]
    return {
        f"direction_{name}": (float(row[name]), float(row[f"{name}_stderr"]))
        for name in ("cosine", "length_ratio")
    }


def _rescaled_direction(target: SecondMoment, approximation: Operator, **options: Any) -> Values:
    scale = best_scale(target, approximation)
    if not scale > 0:
        raise UndefinedError("the best multiple of P is not positive")
    return _direction(target, approximation, **options, scale=scale)


METRICS = (
    Metric(
        "direction",
        _direction,
        scaled=True,
        gives=("direction_cosine", "direction_length_ratio"),
        options=(
            Option(
                "power", "give p in (0, 1], for H^-p", low=0.0, high=1.0, above=True, default=0.5
            ),
            POSITIVE_DAMPING,
            Option("gradients", "give how many gradients, an integer >= 1", True, 1, default=16),
        ),
        rescaled=_rescaled_direction,
    ),
)
