"""Replicates of the approximations that are sample means, each by its cheapest statistic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import final

from kronecker_probe.approximations import Spec
from kronecker_probe.errors import MemoryBudgetError, UnsupportedError
from kronecker_probe.gradients.samples.base import FactoredSamples
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.block import spans
from kronecker_probe.quality.estimates import closed_forms
from kronecker_probe.quality.estimates.closed_forms import ONE_SIDED, PRODUCTS, Grams
from kronecker_probe.quality.estimates.examples import Examples, pair_statistic
from kronecker_probe.quality.estimates.grouped import Grouped
from kronecker_probe.quality.estimates.replicates import Replicates
from kronecker_probe.table.codes import reason_of

CLOSED_FORMS = frozenset({*PRODUCTS, *ONE_SIDED, "identity", "diagonal"})


@final
class SampleMeans:
    """U-statistics over single examples where they are unshared, else over groups of examples."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self._products: dict[str, Replicates] = {}

    @cached_property
    def _grams(self) -> Grams | None:
        return Grams.of(self._examples, self._examples.target)

    def prepare(self, names: Sequence[str]) -> None:
        """The products of two sample means together, in one pass over the Grams."""
        wanted = [name for name in names if name in PRODUCTS and self._in_sample_space(name)]
        grams = self._grams if wanted else None
        if grams is None:
            return
        try:
            forms = list(dict.fromkeys(PRODUCTS[name] for name in wanted))
            found = dict(zip(forms, grams.products(forms), strict=True))
        except MemoryBudgetError:  # each approximation reports it
            return
        self._products |= {name: found[PRODUCTS[name]] for name in wanted}

    def _in_sample_space(self, name: str) -> bool:
        """Whether shared positions make no difference to this approximation's factors."""
        samples = self._examples.target.samples
        plain = isinstance(samples, FactoredSamples) and samples.n_positions == 1
        return plain or name not in PRODUCTS or name == "shampoo-squared"

    def of(self, spec: Spec) -> Replicates | str:
        """The replicates of an approximation, block by block where it has blocks; or why not."""
        size = dict(spec.options).get("block_size")
        target = self._examples.target
        try:
            if size is None:
                return self._of(spec.name, target, self._grams)
            m, n = target.shape
            whole: Replicates | None = None
            for rows in spans(m, int(size)):
                for columns in spans(n, int(size)):
                    block = target.block(rows, columns)
                    # all blocks in one way: replicates of examples and of groups do not add up
                    single = self._grams is not None
                    grams = Grams.of(self._examples, block) if single else None
                    one = self._of(spec.name, block, grams)
                    whole = one if whole is None else whole.plus(one)
            assert whole is not None
            return whole
        except (MemoryBudgetError, UnsupportedError) as error:
            return reason_of(error)

    def _of(self, name: str, target: SecondMoment, grams: Grams | None) -> Replicates:
        examples = self._examples
        if name == "identity":
            return closed_forms.identity(examples, target.quadratic_forms(None, None), target.shape)
        if name == "diagonal":
            forms, norms = kernels_for(target.samples).diagonal_pairs(examples.shares)
            rows = examples.shares * (forms - examples.shares * norms)
            square = pair_statistic(rows, examples.pair_totals)
            return Replicates(square, examples.target_squares, square, single=True)
        if grams is None or not self._in_sample_space(name):
            group = Grouped(examples, target)
            return group.one_sided(ONE_SIDED[name]) if name in ONE_SIDED else group.product(name)
        if name in ONE_SIDED:
            return grams.one_sided(ONE_SIDED[name])
        if target is examples.target and name in self._products:
            return self._products[name]
        return grams.products([PRODUCTS[name]])[0]
