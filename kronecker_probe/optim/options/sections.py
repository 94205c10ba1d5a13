"""The choices that make an optimizer of this family: typed, checked, independent of each other.

Every variant rotates the gradient, divides it entrywise and rotates back (Eschenhagen et al., arXiv
2506.03595), so that four choices say what it is: what the factors accumulate, when and how their
bases are refreshed, what the entries are divided by, and whose length the step takes. A fifth says
how a parameter is cut into matrices. ``presets`` has the named combinations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kronecker_probe.optim.options.base import Config

RULES = ("gradient", "whitened", "kfac")
REDUCTIONS = ("mean", "sum")
ACCUMULATES = ("average", "sum")


@dataclass(frozen=True)
class Statistics(Config):
    """What the factors accumulate.

    Attributes:
        rule: "gradient": L = E[G G^T], R = E[G^T G]. "whitened": each factor sees the other's
            inverse, L = E[G R^{q-1} G^T] / Tr R^q with what is held of R (the trace-power family;
            q = 0 is KL-Shampoo, arXiv 2509.03378). "kfac": L = E[d d^T], R = E[a a^T] of a layer's
            inputs a and its output gradients d of every datum, for an optimizer that was attached
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
            those of the data.
    """

    section: ClassVar[str] = "statistics"

    rule: str = "gradient"
    q: float = 0.0
    accumulate: str = "average"
    bias_correction: bool = True
    every: int = 1
    batch_size: int = 1
    initial: float = 0.0
    loss_reduction: str = "mean"

    def check(self) -> None:
        self._one_of("rule", RULES)
        self._number("q", lambda value: value in (0, 0.5), "0 or 1/2")
        self._one_of("accumulate", ACCUMULATES)
        self._flag("bias_correction")
        self._count("every")
        self._count("batch_size")
        self._nonnegative("initial")
        self._one_of("loss_reduction", REDUCTIONS)


SOLVERS = ("eigh", "qr")
CARRIES = ("keep", "transport")


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

    frequency: int = 10
    tolerance: float | None = None
    solver: str = "eigh"
    max_iterations: int = 1
    start: int | None = None
    carry: str = "keep"
    marginals: bool = False
    stagger: bool = False

    def check(self) -> None:
        self._count("frequency")
        if self.tolerance is not None:
            self._number("tolerance", lambda value: 0 < value < 1, "a number in (0, 1), or None")
        self._one_of("solver", SOLVERS)
        self._count("max_iterations")
        if self.start is not None:
            self._count("start")
        self._one_of("carry", CARRIES)
        self._flag("marginals")
        self._flag("stagger")

    @property
    def first(self) -> int:
        """The step of the first refresh."""
        return self.frequency if self.start is None else self.start


EIGENVALUES = ("kronecker", "corrected", "polar", "inverse-free")
ROOTS = ("eigh", "newton", "matmul")


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

    eigenvalues: str = "kronecker"
    power: float = 0.5
    exponent: float | None = None
    trace_scale: bool = False
    epsilon: float = 1e-8
    relative: bool = False
    root: str = "eigh"

    def check(self) -> None:
        self._one_of("eigenvalues", EIGENVALUES)
        self._number("power", lambda value: 0 < value <= 1, "a number in (0, 1]")
        if self.exponent is not None:
            self._number("exponent", lambda value: -1 <= value < 0, "a number in [-1, 0), or None")
        self._flag("trace_scale")
        self._nonnegative("epsilon")
        self._flag("relative")
        self._one_of("root", ROOTS)


STRUCTURES = ("dense", "diagonal")
PRECISIONS = ("full", "bfloat16")


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

    lr: float = 0.01
    decay: float = 0.5
    damping: float = 1e-3
    structure: str = "dense"
    precision: str = "full"

    def check(self) -> None:
        self._number("lr", lambda value: 0 < value <= 1, "a number in (0, 1]")
        self._decay("decay")
        self._nonnegative("damping")
        self._one_of("structure", STRUCTURES)
        self._one_of("precision", PRECISIONS)


GRAFTING = ("none", "sgd", "adagrad", "rmsprop", "adam")


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

    grafting: str = "none"
    beta2: float | None = None
    epsilon: float = 1e-8

    def check(self) -> None:
        self._one_of("grafting", GRAFTING)
        if self.beta2 is not None:
            self._decay("beta2")
        self._nonnegative("epsilon")


VECTORS = ("kronecker", "diagonal")


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

    block_size: int | None = None
    max_dim: int = 1024
    merge: int = 0
    vectors: str = "kronecker"

    def check(self) -> None:
        if self.block_size is not None:
            self._count("block_size", 2)
        self._count("max_dim")
        self._count("merge", 0)
        self._one_of("vectors", VECTORS)


FACTOR_STORAGE = ("full", "bfloat16")
ROOT_STORAGE = ("full", "packed")


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

    factors: str = "full"
    roots: str = "full"

    def check(self) -> None:
        self._one_of("factors", FACTOR_STORAGE)
        self._one_of("roots", ROOT_STORAGE)


SECTIONS: dict[str, type[Config]] = {
    one.section: one for one in (Statistics, Basis, Spectrum, Inverse, Magnitude, Shapes, Storage)
}
