"""Muon: Shampoo with beta2 = 0, by the Newton-Schulz polynomial that it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.tracking.optimizer_state.reader import ParameterState, parameter_state
from kronecker_probe.tracking.optimizer_state.registry import (
    register_optimizer_state,
    runs_step_of,
)


def _is_muon(optimizer: Optimizer, parameter: Tensor) -> bool:
    known = getattr(torch.optim, "Muon", None)  # from torch 2.9
    return known is not None and runs_step_of(optimizer, known)


@register_optimizer_state(_is_muon)
def muon(optimizer: Optimizer, parameter: Tensor) -> KroneckerOperator:
    r"""The P with P^(-1/2) B = NS(B) for the momentum B = U diag(s) V^T of the state.

    Muon orthogonalizes B by a few steps of an odd polynomial, which is NS(B) = U diag(s g(s)) V^T
    with a gain g(s) that comes near 1 / s from the fifth step on, but for small s. So::

        P = (U diag(1/g) U^T) kron (V diag(1/g) V^T)

    with g(0) on the null spaces, where the polynomial is defined too. Where g = 1/s this is
    (B B^T)^(1/2) kron (B^T B)^(1/2): Shampoo with beta2 = 0, epsilon = 0 and exponent -1/4, whose
    direction is the polar factor U V^T (Muon post of K. Jordan; Shampoo, arXiv 1802.09568).

    With ``nesterov`` torch orthogonalizes a mixture of the gradient of the step, which it does not
    keep, and B; P is that of B. torch computes NS in bfloat16, P is that of exact arithmetic. The
    adjustment of the learning rate to the shape is no part of P.

    Raises:
        UnsupportedError: B is zero, or the coefficients give a gain that is not positive.
    """
    state = parameter_state(optimizer, parameter)
    momentum = state.tensor("momentum_buffer")
    if momentum.ndim != 2:
        raise UnsupportedError(f"the momentum of {state.kind} is {list(momentum.shape)}, not 2-D")
    if not bool(momentum.any()):
        raise UnsupportedError(
            f"the momentum of {state.kind} is zero: it has no polar factor, so there is no P"
        )
    left, singular, right = torch.linalg.svd(momentum.double(), full_matrices=False)
    gains = _gains(state, singular)
    return KroneckerOperator(_factor(left, gains), _factor(right.mT, gains))


def _gains(state: ParameterState, singular: Tensor) -> Tensor:
    """g(s) at the singular values, float64 [r + 1], and at 0 in the last place."""
    a, b, c = (float(value) for value in state.option("ns_coefficients"))
    scale = 1 / max(float(torch.linalg.vector_norm(singular)), float(state.option("eps")))
    points = torch.cat([singular, singular.new_zeros(1)]) * scale
    gains = torch.full_like(points, scale)
    for _ in range(int(state.option("ns_steps"))):
        squares = points.square()
        factor = a + b * squares + c * squares.square()
        points = points * factor
        gains = gains * factor
    if not bool((gains.isfinite() & (gains > 0)).all()):
        raise UnsupportedError(
            f"the Newton-Schulz polynomial of {state.kind} with coefficients ({a:g}, {b:g}, {c:g}) "
            "is not positive on this momentum: its step is no P^(-1/2) of a PSD P"
        )
    return gains


def _factor(vectors: Tensor, gains: Tensor) -> Tensor:
    """Q diag(1/g) Q^T, float64 [k, k], and 1 / g(0) where Q [k, r] does not reach."""
    null = float(1 / gains[-1])
    factor = (vectors * (1 / gains[:-1] - null)) @ vectors.mT
    factor.diagonal().add_(null)
    return factor
