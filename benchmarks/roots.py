"""Inverse fourth (and second) roots of a batch of factors by each route, beside eigh.

Float32 factors of the two kinds that training makes: a decaying spectrum of full rank and a
rank-deficient one, damped relative to the largest eigenvalue. Routes are timed in turn, per
matrix; "eigh alone" is the decomposition without root, residual or retry. Errors are relative to a
float64 eigendecomposition of the same entries.

    python -m benchmarks roots
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import device, environment, interleaved, paired_ratio
from kronecker_probe.linalg.basis_refresh import off_diagonal_share, refresh_by_eigh, warm_qr
from kronecker_probe.linalg.damping import Damping
from kronecker_probe.linalg.inverse_roots import (
    Roots,
    inverse_root_eigh,
    inverse_root_minimax,
    inverse_root_newton,
)
from kronecker_probe.linalg.polar import newton_schulz, polar

# Size of the matrices, and how many of them in a batch.
BATCHES = {64: 16, 256: 4, 512: 2}
DAMPING = Damping(1e-6, "largest")
ROUTES: dict[str, Callable[..., Roots]] = {
    "eigh": inverse_root_eigh,
    "coupled Newton": inverse_root_newton,
    "minimax products": inverse_root_minimax,
}


def factors(d: int, count: int, rank: int) -> Tensor:
    """Second moments with eigenvalues that decay from 1 by a factor 1e5, the rest zero."""
    generator = torch.Generator().manual_seed(d)
    draw = torch.randn(count, d, rank, generator=generator, dtype=torch.float64)
    columns = torch.linalg.qr(draw)[0] * torch.logspace(0, -2.5, rank, dtype=torch.float64)
    moments: Tensor = columns @ columns.mT
    return moments.float().to(device())


def error(roots: Roots, A: Tensor, p: int) -> float:
    """Largest relative Frobenius error of the batch."""
    values, vectors = torch.linalg.eigh(A.double())
    damped = values.clamp_min(0) + roots.epsilon.double()[:, None]
    truth = (vectors * damped.pow(-1 / p)[:, None]) @ vectors.mT
    off = torch.linalg.matrix_norm(roots.values - truth) / torch.linalg.matrix_norm(truth)
    return float(off.max())


def roots(d: int, count: int, repetitions: int, p: int, rank: int) -> None:
    """One size and spectrum: time, ratio, residual and error of each route."""
    A = factors(d, count, rank)
    work: dict[str, Callable[[], object]] = {"eigh alone": partial(torch.linalg.eigh, A)}
    work |= {name: partial(route, A, p, DAMPING) for name, route in ROUTES.items()}
    timed = interleaved(work, repetitions)
    alone = timed["eigh alone"]
    kind = "full rank" if rank == d else f"rank {rank}"
    print(f"  d = {d}, batch {count}, p = {p}, {kind}:")
    print(f"    eigh alone        {1e3 * alone.median / count:8.2f} ms per matrix")
    for name, route in ROUTES.items():
        found = route(A, p, DAMPING)
        print(
            f"    {name:17s} {1e3 * timed[name].median / count:8.2f} ms, "
            f"{paired_ratio(timed[name], alone):5.2f} of eigh alone, "
            f"{int(found.iterations.max()):2d} iterations, residual "
            f"{float(found.residual.max()):.1e}, error {error(found, A, p):.1e}, "
            f"{int(found.retried.sum())} of {count} retried, {int(found.ok.sum())} ok"
        )


def bases(d: int, count: int, repetitions: int) -> None:
    """A refresh after a small drift by one QR iteration and by eigh; polar factors."""
    A = factors(d, count, d)
    held = torch.linalg.eigh(A.double())[1].flip(-1).float()
    # an exponential average after 10 steps at beta2 = .99, in another eigenbasis
    drifted = 0.9 * A + 0.1 * factors(d + 1, count, d + 1)[:, :d, :d]
    G = A @ held
    work: dict[str, Callable[[], object]] = {
        "eigh alone": partial(torch.linalg.eigh, drifted),
        "test of the criterion": partial(off_diagonal_share, drifted, held),
        "refresh by eigh": partial(refresh_by_eigh, drifted, held),
        "refresh by QR, 1 iteration": partial(warm_qr, drifted, held, 0.0),
        "polar factor by SVD": partial(polar, G),
        "Newton-Schulz, float32": partial(newton_schulz, G, dtype=torch.float32),
        "Newton-Schulz, bfloat16": partial(newton_schulz, G),
    }
    timed = interleaved(work, repetitions)
    found = warm_qr(drifted, held, 0.0)
    print(
        f"  d = {d}, batch {count}; QR takes the off-diagonal share from "
        f"{float(found.share_before.max()):.3f} to {float(found.share_after.max()):.3f}:"
    )
    for name, timing in timed.items():
        print(
            f"    {name:26s} {1e3 * timing.median / count:8.2f} ms per matrix, "
            f"{paired_ratio(timing, timed['eigh alone']):5.2f} of eigh alone"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    repetitions = parser.parse_args(sys.argv[1:]).repetitions
    print(f"Inverse roots, bases and polar factors in float32; {environment()}")
    for d, count in BATCHES.items():
        for p, rank in ((4, d), (4, d // 2), (2, d)):
            roots(d, count, repetitions, p, rank)
        bases(d, count, repetitions)


if __name__ == "__main__":
    main()
