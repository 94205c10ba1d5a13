"""What readers know of each metric: its label, its unit, which way is better and how to draw it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kronecker_probe.errors import InvalidInputError

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class MetricInfo:
    """How figures, report and terminal show a metric of an approximation P of H.

    Attributes:
        name: As in the column ``metric`` of the table.
        label: In words, as on an axis.
        unit: Of the values; "" for pure numbers.
        better: Which values are better; None where neither is, as for a scale.
        limits: The smallest and the largest value that is possible; None for no bound.
        drawing: The scale of its axis: "linear", or "log" where the values are positive and span
            more than a decade.
        estimable: Whether it has estimates of the population; else it is of the sample only.
    """

    name: str
    label: str
    unit: str = ""
    better: Better | None = None
    limits: tuple[float | None, float | None] = (None, None)
    drawing: Literal["linear", "log"] = "linear"
    estimable: bool = False

    @property
    def bounded(self) -> bool:
        """Whether the optimal Kronecker product has the best value of all Kronecker products."""
        return self.estimable and self.better is not None

    @property
    def axis(self) -> str:
        """The label with its unit, "divergence (nats)"."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


METRIC_INFO: dict[str, MetricInfo] = {}
"""Metric -> its info, in the order in which they are listed; users' metrics join it."""


def add_metric_info(info: MetricInfo) -> MetricInfo:
    """Make a metric known to the readers.

    Raises:
        InvalidInputError: Another metric has the name, or it holds one of ``: , =``.
    """
    if not info.name or set(info.name) & set(":,= "):
        raise InvalidInputError(
            f"A metric can't be called {info.name!r}; use letters, digits and underscores."
        )
    if info.name in METRIC_INFO:
        raise InvalidInputError(f"A metric {info.name!r} is there already; choose another name.")
    METRIC_INFO[info.name] = info
    return info


def metric_info(name: str) -> MetricInfo:
    """The info of a metric as tables name it, "kl_divergence:damping=0.001".

    Args:
        name: With or without options, which the label then shows behind it. A metric of a user
            whose module was not imported has its name as its label.
    """
    base, _, options = name.partition(":")
    info = METRIC_INFO.get(base) or MetricInfo(base, base.replace("_", " "))
    if not options:
        return info
    return replace(info, name=name, label=f"{info.label}, {options.replace(',', ', ')}")


for _info in (
    MetricInfo(
        "cosine", "cosine similarity to H", better="higher", limits=(-1.0, 1.0), estimable=True
    ),
    MetricInfo(
        "relative_error",
        "relative error ‖H − P‖ / ‖H‖",
        better="lower",
        limits=(0.0, None),
        drawing="log",
        estimable=True,
    ),
    MetricInfo(
        "best_scale_error",
        "relative error at the best scale",
        better="lower",
        limits=(0.0, 1.0),
        drawing="log",
        estimable=True,
    ),
    MetricInfo("best_scale", "best scale c of c·P", drawing="log", estimable=True),
    MetricInfo("trace_ratio", "trace ratio Tr P / Tr H", limits=(0.0, None), drawing="log"),
    MetricInfo(
        "largest_error_eigenvalue",
        "largest eigenvalue of the error, ‖H − P‖₂ / ‖H‖₂",
        better="lower",
        limits=(0.0, None),
        drawing="log",
    ),
    MetricInfo(
        "off_diagonal_mass",
        "basis error: what P's eigenbasis misses of H",
        better="lower",
        limits=(0.0, 1.0),
        drawing="log",
    ),
    MetricInfo(
        "eigenvalue_error",
        "eigenvalue error in P's eigenbasis",
        better="lower",
        limits=(0.0, None),
        drawing="log",
    ),
    MetricInfo("kl_divergence", "KL divergence", "nats", "lower", (0.0, None), "log"),
    MetricInfo("stein_divergence", "Stein divergence", "nats", "lower", (0.0, None), "log"),
    MetricInfo(
        "direction_cosine",
        "cosine of the steps that H and P make of a gradient",
        better="higher",
        limits=(-1.0, 1.0),
    ),
    MetricInfo(
        "direction_length_ratio",
        "length of P's step over that of H's step",
        limits=(0.0, None),
        drawing="log",
    ),
):
    add_metric_info(_info)
