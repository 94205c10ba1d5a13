"""All Kronecker approximations of one unshared layer against the floor of their arithmetic.

The floor: the two float32 N x N Gram products of the layer's factors, and one N x N float64
eigendecomposition. Beside it, 30 power iterations on materialized gradients.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import kronecker_probe as kp
from benchmarks.timing import clock, device, environment, interleaved, paired_ratio

NAMES = ("optimal", "shampoo-squared", "shampoo", "kfac")


def factors(count: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Output gradients and inputs with decaying spectra, as trained layers have."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(count, m, generator=generator) * torch.logspace(0, -2, m)
    a = torch.randn(count, n, generator=generator) * torch.logspace(0, -1.5, n)
    return d.to(device()), a.to(device())


def floor(d: Tensor, a: Tensor) -> None:
    """Two float32 Grams, one float64 eigendecomposition."""
    gram = d @ d.T
    a @ a.T
    torch.linalg.eigh(gram.double())


def ours(d: Tensor, a: Tensor) -> list[float]:
    """Cosines of the optimum and of every other Kronecker approximation."""
    target = kp.SecondMoment(kp.GradientSamples.from_factors(d, a))
    return [kp.cosine_similarity(target, kp.approximate(target, name)) for name in NAMES]


def materialized(d: Tensor, a: Tensor, rounds: int) -> None:
    """Power iteration on the gradient matrices themselves, in float32."""
    g = d[:, :, None] * a[:, None]
    v = torch.eye(a.shape[1], device=a.device)
    for _ in range(rounds):
        u = torch.einsum("kab,bc,kdc->ad", g, v, g)
        u /= torch.linalg.vector_norm(u)
        v = torch.einsum("kab,ac,kcd->bd", g, u, g)
        v /= torch.linalg.vector_norm(v)


def peak_above_inputs(count: int, m: int, n: int) -> float:
    """GB above the inputs, as the high-water mark of a fresh process (CPU only)."""
    code = (
        "import torch, benchmarks.kronecker_floor as b\n"
        "def kb(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith(key))\n"
        f"b.ours(*b.factors(64, 64, 64)); d, a = b.factors({count}, {m}, {n})\n"
        "before = kb('VmRSS'); b.ours(d, a); print((kb('VmHWM') - before) / 1e6)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    return float(done.stdout)


def layer(count: int, m: int, n: int, repetitions: int) -> None:
    """Time one layer and print its line."""
    d, a = factors(count, m, n)
    timed = interleaved({"floor": lambda: floor(d, a), "ours": lambda: ours(d, a)}, repetitions)
    line = (
        f"  {m} x {n}, N = {count}: floor {1e3 * timed['floor'].median:.0f} ms, "
        f"optimum + three others + cosines {1e3 * timed['ours'].median:.0f} ms, "
        f"ratio {paired_ratio(timed['ours'], timed['floor']):.2f} (goal 3)"
    )
    if device().type == "cpu":
        line += f", {peak_above_inputs(count, m, n):.3f} GB above the inputs (goal .25)"
    print(line)
    if m <= 512:
        seconds = clock(lambda: materialized(d, a, rounds=1)) * 30
        print(
            f"    30 power iterations on materialized gradients (1 timed, x 30): {seconds:.1f} s, "
            f"{seconds / timed['ours'].median:.0f} times ours"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    repetitions = parser.parse_args(sys.argv[1:]).repetitions
    print(f"Kronecker approximations of one layer; {environment()}")
    for count, m, n in ((512, 512, 512), (1024, 4096, 4096)):
        layer(count, m, n, repetitions)


if __name__ == "__main__":
    main()
