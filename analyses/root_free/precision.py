"""Part "precision" of ``root_free``: what bfloat16 does to methods with and without inverse roots.

Each method trains the GPT in both precisions from the same start, on the same batches and at the
learning rate that the search found for it in float32. Weights are float32 in all of them.

- ``InverseFreeShampoo`` holds its whole state (gradients, factors and momentum) in float32 or in
  bfloat16, and computes in that (Lin et al., 2024).
- ``RootFreeShampoo`` and ``Shampoo`` hold theirs in float32, statistics too; only the inverses and
  inverse roots are computed in either. torch has no eigendecomposition in bfloat16, so both come
  from coupled Newton iteration, with every product in that dtype. (Those of bfloat16 matrices add
  in float32 and round the sum, as on accelerators.) "bfloat16" is the iteration as it is, without
  the residual check of the library, which falls back on an eigendecomposition; a root that is not
  finite leaves the last good one. In "bfloat16, best iterate" the iterate counts whose M, that
  should become the identity, was nearest to it: a divergence does no more harm than it must.

Damping is relative to the largest eigenvalue of each factor (the search had Shampoo's own, an
absolute 1e-8). Roots are computed after every tenth step, for the next ones. The residual of a root
is formed in float64 from the float32 factor (``kronecker_probe.linalg.residuals``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from kronecker_probe import optim
from kronecker_probe.linalg.inverse_roots import TOLERANCE
from kronecker_probe.linalg.newton import integer_power, newton_inverse_root
from kronecker_probe.linalg.residuals import root_residual
from kronecker_probe.optim import KroneckerOptimizer
from kronecker_probe.optim.engine.inspection import FactorInUse

from .methods import DECAY, GPT, MOMENTUM, Params, Preset, Row, trained, workload_of

FULL, HALF, BEST = "float32", "bfloat16", "bfloat16, best iterate"
INVERSE_FREE, INVERSES, ROOTS = "InverseFreeShampoo", "RootFreeShampoo", "Shampoo"
EVERY = 10  # steps from one refresh of the roots to the next, as by default
ITERATIONS = 40  # a float32 factor with a damping of 1e-6 takes 20


def measure_precision(rates: dict[str, float], preset: Preset) -> Iterator[Row]:
    """Final losses of all runs, and the residuals of their roots.

    Args:
        rates: Of each method, as the search found them.
        preset: How much.
    """
    steps = preset.steps[GPT]
    runs = [(INVERSE_FREE, how, math.nan) for how in (FULL, HALF)]
    # the least damping is the hardest; factors that start from the identity hardly feel it
    runs += [(INVERSES, how, min(preset.dampings)) for how in (FULL, HALF, BEST)]
    runs += [(ROOTS, how, damping) for damping in preset.dampings for how in (FULL, HALF, BEST)]
    for seed in range(preset.seeds):
        for method, how, damping in runs:
            shared = {"workload": GPT, "method": method, "precision": how, "seed": seed}
            shared |= {"damping": damping, "lr": rates[method], "step": steps}
            for measured, value in _run(method, how, rates[method], damping, seed, steps):
                yield shared | {"measured": measured, "value": value}


def _run(
    method: str, how: str, lr: float, damping: float, seed: int, steps: int
) -> Iterator[tuple[str, float]]:
    """The final loss, and of roots the median residual and the share that is beyond tolerance."""
    workload = workload_of(GPT, seed)
    named = list(workload.model.named_parameters())
    residuals: list[float] = []
    if method == INVERSE_FREE:
        inverse = {"lr": 1 - DECAY, "precision": "bfloat16" if how == HALF else "full"}
        optimizer = optim.InverseFreeShampoo(
            named, lr=lr, batch_size=workload.batch_size, inverse=inverse
        )
    else:
        optimizer = _with_roots(method, named, lr, damping, workload.batch_size)

    def after(step: int) -> None:
        if method != INVERSE_FREE and step % EVERY == 1:
            residuals.extend(write_roots(optimizer, how))

    [(_, loss)] = trained(workload, optimizer, seed, (steps,), after)
    yield "loss", loss
    if residuals:
        found = torch.tensor(residuals, dtype=torch.float64)
        yield "log10_residual", float(found.median().log10())
        yield "beyond_tolerance", float((found > TOLERANCE).double().mean())


def _with_roots(
    method: str, named: Params, lr: float, damping: float, batch: int
) -> KroneckerOptimizer:
    """A method that refreshes its roots at the first step alone; all others are written."""
    once = {"start": 1, "frequency": 10**9}
    damped = {"epsilon": damping, "relative": True}
    if method == INVERSES:
        return optim.RootFreeShampoo(
            named, lr=lr, betas=(0.0, DECAY), batch_size=batch, basis=once, spectrum=damped
        )
    return optim.Shampoo(
        named, lr=lr, betas=(0.0, DECAY), momentum=MOMENTUM, basis=once, spectrum=damped
    )


def write_roots(optimizer: KroneckerOptimizer, how: str) -> list[float]:
    """Replace all held roots by those computed from the held factors; the residuals of these."""
    found: dict[tuple[int, int], list[tuple[Tensor, FactorInUse]]] = {}
    for param in optimizer.param_groups[0]["params"]:
        for held in optimizer.inspect(param).factors:
            # one batch for all of one size and power
            p = round(-1 / cast(float, held.exponent))
            found.setdefault((len(held.factor), p), []).append((param, held))
    spectrum = optimizer.param_groups[0]["spectrum"]
    residuals: list[float] = []
    for (_, p), group in found.items():
        A = torch.stack([held.factor for _, held in group])
        if not bool(A.isfinite().all()):  # of a run that diverges
            residuals += [math.inf] * len(group)
            continue
        X, residual = inverse_roots(A, p, spectrum.epsilon, how)
        residuals += residual.tolist()
        for (param, held), root in zip(group, X, strict=True):
            if not bool(root.isfinite().all()):
                continue
            # of L kron R / Tr L the first root holds the scale
            scaled = spectrum.trace_scale and held.side == 0
            root = root * held.factor.trace() if scaled else root
            optimizer.state[param][f"root_{held.side}"].copy_(root[None])
    return residuals


def inverse_roots(A: Tensor, p: int, damping: float, how: str) -> tuple[Tensor, Tensor]:
    """(A + damping lambda_max I)^(-1/p) by coupled Newton iteration.

    Args:
        A: [b, d, d] float32, symmetric PSD.
        p: A positive integer.
        damping: Relative.
        how: "float32", "bfloat16" or "bfloat16, best iterate".

    Returns:
        The roots [b, d, d] float32, and their residuals [b] float64.
    """
    largest = torch.linalg.eigvalsh(A.double())[:, -1].to(A.dtype)
    largest = largest.clamp_min(torch.finfo(A.dtype).tiny)
    damped = A + (damping * largest)[:, None, None] * torch.eye(A.shape[-1])
    scale = (1 + damping) * largest
    B = damped / scale[:, None, None]
    if how != FULL:
        B = B.bfloat16()
    X = _best_iterate(B, p) if how == BEST else newton_inverse_root(B, p, ITERATIONS)[0]
    roots = X.float() * scale.pow(-1 / p)[:, None, None]
    return roots, root_residual(lambda Z: damped.double() @ Z, roots, p)


def _best_iterate(B: Tensor, p: int) -> Tensor:
    """That of ``newton_inverse_root`` at which M was nearest to the identity."""
    z, eye = (p + 1) / 2, torch.eye(B.shape[-1], dtype=B.dtype)
    M, X = z * B, (z ** (1 / p) * eye).expand_as(B)
    best, least = X.clone(), torch.full((len(B),), math.inf)
    for _ in range(ITERATIONS):
        T = ((p + 1) * eye - M) / p
        X, M = X @ T, integer_power(T, p) @ M
        error = (M - eye).abs().amax((-2, -1)).float()
        better = error < least  # false for what is not finite
        if not bool(better.any()):
            break
        best[better], least[better] = X[better], error[better]
    return (best + best.mT) / 2
