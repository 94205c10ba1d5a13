"""Shared layers: from factors against through gradient matrices, in time and in memory.

Two layers: T = 8 positions of a 1024 x 1024 weight, where factors win everywhere, and T = 64 of
a 256 x 256 weight, where matrices win the norm. Both ways run in turn, each in its best form.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import kronecker_probe as kp
from benchmarks.timing import clock, device, environment
from kronecker_probe.operators.second_moment.cost_model import machine_of
from kronecker_probe.operators.second_moment.kernels.base import Kernels
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for, ways_of
from kronecker_probe.operators.second_moment.kernels.factored import FactorKernels
from kronecker_probe.operators.second_moment.kernels.matrix import MatrixKernels

OPERATIONS = ("pairs", "forms", "left", "right")
SHOWN = {"pairs": "norm", "forms": "inner product", "left": "half step", "right": "half step ^T"}
# Sums that are linear in N run through G on this share of the data, which is enough to wait for.
SHARE = 8


def factors(count: int, positions: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Float32 output gradients and inputs with decaying spectra, as trained layers have."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(count, positions, m, generator=generator) * torch.logspace(0, -2, m)
    a = torch.randn(count, positions, n, generator=generator) * torch.logspace(0, -1.5, n)
    return d.to(device()), a.to(device())


def run(kernels: Kernels, operation: str) -> None:
    """One sum over the samples."""
    m, n = kernels.shape
    where = {"dtype": torch.float64, "device": kernels.weights.device}
    left, right = torch.eye(m, **where).add_(1.0), torch.eye(n, **where).add_(1.0)
    if operation == "pairs":
        kernels.pair_products()
    elif operation == "forms":
        kernels.quadratic_forms(left, right)
    elif operation == "left":
        kernels.left_step(right)
    else:
        kernels.right_step(left)


def contender(way: str, count: int, positions: int, m: int, n: int) -> Kernels:
    """Kernels over factors, or over float32 gradient matrices that are held in memory."""
    d, a = factors(count, positions, m, n)
    if way == "factors":
        return FactorKernels(kp.GradientSamples.from_factors(d, a))
    return MatrixKernels(kp.GradientSamples.from_matrices(d.mT @ a))


def peak(way: str, operation: str, count: int, positions: int, m: int, n: int) -> float:
    """GB at the high-water mark of a fresh process, above one that only imports (CPU only)."""
    code = (
        "import torch, benchmarks.shared_layers as b\n"
        "def kb(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith(key))\n"
        f"for o in b.OPERATIONS: b.run(b.contender({way!r}, 8, 2, 64, 64), o)\n"
        f"before = kb('VmRSS'); k = b.contender({way!r}, {count}, {positions}, {m}, {n})\n"
        f"b.run(k, {operation!r}); print((kb('VmHWM') - before) / 1e6)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return float(done.stdout)


def layer(count: int, positions: int, m: int, n: int, repetitions: int) -> None:
    """Time one layer, both ways in turn, and print its lines."""
    crossover = (m * n / (m + n)) ** 0.5
    print(
        f"  T = {positions}, {m} x {n}, N = {count}; norms turn to matrices at T = {crossover:.0f}"
    )
    by_factors = contender("factors", count, positions, m, n)
    whole = contender("matrices", count, positions, m, n)
    part = contender("matrices", count // SHARE, positions, m, n)
    chosen = kernels_for(by_factors.samples)
    ways, machine = ways_of(chosen), machine_of(device())
    for operation in OPERATIONS:
        linear = operation != "pairs" and m >= 512
        through = part if linear else whole
        scale = SHARE if linear else 1
        seconds: dict[str, list[float]] = {"factors": [], "matrices": []}
        for _ in range(repetitions):
            seconds["factors"].append(clock(lambda o=operation: run(by_factors, o)))
            seconds["matrices"].append(scale * clock(lambda o=operation, k=through: run(k, o)))
        fastest = {way: min(values) for way, values in seconds.items()}
        predicted = {
            way: getattr(kernels.costs(), operation).seconds(machine)
            for way, kernels in (("factors", by_factors), ("matrices", whole))
        }
        line = (
            f"    {SHOWN[operation]:13s} factors {1e3 * fastest['factors']:8.1f} ms, matrices "
            f"{1e3 * fastest['matrices']:8.1f} ms: ratio "
            f"{fastest['matrices'] / fastest['factors']:6.2f} "
            f"(by operation counts {predicted['matrices'] / predicted['factors']:.2f}), "
            f"planner: {ways[operation]}"
        )
        if device().type == "cpu":
            lean = {way: peak(way, operation, count, positions, m, n) for way in fastest}
            line += f", peak {lean['factors']:.3f} GB against {lean['matrices']:.3f} GB"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    repetitions = parser.parse_args(sys.argv[1:]).repetitions
    print(f"Shared layers, factors against gradient matrices (goal 5 at T = 8); {environment()}")
    layer(128, 8, 1024, 1024, repetitions)
    layer(128, 64, 256, 256, repetitions)


if __name__ == "__main__":
    main()
