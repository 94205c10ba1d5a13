"""Which route is cheapest: operation counts and bytes for each, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kronecker_probe.errors import MemoryBudgetError, UnsupportedError, unknown_name
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.linalg.memory import available_bytes
from kronecker_probe.operators.second_moment.cost_model import OPERATIONS, Machine, machine_of
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for, ways_of
from kronecker_probe.operators.second_moment.routes.one_sided import OneSided, one_sided_bytes

# Pairs of half steps that the optimal product takes, a typical number.
TYPICAL_ROUNDS = 12
# Matrices up to this size are read from a cache, so many times faster than from memory.
CACHED_SIZE, CACHED = 1024, 4


@final
@dataclass(frozen=True)
class Step:
    """One sum over the samples, and the way it is computed.

    Attributes:
        operation: "left", "right" (half steps), "forms" (inner products with Kronecker
            products), "diagonal", "pairs" (the norm) or "apply".
        way: "factors", or "matrices" formed in chunks.
        seconds: Predicted time.
    """

    operation: str
    way: str
    seconds: float


@dataclass(frozen=True)
class RouteCost:
    """What one route would cost for the norm and all six approximations.

    Attributes:
        route: "sample", "parameter" or "dense"; "one-sided" where none of them fits.
        seconds: Predicted time; infinite where the route cannot hold the samples.
        peak_bytes: Predicted memory above the samples.
        reason: Why the route is impossible, empty where it is not.
        steps: What each sum over the samples takes, and in which way; parameter space only.
    """

    route: str
    seconds: float
    peak_bytes: float
    reason: str = ""
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The route taken and the ones that it was chosen over.

    Attributes:
        route: The route taken.
        costs: One entry per route.
        asked: "auto", or the route that the caller chose.
    """

    route: str
    costs: tuple[RouteCost, ...]
    asked: str

    @property
    def seconds(self) -> float:
        """Predicted seconds of the route taken."""
        return next(c.seconds for c in self.costs if c.route == self.route)

    def __str__(self) -> str:
        lines = ["route        seconds     GB"]
        for cost in self.costs:
            mark = "->" if cost.route == self.route else "  "
            numbers = (
                f"{cost.seconds:10.2g} {cost.peak_bytes / 1e9:6.2f}"
                if math.isfinite(cost.seconds)
                else f"  {cost.reason}"
            )
            lines.append(f"{mark} {cost.route:9s}{numbers}")
            lines += [f"     {s.operation:9s}{s.seconds:8.2g}  {s.way}" for s in cost.steps]
        return "\n".join(lines)


def make_plan(samples: GradientSamples, route: str = "auto") -> Plan:
    """Choose a route for ``samples``.

    Raises:
        UnknownNameError: No such route.
        UnsupportedError: The route asked for cannot hold the samples.
        MemoryBudgetError: Nothing that was asked for fits, not even norm, diagonal and the factor
            of the smaller side; the message says the GB.
    """
    costs = tuple(cost(samples) for cost in (_sample, _parameter, _dense))
    if route != "auto":
        chosen = next((c for c in costs if c.route == route), None)
        if chosen is None:
            raise unknown_name("route", route, ["auto", *(c.route for c in costs)])
        if chosen.reason:
            raise UnsupportedError(f"route={route!r}: {chosen.reason}; use route='auto'.")
        _require(chosen, samples)
        return Plan(route, costs, route)
    free = available_bytes(samples.device)
    fitting = [c for c in costs if not c.reason and c.peak_bytes <= free]
    if not fitting:
        # norm, diagonal and the smaller side's factor of a large embedding need little
        part = RouteCost(OneSided.name, _parameter(samples).seconds, one_sided_bytes(samples))
        if min(samples.shape) < max(samples.shape) and part.peak_bytes <= free:
            return Plan(part.route, (*costs, part), route)
        possible = [c for c in costs if not c.reason]
        _require(min(possible, key=lambda c: c.peak_bytes), samples)
    return Plan(min(fitting, key=lambda c: c.seconds).route, costs, route)


