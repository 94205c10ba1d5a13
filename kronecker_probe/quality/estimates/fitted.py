"""Approximations that are fitted: the jackknife over refits, brackets, and held-out halves.

In sample, <H_N, P_N> / |P_N| is too large (P_N has seen H_N), and |H_N| is too large (it holds
what each example has to do with itself). The second is removed exactly, by |H|^2 over distinct
examples; the first is of order 1/N for a smooth fit, and leaving out one of g groups of examples at
a time removes it. With g = 8, on populations with known values, what is left is under a tenth of
the plug-in's bias at N = 128 for most, and under a third for all (benchmarks/estimate_coverage.py).

Where refits cost too much (shared positions), the halves give a bracket instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, final

import torch
from torch import Tensor

from kronecker_probe.approximations import approximate as fit
from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.quality.estimates.examples import Examples
from kronecker_probe.quality.estimates.forms import example_forms
from kronecker_probe.quality.estimates.replicates import Replicates
from kronecker_probe.quality.metrics.frobenius import InnerProducts

# Groups left out one at a time.
REFITS = 8

# <H, P> and |P|^2
Pair: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Bracket:
    """What bounds the quality of a fit whose own error bar would take too many refits.

    Attributes:
        inside: In-sample, over |H|^2 of distinct examples: of all examples, and of either half.
        held_out: The factors of either half on the examples of the other.
        fixed: In-sample without each example, the factors held as they are: to first order in 1/N
            the jackknife of a fit that maximizes the cosine, whose derivative in P is zero.
    """

    inside: Replicates
    held_out: Replicates
    fixed: Replicates


@final
class Refits:
    """Fits to all examples (``whole`` holds known ones), to all but some, and to either half."""

    def __init__(self, examples: Examples, whole: dict[str, Operator]) -> None:
        self._examples = examples
        self._whole = whole
        self._half_fits: dict[str, list[Operator] | str] = {}

    def whole(self, name: str) -> Operator:
        """The fit to all examples.

        Raises:
            UnsupportedError: There is none.
        """
        if name not in self._whole:
            self._whole[name] = fit(self._examples.target, name)
        return self._whole[name]

    def jackknifed(self, names: Sequence[str], count: int) -> dict[str, Replicates | str]:
        """In-sample replicates of each name, of all examples and without each of ``count`` groups.

        A name that has no fit on every part has the reason instead.
        """
        d = self._examples
        found: dict[str, list[Pair]] = {name: [] for name in names}
        reasons: dict[str, str] = {}
        squares = [float(d.target_squares[0])]
        self._fit(d.target, found, reasons, self._whole)
        for group in d.groups(min(count, d.count)):
            kept = d.without(group)
            squares.append(d.subset_square(kept))
            self._fit(d.target.subset(kept), found, reasons, {})
        target = d.shares.new_tensor(squares)
        return {name: reasons.get(name) or _replicates(found[name], target) for name in names}

    def _fit(
        self,
        target: SecondMoment,
        found: dict[str, list[Pair]],
        reasons: dict[str, str],
        known: Mapping[str, Operator],
    ) -> None:
        """One more part of the examples for each name; its factors are dropped at once."""
        for name, pairs in found.items():
            if name in reasons:
                continue
            try:
                one = known[name] if name in known else fit(target, name)
                pairs.append(_pair(target, one))
            except UnsupportedError as error:
                reasons[name] = f"not for every part of the examples: {error}"

    def bracket(self, name: str) -> Bracket | str:
        """In-sample and held-out replicates from the fits to either half."""
        fits, d = self._of_halves(name), self._examples
        if isinstance(fits, str):
            return fits
        halves = list(zip([half for _, half in self._halves], fits, strict=True))
        whole = self.whole(name)
        squares = [float(d.target_squares[0])]
        squares += [d.subset_square(group) for group, _ in self._halves]
        pairs = [_pair(d.target, whole), *(_pair(half, one) for half, one in halves)]
        inside = _replicates(pairs, d.shares.new_tensor(squares))
        return Bracket(inside, self._crossed(fits), fixed_operator(d, whole))

    def held_out(self, name: str) -> Replicates | str:
        """Cross-fitted replicates: the factors of one half on the examples of the other.

        The parts left out are single examples of the scored half; the factors stay as they are, so
        that the standard error is that of measuring these factors.
        """
        fits = self._of_halves(name)
        return fits if isinstance(fits, str) else self._crossed(fits)

    @cached_property
    def _halves(self) -> list[tuple[Tensor, SecondMoment]]:
        return [(group, self._examples.target.subset(group)) for group in self._examples.groups(2)]

    def _of_halves(self, name: str) -> list[Operator] | str:
        if name not in self._half_fits:
            try:
                self._half_fits[name] = [fit(half, name) for _, half in self._halves]
            except UnsupportedError as error:
                self._half_fits[name] = f"not for either half of the examples: {error}"
        return self._half_fits[name]

    def _crossed(self, fits: Sequence[Operator]) -> Replicates:
        d = self._examples
        columns = []
        for (group, half), fitted in zip(self._halves, reversed(fits), strict=True):
            p = d.shares[group]
            scale = d.scale * (1.0 - float(p.sum()))  # of the weights of the other half
            forms = p * example_forms(half, fitted) / scale
            cross = torch.full_like(d.target_squares, float(forms.sum() / p.sum()))
            cross[1 + group] = (forms.sum() - forms) / (p.sum() - p)
            columns.append((cross, torch.full_like(cross, (fitted.norm() / scale) ** 2)))
        cross, square = (torch.stack(part, dim=1) for part in zip(*columns, strict=True))
        return Replicates(cross, d.target_squares, square, single=True)


def fixed_operator(examples: Examples, operator: Operator) -> Replicates:
    """Replicates of an operator that does not depend on the examples: <H, P> is a plain mean."""
    parts = examples.shares * example_forms(examples.target, operator) / examples.scale
    whole = parts.sum()
    cross = torch.cat([whole[None], (whole - parts) / (1.0 - examples.shares)])
    square = torch.full_like(cross, (operator.norm() / examples.scale) ** 2)
    return Replicates(cross, examples.target_squares, square, single=True)


def _pair(target: SecondMoment, operator: Operator) -> Pair:
    """<H, P> and |P|^2 for weights of sum 1."""
    total = float(target.samples.weights.sum())
    products = InnerProducts.of(target, operator)
    return products.cross / total / total, (products.approximation / total) ** 2


def _replicates(pairs: Sequence[Pair], target: Tensor) -> Replicates:
    cross, square = target.new_tensor(pairs).unbind(dim=1)
    return Replicates(cross, target, square, single=False)
