"""Several leading Kronecker terms of R(H), on any route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kronecker_probe.linalg.golub_kahan import LinearMap, repeated_triples
from kronecker_probe.linalg.symmetric import Packing
from kronecker_probe.operators.factors.factor import Factor, MatrixFactor, SampleFactor
from kronecker_probe.operators.second_moment.routes.base import Route
from kronecker_probe.operators.second_moment.routes.parameter_space import ParameterSpace
from kronecker_probe.operators.second_moment.routes.sample_space import SampleSpace


@dataclass(frozen=True)
class LeadingTerm:
    """A singular triple of R(H): sigma * left kron right is its term.

    Attributes:
        singular_value: sigma.
        left: U, unit Frobenius norm; symmetric, or skew-symmetric with ``right``.
        right: V likewise.
        skew: Whether both are skew-symmetric.
    """

    singular_value: float
    left: Factor
    right: Factor
    skew: bool


@dataclass(frozen=True)
class LeadingTerms:
    """The leading terms, by descending singular value, and how they were found."""

    terms: tuple[LeadingTerm, ...]
    rounds: int
    residual: float


def leading_terms(route: Route, k: int) -> LeadingTerms:
    """The k leading terms, fewer where R(H) has a smaller rank.

    R(H) takes symmetric matrices to symmetric ones and skew to skew, and both kinds are solved
    by themselves. On unshared factored samples a skew image is zero.
    """
    symmetric = _solve(_coordinates(route, 1), k, 0.0)
    found = [symmetric]
    unshared = route.samples.n_positions == 1
    if not unshared and min(route.shape) > 1:
        values = [term.singular_value for term in symmetric.terms]
        found.append(_solve(_coordinates(route, -1), k, values[k - 1] if len(values) >= k else 0.0))
    terms = sorted(
        (term for one in found for term in one.terms), key=lambda term: -term.singular_value
    )
    return LeadingTerms(
        tuple(terms[:k]), sum(one.rounds for one in found), max(one.residual for one in found)
    )


@dataclass(frozen=True)
class _Coordinates:
    """R(H) / scale in coordinates of one parity, and what vectors of coordinates stand for."""

    linear: LinearMap
    draw: Callable[[torch.Generator], Tensor]
    factors: tuple[Callable[[Tensor], Factor], Callable[[Tensor], Factor]]
    scale: float
    skew: bool


def _solve(coordinates: _Coordinates, k: int, floor: float) -> LeadingTerms:
    least = floor / coordinates.scale if coordinates.scale > 0 else 0.0
    triples = repeated_triples(coordinates.linear, coordinates.draw, k, least)
    terms = []
    for sigma, u, v in zip(triples.values.tolist(), triples.left.T, triples.right.T, strict=True):
        left, right = coordinates.factors[0](u), coordinates.factors[1](v)
        terms.append(LeadingTerm(sigma * coordinates.scale, left, right, coordinates.skew))
    return LeadingTerms(tuple(terms), triples.rounds, triples.residual)


def _coordinates(route: Route, sign: int) -> _Coordinates:
    if isinstance(route, SampleSpace):
        return _of_samples(route)
    (m, n), device = route.shape, route.weights.device
    left, right = Packing(m, device, sign), Packing(n, device, sign)

    def step(side: int, given: Tensor) -> Tensor:
        own, other = (right, left) if side else (left, right)
        matrix = other.unpack(given)
        if isinstance(route, ParameterSpace):
            return own.pack(route.kernels.step(side, matrix, sign))
        return own.pack(route.step(side, MatrixFactor(matrix)).matrix)

    return _Coordinates(
        LinearMap(partial(step, 0), partial(step, 1)),
        lambda generator: _noise(len(right), generator).to(device),
        (lambda u: MatrixFactor(left.unpack(u)), lambda v: MatrixFactor(right.unpack(v))),
        1.0,
        sign < 0,
    )


def _of_samples(route: SampleSpace) -> _Coordinates:
    b = route.balanced
    return _Coordinates(
        b.linear,
        lambda generator: b.kd @ _noise(len(b.root), generator).to(b.kd.device),
        (
            lambda u: SampleFactor(route.outputs, b.s * u),
            lambda v: SampleFactor(route.inputs, b.t * v),
        ),
        b.scale,
        False,
    )


def _noise(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=generator)
