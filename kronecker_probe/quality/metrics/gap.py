"""Where a layer's Kronecker error comes from, from the best product to the one in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, final

import pandas as pd

from kronecker_probe.approximations import approximate
from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
    UnsupportedError,
    unknown_name,
)
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.quality.metrics.frobenius import InnerProducts
from kronecker_probe.table.codes import reason_of

T = TypeVar("T")
PerLayer: TypeAlias = Mapping[str, T] | T
Held: TypeAlias = Operator | GradientSamples
Link: TypeAlias = tuple[str, Callable[[], Operator]]

COLUMNS = ("parameter", "m", "n", "rule", "component", "contribution", "error", "note")
WHOLE = "samples"  # the name of a layer that came without one, as in compare


@final
@dataclass(frozen=True)
class GapDecomposition:
    """The squared error 1 - cos^2 of each layer as a sum of contributions.

    Attributes:
        table: One row per layer and component, in the order of the chain; columns parameter, m, n,
            rule, component ("kronecker-limit", "rule", "labels", "batch-gradients",
            "staleness"), contribution (its part of the squared error, possibly negative), error
            (1 - cos^2 reached so far, the sum of the contributions up to it) and note (why a
            contribution is undefined).
    """

    table: pd.DataFrame

    @property
    def total(self) -> pd.Series[Any]:
        """1 - cos^2 at the end of each layer's chain."""
        # not the sum of the contributions, of which one after an undefined link is unknown
        ends = self.table.groupby("parameter", sort=False)["error"].last()
        return ends.rename("total")

    def plot(self, **options: Any) -> Any:
        """Stacked bars, a layer each; returns the Axes (see ``kp.plots.plot_gap``)."""
        from kronecker_probe.plots.gap import plot_gap

        return plot_gap(self.table, **options)

    def __repr__(self) -> str:
        return self._wide().to_string(float_format="{:.4f}".format)

    def _repr_html_(self) -> str:
        return str(self._wide().to_html(float_format="{:.4f}".format))

    def _wide(self) -> pd.DataFrame:
        components = list(dict.fromkeys(self.table["component"]))
        wide = self.table.pivot_table(
            index="parameter",
            columns="component",
            values="contribution",
            sort=False,
            dropna=False,
        )
        wide = wide.reindex(columns=components).assign(total=self.total)
        return wide.rename_axis(index=None, columns=None)


def decompose_gap(
    target: PerLayer[GradientSamples],
    rule: str = "shampoo-squared",
    *,
    labels: PerLayer[GradientSamples] | None = None,
    batches: PerLayer[GradientSamples] | None = None,
    held: PerLayer[Held] | None = None,
) -> GapDecomposition:
    """Split the error of an optimizer's preconditioner into its causes, layer by layer.

    The error of an operator P is 1 - cos^2(H, P), its squared relative error at the best scale,
    always against the one target H. It is followed along a chain in which one thing changes at a
    time, and each contribution is the change in the error:

    1. "kronecker-limit": P = the optimal Kronecker product of H; 1 - sigma_1^2 / |H|^2, which no
       rule can avoid.
    2. "rule": P = the rule applied to the gradient samples of H.
    3. "labels": the rule on gradient samples for the true labels, as optimizers see them.
    4. "batch-gradients": the rule on mini-batch gradients.
    5. "staleness": the preconditioner in use: the optimizer's operator, or the rule on the
       gradient samples of an older checkpoint.

    Links that are not given are left out. The contributions add up to the error at the end of the
    chain exactly; each but the first may be negative, where one cause undoes another. Where a
    link is undefined or does not fit into memory, so is its contribution and the next one, which
    would include it; the notes say why. These are
    plug-in numbers: with few samples much of the "kronecker-limit" is sampling noise, so compare
    N with that of ``kp.samples_needed``.

    Args:
        target: Samples of H, "ggn" or "fisher": what ``kp.capture`` returned, any mapping of names
            to samples, or one set.
        rule: The name of an approximation, as for ``kp.approximate``.
        labels: Gradient samples for the true labels ("empirical-fisher"), in the same form.
        batches: Mini-batch gradients (``kp.batch_gradients``), likewise. Where they are held as
            matrices, a rule that needs factors ("kfac") has none; its row says so.
        held: Operators, or samples of an older checkpoint to which the rule is applied; layers
            that it lacks have no "staleness".

    Raises:
        InvalidInputError: Nothing to decompose, or samples of another layer's shape, or of a
            layer too few.
        UnknownNameError: No such approximation, or a layer that ``target`` has not.
    """
    layers = _layers("target", target, GradientSamples)
    given = {
        "labels": _matching("labels", labels, layers, GradientSamples, partial=False),
        "batches": _matching("batches", batches, layers, GradientSamples, partial=False),
        "held": _matching("held", held, layers, (Operator, GradientSamples), partial=True),
    }
    rows: list[dict[str, Any]] = []
    for name, samples in layers.items():
        moment = SecondMoment(samples)
        links = _chain(moment, rule, *(part.get(name) for part in given.values()))
        m, n = samples.shape
        shared = {"parameter": name, "m": m, "n": n, "rule": rule}
        rows += [shared | row for row in follow(moment, links)]
    return GapDecomposition(pd.DataFrame(rows, columns=list(COLUMNS)))


