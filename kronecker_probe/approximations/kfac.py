"""Approximations from a layer's inputs a and output gradients d: K-FAC and its relatives."""

from __future__ import annotations

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.gradients.samples.base import FactoredSamples
from kronecker_probe.operators.factors.factor import SampleFactor
from kronecker_probe.operators.factors.vectors import Rows
from kronecker_probe.operators.second_moment.kernels.vectors import (
    pooled_vectors,
    position_vectors,
)
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.table.codes import ReasonCode


def kfac(target: SecondMoment) -> KroneckerOperator:
    """E[d d^T] kron E[a a^T] of output gradients d and inputs a.

    Martens and Grosse (2015); with T > 1 shared positions the expand form of Eschenhagen et al.
    (2023): d d^T is summed over positions, a a^T averaged.

    Raises:
        UnsupportedError: The samples have no factors.
    """
    return KroneckerOperator(*target.kfac_factors())


def kfac_reduce(target: SecondMoment) -> KroneckerOperator:
    """E[d' d'^T] kron E[a' a'^T] with d' the mean of d over positions and a' the sum of a.

    K-FAC-reduce (Eschenhagen et al., 2023, arXiv 2311.00636): exact for a deep linear network
    whose positions are averaged or summed behind the layer, so that d is the same at each of
    them; that fixes the normalization. K-FAC itself for T = 1.

    Raises:
        UnsupportedError: The samples have no factors.
    """
    samples = _factored(target, "K-FAC-reduce")
    if samples.n_positions == 1:
        return kfac(target)
    outputs, inputs = pooled_vectors(samples)
    w = samples.weights
    total = float(w.sum())
    shares = w / total if total > 0 else w
    return KroneckerOperator(outputs.outer_sum(w), inputs.outer_sum(shares))


def tkfac(target: SecondMoment) -> KroneckerOperator:
    """delta Psi kron Phi, Psi = E[|a|^2 d d^T] / delta, Phi = E[|d|^2 a a^T] / delta.

    Trace-restricted K-FAC (Gao et al., 2021), with delta = E[|a|^2 |d|^2]. With T > 1 shared
    positions the expand form: every position counts as a draw d_t a_t^T of its own, so delta is
    Tr H without the products between positions. On unshared gradient samples it is Shampoo^2.

    Raises:
        UnsupportedError: The samples have no factors.
    """
    samples = _factored(target, "TKFAC")
    outputs, inputs = _position_rows(target, samples)
    w = samples.weights.repeat_interleave(samples.n_positions)
    psi, phi = w * inputs.squared_norms, w * outputs.squared_norms
    delta = float(w @ (inputs.squared_norms * outputs.squared_norms))
    scale = 1.0 / delta if delta > 0 else 0.0
    if samples.n_positions > 1:
        return KroneckerOperator(outputs.outer_sum(psi), inputs.outer_sum(phi), scale)
    return KroneckerOperator(SampleFactor(outputs, psi), SampleFactor(inputs, phi), scale)


def _position_rows(target: SecondMoment, samples: FactoredSamples) -> tuple[Rows, Rows]:
    """d as [N T, C, m] and a as [N T, 1, n]; the target's own, with Grams, where it has them."""
    left, right = target.left_factor, target.right_factor
    if isinstance(left, SampleFactor) and isinstance(right, SampleFactor):
        return left.rows, right.rows
    return position_vectors(samples)


def _factored(target: SecondMoment, who: str) -> FactoredSamples:
    samples = target.samples
    if not isinstance(samples, FactoredSamples):
        raise UnsupportedError(
            f"{who} needs the inputs and output gradients of a linear or convolutional layer, and "
            f"{type(samples).__name__} hold none; give GradientSamples.from_factors(...).",
            ReasonCode.NO_FACTORS,
        )
    return samples
