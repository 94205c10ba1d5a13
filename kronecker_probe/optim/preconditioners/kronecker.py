"""Kronecker products of inverse roots: Shampoo, its square, KL-Shampoo, root-free ones."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.linalg.damping import Damping
from kronecker_probe.linalg.eigenbasis import eigh_descending, eigh_each
from kronecker_probe.linalg.inverse_roots import inverse_root_minimax, inverse_root_newton
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.optim.blocks.contractions import (
    completed,
    contract,
    packed,
    packed_identity,
    per_block,
)
from kronecker_probe.optim.options.kinds import (
    FromGradients,
    FromLayers,
    KroneckerOptions,
    Solver,
    Whitened,
)
from kronecker_probe.optim.preconditioners.base import Failure, State
from kronecker_probe.optim.preconditioners.factored import Factored

# Of L^e kron R^e, by e.
_RULES = {0.5: "shampoo", 1.0: "shampoo-squared"}
# A held root whose smallest eigenvalue is within this many roundings of its largest is noise there.
_RESOLUTION = 16
# Inverse roots of these kinds come from products alone, and only for integer p = -1 / exponent.
_ITERATIONS = {"newton": inverse_root_newton, "matmul": inverse_root_minimax}


@final
class Kronecker(Factored[KroneckerOptions]):
    """M times (A_k / b + epsilon I)^e along every side that has a factor A_k."""

    renewed: ClassVar[str] = "root"

    @property
    def exponent(self) -> float:
        """e."""
        return self.options.exponent_of(len(self.sides))

    @property
    def rule(self) -> str | None:
        if len(self.sides) < 2 or len(self.block) > 2:
            return None
        of_factor = -self.exponent / self.options.power
        match self.options.source:
            case Whitened(q):
                return f"divergence:q={q:g}" if math.isclose(of_factor, 1.0) else None
            case FromLayers():
                return "kfac" if math.isclose(of_factor, 1.0) else None
            case FromGradients():
                # without the trace scale the square has another scale, and the same cosine
                return next((k for e, k in _RULES.items() if math.isclose(e, of_factor)), None)

    def initial(self, like: Tensor) -> State:
        state = self.factors(like)
        for side, end in self.each():
            size = self.block[side]
            eye = torch.eye(size, dtype=like.dtype, device=like.device)
            root = packed_identity(size, like) if self.options.packed else eye
            state[f"root_{end}"] = root.repeat(len(like), *[1] * root.ndim)
            if isinstance(self.options.roots, Solver):
                state[f"basis_{end}"] = eye.repeat(len(like), 1, 1)
        return self.with_momentum(state, like)

    def refresh(self, state: State, step: int) -> list[Failure]:
        rows = self.due(state, step)
        if not len(rows):
            return []
        failures: list[Failure] = []
        for place, (_, end) in enumerate(self.each()):
            factor = self.full_factor(state, end, step, rows)
            ok = self._refresh_side(state, end, place, factor, rows)
            state["refreshed"][rows.cpu()[ok.cpu()], place] = step
            if place == 0 and self.options.trace_scale:
                trace = factor.diagonal(dim1=1, dim2=2).sum(1)[ok]
                good = rows[ok.to(rows.device)]
                root = state[f"root_{end}"]
                root[good] *= per_block(self._scale(trace), root)
            failures += self.count_failures(state, place, rows, ok, "inverse root")
        return failures

    def _scale(self, trace: Tensor) -> Tensor:
        """S^power of the product of k factors over S, which estimates H.

        With the trace T of each factor the product of k of them has T^k where H has T; an absent
        factor, of r rows, is the identity times T / r.
        """
        return (trace.pow(len(self.sides) - 1) * self.missing).pow(self.options.power)

    def _refresh_side(
        self, state: State, end: str, place: int, factor: Tensor, rows: Tensor
    ) -> Tensor:
        """Renew the roots of ``rows``; which of them succeeded, [b]."""
        solved = torch.zeros(len(rows), dtype=torch.bool, device=factor.device)
        if self.options.roots in _ITERATIONS:
            solved = self._iterate(state, end, place, factor, rows)
            if bool(solved.all()):
                return solved
        rest = ~solved
        solved[rest] = self._decompose(state, end, place, factor[rest], rows[rest.to(rows.device)])
        return solved

    def _decompose(
        self, state: State, end: str, place: int, factor: Tensor, rows: Tensor
    ) -> Tensor:
        """Roots from eigenvalues; those in a basis that passed its test are renewed too."""
        if isinstance(solver := self.options.roots, Solver):
            found = self.refreshed_basis(state, place, rows, factor, solver, quotients=True)
            state[f"basis_{end}"][rows] = found.vectors
            values, vectors, solved = found.diagonal, found.vectors, found.ok
        else:
            values, vectors, solved = eigh_each(factor)
            state["refreshes"][rows.cpu()[solved.cpu()], place] += 1
        values = values.clamp_min(0)
        epsilon = self._epsilon(values)[:, None]
        damped = values + epsilon
        if self.options.epsilon.value == 0:
            rounding = values.shape[1] * torch.finfo(values.dtype).eps
            damped = damped.masked_fill(damped <= rounding * values.amax(1, keepdim=True), 0.0)
        powers = inverse_powers(damped, self.exponent)
        solved &= powers.isfinite().all(1)
        good = rows[solved.to(rows.device)]
        roots = vectors * powers.unsqueeze(1) @ vectors.mT
        self._hold_root(state, end, good, roots[solved])
        self.hold_whitener(state, end, good, damped[solved], vectors[solved])
        return solved

    def _iterate(self, state: State, end: str, place: int, factor: Tensor, rows: Tensor) -> Tensor:
        """Roots by products alone; which of them are within the tolerance of their residual."""
        epsilon, method = self.options.epsilon, self.options.roots
        assert isinstance(method, str)
        damping = Damping(epsilon.value, "largest" if epsilon.relative else "absolute")
        roots = _ITERATIONS[method](factor, round(-1 / self.exponent), damping)
        good = rows[roots.ok.to(rows.device)]
        self._hold_root(state, end, good, roots.values[roots.ok])
        state["refreshes"][good.cpu(), place] += 1
        state["iterations"][good.cpu(), place] += roots.iterations[roots.ok].cpu()
        return roots.ok

    def _epsilon(self, values: Tensor) -> Tensor:
        epsilon = self.options.epsilon
        if epsilon.relative:
            return epsilon.value * values.amax(1)
        return torch.full_like(values[:, 0], epsilon.value)

    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        average = self.average(state, gradients)
        for side, end in self.each():
            scratch = None if side == self.sides[-1] else self.scratch
            average = contract(average, self._root(state, end), side, scratch, "contracted")
        return average

    def _hold_root(self, state: State, end: str, rows: Tensor, roots: Tensor) -> None:
        state[f"root_{end}"][rows] = packed(roots) if self.options.packed else roots

    def _root(self, state: State, end: str, rows: slice = slice(None)) -> Tensor:
        return completed(state[f"root_{end}"][rows], self.block[int(end)])

    def operator(self, state: State, block: int, step: int) -> KroneckerOperator:
        row = slice(block, block + 1)
        held = {
            side: self._inverse_power(self._root(state, end, row)[0], side)
            for side, end in self.each()
        }
        return KroneckerOperator(*self.product(state, held))

    def fresh(self, state: State, block: int, step: int, *, damped: bool) -> KroneckerOperator:
        """P of one block as a refresh at this step would make it, from the same statistics.

        Args:
            state: Of the stack.
            block: Which one.
            step: Its steps.
            damped: With epsilon, or without.
        """
        rows = torch.tensor([block])
        powers = {}
        scale = 1.0
        for side, end in self.each():
            factor = self.full_factor(state, end, step, rows)[0].double()
            values, vectors = eigh_descending(factor)
            values = values.clamp_min(0)
            if damped:
                values = values + self._epsilon(values[None])
            powers[side] = (vectors * values.pow(-self.exponent / self.options.power)) @ (
                vectors.mT
            )
            if side == self.sides[0] and self.options.trace_scale:
                power = self.options.power
                scale = float(self._scale(factor.trace()).pow(-1 / power))
        left, right = self.product(state, powers)
        return KroneckerOperator(left * scale, right)

    def _inverse_power(self, root: Tensor, side: int) -> Tensor:
        """A^(-1/power) of a held inverse root A, the pseudo-inverse where epsilon is 0."""
        values, vectors = eigh_descending(root.double())
        rounding = torch.finfo(root.dtype).eps * values[0]
        power = -1.0 / self.options.power
        if self.options.epsilon.value == 0:
            null = values <= rounding * len(values)
            values = values.masked_fill(null, math.inf)
        elif values[-1] <= _RESOLUTION * rounding:
            raise UnsupportedError(
                f"the inverse root of dimension {side} is not resolved in {root.dtype}: its "
                f"eigenvalues reach from {float(values[-1]):.3g} to {float(values[0]):.3g}. Raise "
                f"spectrum.epsilon ({self.options.epsilon.value:g})."
            )
        return (vectors * values.pow(power)) @ vectors.mT


def inverse_powers(values: Tensor, exponent: float) -> Tensor:
    """values^exponent, 0 where a value is 0: the pseudo-inverse."""
    return torch.where(values > 0, values, math.inf).pow(exponent)
