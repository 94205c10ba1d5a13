"""What an entry of the catalog of metrics is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

from torch import Tensor

from kronecker_probe.table.metric_info import METRIC_INFO, MetricInfo
from kronecker_probe.table.specs import Option

# metric -> (value, standard error or None)
Values: TypeAlias = Mapping[str, tuple[float, float | None]]
# (<H, P>, |H|^2, |P|^2) of each replicate of the jackknife, float64 [...], to the metric of each
Form: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class Metric:
    """A metric of an approximation P of H; its label, unit and drawing are in its ``infos``.

    Attributes:
        name: As users ask for it.
        formula: (H, P, **options) -> its values by name; raises UndefinedError where there are
            none.
        gives: The names of these values, each with a :class:`MetricInfo`; by default ``name``.
        scaled: Whether it depends on the scale of P, so that it says nothing about an operator
            whose scale is not that of H.
        options: Its options.
        rescaled: The same of the multiple of P that is nearest to H, for operators of any scale;
            None where that would say nothing.
        form: How it follows from the three inner products, which gives it held-out and population
            estimates; None where it is of the sample only.
        squared: Whether ``form`` gives its square, which an estimate may make negative.
    """

    name: str
    formula: Callable[..., Values]
    scaled: bool
    gives: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    rescaled: Callable[..., Values] | None = None
    form: Form | None = None
    squared: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "gives", self.gives or (self.name,))

    @property
    def infos(self) -> tuple[MetricInfo, ...]:
        """What readers know of each of its values."""
        return tuple(METRIC_INFO[name] for name in self.gives)


POSITIVE_DAMPING = Option(
    "damping",
    "give a positive number, for example damping=0.001",
    low=0.0,
    above=True,
    default=1e-3,
)
