"""Second moments in the factors' eigenbases: EShampoo and SOAP."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from kronecker_probe.linalg.basis_refresh import BasisRefresh
from kronecker_probe.operators.structures.eigen import EigenOperator
from kronecker_probe.optim.blocks.contractions import along, contract, per_block
from kronecker_probe.optim.options.kinds import CorrectedOptions, FromGradients, FromLayers
from kronecker_probe.optim.preconditioners.base import Failure, State
from kronecker_probe.optim.preconditioners.diagonal import damped_power, divided
from kronecker_probe.optim.preconditioners.factored import Factored

# Rounds of row and column scalings to the marginals.
_SCALINGS = 3
# Marginals below this share of the largest are not divided by.
_FLOOR = 1e-12
# Roots of D within this many roundings of the largest are those of the rotation, and no gradients.
_ROUNDINGS = 32
# What D in the bases of the factors is, by what those are of.
_RULES = {FromGradients: "eigen-corrected", FromLayers: "ekfac"}


@final
class Rotated(Factored[CorrectedOptions]):
    """Q_L ((Q_L^T M Q_R) / (D^power + epsilon)) Q_R^T, D the second moment of Q_L^T G Q_R.

    M is kept in the rotated frame: bases are complete, so that turning it with them is exact, and
    a step takes two rotations instead of three. Where D is rounding the step is 0: in a null space
    of the gradients their quotient would be noise of size 1.
    """

    renewed: ClassVar[str] = "basis"
    _due_marginals: tuple[Tensor, dict[int, Tensor]] | None = None

    @property
    def rule(self) -> str | None:
        whole = len(self.sides) == 2 and len(self.block) == 2
        return _RULES.get(type(self.options.source)) if whole else None

    def initial(self, like: Tensor) -> State:
        state = self.factors(like)
        for side, end in self.each():
            eye = torch.eye(self.block[side], dtype=like.dtype, device=like.device)
            state[f"basis_{end}"] = eye.repeat(len(like), 1, 1)
        state["second_moment"] = torch.full_like(like, self.options.moments.initial)
        state["null_floor"] = like.new_zeros(len(like))
        return self.with_momentum(state, like)

    def refresh(self, state: State, step: int) -> list[Failure]:
        rows = self.due(state, step)
        if not len(rows):
            return []
        failures: list[Failure] = []
        marginals: dict[int, Tensor] = {}
        quotients = self.options.marginals or self._whitens
        sound = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for place, (side, end) in enumerate(self.each()):
            factor = self.full_factor(state, end, step, rows)
            found = self.refreshed_basis(state, place, rows, factor, self.options.solver, quotients)
            ok = found.ok.to(rows.device)
            marginals[side] = found.diagonal.clamp_min(0)
            # a basis that passed its test is as good as a new one
            state["refreshed"][rows.cpu()[found.ok.cpu()], place] = step
            if bool(found.refreshed.any()):
                self._turn(state, side, rows, found)
            damped = marginals[side] + self._epsilon(marginals[side])
            self.hold_whitener(state, end, rows[ok], damped[found.ok], found.vectors[found.ok])
            failures += self.count_failures(state, place, rows, found.ok, "eigenbasis")
            sound &= ok
        if self.options.marginals:
            chosen = {side: values[sound.to(values.device)] for side, values in marginals.items()}
            self._due_marginals = rows[sound], chosen
        return failures

    def _epsilon(self, values: Tensor) -> Tensor:
        """What damps the factors that whiten, [b, 1]."""
        epsilon = self.options.epsilon
        largest = values.amax(1, keepdim=True)
        return epsilon.value * (largest if epsilon.relative else torch.ones_like(largest))

    def _turn(self, state: State, side: int, rows: Tensor, found: BasisRefresh) -> None:
        """Let the averages follow a basis."""
        old = state[f"basis_{side}"][rows]
        state[f"basis_{side}"][rows] = found.vectors
        overlap = found.vectors.mT @ old
        if "momentum" in state:
            state["momentum"][rows] = contract(state["momentum"][rows], overlap, side)
        follow = contract if self.options.transport else kept
        moment = state["second_moment"][rows]
        state["second_moment"][rows] = follow(moment, overlap.square(), side)

    def _match(self, state: State, step: int) -> None:
        """Scale D to the diagonals of the factors, which are its row and column sums.

        The factors of a refresh hold the gradient of its step; so D must hold it, too.
        """
        if self._due_marginals is None:
            return
        rows, marginals = self._due_marginals
        self._due_marginals = None
        moment = state["second_moment"][rows] / self.options.moments.correction(step)
        for _ in range(_SCALINGS):
            for side, wanted in marginals.items():
                others = [k for k in range(1, moment.ndim) if k != side + 1]
                sums = moment.sum(dim=others, keepdim=True)
                target = along(wanted, side, moment)
                floor = _FLOOR * target.amax(dim=side + 1, keepdim=True)
                moment = moment * torch.where(sums > floor, target / sums, 1.0)
        state["second_moment"][rows] = moment * self.options.moments.correction(step)

    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        rotated = self._rotate(state, gradients)
        keep, weight = self.options.moments.weights()
        moment = state["second_moment"].mul_(keep)
        for row, layer in enumerate(self.layers):
            left, right = (state[f"basis_{end}"][row] for _, end in self.each())
            layer.add_squares(moment[row], left, right, weight)
        if not self.layers:
            moment.addcmul_(rotated, rotated, value=weight)
        self._match(state, step)
        average = self.average(state, rotated)
        denominator = self._denominator(moment, step)
        if self._has_null:
            self._set_floor(state, rotated)
            floor = state["null_floor"]
            # on a CPU to look costs less than to mask; an accelerator would wait for the answer
            if not moment.is_cpu or bool((moment.flatten(1).amin(1) <= floor).any()):
                denominator.masked_fill_(moment <= per_block(floor, moment), math.inf)
        damped = self._has_null or self.options.epsilon.surely_damps
        return self._rotate_back(state, divided(average, denominator, damped=damped))

    @property
    def _has_null(self) -> bool:
        """Whether D tells where gradients are rounding, and nothing else bounds the quotient.

        The gradients of K-FAC's statistics can be others than those that are averaged, and a
        relative epsilon bounds every quotient.
        """
        return not (isinstance(self.options.source, FromLayers) or self.options.epsilon.relative)

    def _set_floor(self, state: State, rotated: Tensor) -> None:
        """Below it D is rounding, and nothing is known of the sign of a gradient.

        That is relative to the largest entry of D and of the gradient now: after one that was far
        larger than all others D falls slowly.
        """
        top = state["second_moment"].flatten(1).amax(1)
        flat = rotated.flatten(1)  # aminmax along a dimension is many times slower
        now = torch.maximum(flat.amin(1).abs(), flat.amax(1)).square()
        now = torch.where(now > 0, torch.minimum(now, top), top)
        state["null_floor"].copy_(now * (_ROUNDINGS * torch.finfo(now.dtype).eps) ** 2)

    def _denominator(self, moment: Tensor, step: int) -> Tensor:
        one = self.options
        correction = one.moments.correction(step)
        return damped_power(moment, correction, one.root, one.epsilon, self.scratch)

    def filtered(self, state: State, gradients: Tensor, step: int) -> Tensor:
        if "momentum" not in state:
            return gradients
        return self._rotate_back(state, state["momentum"])

    def _rotate(self, state: State, blocks: Tensor) -> Tensor:
        """Q_L^T X Q_R, until the next call."""
        for side, end in self.each():
            basis = state[f"basis_{end}"].mT
            blocks = contract(blocks, basis, side, self.scratch, f"rotated {side}")
        return blocks

    def _rotate_back(self, state: State, blocks: Tensor) -> Tensor:
        """Q_L X Q_R^T, a new tensor."""
        for side, end in self.each():
            scratch = None if side == self.sides[-1] else self.scratch
            blocks = contract(blocks, state[f"basis_{end}"], side, scratch, "rotated back")
        return blocks

    def ready(self, state: State, step: int) -> bool:
        # the identity is a basis, in which this is Adam
        return True

    def operator(self, state: State, block: int, step: int) -> EigenOperator:
        held = state["second_moment"][block : block + 1]
        power = self.options.power
        values = self._denominator(held.double(), step).pow(1 / power)
        if self._has_null:
            values = values.masked_fill(held <= state["null_floor"][block], 0.0)
        bases = {side: state[f"basis_{side}"][block] for side in self.sides}
        left, right = self.product(state, bases)
        return EigenOperator(left, right, values[0].reshape(len(left), -1), exact=True)


def kept(moment: Tensor, squares: Tensor, side: int) -> Tensor:
    """Second moments in a new basis: those of the columns that its columns continue.

    A column continues the old one with which it has a squared overlap above a half; no two can have
    that with the same. One that continues none, as in a null space, whose basis is anyone's choice,
    has the average over all: a second moment that belongs to another direction could be far too
    small for it.

    Args:
        moment: D, [b, r_0, r_1, ...].
        squares: Squared overlaps, [b, new, old].
        side: The dimension of D that is turned.
    """
    most, partner = squares.max(dim=2)
    continues = most > 0.5
    if bool(continues.all()):  # a permutation
        return moment.gather(side + 1, along(partner, side, moment).expand_as(moment))
    alone = torch.zeros_like(squares).scatter_(2, partner.unsqueeze(2), 1.0)
    return contract(moment, torch.where(continues.unsqueeze(2), alone, squares), side)
