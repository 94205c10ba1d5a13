"""The target: a second moment of gradient matrices, never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.samples.base import FactoredSamples, GradientSamples
from kronecker_probe.linalg.memory import require_memory
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.factors.factor import Eigenbasis, Factor, MatrixFactor
from kronecker_probe.operators.factors.vectors import Rows, principal
from kronecker_probe.operators.second_moment.kernels.choose import cross_products
from kronecker_probe.operators.second_moment.planner import Plan, make_plan
from kronecker_probe.operators.second_moment.routes.base import Group, LeadingProduct, Route
from kronecker_probe.operators.second_moment.routes.dense import DenseSpace
from kronecker_probe.operators.second_moment.routes.leading_terms import LeadingTerms, leading_terms
from kronecker_probe.operators.second_moment.routes.one_sided import OneSided
from kronecker_probe.operators.second_moment.routes.parameter_space import ParameterSpace
from kronecker_probe.operators.second_moment.routes.sample_space import SampleSpace

_ROUTES: dict[str, Callable[..., Route]] = {
    r.name: r for r in (SampleSpace, ParameterSpace, DenseSpace, OneSided)
}


# The smallest positive number.
SMALLEST = 5e-324


@final
class SecondMoment(Operator):
    """H = sum_i w_i sum_c vec(G_ic) vec(G_ic)^T of gradient samples.

    The three exact routes (sample space, parameter space, dense) give the same numbers; the
    planner takes the cheapest. Where the matrices of one side fit into memory and those of the
    other do not (a large embedding), norm, trace, diagonal and the factor of the one side are all
    that there is; the rest raises a MemoryBudgetError.

    Args:
        samples: The samples.
        route: "auto", "sample" (factored samples with T = 1 only), "parameter" or "dense".

    Raises:
        InvalidInputError: ``samples`` are no GradientSamples.
        UnknownNameError: No such route.
        UnsupportedError: The route cannot hold these samples.
        MemoryBudgetError: No route, or not the one asked for, fits in memory.
    """

    inner_rank = 6

    def __init__(self, samples: GradientSamples, route: str = "auto") -> None:
        if not isinstance(samples, GradientSamples):
            raise InvalidInputError(
                f"SecondMoment got a {type(samples).__name__}; give GradientSamples: one entry of "
                "kp.capture(...), or GradientSamples.from_matrices / from_factors."
            )
        self.samples = samples
        self.shape, self.device = samples.shape, samples.device
        self._plan = make_plan(samples, route)
        self._known_pairs: Tensor | None = None

    @cached_property
    def _route(self) -> Route:
        return _ROUTES[self._plan.route](self.samples)

    def plan(self) -> Plan:
        """The routes with their predicted seconds and bytes, and the one taken; printable."""
        return self._plan

    @cached_property
    def _norm(self) -> float:
        if self._known_pairs is not None:
            weights = self.samples.weights
            return math.sqrt(float(weights @ (self._known_pairs @ weights)))
        norm = math.sqrt(max(0.0, self._route.norm_squared()))
        return norm or self._underflowing_norm()

    def norm(self) -> float:
        """The Frobenius norm of H; positive unless H = 0, even where float64 underflows."""
        return self._norm

    def trace(self) -> float:
        """Tr H = E|G|^2 = Tr L = Tr R."""
        m, n = self.shape
        return (self.left_factor if m <= n else self.right_factor).trace()

    def _underflowing_norm(self) -> float:
        """A norm that came out as 0, by way of gradients of unit size; 0 where it is 0 of those."""
        scale, tensors = 1.0, []
        for tensor in self.samples.tensors:
            size = float(tensor.abs().max()) if tensor.is_floating_point() else 1.0
            if size == 0.0:
                return 0.0
            scale *= size
            tensors.append(tensor / size if tensor.is_floating_point() else tensor)
        unit = self.samples.with_tensors(tensors, self.samples.weights)
        found = math.sqrt(max(0.0, float(unit.weights @ cross_products(unit, unit) @ unit.weights)))
        return max(found * scale**2, SMALLEST) if found > 0 else 0.0

    @property
    def left_factor(self) -> Factor:
        """L = E[G G^T], the left partial trace."""
        return self._route.left

    @property
    def right_factor(self) -> Factor:
        """R = E[G^T G], the right partial trace."""
        return self._route.right

    def left_step(self, right: Factor | Tensor | None) -> Factor:
        """E[G V G^T], a half step of the iteration for Kronecker products.

        Args:
            right: V, a symmetric factor or matrix [n, n]; None is the identity, which gives L.

        Raises:
            InvalidInputError: V has another shape.
        """
        V = self._right(right)
        return self.left_factor if V is None else self._route.step(0, V)

    def right_step(self, left: Factor | Tensor | None) -> Factor:
        """E[G^T U G] of symmetric U [m, m]; None is the identity, which gives R."""
        U = self._left(left)
        return self.right_factor if U is None else self._route.step(1, U)

    def grouped_step(
        self, side: int, given: Factor | Tensor | None, groups: Sequence[Group]
    ) -> list[Factor]:
        """:meth:`left_step` (side 0) or :meth:`right_step` of each group of examples by itself.

        They add up to the whole.

        Args:
            side: 0 or 1.
            given: V [n, n] or U [m, m]; None is the identity.
            groups: Examples of each group, as slices or indices; weights stay as they are.
        """
        checked = self._left(given) if side else self._right(given)
        return self._route.grouped_step(side, checked, groups)

    def grouped_forms(self, lefts: Tensor, rights: Tensor, groups: Sequence[Group]) -> Tensor:
        """sum_{i in group} w_i sum_c <G_ic, A_b G_ic C_e>, float64 [groups, B, E].

        Args:
            lefts: A, PSD, float64 [B, m, m].
            rights: C, PSD, float64 [E, n, n].
            groups: Examples of each group, as slices or indices.
        """
        return self._route.grouped_forms(lefts, rights, groups)

    def quadratic_forms(
        self, left: Factor | Tensor | None, right: Factor | Tensor | None
    ) -> Tensor:
        """sum_c <G_ic, A G_ic C> of each example, without its weight, float64 [N].

        Args:
            left: A, symmetric [m, m]; None is the identity.
            right: C, symmetric [n, n]; None is the identity.
        """
        return self._route.quadratic_forms(self._left(left), self._right(right))

    def pair_products(self) -> Tensor:
        """K_ij = sum_cd <G_ic, G_jd>^2 of all examples, float64 [N, N]; |H|^2 = w^T K w."""
        known = self._known_pairs
        return self._route.pair_products() if known is None else known

    def sample_rows(self) -> tuple[Rows, Rows] | None:
        """d and a of unshared factored samples with their Grams; None outside of sample space."""
        route = self._route
        return (route.outputs, route.inputs) if isinstance(route, SampleSpace) else None

    def subset(self, index: Group) -> SecondMoment:
        """The second moment of some of the examples, with their weights as they are.

        It shares this one's pair products, and its Grams in sample space, so that neither is
        computed again.
        """
        samples = self.samples.subset(index)
        if isinstance(self._route, SampleSpace):
            assert isinstance(samples, FactoredSamples)
            part = SecondMoment(samples, route="sample")
            part.__dict__["_route"] = self._route.subset(samples, index)
        else:
            part = SecondMoment(samples)
        part._known_pairs = principal(self.pair_products(), index)
        return part

    def block(self, rows: slice, columns: slice) -> SecondMoment:
        return SecondMoment(self.samples.block(rows, columns))

    def kfac_factors(self) -> tuple[Factor, Factor]:
        """E[d d^T] and E[a a^T] of factored samples (expand form for T > 1).

        Raises:
            UnsupportedError: The samples have no factors.
        """
        return self._route.kfac_factors()

    @cached_property
    def leading_product(self) -> LeadingProduct:
        """The leading Kronecker product of R(H): sigma_1, U_1, V_1."""
        return self._route.leading()

    def leading_terms(self, k: int) -> LeadingTerms:
        """The k leading Kronecker terms of R(H), fewer where its rank is smaller."""
        return leading_terms(self._route, k)

    def kronecker_spectrum(self, k: int | None = None) -> Tensor:
        """Singular values of R(H), whose best rank-r approximations are sums of r products.

        Args:
            k: How many, the largest ones; None for all that the route can give: the complete
                spectrum of unshared layers (min(N, m^2, n^2) values) and of small layers, else
                the leading 16.

        Returns:
            float64 CPU [k], descending, unnormalized; their squares sum to |H|^2 when complete.
            Values below about 1e-8 of the largest are rounding in sample space. Where R(H) has a
            smaller rank than k, the rest are zero or left out.

        Raises:
            InvalidInputError: k is not positive.
        """
        if k is not None and (not isinstance(k, int) or k < 1):
            raise InvalidInputError(f"kronecker_spectrum got k={k!r}; give a positive integer.")
        if k == 1:
            sigma = self.leading_product.singular_value
            return torch.tensor([sigma] if sigma > 0 else [], dtype=torch.float64)
        samples = self.samples
        if k is None and self._plan.route == "parameter" and samples.n_positions == 1:
            assert isinstance(samples, FactoredSamples)
            return SampleSpace(samples).spectrum(None)  # complete, unlike half steps
        return self._route.spectrum(k)

    def factor_inner(self, left: Factor, right: Factor) -> float:
        """<H, left kron right> of two factors."""
        return self._route.factor_inner(left, right)

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        if torch.equal(right, -right.T):
            if self.samples.n_positions == 1:  # d^T A d = 0
                return 0.0
            return float((self._route.kernels.left_step(right, -1) * left).sum())
        return self.factor_inner(MatrixFactor(left), MatrixFactor(right))

    def _inner(self, other: Operator) -> float:
        assert isinstance(other, SecondMoment)
        if other.samples is self.samples:
            return self.norm() ** 2
        pairs = cross_products(self.samples, other.samples)
        return float(self.samples.weights @ (pairs @ other.samples.weights))

    @cached_property
    def _diagonals(self) -> list[tuple[Eigenbasis, Eigenbasis, Tensor]]:
        return []

    def eigen_diagonal(self, left: Eigenbasis, right: Eigenbasis) -> Tensor:
        """diag((Q_L kron Q_R)^T H (Q_L kron Q_R)), float64 [r, s]; kept for the same bases."""
        for known_left, known_right, values in self._diagonals:
            if known_left is left and known_right is right:
                return values
        values = self._route.eigen_diagonal(left, right)
        self._diagonals[:] = [(left, right, values)]
        return values

    def projected_diagonal(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        return self._route.eigen_diagonal(Eigenbasis.of(left_basis), Eigenbasis.of(right_basis))

    def diagonal(self) -> Tensor:
        return self._route.kernels.projected_diagonal(None, None)

    def _apply(self, x: Tensor) -> Tensor:
        return self._route.kernels.apply(x)

    def to_dense(self) -> Tensor:
        m, n = self.shape
        require_memory(16 * (m * n) ** 2, f"A dense {m * n} x {m * n} matrix", self.device)
        route = self._route if isinstance(self._route, DenseSpace) else DenseSpace(self.samples)
        return route.to_dense()

    def _left(self, given: Factor | Tensor | None) -> Factor | None:
        """U [m, m]; None for the identity.

        Raises:
            InvalidInputError: It has another shape.
        """
        return _factor(given, self.shape[0], "left")

    def _right(self, given: Factor | Tensor | None) -> Factor | None:
        """V [n, n], as :meth:`_left`."""
        return _factor(given, self.shape[1], "right")

    def __repr__(self) -> str:
        m, n = self.shape
        return f"SecondMoment({m} x {n}, {self.samples!r}, route={self._plan.route!r})"


def _factor(given: Factor | Tensor | None, size: int, side: str) -> Factor | None:
    if given is None:
        return None
    shape = (given.size, given.size) if isinstance(given, Factor) else tuple(given.shape)
    if shape != (size, size):
        raise InvalidInputError(
            f"The {side} matrix of a half step is {list(shape)}; this layer needs [{size}, {size}]."
        )
    return given if isinstance(given, Factor) else MatrixFactor(given)
