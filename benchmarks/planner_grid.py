"""Does the planner pick the fastest route? Every route on a grid of shapes and sample sizes."""

from __future__ import annotations

import argparse
import math
import sys

import kronecker_probe as kp
from benchmarks.kronecker_floor import factors
from benchmarks.timing import clock, environment
from kronecker_probe.approximations import APPROXIMATIONS

SIZES = (16, 64, 256, 1024, 4096)
COUNTS = (64, 512, 4096)
LONGEST = 20.0  # seconds; routes predicted above are not timed


def everything(samples: kp.GradientSamples, route: str) -> None:
    """The norm and the cosines of all six approximations."""
    target = kp.SecondMoment(samples, route=route)
    for name in APPROXIMATIONS:
        kp.cosine_similarity(target, kp.approximate(target, name))


def fastest(samples: kp.GradientSamples, route: str, repetitions: int) -> float:
    """Seconds of the fastest of some repetitions."""
    return min(clock(lambda: everything(samples, route)) for _ in range(repetitions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="print every point")
    options = parser.parse_args(sys.argv[1:])
    print(f"Planner on a grid; {environment()}")
    good, points = 0, 0
    for m in SIZES:
        for n in SIZES:
            for count in COUNTS:
                samples = kp.GradientSamples.from_factors(*factors(count, m, n))
                plan = kp.SecondMoment(samples).plan()
                feasible = [c for c in plan.costs if c.seconds <= LONGEST and c.peak_bytes < 8e9]
                if plan.route not in [c.route for c in feasible]:
                    continue
                times = {c.route: fastest(samples, c.route, options.repetitions) for c in feasible}
                best = min(times.values())
                ratio = times[plan.route] / best
                points += 1
                good += ratio <= 1.5
                if options.verbose or ratio > 1.5:
                    shown = ", ".join(
                        f"{c.route} {times[c.route]:.3g} s ({c.seconds:.2g} predicted)"
                        for c in feasible
                    )
                    print(f"  {m} x {n}, N = {count}: {plan.route} at {ratio:.2f}; {shown}")
    share = good / points if points else math.nan
    print(
        f"  within 1.5x of the fastest route on {good} of {points} points, {share:.0%} (goal 90%)"
    )


if __name__ == "__main__":
    main()