def _require(cost: RouteCost, samples: GradientSamples) -> None:
    device = samples.device
    free = available_bytes(device)
    if cost.peak_bytes > free:
        raise MemoryBudgetError(
            f"H of {samples!r} by route={cost.route!r} needs {cost.peak_bytes / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free on {device}; use fewer samples, a part of the layer "
            "(samples.block), or another route."
        )


def _eigen_seconds(machine: Machine, size: float) -> float:
    return 9 * size**3 / machine.eigh


def _sample(s: GradientSamples) -> RouteCost:
    if s.n_positions != 1:
        seen = "matrices" if s.n_positions is None else f"factors with T = {s.n_positions}"
        reason = f"sample space holds only factored samples with T = 1, these are {seen}"
        return RouteCost("sample", math.inf, math.inf, reason)
    machine = machine_of(s.device)
    (m, n), count, columns = s.shape, s.n_examples, s.n_columns
    rows = count * columns
    # sum_cd <x_ic, x_jd>^2 from all products, or from packed outer products where m is small
    products, packed = rows**2 * m, count**2 * m * (m + 1)
    direct = columns == 1 or products <= packed
    gram = min(products, packed) + count**2 * n
    pairs = rows**2 if direct else count**2
    # small Grams stay in the cache from one matrix-vector product to the next
    products_stream = TYPICAL_ROUNDS * 6 * count**2 / (CACHED if count <= CACHED_SIZE else 1)
    stream = 8 * (3 * pairs + 4 * count**2 + products_stream)
    roots, flops, peak = 0.0, float(gram), 8.0 * 6 * count**2
    for size, vectors in ((m, rows), (n, count)):
        if size <= vectors:
            flops += 2 * vectors * size**2 * 2
            roots += _eigen_seconds(machine, size)
            peak += 8 * 4 * size**2 + 8 * vectors * size
        else:
            flops += vectors**2 * size + 2 * vectors**3
            roots += _eigen_seconds(machine, vectors)
            peak += 8 * 5 * vectors**2
    flops += 2 * min(m, rows) * min(n, count) * count + 2 * count * m * n
    seconds = flops / machine.flops + roots + stream / machine.stream
    return RouteCost("sample", seconds + 40 * TYPICAL_ROUNDS * machine.call, peak + 8 * m * n)


def _parameter(s: GradientSamples) -> RouteCost:
    machine = machine_of(s.device)
    m, n = s.shape
    kernels = kernels_for(s)
    costs = kernels.costs()
    # L, R, the optimum, two inner products, a projected diagonal and the diagonal of H
    job = costs.pairs + (costs.left + costs.right) * (1 + TYPICAL_ROUNDS) + costs.left * 2
    job = job + costs.diagonal * 2
    vectors = TYPICAL_ROUNDS * (m * m + n * n) / 2  # packed
    seconds = job.seconds(machine) + 8 * 4 * TYPICAL_ROUNDS * vectors / machine.stream
    seconds += _eigen_seconds(machine, m) + _eigen_seconds(machine, n)
    peak = 8.0 * (vectors + 6 * (m * m + n * n) + m * n + s.n_examples**2) + costs.nbytes
    ways = ways_of(kernels)
    steps = tuple(
        Step(name, ways[name], getattr(costs, name).seconds(machine)) for name in OPERATIONS
    )
    overhead = 60 * TYPICAL_ROUNDS * machine.call
    return RouteCost("parameter", seconds + overhead, peak, steps=steps)


def _dense(s: GradientSamples) -> RouteCost:
    machine = machine_of(s.device)
    (m, n), count, columns = s.shape, s.n_examples, s.n_columns
    entries = float(m * n) ** 2
    unshared = s.n_positions == 1
    forming = 2 * entries * count * (1 if unshared else columns)
    if s.n_positions is not None and not unshared:
        forming += 2.0 * count * columns * s.n_positions * m * n
    projecting = 2 * entries * n + 2 * m**3 * n
    stream = 8 * entries * (2 * TYPICAL_ROUNDS + 8)
    seconds = (forming + projecting) / machine.flops + stream / machine.stream
    seconds += _eigen_seconds(machine, m) + _eigen_seconds(machine, n)
    peak = 8 * entries * (1 if unshared else 2) + 8 * n**3
    return RouteCost("dense", seconds + 40 * TYPICAL_ROUNDS * machine.call, peak)
