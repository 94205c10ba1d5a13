"""What a preconditioner is once its options are read: one of five kinds, with its own options only.

Nothing here is checked: :func:`kronecker_probe.optim.options.reading.read` is the one place that
makes these from the sections that users write, and refuses what does not go together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kronecker_probe.linalg.precision import state_dtype
from kronecker_probe.optim.options.sections import Shapes


@dataclass(frozen=True)
class Every:
    """Statistics that are updated in every so-manieth step, from the first on."""

    every: int

    def update_at(self, step: int) -> int | None:
        """The number of the update at a step, from 1; None where there is none."""
        count, rest = divmod(step - 1, self.every)
        return None if rest else count + 1


@dataclass(frozen=True)
class Moments(Every):
    """How second moments accumulate; ``beta2`` None is a sum."""

    beta2: float | None
    bias_correction: bool
    batch_size: int
    initial: float

    def weights(self, steps: int = 1) -> tuple[float, float]:
        """What an update keeps, and the weight of what is new, ``steps`` after the last update."""
        if self.beta2 is None:
            return 1.0, float(self.batch_size)
        kept = self.beta2**steps
        return kept, (1.0 - kept) * self.batch_size

    def correction(self, steps: int) -> float:
        """What second moments that hold so many steps are divided by."""
        if self.beta2 is None or not self.bias_correction:
            return 1.0
        return 1.0 - self.beta2**steps

    def correction_at(self, step: int) -> float:
        """What those of the last update, which stands for the steps until the next, are."""
        return self.correction(self.every * ((step - 1) // self.every + 1))


@dataclass(frozen=True)
class FromGradients:
    """L = E[G G^T], R = E[G^T G]."""


@dataclass(frozen=True)
class Whitened:
    """Each factor of gradients that the other factor whitens; q is the order of the divergence."""

    q: float


@dataclass(frozen=True)
class FromLayers:
    """L = E[d d^T], R = E[a a^T] of output gradients and inputs, of a "mean" or "sum" loss."""

    loss_reduction: str


Source = FromGradients | Whitened | FromLayers


@dataclass(frozen=True)
class Refresh:
    """When bases or roots are renewed, or tested."""

    frequency: int
    first: int
    stagger: bool

    def is_due(self, step: int, offset: int) -> bool:
        """Whether a block is refreshed, or tested, at its step."""
        if step == self.first:
            return True
        return step > self.first and (step - self.first + offset) % self.frequency == 0


@dataclass(frozen=True)
class Solver:
    """How a basis is renewed: by "eigh" or "qr"; with a tolerance only where it fails its test."""

    method: str
    tolerance: float | None
    max_iterations: int


@dataclass(frozen=True)
class Epsilon:
    """What is added to eigenvalues or roots, relative to the largest of them or as it is."""

    value: float
    relative: bool

    @property
    def surely_damps(self) -> bool:
        """Whether every denominator is positive, those of zero moments too."""
        return self.value > 0 and not self.relative


@dataclass(frozen=True)
class DiagonalOptions:
    """A second moment of every entry, divided by from step ``first`` on."""

    moments: Moments
    first: int
    power: float
    epsilon: Epsilon


@dataclass(frozen=True)
class FactoredOptions:
    """What both kinds with factors have; blocks without any factor have the diagonal kind."""

    moments: Moments
    source: Source
    refresh: Refresh
    power: float
    epsilon: Epsilon
    bfloat16: bool

    def without_factors(self) -> DiagonalOptions:
        """Of blocks none of whose sides has a factor."""
        return DiagonalOptions(self.moments, self.refresh.first, self.power, self.epsilon)


@dataclass(frozen=True)
class KroneckerOptions(FactoredOptions):
    """Products of inverse roots of the factors.

    Attributes:
        exponent: Of each factor; None shares -power among the factors of a block.
        trace_scale: Divide L kron R by Tr L.
        roots: The :class:`Solver` of the bases that are held; "eigh" for decompositions without;
            "newton" or "matmul" for products alone.
        packed: Hold the upper panels of the roots only.
    """

    exponent: float | None
    trace_scale: bool
    roots: Solver | str
    packed: bool

    def exponent_of(self, factors: int) -> float:
        """The power of each of so many factors."""
        return -self.power / max(1, factors) if self.exponent is None else self.exponent


@dataclass(frozen=True)
class CorrectedOptions(FactoredOptions):
    """Second moments in the eigenbases of the factors, to the power ``root``."""

    solver: Solver
    root: float
    transport: bool
    marginals: bool


@dataclass(frozen=True)
class PolarOptions:
    """The polar factor of the average: exact, or by Newton-Schulz steps."""

    exact: bool
    nesterov: bool


@dataclass(frozen=True)
class InverseFreeOptions(Every):
    """Inverse factors that are updated themselves."""

    batch_size: int
    lr: float
    decay: float
    damping: float
    diagonal: bool
    bfloat16: bool


Kind = KroneckerOptions | CorrectedOptions | PolarOptions | InverseFreeOptions | DiagonalOptions


@dataclass(frozen=True)
class GraftOptions:
    """Whose length the step takes; ``beta2`` is None for sums, and where there is no moment."""

    method: str
    beta2: float | None
    epsilon: float
    bias_correction: bool

    @property
    def has_moment(self) -> bool:
        """Whether it keeps a second moment of its own."""
        return self.method in ("adagrad", "rmsprop", "adam")


@dataclass(frozen=True)
class Recipe:
    """All choices of a parameter group but for the rates of its steps."""

    kind: Kind
    graft: GraftOptions
    shapes: Shapes
    beta1: float
    bias_correction: bool
    scale_by_shape: bool

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the state of a parameter of this dtype."""
        if isinstance(self.kind, InverseFreeOptions) and self.kind.bfloat16:
            return torch.bfloat16
        return state_dtype(dtype)

    def rate(self, step: int, shape: torch.Size) -> float:
        """What the update of a parameter is multiplied by, besides the learning rate.

        1 / (1 - beta1^t), unless a polar factor, of length 1, is not grafted; and for
        ``scale_by_shape`` max(1, m / n)^1/2.
        """
        fixed = isinstance(self.kind, PolarOptions) and self.graft.method == "none"
        rate = 1.0
        if self.bias_correction and not fixed:
            rate = float(1.0 / (1.0 - self.beta1**step))
        if not self.scale_by_shape or not shape:
            return rate
        return rate * math.sqrt(max(1.0, shape[0] ** 2 / shape.numel()))
