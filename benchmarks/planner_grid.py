"""Does the planner pick the fastest way? Routes and sums on a grid of T, C, N, m and n."""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import kronecker_probe as kp
from benchmarks.timing import clock, device, environment
from kronecker_probe.gradients.samples.base import FactoredSamples
from kronecker_probe.operators.second_moment.cost_model import machine_of
from kronecker_probe.operators.second_moment.kernels.base import Kernels
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for, ways_of
from kronecker_probe.operators.second_moment.kernels.factored import FactorKernels
from kronecker_probe.operators.second_moment.kernels.matrix import MatrixKernels
from kronecker_probe.operators.second_moment.planner import RouteCost

POSITIONS = (1, 4, 8, 16, 64, 128)
COLUMNS = (1, 8)
COUNTS = (32, 256, 2048)
SIZES = (16, 64, 256, 1024)
APPROXIMATIONS = ("optimal", "shampoo-squared", "shampoo", "kfac", "eigen-corrected", "diagonal")
SUMS = ("left", "right", "forms", "diagonal", "pairs")
# Samples beyond these bytes, and routes predicted to take longer than these seconds, are left out.
LARGEST, LONGEST = 1e8, 2.0
GOOD = 1.5


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    positions: int
    columns: int
    count: int
    m: int
    n: int

    def samples(self) -> kp.GradientSamples:
        """Float32 factors with decaying spectra, as trained layers have."""
        generator = torch.Generator().manual_seed(0)
        d = torch.randn(self.count, self.columns, self.positions, self.m, generator=generator)
        a = torch.randn(self.count, self.positions, self.n, generator=generator)
        d, a = d * torch.logspace(0, -2, self.m), a * torch.logspace(0, -1.5, self.n)
        return kp.GradientSamples.from_factors(d.to(device()), a.to(device()))

    @property
    def nbytes(self) -> int:
        """Bytes of its samples."""
        return 4 * self.count * self.positions * (self.columns * self.m + self.n)

    def __str__(self) -> str:
        return f"T = {self.positions}, C = {self.columns}, N = {self.count}, {self.m} x {self.n}"


def grid() -> Iterator[Point]:
    """The points whose samples are small enough, in a random but fixed order."""
    points = [Point(*one) for one in itertools.product(POSITIONS, COLUMNS, COUNTS, SIZES, SIZES)]
    random.Random(0).shuffle(points)
    return (p for p in points if p.nbytes <= LARGEST)


def everything(samples: kp.GradientSamples, route: str) -> None:
    """The norm and the cosines of the six basic approximations."""
    target = kp.SecondMoment(samples, route=route)
    for name in APPROXIMATIONS:
        kp.cosine_similarity(target, kp.approximate(target, name))


def run(kernels: Kernels, operation: str) -> None:
    """One sum over the samples."""
    m, n = kernels.shape
    where = {"dtype": torch.float64, "device": kernels.weights.device}
    left, right = torch.eye(m, **where).add_(1.0), torch.eye(n, **where).add_(1.0)
    calls = {
        "left": lambda: kernels.left_step(right),
        "right": lambda: kernels.right_step(left),
        "forms": lambda: kernels.quadratic_forms(left, right),
        "diagonal": lambda: kernels.projected_diagonal(left, right),
        "pairs": kernels.pair_products,
    }
    calls[operation]()


def routes_ratio(samples: kp.GradientSamples, repetitions: int) -> tuple[float, str] | None:
    """Time of the planned route over that of the fastest one, with a line that shows them."""
    plan = kp.SecondMoment(samples).plan()
    possible = [c for c in plan.costs if c.seconds <= LONGEST and c.peak_bytes < 8e9]
    if plan.route not in [c.route for c in possible]:
        return None

    def fastest(cost: RouteCost) -> float:
        return min(clock(lambda: everything(samples, cost.route)) for _ in range(repetitions))

    times = {c.route: fastest(c) for c in possible}
    shown = ", ".join(f"{c.route} {times[c.route]:.3g} s ({c.seconds:.2g})" for c in possible)
    return times[plan.route] / min(times.values()), f"{plan.route}: {shown}"


def sums_ratios(samples: kp.GradientSamples, repetitions: int) -> dict[str, tuple[float, str]]:
    """Likewise for each sum of a shared layer, from factors against through matrices."""
    assert isinstance(samples, FactoredSamples)
    kinds = {"factors": FactorKernels, "matrices": MatrixKernels}
    chosen, machine = ways_of(kernels_for(samples)), machine_of(samples.device)
    found = {}
    for operation in SUMS:
        times: dict[str, float] = {}
        predicted: dict[str, float] = {}
        for way, kind in kinds.items():
            kernels = kind(samples)
            predicted[way] = getattr(kernels.costs(), operation).seconds(machine)
            if predicted[way] <= LONGEST:
                call = functools.partial(run, kernels, operation)
                times[way] = min(clock(call) for _ in range(repetitions))
        way = chosen[operation]
        if way not in times:
            continue
        shown = ", ".join(f"{w} {times[w]:.3g} s ({predicted[w]:.2g})" for w in times)
        found[operation] = times[way] / min(times.values()), f"{operation} by {way}: {shown}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100, help="points of the grid to try")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="print every point")
    options = parser.parse_args(sys.argv[1:])
    print(f"Planner on a grid; times as measured (predicted); {environment()}")
    ratios: dict[str, list[float]] = {}
    for point in itertools.islice(grid(), options.points):
        samples = point.samples()
        results: dict[str, tuple[float, str]] = {}
        if (routes := routes_ratio(samples, options.repetitions)) is not None:
            results["route"] = routes
        if point.positions > 1:
            results |= sums_ratios(samples, options.repetitions + 1)
        for name, (ratio, line) in results.items():
            ratios.setdefault(name, []).append(ratio)
            if options.verbose or ratio > GOOD:
                print(f"  {point}: {ratio:.2f}, {line}", flush=True)
    for name, values in ratios.items():
        good = sum(ratio <= GOOD for ratio in values)
        print(
            f"  {name:8s} within {GOOD}x of the fastest on {good} of {len(values)} points, "
            f"{good / len(values):.0%} (goal 90%)"
        )


if __name__ == "__main__":
    main()
