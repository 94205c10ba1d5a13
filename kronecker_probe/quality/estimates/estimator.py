"""All estimates about one target, with what they share computed once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import final

from torch import Tensor

from kronecker_probe.approximations import resolve
from kronecker_probe.errors import InvalidInputError, MemoryBudgetError, UnsupportedError
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.quality.estimates import closed_forms
from kronecker_probe.quality.estimates.estimate import Bound, Estimate, abstention
from kronecker_probe.quality.estimates.examples import Examples
from kronecker_probe.quality.estimates.fitted import REFITS, Bracket, Refits, fixed_operator
from kronecker_probe.quality.estimates.forms import weakest_direction
from kronecker_probe.quality.estimates.replicates import Jackknifed, Replicates, jackknife
from kronecker_probe.quality.estimates.sample_means import CLOSED_FORMS, SampleMeans
from kronecker_probe.quality.metrics.catalog import SQUARED
from kronecker_probe.quality.metrics.frobenius import InnerProducts
from kronecker_probe.table.codes import Reason, ReasonCode, reason_of

TARGET_METRICS = ("norm", "trace")
# Approximations of separate means of d and a, which other examples may carry than those of H.
OF_FACTORS = frozenset({"kfac", "kfac-reduce", "ekfac"})
NOT_INDEPENDENT = Reason(
    "these examples are not independent: their weighted sum is the target itself, and the plug-in "
    "number has no sampling error",
    ReasonCode.NOT_INDEPENDENT,
)
# Effective examples for each product of a sum under which refits are too uneven: a bracket instead.
MIN_REFITTED = 30.0
# Effective examples along each eigenvector that a fit with q < MILD_Q needs.
MIN_DIRECTION, MILD_Q = 5.0, 0.5
UNDEFINED = Reason(
    "|H|^2 or |P|^2 over distinct examples is not positive, of all or without some of them: P = 0, "
    "or hardly any two examples share a direction; measure more examples",
    ReasonCode.NOT_POSITIVE,
)
# Rules that give H itself wherever it acts on vectors, m or n = 1, in any sample.
EXACT_ON_VECTORS = frozenset({"optimal", "shampoo-squared", "shampoo-squared-sequential"})
BRACKET = "bracket: from held-out factors to the in-sample fit, each with its error"


@final
class Estimator:
    """Estimates about one target.

    Args:
        target: H.
        refits: For fitted approximations, the groups of the jackknife over refits, at least 4;
            0 for a bracket from the two halves; None for 8 where examples have no shared positions
            (or layers are small), 0 elsewhere, and for a sum of r products where fewer than
            30 r examples are effective.
        fits: Label -> operator fitted to all examples, for those known already.

    Raises:
        InvalidInputError: ``target`` is no SecondMoment, or ``refits`` is out of range.
    """

    def __init__(
        self,
        target: SecondMoment,
        refits: int | None = None,
        fits: Mapping[str, Operator] | None = None,
    ) -> None:
        if not isinstance(target, SecondMoment):
            raise InvalidInputError(
                f"estimate got a {type(target).__name__}; wrap the samples as kp.SecondMoment(...)."
            )
        check_refits(refits)
        self._target = target
        self._examples = Examples(target)
        same = self._examples.target is target
        self._fits = dict(fits or {})
        self._refits = Refits(self._examples, self._fits if same else {})
        self._given_count = refits
        self._means = SampleMeans(self._examples)
        self._weaknesses: dict[str, str] = {}

    @cached_property
    def _count(self) -> int:
        """Groups of the jackknife over refits where they are affordable; 0 for a bracket."""
        shared = self._target.plan().route == "parameter" and self._target.samples.n_positions != 1
        return 0 if shared else REFITS

    def _groups_for(self, label: str) -> int:
        if self._given_count is not None:
            return self._given_count
        rank = dict(resolve(label).options).get("rank", 1)
        return self._count if self.n_eff >= rank * MIN_REFITTED else 0

    @property
    def n(self) -> int:
        """N, examples of positive weight."""
        return self._examples.count

    @property
    def n_eff(self) -> float:
        """The effective number of examples."""
        return self._examples.n_eff

    @cached_property
    def _silence(self) -> str:
        """Why nothing is estimated beyond the sample; empty if it may be."""
        if not self._target.samples.independent:
            return NOT_INDEPENDENT
        unusable = InnerProducts(0.0, self._target.norm(), 0.0).unusable
        return unusable or abstention(self.n, self.n_eff)

    def _n_eff_for(self, label: str | None) -> float:
        """How many examples carry the numbers of one approximation."""
        of_factors = label is not None and label.partition(":")[0] in OF_FACTORS
        return self._examples.n_eff_of_factors if of_factors else self.n_eff

    def _silence_for(self, label: str) -> str:
        """Why nothing is estimated of one approximation; empty if it may be."""
        return self._silence or abstention(self.n, self._n_eff_for(label))

    def noise_floor(self) -> float:
        """The cosine of the sample matrix to the population's, |H| / |H_N|.

        What the plug-in cosine of the true H itself would be, to first order: E <H_N, H> =
        |H|^2. NaN where it is unknown.
        """
        if self._silence:
            return math.nan
        try:
            squared = float(self._examples.target_squares[0])
        except MemoryBudgetError:
            return math.nan
        return self._examples.scale * math.sqrt(squared) / self._target.norm()

    def of_target(self, metric: str, kind: str) -> Estimate:
        """|H| or Tr H."""
        if kind == "plugin":
            value = self._target.norm() if metric == "norm" else self._target.trace()
            return self._estimate(metric, None, kind, Jackknifed(value, math.nan, math.nan))
        if self._silence:
            return self._undefined(metric, None, kind, self._silence)
        try:
            values = closed_forms.norm if metric == "norm" else closed_forms.trace
            found = jackknife(values(self._examples), single=True)
            copies = self._examples.copies
        except MemoryBudgetError as error:
            return self._undefined(metric, None, kind, reason_of(error))
        one = self._estimate(metric, None, kind, found)
        if not copies or one.note:
            return one
        note = f"{copies} of {self.n} examples have the same gradients as another"
        note += ": if they are copies of it, measure each once"
        return replace(one, note=note, copies=copies)

    def plugin(self, label: str, operator: Operator, metrics: Sequence[str]) -> list[Estimate]:
        """The numbers of the sample matrix itself."""
        products = InnerProducts.of(self._target, operator)
        note = products.unusable or products.undefined
        found = []
        for metric in metrics:
            value: float = getattr(products, metric)
            square = value**2 if metric in SQUARED else value
            one = self._estimate(metric, label, "plugin", Jackknifed(square, math.nan, math.nan))
            found.append(replace(one, note=note) if math.isnan(value) else one)
        return found

    def estimates(
        self, labels: Sequence[str], metrics: Sequence[str], kind: str
    ) -> dict[str, list[Estimate]]:
        """Held-out or population estimates of approximations, by label.

        Args:
            labels: Specs as ``resolve`` labels them.
            metrics: Of :data:`ESTIMABLE`.
            kind: "held-out" or "population".
        """
        outcomes: dict[str, Replicates | Bracket | str] = {
            label: why for label in labels if (why := self._silence_for(label))
        }
        rest = [label for label in labels if label not in outcomes]
        if kind == "held-out":
            outcomes |= {label: self._held_out(label) for label in rest}
        else:
            outcomes |= {label: self._perfect for label in rest if self._is_exact(label)}
            specs = {label: resolve(label) for label in rest if label not in outcomes}
            closed = {k: spec for k, spec in specs.items() if spec.name in CLOSED_FORMS}
            self._means.prepare([spec.name for spec in closed.values() if not spec.options])
            outcomes |= {label: self._means.of(spec) for label, spec in closed.items()}
            outcomes |= self._fitted([label for label in specs if label not in closed])
        return {
            label: [self._of(label, metric, kind, outcomes[label]) for metric in metrics]
            for label in labels
        }

    def _is_exact(self, label: str) -> bool:
        """Whether P = H for any examples."""
        spec, (m, n) = resolve(label), self._target.shape
        if "block_size" in dict(spec.options):
            return False
        one_sided = (spec.name == "left-only" and n == 1) or (spec.name == "right-only" and m == 1)
        return one_sided or (min(m, n) == 1 and spec.name in EXACT_ON_VECTORS)

    @property
    def _perfect(self) -> Replicates | str:
        try:
            square = self._examples.target_squares
        except MemoryBudgetError as error:
            return reason_of(error)
        return Replicates(square, square, square, single=True)

    def of_operator(self, label: str, operator: Operator, metrics: Sequence[str]) -> list[Estimate]:
        """Population estimates of an operator that was not fitted to these examples."""
        try:
            found: Replicates | str = self._silence or fixed_operator(self._examples, operator)
        except MemoryBudgetError as error:
            found = reason_of(error)
        return [self._of(label, metric, "population", found) for metric in metrics]

    def _held_out(self, label: str) -> Replicates | str:
        try:
            return self._ill_founded(label) or self._refits.held_out(label)
        except (MemoryBudgetError, UnsupportedError) as error:
            return reason_of(error)

    def _fitted(self, labels: Sequence[str]) -> dict[str, Replicates | Bracket | str]:
        try:
            found: dict[str, Replicates | Bracket | str] = {
                label: weak for label in labels if (weak := self._ill_founded(label))
            }
            counts = {label: self._groups_for(label) for label in labels if label not in found}
            bracketed = [label for label, count in counts.items() if not count]
            refitted = [label for label in counts if label not in bracketed]
            found |= {label: self._refits.bracket(label) for label in bracketed}
            if refitted:
                found |= self._refits.jackknifed(refitted, counts[refitted[0]])
            return found
        except (MemoryBudgetError, UnsupportedError) as error:
            return dict.fromkeys(labels, reason_of(error))

    def _ill_founded(self, label: str) -> str:
        """Why an inverse of the factors rests on too few examples; empty if it does not."""
        if label not in self._weaknesses:
            self._weaknesses[label] = self._weakness(label)
        return self._weaknesses[label]

    def _weakness(self, label: str) -> str:
        spec = resolve(label)
        options = dict(spec.options)
        if spec.name != "divergence" or options["q"] >= MILD_Q or "block_size" in options:
            return ""
        operator = self._refits.whole(label)
        assert isinstance(operator, KroneckerOperator)
        weakest = weakest_direction(self._examples.target, operator)
        if weakest >= MIN_DIRECTION:
            return ""
        return Reason(
            f"it divides by the eigenvalues of both factors, and one eigenvector rests on "
            f"{weakest:.1f} effective examples of {self.n}, under {MIN_DIRECTION:g}; measure more "
            "examples, or use q = 1/2",
            ReasonCode.WEAK_DIRECTION,
        )

    def _of(
        self, label: str, metric: str, kind: str, outcome: Replicates | Bracket | str
    ) -> Estimate:
        if isinstance(outcome, str):
            return self._undefined(metric, label, kind, outcome)
        if isinstance(outcome, Bracket):
            return self._bracketed(label, metric, kind, outcome)
        return self._estimate(metric, label, kind, _jackknifed(outcome, metric))

    def _bracketed(self, label: str, metric: str, kind: str, bracket: Bracket) -> Estimate:
        value = _jackknifed(bracket.inside, metric).value  # 2 t - mean of the halves'
        bounds = []
        for replicates in (bracket.held_out, bracket.fixed):
            error = _jackknifed(replicates, metric)
            whole = float(replicates.values(metric)[0])
            bounds.append(Bound(whole, error.stderr, error.df))
        one = self._estimate(metric, label, kind, Jackknifed(value, math.nan, math.nan))
        if any(math.isnan(x) for x in (value, *(b.stderr for b in bounds))):
            return replace(one, value=math.nan, note=one.note or UNDEFINED)
        return replace(one, bracket=(bounds[0], bounds[1]), note=BRACKET)

    def _undefined(self, metric: str, label: str | None, kind: str, why: str) -> Estimate:
        n_eff = self._n_eff_for(label)
        return Estimate(metric, label, kind, math.nan, math.nan, self.n, n_eff, note=why)

    def _estimate(self, metric: str, label: str | None, kind: str, found: Jackknifed) -> Estimate:
        note = UNDEFINED if math.isnan(found.value) else ""
        n_eff = self._n_eff_for(label)
        return Estimate(
            metric, label, kind, found.value, found.stderr, self.n, n_eff, found.df, note
        )


def check_refits(refits: int | None) -> None:
    """Refuse a number of refits that gives no error bar.

    Raises:
        InvalidInputError: It is neither 0 nor an integer of at least 4.
    """
    known = isinstance(refits, int) and not isinstance(refits, bool) and (refits == 0 or refits > 3)
    if refits is not None and not known:
        raise InvalidInputError(
            f"refits={refits!r}; give at least 4 groups, 0 for a bracket, or None to choose."
        )


def _jackknifed(replicates: Replicates, metric: str) -> Jackknifed:
    values: Tensor = replicates.values(metric)
    return jackknife(values, replicates.single)
