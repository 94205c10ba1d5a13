"""The choices that make an optimizer of this family: typed, checked, independent of each other.

Every variant rotates the gradient, divides it entrywise and rotates back (Eschenhagen et al., arXiv
2506.03595), so that four choices say what it is: what the factors accumulate, when and how their
bases are refreshed, what the entries are divided by, and whose length the step takes. A fifth says
how a parameter is cut into matrices. ``presets`` has the named combinations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kronecker_probe.optim.options.base import (
    DECAY,
    NONNEGATIVE,
    Config,
    count,
    flag,
    number,
    one_of,
    option,
    or_none,
)


@dataclass(frozen=True)
class Statistics(Config):
    """What the factors accumulate.

    Attributes:
        rule: "gradient": L = E[G G^T], R = E[G^T G]. "whitened": each factor sees the other's
            inverse, L = E[G R^{q-1} G^T] / Tr R^q with what is held of R (the trace-power family;
            q = 0 is KL-Shampoo, arXiv 2509.03378). "kfac": L = E[d d^T], R = E[a a^T] of a layer's
            inputs a and its output gradients d of every example, for an optimizer that was attached
            to the model (K-FAC, expand form, arXiv 2311.00636).
        q: Order of "whitened": 0 or 1/2.
        accumulate: "average" with decay betas[1], or "sum", as in AdaGrad.
        bias_correction: Divide averages, that of the gradient too, by 1 - beta^t.
        every: Steps from one update to the next. An update then has the weight of all steps since
            the last, 1 - beta2^every.
        batch_size: B, for root-free methods on mean losses: B G G^T in place of G G^T estimates the
            same matrix at any batch size (arXiv 2402.03496).
        initial: c of the estimate c I of H that is there before the first gradient; 0 with bias
            correction.
        loss_reduction: Of "kfac": whether the gradient of a step is the "mean" or the "sum" of
            those of the examples.
    """

    section: ClassVar[str] = "statistics"

    rule: str = option("gradient", check=one_of("gradient", "whitened", "kfac"))
    q: float = option(0.0, check=number("0 or 1/2", lambda value: value in (0, 0.5)))
    accumulate: str = option("average", check=one_of("average", "sum"))
    bias_correction: bool = option(True, check=flag)
    every: int = option(1, check=count(1))
    batch_size: int = option(1, check=count(1))
    initial: float = option(0.0, check=NONNEGATIVE)
    loss_reduction: str = option("mean", check=one_of("mean", "sum"))


@dataclass(frozen=True)
class Basis(Config):
    """When and how the eigenbases (or the inverse roots) are refreshed.

    Attributes:
        frequency: Steps from one refresh, or test, to the next.
        tolerance: None refreshes every time. Else a factor is refreshed when the off-diagonal
            part of it in its basis exceeds this share of it, each by itself (arXiv 2506.03595).
        solver: "eigh", or "qr" for QR iterations from the basis that is held.
        max_iterations: Of "qr", a refresh.
        start: Step of the first refresh; None for ``frequency``.
        carry: What becomes of corrected eigenvalues when a basis changes: "keep" (each column
            has that of the old one which it continues, and where it continues none the average by
            squared overlaps) or "transport" (that average for all).
        marginals: Rescale them after that to the marginals diag(Q^T L Q), diag(Q^T R Q).
        stagger: Spread the refreshes of different blocks over the steps in between.
    """

    section: ClassVar[str] = "basis"

    frequency: int = option(10, check=count(1))
    tolerance: float | None = option(
        None, check=or_none(number("a number in (0, 1), or None", lambda value: 0 < value < 1))
    )
    solver: str = option("eigh", check=one_of("eigh", "qr"))
    max_iterations: int = option(1, check=count(1))
    start: int | None = option(None, check=or_none(count(1)))
    carry: str = option("keep", check=one_of("keep", "transport"))
    marginals: bool = option(False, check=flag)
    stagger: bool = option(False, check=flag)

    @property
    def first(self) -> int:
        """The step of the first refresh."""
        return self.frequency if self.start is None else self.start


@dataclass(frozen=True)
class Spectrum(Config):
    """What the entries are divided by.

    Attributes:
        eigenvalues: "kronecker": products of the factors' eigenvalues. "corrected": a second
            moment of the gradient in their bases, updated in every step. "polar": none, as every
            singular value of the averaged gradient becomes 1 (Muon, Shampoo with beta2 = 0).
            "inverse-free": inverse factors that are updated themselves (``inverse`` says how).
        power: The direction is P^-power M, P being the estimate of H that ``operator`` gives: 1/2,
            or 1 for root-free methods.
        exponent: Power of each factor, in [-1, 0), or of a corrected eigenvalue. None: -power / k
            for k factors, -power for corrected eigenvalues.
        trace_scale: Divide L kron R by Tr L, which makes it an estimate of H (arXiv 2406.17748).
        epsilon: Added to the eigenvalues of the factors, or to the root of the corrected ones.
        relative: ``epsilon`` counts in the largest eigenvalue of the factor, or in the largest
            root of a corrected one.
        root: How inverse roots are found: "eigh", "newton" (coupled Newton) or "matmul" (products
            alone, for accelerators).
    """

    section: ClassVar[str] = "spectrum"

    eigenvalues: str = option(
        "kronecker", check=one_of("kronecker", "corrected", "polar", "inverse-free")
    )
    power: float = option(0.5, check=number("a number in (0, 1]", lambda value: 0 < value <= 1))
    exponent: float | None = option(
        None, check=or_none(number("a number in [-1, 0), or None", lambda value: -1 <= value < 0))
    )
    trace_scale: bool = option(False, check=flag)
    epsilon: float = option(1e-8, check=NONNEGATIVE)
    relative: bool = option(False, check=flag)
    root: str = option("eigh", check=one_of("eigh", "newton", "matmul"))


@dataclass(frozen=True)
class Inverse(Config):
    """How inverse factors are updated by products alone (arXiv 2402.03496).

    Attributes:
        lr: Rate of the factors.
        decay: Of the average of their log-space updates.
        damping: lambda of H + lambda I, whose KL-optimal product they approach.
        structure: "dense" or "diagonal" factors.
        precision: "full", that of other statistics, or "bfloat16" for all of the state: factors,
            their updates, and the momentum.
    """

    section: ClassVar[str] = "inverse"

    lr: float = option(0.01, check=number("a number in (0, 1]", lambda value: 0 < value <= 1))
    decay: float = option(0.5, check=DECAY)
    damping: float = option(1e-3, check=NONNEGATIVE)
    structure: str = option("dense", check=one_of("dense", "diagonal"))
    precision: str = option("full", check=one_of("full", "bfloat16"))


@dataclass(frozen=True)
class Magnitude(Config):
    """Whose length the step takes, block by block (grafting, arXiv 2309.06497).

    Attributes:
        grafting: "none"; "sgd", |M|; "adagrad", "rmsprop" (without bias correction) or "adam",
            |M / (sqrt(v) + epsilon)| with a second moment v of its own.
        beta2: Of "rmsprop" and "adam"; None for betas[1].
        epsilon: Of "adagrad", "rmsprop" and "adam".
    """

    section: ClassVar[str] = "magnitude"

    grafting: str = option("none", check=one_of("none", "sgd", "adagrad", "rmsprop", "adam"))
    beta2: float | None = option(None, check=or_none(DECAY))
    epsilon: float = option(1e-8, check=NONNEGATIVE)


@dataclass(frozen=True)
class Shapes(Config):
    """How a parameter is cut into blocks, and which of their sides have a factor.

    Attributes:
        block_size: Longest side of a block; None leaves parameters whole.
        max_dim: Sides above have no factor, which leaves the identity there.
        merge: Neighbouring dimensions are merged while their product is at most this; 0 sees every
            parameter as the matrix of its first dimension x the rest.
        vectors: Whether parameters of one dimension have a full "kronecker" factor or a
            "diagonal" second moment.
    """

    section: ClassVar[str] = "shapes"

    block_size: int | None = option(None, check=or_none(count(2)))
    max_dim: int = option(1024, check=count(1))
    merge: int = option(0, check=count(0))
    vectors: str = option("kronecker", check=one_of("kronecker", "diagonal"))


@dataclass(frozen=True)
class Storage(Config):
    """How factors and roots are held between steps; all is computed in float32 at least.

    Attributes:
        factors: "full", in the dtype of the state; or "bfloat16", in half of the memory, rounded so
            that the errors of many steps cancel (``rounding.store``).
        roots: "full"; or "packed", the upper panels of inverse roots, which is about half of the
            memory of those from side 128 on, and completed in each step.
    """

    section: ClassVar[str] = "storage"

    factors: str = option("full", check=one_of("full", "bfloat16"))
    roots: str = option("full", check=one_of("full", "packed"))


SECTIONS: dict[str, type[Config]] = {
    one.section: one for one in (Statistics, Basis, Spectrum, Inverse, Magnitude, Shapes, Storage)
}