def _chain(
    target: SecondMoment,
    rule: str,
    labels: GradientSamples | None,
    batches: GradientSamples | None,
    held: Held | None,
) -> list[Link]:
    links: list[Link] = [
        ("kronecker-limit", lambda: approximate(target, "optimal")),
        ("rule", lambda: approximate(target, rule)),
    ]
    if labels is not None:
        links.append(("labels", lambda: approximate(SecondMoment(labels), rule)))
    if batches is not None:
        links.append(("batch-gradients", lambda: approximate(SecondMoment(batches), rule)))
    if isinstance(held, Operator):
        links.append(("staleness", lambda: held))
    elif held is not None:
        links.append(("staleness", lambda: approximate(SecondMoment(held), rule)))
    return links


def follow(target: SecondMoment, links: list[Link]) -> list[dict[str, Any]]:
    """A row a link: the error that it reaches, less that of the link before.

    Args:
        target: H.
        links: (component, a function that makes its operator), in the order of the chain.

    Returns:
        Dicts of component, contribution, error (1 - cos^2) and note.

    After an undefined link the change is that of two causes together, and no contribution.
    """
    rows: list[dict[str, Any]] = []
    reached, undefined = 0.0, list[str]()
    for component, make in links:
        error, note = _squared_error(target, make)
        contribution = error - reached
        if math.isnan(error):
            undefined.append(component)
        else:
            if undefined:
                note = f"its change of {contribution:.3g} includes {' and '.join(undefined)}, "
                note += "which is undefined"
                contribution = math.nan
            reached, undefined = error, []
        rows.append(
            {"component": component, "contribution": contribution, "error": error, "note": note}
        )
    return rows


def _squared_error(target: SecondMoment, make: Callable[[], Operator]) -> tuple[float, str | None]:
    """1 - cos^2(H, P), or NaN and why."""
    try:
        products = InnerProducts.of(target, make())
    except (UnsupportedError, MemoryBudgetError) as error:
        return math.nan, reason_of(error)
    if products.undefined:
        return math.nan, products.undefined
    return max(0.0, 1.0 - products.cosine**2), None


def _layers(name: str, given: object, kinds: Any) -> dict[str, Any]:
    if isinstance(given, kinds):
        given = {WHOLE: given}
    if not isinstance(given, Mapping):
        raise InvalidInputError(
            f"decompose_gap got {name}= of type {type(given).__name__}; give the samples of "
            "kp.capture, GradientSamples, or a mapping of names to them."
        )
    if not given:
        raise InvalidInputError(f"decompose_gap got an empty {name}=; give at least one layer.")
    for layer, one in given.items():
        if not isinstance(one, kinds):
            raise InvalidInputError(
                f"decompose_gap: {name}[{layer!r}] is a {type(one).__name__}; give GradientSamples"
                + (" or an operator." if isinstance(kinds, tuple) else ".")
            )
    return dict(given)


def _matching(
    name: str, given: object, layers: Mapping[str, GradientSamples], kinds: Any, *, partial: bool
) -> dict[str, Any]:
    """The layers of one more source, checked against those of the target."""
    if given is None:
        return {}
    found = _layers(name, given, kinds)
    for layer, one in found.items():
        if layer not in layers:
            raise unknown_name(f"layer of {name}", layer, layers)
        if one.shape != layers[layer].shape:
            (m, n), (r, s) = layers[layer].shape, one.shape
            raise InvalidInputError(
                f"decompose_gap: {name}[{layer!r}] is {r} x {s}, the target there is {m} x {n}."
            )
    missing = [layer for layer in layers if layer not in found]
    if missing and not partial:
        raise InvalidInputError(
            f"decompose_gap: {name}= lacks {missing[0]!r}, which the target has; capture the same "
            "layers for both."
        )
    return found
