"""Kronecker products of inverse roots: Shampoo, its square, KL-Shampoo and their root-free forms."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.linalg.basis_refresh import BasisRefresh, refresh_by_eigh, warm_qr
from kronecker_probe.linalg.damping import Damping
from kronecker_probe.linalg.eigenbasis import eigh_descending, eigh_each
from kronecker_probe.linalg.inverse_roots import inverse_root_minimax, inverse_root_newton
from kronecker_probe.operators.kronecker import KroneckerOperator
from kronecker_probe.optim.config import Basis
from kronecker_probe.optim.contractions import contract
from kronecker_probe.optim.factors import Factored
from kronecker_probe.optim.preconditioner import Failure, State

# A held root whose smallest eigenvalue is within this many roundings of its largest is noise there.
_RESOLUTION = 16
# Inverse roots of these kinds come from products alone, and only for integer p = -1 / exponent.
_ITERATIONS = {"newton": inverse_root_newton, "matmul": inverse_root_minimax}


@final
class Kronecker(Factored):
    """M times (A_k / b + epsilon I)^e along every side that has a factor A_k."""

    @property
    def exponent(self) -> float:
        """e."""
        return self.recipe.spectrum.exponent_of(len(self.sides))

    @property
    def _holds_basis(self) -> bool:
        basis = self.recipe.basis
        return basis.solver == "qr" or basis.tolerance is not None

    def initial(self, like: Tensor) -> State:
        state = self.factors(like)
        for side, end in self.each():
            size = self.block[side]
            eye = torch.eye(size, dtype=like.dtype, device=like.device)
            for name in ("root", "basis") if self._holds_basis else ("root",):
                state[f"{name}_{end}"] = eye.repeat(len(like), 1, 1)
        return self.with_momentum(state, like)

    def refresh(self, state: State, step: int) -> list[Failure]:
        if not self.is_due(step):
            return []
        rows = self.due(state, step)
        if not len(rows):
            return []
        failures: list[Failure] = []
        for place, (_, end) in enumerate(self.each()):
            factor = self.full_factor(state, end, step, rows)
            ok = self._refresh_side(state, end, place, factor, rows, step)
            if place == 0 and self.recipe.spectrum.trace_scale:
                trace = factor.diagonal(dim1=1, dim2=2).sum(1)[ok]
                power = self.recipe.spectrum.power
                state[f"root_{end}"][rows[ok]] *= trace.pow(power)[:, None, None]
            failed = rows[~ok.to(rows.device)].tolist()
            failures += [Failure(k, self.sides[place], self._why(end)) for k in failed]
        return failures

    def _why(self, end: str) -> str:
        return f"no {self.recipe.spectrum.root} inverse root of factor {end} was found"

    def _refresh_side(
        self, state: State, end: str, place: int, factor: Tensor, rows: Tensor, step: int
    ) -> Tensor:
        """Renew the roots of ``rows``; which of them succeeded, [b]."""
        spectrum = self.recipe.spectrum
        if spectrum.root != "eigh":
            return self._iterate(state, end, place, factor, rows, step)
        if self._holds_basis:
            values, vectors, solved, renewed = self._tested(state, end, place, factor, rows)
        else:
            values, vectors, solved = eigh_each(factor)
            renewed = solved
        values = values.clamp_min(0)
        damped = values + self._epsilon(values)[:, None]
        powers = inverse_powers(damped, self.exponent)
        solved &= powers.isfinite().all(1)
        good = rows[(renewed & solved).to(rows.device)]
        chosen = renewed & solved
        state[f"root_{end}"][good] = (vectors * powers.unsqueeze(1) @ vectors.mT)[chosen]
        self.hold_whitener(state, end, good, damped[chosen], vectors[chosen])
        state["refreshed"][good.cpu(), place] = step
        state["refreshes"][good.cpu(), place] += 1
        return solved

    def _tested(
        self, state: State, end: str, place: int, factor: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues and bases of ``rows``, which are sound, and which were renewed."""
        found = refreshed_basis(self.recipe.basis, factor, state[f"basis_{end}"][rows])
        state[f"basis_{end}"][rows] = found.vectors
        state["tests"][rows.cpu(), place] += 1
        state["iterations"][rows.cpu(), place] += found.iterations.cpu()
        first = (state["refreshed"][rows.cpu(), place] == 0).to(found.refreshed.device)
        return found.diagonal, found.vectors, found.ok, found.refreshed | (first & found.ok)

    def _iterate(
        self, state: State, end: str, place: int, factor: Tensor, rows: Tensor, step: int
    ) -> Tensor:
        spectrum = self.recipe.spectrum
        unit = "largest" if spectrum.relative else "absolute"
        solver = _ITERATIONS[spectrum.root]
        roots = solver(factor, round(-1 / self.exponent), Damping(spectrum.epsilon, unit))
        good = rows[roots.ok.to(rows.device)]
        state[f"root_{end}"][good] = roots.values[roots.ok]
        state["refreshed"][good.cpu(), place] = step
        state["refreshes"][good.cpu(), place] += 1
        state["iterations"][good.cpu(), place] += roots.iterations[roots.ok].cpu()
        return roots.ok

    def _epsilon(self, values: Tensor) -> Tensor:
        epsilon = self.recipe.spectrum.epsilon
        if self.recipe.spectrum.relative:
            return epsilon * values.amax(1)
        return torch.full_like(values[:, 0], epsilon)

    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        average = self.average(state, gradients)
        for side, end in self.each():
            average = contract(average, state[f"root_{end}"], side)
        return average

    def operator(self, state: State, block: int, step: int) -> KroneckerOperator:
        factors = []
        for side, size in enumerate(self.block):
            if side in self.sides:
                root = state[f"root_{side}"][block]
                factors.append(self._inverse_power(root, side))
            else:
                factors.append(torch.eye(size, dtype=torch.float64, device=state_device(state)))
        left, *others = factors
        right = others[0] if others else left.new_ones(1, 1)
        for one in others[1:]:
            right = torch.kron(right, one)
        return KroneckerOperator(left, right)

    def _inverse_power(self, root: Tensor, side: int) -> Tensor:
        """A^(-1/power) of a held inverse root A, the pseudo-inverse where epsilon is 0."""
        values, vectors = eigh_descending(root.double())
        rounding = torch.finfo(root.dtype).eps * values[0]
        power = -1.0 / self.recipe.spectrum.power
        if self.recipe.spectrum.epsilon == 0:
            null = values <= rounding * len(values)
            values = values.masked_fill(null, math.inf)
        elif values[-1] <= _RESOLUTION * rounding:
            raise UnsupportedError(
                f"the inverse root of dimension {side} is not resolved in {root.dtype}: its "
                f"eigenvalues reach from {float(values[-1]):.3g} to {float(values[0]):.3g}. Raise "
                f"spectrum.epsilon ({self.recipe.spectrum.epsilon:g})."
            )
        return (vectors * values.pow(power)) @ vectors.mT


def refreshed_basis(basis: Basis, factor: Tensor, held: Tensor) -> BasisRefresh:
    """Bases after a refresh, or a test, by the rule of ``basis``."""
    tolerance = basis.tolerance or 0.0
    if basis.solver == "qr":
        return warm_qr(factor, held, tolerance, basis.max_iterations)
    return refresh_by_eigh(factor, held, tolerance)


def inverse_powers(values: Tensor, exponent: float) -> Tensor:
    """values^exponent, 0 where a value is 0: the pseudo-inverse."""
    return torch.where(values > 0, values, math.inf).pow(exponent)


def state_device(state: State) -> torch.device:
    """Where the tensors of a state are, its counters apart."""
    return next(t.device for t in state.values() if t.is_floating_point())
