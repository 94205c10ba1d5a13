"""What an estimate is: a number that names its estimand, with its error bar or its abstention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from scipy.special import stdtrit

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.quality.metrics.catalog import SQUARED
from kronecker_probe.table.codes import Reason, ReasonCode
from kronecker_probe.table.columns import KINDS

# Effective examples under which no population or held-out number is given.
MIN_N_EFF = 30.0
# Above this share of N, N_eff is low because N is.
MOSTLY = 0.8
# Times N that are worth the trouble of measuring again.
LEAST_MORE = 1.3
LEVEL = 0.95


@final
@dataclass(frozen=True)
class Bound:
    """One side of a bracket: a number that is biased to that side.

    Attributes:
        value: The held-out or the in-sample number.
        stderr: Its standard error.
        df: Degrees of freedom of that.
    """

    value: float
    stderr: float
    df: float

    def reach(self, level: float) -> float:
        """Half the width of its confidence interval."""
        return _half_width(self.stderr, self.df, level)


@final
@dataclass(frozen=True)
class Estimate:
    """A quality number with its standard error.

    The errors ("relative_error", "best_scale_error") are estimated as *squared* errors, because
    only those have unbiased estimates: their ``value`` and ``stderr`` are those of the square, and
    the value is negative about half of the time when the true error is 0. :attr:`display` takes
    the root. Nothing is clipped: a cosine may exceed 1.

    Attributes:
        metric: "norm", "trace", "cosine", "relative_error", "best_scale_error", "best_scale".
        approximation: Its label; None for the norm and the trace of H itself.
        kind: What is estimated. "plugin": the sample matrix itself. "held-out": the quality of
            factors fitted on half of the examples. "population": the limit of infinitely many.
        value: The number, a squared error for the errors; NaN where it abstains or is undefined.
        stderr: Its standard error; NaN for plug-in numbers, whose bias is the larger part.
        n: Independent examples N (examples of positive weight).
        n_eff: (sum |G_i|^2)^2 / sum |G_i|^4, weights included: how many examples carry the numbers.
        df: Degrees of freedom of Student's t in :meth:`interval`.
        note: Why it abstains (a :class:`~kronecker_probe.table.codes.Reason`, with its code), or
            how it was found where that matters.
        bracket: For a number without a standard error, the held-out and the in-sample number,
            one too pessimistic and one too optimistic; :meth:`interval` reaches from the one's
            confidence interval to the other's.
        copies: Of the norm of H: how many examples have the same gradients as another one, where
            some have.
    """

    metric: str
    approximation: str | None
    kind: str
    value: float
    stderr: float
    n: int
    n_eff: float
    df: float = math.inf
    note: str = ""
    bracket: tuple[Bound, Bound] | None = None
    copies: int | None = None

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The two-sided confidence interval, on the scale of ``value``.

        Args:
            level: Its coverage, between 0 and 1; of a bracket, that of either of its sides.

        Returns:
            (low, high); NaN where there is no standard error.

        Raises:
            InvalidInputError: ``level`` is not between 0 and 1.
        """
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
            raise InvalidInputError(f"interval got level={level!r}; give it between 0 and 1.")
        if self.bracket is not None:
            ends = [bound.value - bound.reach(level) for bound in self.bracket]
            ends += [bound.value + bound.reach(level) for bound in self.bracket]
            return min(*ends, self.value), max(*ends, self.value)
        half = _half_width(self.stderr, self.df, level)
        return self.value - half, self.value + half

    @property
    def display(self) -> float:
        """The value as tables show it: an error is the root of its square, 0 where negative."""
        return self._shown(self.value)

    def display_interval(self, level: float = LEVEL) -> tuple[float, float]:
        """:meth:`interval` as tables show it: roots for the errors."""
        low, high = self.interval(level)
        return self._shown(low), self._shown(high)

    def _shown(self, value: float) -> float:
        if self.metric not in SQUARED or math.isnan(value):
            return value
        return math.sqrt(max(0.0, value))

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"undefined ({self.note})" if self.note else "undefined"
        if self.bracket is not None:
            low, high = self.display_interval()
            return f"{self.display:.3f} in [{low:.3f}, {high:.3f}]"
        if math.isnan(self.stderr):
            return f"{self.display:.3f}"
        if self.metric in SQUARED:
            low, high = self.display_interval()
            return f"{self.display:.3f} [{low:.3f}, {high:.3f}]"
        return f"{self.value:.3f} ± {self.stderr:.3f}"

    def __repr__(self) -> str:
        of = "" if self.approximation is None else f" of {self.approximation}"
        counts = f"N={self.n}, N_eff={self.n_eff:.0f}"
        note = f"; {self.note}" if self.note and not math.isnan(self.value) else ""
        return f"Estimate({self.kind} {self.metric}{of}: {self}; {counts}{note})"


def _half_width(stderr: float, df: float, level: float) -> float:
    return 0.0 if stderr == 0 else float(stdtrit(df, 0.5 + level / 2)) * stderr


def check_kinds(kinds: str | Iterable[str]) -> tuple[str, ...]:
    """The kinds asked for, each once.

    Raises:
        UnknownNameError: No such kind of estimate.
        InvalidInputError: There is none at all.
    """
    if not isinstance(kinds, str) and not isinstance(kinds, Iterable):
        raise InvalidInputError(f"estimates={kinds!r}; name one or several of {', '.join(KINDS)}.")
    named = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not named:
        raise InvalidInputError(f"No kind of estimate is asked for; name some of {KINDS}.")
    for kind in named:
        if kind not in KINDS:
            raise unknown_name("kind of estimate", kind, KINDS)
    return tuple(dict.fromkeys(named))


def abstention(n: int, n_eff: float) -> Reason:
    """Why so few effective examples give no estimate, and what to do; empty if they do."""
    if n_eff >= MIN_N_EFF:
        return Reason("")
    # just as many would leave half of all samples below again
    needed = math.ceil(n * max(MIN_N_EFF / max(n_eff, 1.0), LEAST_MORE) / 10) * 10
    # three digits, for 29.8 is not yet 30
    few = f"N_eff = {n_eff:.3g} of N = {n}: a few examples carry the numbers, and"
    if n < MIN_N_EFF or n_eff > MOSTLY * n:
        few = f"N = {n} examples (N_eff = {n_eff:.3g}) are few:"
    return Reason(
        f"{few} under {MIN_N_EFF:.0f} effective examples no estimate can be trusted; measure about "
        f"{needed} examples",
        ReasonCode.FEW_EXAMPLES,
    )
