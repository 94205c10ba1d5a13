"""The codes of the measurement table: what a reader may rely on, where ``note`` is for people."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Described(StrEnum):
    """A code whose ``about`` says in a line what it means."""

    about: str

    def __new__(cls, value: str, about: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.about = about
        return member


class ReasonCode(Described):
    """Why a number is undefined, an estimate abstains or a parameter was not measured."""

    # A parameter without any number (rows of the metric "skipped").
    NOT_SELECTED = "not-selected", "`layers=` leaves the parameter out"
    FROZEN = "frozen", "the parameter does not require a gradient"
    NO_GRADIENT = (
        "no-gradient",
        "the loss does not depend on it, or it has no gradient yet",
    )
    NOT_MEASURABLE = "not-measurable", "no layer rule and no fallback can separate the examples"
    # An estimate that abstains, while the plug-in number may be defined.
    FEW_EXAMPLES = "few-examples", "too few effective examples for any estimate"
    WEAK_DIRECTION = "weak-direction", "an inverse rests on too few effective examples"
    NOT_INDEPENDENT = (
        "not-independent",
        "the gradient samples are batches or a trajectory",
    )
    NOT_POSITIVE = "not-positive", "a squared norm over distinct examples is not positive"
    # An approximation or a metric that does not exist for these samples.
    NO_FACTORS = "no-factors", "the gradient samples have no layer inputs and output gradients"
    UNSUPPORTED = "unsupported", "the approximation or metric is not defined for these samples"
    MEMORY = "memory", "the computation would need more memory than there is"
    ZERO = "zero", "H or P is zero"
    NOT_FINITE = "not-finite", "H, P or a factor is not finite"
    OUT_OF_RANGE = "out-of-range", "the scale of H is beyond what float64 can score"
    NOT_CONVERGED = "not-converged", "an iteration did not converge"
    UNDEFINED = "undefined", "undefined for another reason, which the note says"
    # The optimizer's state.
    NO_PRECONDITIONER = (
        "no-preconditioner",
        "the optimizer has no preconditioner for it (yet)",
    )
    IN_STATISTICS = "in-statistics", "the part is contained in `in_use_statistics`"


class Interval(Described):
    """What the columns ``low`` and ``high`` of an estimate are."""

    CONFIDENCE = "confidence", "the 95% interval of the standard error in `stderr`"
    ROOT = "root", "the roots of the 95% interval of a squared error"
    BRACKET = "bracket", "from the held-out number to the in-sample one, each with its error"


class Reason(str):
    """A message for people that carries its code.

    Attributes:
        code: A member of :class:`ReasonCode`.
    """

    __slots__ = ("code",)
    code: ReasonCode

    def __new__(cls, message: str, code: ReasonCode = ReasonCode.UNDEFINED) -> Self:
        self = super().__new__(cls, message)
        self.code = code
        return self


def code_of(reason: object) -> ReasonCode:
    """The code that a reason or an error carries; "undefined" for any other message."""
    return ReasonCode(getattr(reason, "code", ReasonCode.UNDEFINED))


def reason_of(error: BaseException) -> Reason:
    """The message of an error, with its code."""
    return Reason(str(error), code_of(error))
