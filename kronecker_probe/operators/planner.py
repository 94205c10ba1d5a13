"""Which route is cheapest: operation counts and bytes for each, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kronecker_probe.errors import MemoryBudgetError, UnsupportedError, unknown_name
from kronecker_probe.gradients.samples import GradientSamples
from kronecker_probe.linalg.memory import available_bytes

# Pairs of half steps that the optimal product takes, a typical number.
TYPICAL_ROUNDS = 12
# Matrices up to this size are read from a cache, so many times faster than from memory.
CACHED_SIZE, CACHED = 1024, 4


@dataclass(frozen=True)
class Machine:
    """Rates that turn counts into seconds; rough, for choosing a route and refusing early.

    Attributes:
        flops: Float64 matrix products, floating-point operations a second.
        eigh: The same for a symmetric eigendecomposition counted as 9 n^3 operations.
        stream: Bytes a second of element-wise passes and matrix-vector products.
        call: Seconds that one tensor operation costs at least.
    """

    flops: float
    eigh: float
    stream: float
    call: float


def machine_of(device: torch.device) -> Machine:
    """Rates of the device; a CPU's scale with torch.get_num_threads()."""
    if device.type == "cuda":
        return Machine(flops=1e13, eigh=2e11, stream=1e12, call=1e-5)
    threads = torch.get_num_threads()
    return Machine(flops=2e10 * threads, eigh=8e9 * threads**0.5, stream=1e10, call=5e-6)


@dataclass(frozen=True)
class RouteCost:
    """What one route would cost for the norm and all six approximations.

    Attributes:
        route: "sample", "parameter" or "dense".
        seconds: Predicted time; infinite where the route cannot hold the samples.
        peak_bytes: Predicted memory above the samples.
        reason: Why the route is impossible, empty where it is not.
    """

    route: str
    seconds: float
    peak_bytes: float
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """The route taken and the ones that it was chosen over.

    Attributes:
        route: The route taken.
        costs: One entry a route.
        asked: "auto", or the route that the caller insisted on.
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
        return "\n".join(lines)


def make_plan(samples: GradientSamples, route: str = "auto") -> Plan:
    """Choose a route for ``samples``.

    Raises:
        UnknownNameError: No such route.
        UnsupportedError: The route asked for cannot hold the samples.
        MemoryBudgetError: Nothing that was asked for fits; the message says the GB.
    """
    costs = tuple(cost(samples) for cost in (_sample, _parameter, _dense))
    if route != "auto":
        chosen = next((c for c in costs if c.route == route), None)
        if chosen is None:
            raise unknown_name("route", route, ["auto", *(c.route for c in costs)])
        if chosen.reason:
            raise UnsupportedError(f"route={route!r}: {chosen.reason}; use route='auto'.")
        _require(chosen, samples.device)
        return Plan(route, costs, route)
    free = available_bytes(samples.device)
    fitting = [c for c in costs if not c.reason and c.peak_bytes <= free]
    if not fitting:
        possible = [c for c in costs if not c.reason]
        _require(min(possible, key=lambda c: c.peak_bytes), samples.device)
    return Plan(min(fitting, key=lambda c: c.seconds).route, costs, route)


def _require(cost: RouteCost, device: torch.device) -> None:
    free = available_bytes(device)
    if cost.peak_bytes > free:
        raise MemoryBudgetError(
            f"route={cost.route!r} needs {cost.peak_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB "
            f"are free on {device}; use fewer samples, or another route (H.plan() lists them)."
        )


def _eigen_seconds(machine: Machine, size: float) -> float:
    return 9 * size**3 / machine.eigh


def _sample(s: GradientSamples) -> RouteCost:
    if s.n_positions != 1:
        seen = "matrices" if s.n_positions is None else f"factors with T = {s.n_positions}"
        reason = f"sample space holds only factored samples with T = 1, these are {seen}"
        return RouteCost("sample", math.inf, math.inf, reason)
    machine = machine_of(s.device)
    (m, n), count, columns = s.shape, s.n_data, s.n_columns
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


def _half_steps(s: GradientSamples) -> float:
    """Operations of a pair of half steps."""
    (m, n), count, columns = s.shape, s.n_data, s.n_columns
    t = s.n_positions
    formed = 4.0 * columns * m * n * (m + n)
    if t is None:
        return count * formed
    shared = t * t * (n + columns * m) if t > 1 else 0
    factored = 4.0 * (t * n * n + columns * t * m * m + shared)
    return count * min(factored, formed + 2 * columns * t * m * n)


def _norm_flops(s: GradientSamples) -> float:
    """Operations of sum_ij <G_i, G_j>^2; only one triangle is computed."""
    (m, n), count, columns = s.shape, s.n_data, s.n_columns
    t = s.n_positions
    formed = float((count * columns) ** 2 * m * n)
    if t is None:
        return formed
    factored = float((count * t) ** 2 * (columns**2 * m + n))
    return factored if t == 1 or t * t * (m + n) <= m * n else formed


def _parameter(s: GradientSamples) -> RouteCost:
    machine = machine_of(s.device)
    (m, n), count, columns = s.shape, s.n_data, s.n_columns
    pair = _half_steps(s)
    bases = 2.0 * count * (columns * m * m + n * n + columns * m * n) * (s.n_positions or 1)
    # L and R, optimum, five inner products, the projected diagonal
    flops = _norm_flops(s) + pair * (1 + TYPICAL_ROUNDS + 5) + bases
    t = s.n_positions or 1
    pairs = (count * columns * t) ** 2 * (2 if t > 1 else 1)
    vectors = TYPICAL_ROUNDS * (m * m + n * n)
    stream = 8 * (4.0 * pairs + 4 * TYPICAL_ROUNDS * vectors)
    seconds = flops / machine.flops + stream / machine.stream
    seconds += _eigen_seconds(machine, m) + _eigen_seconds(machine, n)
    peak = 8.0 * (2 * vectors + 6 * (m * m + n * n) + m * n) + 2e8
    return RouteCost("parameter", seconds + 60 * TYPICAL_ROUNDS * machine.call, peak)


def _dense(s: GradientSamples) -> RouteCost:
    machine = machine_of(s.device)
    (m, n), count, columns = s.shape, s.n_data, s.n_columns
    entries = float(m * n) ** 2
    forming = 2 * entries * count * (1 if s.n_positions == 1 else columns)
    projecting = 2 * entries * n + 2 * m**3 * n
    stream = 8 * entries * (2 * TYPICAL_ROUNDS + 8)
    seconds = (forming + projecting) / machine.flops + stream / machine.stream
    seconds += _eigen_seconds(machine, m) + _eigen_seconds(machine, n)
    peak = 8 * entries * (1 if s.n_positions == 1 else 2) + 8 * n**3
    return RouteCost("dense", seconds + 40 * TYPICAL_ROUNDS * machine.call, peak)
