"""Stable machine codes of findings and of remedies; ``docs/findings.md`` is made from them."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class _Described(StrEnum):
    """A code with a line of documentation for each member."""

    about: str

    def __new__(cls, value: str, about: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.about = about
        return member


class Code(_Described):
    """What a finding says; ``about`` says it in a line."""

    # the run
    LOSS_NOT_FINITE = "loss-not-finite", "the loss became NaN or infinite and stayed so"
    LOSS_GREW = "loss-grew", "the loss ended at more than three times its first value"
    REPEATED_EXAMPLES = "repeated-examples", "several examples have the same gradients"
    NOT_MEASURED = "not-measured", "parameters were skipped for a reason that the table holds"
    NOTHING_TO_JUDGE = "nothing-to-judge", "the table holds no cosine of an approximation"
    FORM_FITS = "form-fits", "one Kronecker product is close to H in every layer that was judged"
    FORM_FITS_WORST = "form-fits-worst", "the layers in which one Kronecker product fits H worst"
    OPTIMUM_NOT_MEASURED = "optimum-not-measured", "a rule fits badly and the optimum is unknown"
    VECTORS = "vectors", "parameters of one row or column, for which every comparison is trivial"
    KFAC_UNDEFINED = "kfac-undefined", "layers without inputs and output gradients for K-FAC"
    # why a layer is not judged
    UNDEFINED = "undefined", "no cosine of the layer is defined"
    UNDEFINED_AT_STEPS = "undefined-at-steps", "no cosine of the layer is defined at some steps"
    HELD_OUT_ONLY = "held-out-only", "the layer has held-out cosines alone"
    TRUNCATED = "truncated", "the target was truncated so far that cosines with it say nothing"
    TOO_FEW_SAMPLES = "too-few-samples", "too few independent gradient samples for any estimate"
    # the optimal Kronecker product
    CLOSE = "close-to-optimum", "a rule is as good as the best product, or nearly so"
    CLOSE_NOT_IN_USE = "close-but-not-in-use", "a rule is close, but the optimizer's own P is not"
    CLOSE_TO_POOR = "close-to-poor-optimum", "a rule is close to a best product that fits badly"
    CLOSE_TO_UNSURE = "close-to-unsure-optimum", "a rule is close to a product that may fit badly"
    FAR = "far-from-optimum", "every rule is clearly behind the best product"
    UNCERTAIN = "distance-uncertain", "the distance to the best product is lost in its error"
    KINDS_DIFFER = "kinds-differ", "no two numbers of one kind can be compared"
    # beyond it, and the rules themselves
    SECOND_PRODUCT = "second-product", "a sum of two products fits clearly better than one"
    EIGENVALUES = "corrected-eigenvalues", "corrected eigenvalues fit better than any product"
    EXPONENT = "shampoo-exponent", "Shampoo's exponent -1/4 fits worse than -1/2"
    SCALE = "scale", "a rule has the right direction and the wrong size"
    # the preconditioner in use
    IN_USE_RULE = "in-use-rule", "the optimizer's own P is far behind, mostly by its rule"
    IN_USE_BLOCKS = "in-use-blocks", "... mostly by blocks or by a side left out"
    IN_USE_STATISTICS = "in-use-statistics", "... mostly by the statistics in its factors"
    IN_USE_DAMPING = "in-use-damping", "... mostly by epsilon"
    IN_USE_STALENESS = "in-use-staleness", "... mostly by staleness"
    IN_USE_UNEXPLAINED = "in-use-unexplained", "... and the table does not say by what"
    BEHIND_ITS_RULE = "behind-its-rule", "the factors in use lag behind fresh ones"
    OFF_ITS_RULE = "off-its-rule", "the factors in use differ from fresh ones of another target"
    # refreshes along a run
    STALENESS_UNSEEN = "staleness-unseen", "every probe fell right after a refresh"
    STALENESS_COST = "staleness-cost", "the largest loss from staleness that a probe saw"
    STALENESS_FREE = "staleness-free", "no probe saw a measurable loss from staleness"
    # the factors
    ROUNDING_AMPLIFIED = "rounding-amplified", "directions without a correct digit are scaled up"
    BASIS_OFF = "basis-off", "the eigenbasis in use no longer diagonalizes its factor"

    @property
    def subject(self) -> str:
        """What the finding is about, in a few words: shared by codes that answer one question."""
        return _SUBJECTS.get(self, str(self).replace("-", " "))


_SUBJECTS = {
    Code.LOSS_NOT_FINITE: "divergence",
    Code.LOSS_GREW: "divergence",
    Code.FORM_FITS: "worst approximated layers",
    Code.FORM_FITS_WORST: "worst approximated layers",
    Code.TRUNCATED: "truncated target",
    Code.TOO_FEW_SAMPLES: "too few gradient samples",
    Code.HELD_OUT_ONLY: "undefined",
    Code.UNDEFINED_AT_STEPS: "undefined",
    **dict.fromkeys(
        (
            Code.CLOSE,
            Code.CLOSE_NOT_IN_USE,
            Code.CLOSE_TO_POOR,
            Code.CLOSE_TO_UNSURE,
            Code.FAR,
            Code.UNCERTAIN,
            Code.KINDS_DIFFER,
        ),
        "distance to the optimum",
    ),
    Code.SECOND_PRODUCT: "Kronecker rank",
    Code.EIGENVALUES: "eigenvalues",
    Code.EXPONENT: "Shampoo's exponent",
    Code.IN_USE_RULE: "rule of the preconditioner in use",
    Code.IN_USE_BLOCKS: "blocks of the preconditioner in use",
    Code.IN_USE_STATISTICS: "statistics of the preconditioner in use",
    Code.IN_USE_DAMPING: "damping of the preconditioner in use",
    Code.IN_USE_STALENESS: "staleness of the preconditioner in use",
    Code.IN_USE_UNEXPLAINED: "preconditioner in use",
    Code.BEHIND_ITS_RULE: "staleness",
    Code.OFF_ITS_RULE: "factors in use",
    Code.STALENESS_UNSEEN: "staleness not seen",
    Code.STALENESS_COST: "cost of staleness",
    Code.STALENESS_FREE: "cost of staleness",
    Code.ROUNDING_AMPLIFIED: "directions below rounding",
    Code.BASIS_OFF: "basis in use",
}


class Remedy(_Described):
    """What to do about a finding; ``about`` is the advice, with the names of numbers in braces."""

    NONE = "", ""
    LOWER_LEARNING_RATE = (
        "lower-learning-rate",
        "the run diverged, so lower the learning rate before reading anything else",
    )
    MEASURE_ONCE = (
        "measure-once",
        "if they are copies, measure each example once: copies make the standard errors too small",
    )
    READ_REASONS = "read-reasons", "the table says why for each of them"
    MEASURE_COSINE = "measure-cosine", "measure 'cosine' of at least one layer"
    MEASURE_OPTIMAL = "measure-optimal", "measure the approximation 'optimal'"
    JUDGE_OTHER_RULES = (
        "judge-other-rules",
        "judge Shampoo² or the optimal product there, which need the gradients alone",
    )
    GO_BEYOND = "go-beyond", "use corrected eigenvalues, where they fit better than any product"
    ADD_POPULATION = "add-population", "add the estimate 'population'"
    ADD_PLUGIN = "add-plugin", "add the estimate 'plugin'"
    ADD_ESTIMATE = "add-estimate", "add the estimate 'population' or 'plugin'"
    KEEP_MORE = (
        "keep-more",
        "give the window more memory or a higher rank (window_memory of a Tracker, memory or rank "
        "of a GradientWindow), or make it shorter",
    )
    MEASURE_AT_LEAST = "measure-at-least", "measure at least {more} examples"
    MEASURE_MORE = "measure-more", "measure more examples, until all have a population estimate"
    MEASURE_BETWEEN = "measure-between", "{least} to {most} examples would settle it"
    AT_THRESHOLD = (
        "at-threshold",
        "the difference lies at the threshold of 0.02, so more examples will not settle it",
    )
    REFITS = "refits", "refits=8 in kp.compare gives a standard error in place of the bracket"
    REFITS_LATER = (
        "refits-later",
        "a run has only the bracket as error; kp.compare of the same samples with refits=8 gives a "
        "standard error",
    )
    MAKE_OPTIMAL = (
        "make-optimal",
        "kp.approximate(H, 'optimal') makes that product; no optimizer preset follows it",
    )
    CORRECT_EIGENVALUES = "correct-eigenvalues", "the presets SOAP and EShampoo correct them"
    SQUARE = "square", "the preset ShampooSquared has the exponent -1/2 with the trace scale"
    JUDGE_BY_STEPS = (
        "judge-by-steps",
        "judge the exponent by its steps, which this cosine does not measure",
    )
    RESCALE = "rescale", "graft its step length, or rescale it"
    ANOTHER_RULE = "another-rule", "use the preset whose rule fits best of those measured, if any"
    LARGER_BLOCKS = "larger-blocks", "raise shapes.block_size, or leave it out"
    BOTH_SIDES = (
        "both-sides",
        "if shapes.max_dim leaves the other side out, raise it above both sides",
    )
    OTHER_STATISTICS = "other-statistics", "change what the factors average, or the target"
    LOWER_EPSILON = "lower-epsilon", "lower spectrum.epsilon, as far as training stays stable"
    RAISE_EPSILON = "raise-epsilon", "raise spectrum.epsilon to {suggested_epsilon:.1e}"
    KEEP_EPSILON = (
        "keep-epsilon",
        "a larger spectrum.epsilon would prevent that, but damping costs {damping:.3f} of squared "
        "error already",
    )
    REFRESH = (
        "refresh-more",
        "refresh more often (a lower basis.frequency), or use an adaptive basis.tolerance of .1",
    )
    NO_REFRESH = "refresh-enough", "refreshing more often (basis.frequency) would not help"
    TARGET_TRAJECTORY = (
        "target-trajectory",
        "target='trajectory' leaves batches and labels out of the comparison",
    )
    PROBE_ELSEWHERE = (
        "probe-elsewhere",
        "probe at other steps (for example --probe-offset {offset:.0f})",
    )
