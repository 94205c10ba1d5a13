"""Leading Kronecker products by Lanczos over half steps, in symmetric coordinates.

R(H) takes symmetric matrices to symmetric ones and skew to skew, so both kinds are solved by
themselves, at half the size. The leading pair is symmetric: it is PSD.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples, MatrixSamples
from kronecker_probe.linalg.golub_kahan import LinearMap, leading_triples, repeated_triples
from kronecker_probe.linalg.symmetric import Packing
from kronecker_probe.operators.factors.factor import MatrixFactor
from kronecker_probe.operators.second_moment.kernels.base import Kernels
from kronecker_probe.operators.second_moment.routes.base import LeadingProduct, Route

# Relative residual of Lanczos in float64: the singular value is then exact to rounding.
TOLERANCE = 1e-8
# Likewise in float32, whose half steps are good to 1e-7; and what float64 must confirm.
SINGLE_TOLERANCE, CONFIRMED = 1e-6, 2e-6
# A pair of half steps below this many operations takes no time worth saving.
SINGLE_FLOPS = 2e9


def leading(route: Route) -> LeadingProduct | None:
    """The leading product, certified by a pair of half steps in float64; None for H = 0.

    Large samples of float32 or less iterate in float32 first. Whatever found the direction, a
    last pair of float64 half steps u = R(H) v, v' = R(H)^T u measures the residual |R(H)^T u -
    sigma v| / sigma, improves the pair by one power step, and gives the singular value, whose
    error is the square of the residual; the float64 iteration goes on where it is too large.
    """
    spaces = _Spaces.of(route, sign=1)
    start = route.right
    size = start.norm()
    if not size > 0:
        return None
    image = spaces.left.pack(route.step(0, start).matrix) / size
    v = spaces.right.pack(start.matrix) / size
    known: Tensor | None = image
    rounds = 0
    for dtype in _precisions(route):
        single = dtype == torch.float32
        found = leading_triples(
            spaces.linear,
            v.to(dtype),
            tolerance=SINGLE_TOLERANCE if single else TOLERANCE,
            image=None if known is None else known.to(dtype),
        )
        rounds += found.rounds + 1
        if found.leading_value > 0 and bool(torch.isfinite(found.right).all()):
            v, known = found.right[:, 0].double(), None
        product, v = _certified(spaces, v, rounds)
        if not single or product.residual <= CONFIRMED:
            return product
        known = None
    raise AssertionError("the last precision is float64")


def spectrum(route: Route, k: int) -> Tensor:
    """The k largest singular values of R(H), of symmetric and of skew matrices together."""
    symmetric = _values(route, 1, k, 0.0)
    if min(route.shape) == 1:
        return symmetric
    floor = float(symmetric[k - 1]) if len(symmetric) >= k else 0.0
    merged = torch.cat([symmetric, _values(route, -1, k, floor)])
    return merged.sort(descending=True).values[:k]


def _values(route: Route, sign: int, k: int, floor: float) -> Tensor:
    spaces = _Spaces.of(route, sign)

    def draw(generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(spaces.right), dtype=torch.float64, generator=generator)
        return noise.to(route.weights.device)

    return repeated_triples(spaces.linear, draw, k, floor).values


@dataclass(frozen=True)
class _Spaces:
    """Both sides' coordinates, and the half steps in them."""

    kernels: Kernels
    left: Packing
    right: Packing

    @staticmethod
    def of(route: Route, sign: int) -> _Spaces:
        (m, n), device = route.shape, route.weights.device
        return _Spaces(route.kernels, Packing(m, device, sign), Packing(n, device, sign))

    @property
    def linear(self) -> LinearMap:
        """R(H) and its adjoint, in the dtype of what they get."""
        return LinearMap(partial(self._step, 0), partial(self._step, 1))

    def _step(self, side: int, given: Tensor) -> Tensor:
        own, other = (self.right, self.left) if side else (self.left, self.right)
        return own.pack(self.kernels.step(side, other.unpack(given), other.sign)).to(given.dtype)


def _certified(spaces: _Spaces, v: Tensor, rounds: int) -> tuple[LeadingProduct, Tensor]:
    linear, v = spaces.linear, v / torch.linalg.vector_norm(v)
    u = linear.forward(v)
    sigma = torch.linalg.vector_norm(u)
    u = u / sigma
    back = linear.adjoint(u)
    residual = float(torch.linalg.vector_norm(back - sigma * v) / sigma)
    sigma = torch.linalg.vector_norm(back)
    improved = back / sigma
    left, right = spaces.left.unpack(u), spaces.right.unpack(improved)
    sign = torch.sign(left.diagonal().sum())  # R(H) keeps PSD matrices PSD: one sign for both
    factors = MatrixFactor(left * sign), MatrixFactor(right * sign)
    return LeadingProduct(float(sigma), *factors, rounds, residual), improved


def _precisions(route: Route) -> list[torch.dtype]:
    single = iterates_in_float32(route.kernels, route.samples)
    return [torch.float32, torch.float64] if single else [torch.float64]


def iterates_in_float32(kernels: Kernels, samples: GradientSamples) -> bool:
    """Whether half steps are large, and the samples known to no more than float32."""
    costs = kernels.costs()
    return costs.left.flops + costs.right.flops >= SINGLE_FLOPS and _at_most_single(samples)


def _at_most_single(samples: GradientSamples) -> bool:
    if isinstance(samples, FactoredSamples):
        return torch.float64 not in (samples.output_grads.dtype, samples.inputs.dtype)
    return isinstance(samples, MatrixSamples) and samples.values.dtype != torch.float64
