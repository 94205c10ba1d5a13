"""Second moments in the factors' eigenbases: EShampoo and SOAP."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from kronecker_probe.linalg.basis_refresh import BasisRefresh
from kronecker_probe.operators.eigen import EigenOperator
from kronecker_probe.optim.contractions import contract
from kronecker_probe.optim.diagonal import divided, powered
from kronecker_probe.optim.factors import Factored
from kronecker_probe.optim.kronecker import refreshed_basis, state_device
from kronecker_probe.optim.preconditioner import Failure, State

# Rounds of row and column scalings to the marginals.
_SCALINGS = 3
# Marginals below this share of the largest are not divided by.
_FLOOR = 1e-12


@final
class Rotated(Factored):
    """Q_L ((Q_L^T M Q_R) / (D^power + epsilon)) Q_R^T, D the second moment of Q_L^T G Q_R.

    M is kept in the rotated frame: bases are complete, so that turning it with them is exact, and
    a step takes two rotations instead of three.
    """

    def initial(self, like: Tensor) -> State:
        state = self.factors(like)
        for side, end in self.each():
            eye = torch.eye(self.block[side], dtype=like.dtype, device=like.device)
            state[f"basis_{end}"] = eye.repeat(len(like), 1, 1)
        state["second_moment"] = torch.zeros_like(like)
        return self.with_momentum(state, like)

    def refresh(self, state: State, step: int) -> list[Failure]:
        if not self.is_due(step):
            return []
        rows = self.due(state, step)
        if not len(rows):
            return []
        failures: list[Failure] = []
        marginals: dict[int, Tensor] = {}
        for place, (side, end) in enumerate(self.each()):
            factor = self.full_factor(state, end, step, rows)
            old = state[f"basis_{end}"][rows]
            found = refreshed_basis(self.recipe.basis, factor, old)
            marginals[side] = found.diagonal.clamp_min(0)
            self._count(state, place, rows, found, step)
            if bool(found.refreshed.any()):
                self._turn(state, side, rows, old, found)
            damped = marginals[side] + self.recipe.spectrum.epsilon
            self.hold_whitener(state, end, rows, damped, found.vectors)
            failed = rows[~found.ok.to(rows.device)].tolist()
            why = f"no eigenbasis of factor {end} was found"
            failures += [Failure(k, side, why) for k in failed]
        if self.recipe.basis.marginals and step > 1:
            self._match(state, rows, marginals, step)
        return failures

    def _count(self, state: State, place: int, rows: Tensor, found: BasisRefresh, step: int) -> None:
        where = rows.cpu()
        state["tests"][where, place] += 1
        state["iterations"][where, place] += found.iterations.cpu()
        state["refreshes"][where, place] += found.refreshed.cpu().long()
        # a basis that passed its test is as good as a new one
        sound = where[found.ok.cpu()]
        state["refreshed"][sound, place] = step

    def _turn(self, state: State, side: int, rows: Tensor, old: Tensor, found: BasisRefresh) -> None:
        """Let the averages follow a basis."""
        state[f"basis_{side}"][rows] = found.vectors
        overlap = found.vectors.mT @ old
        if "momentum" in state:
            state["momentum"][rows] = contract(state["momentum"][rows], overlap, side)
        moment = state["second_moment"][rows]
        if self.recipe.basis.carry == "transport":
            moment = contract(moment, overlap.square(), side)
        else:
            shape = [len(rows), *[1] * (moment.ndim - 1)]
            shape[side + 1] = -1
            order = found.continues.view(shape).expand_as(moment)
            moment = moment.gather(side + 1, order)
        state["second_moment"][rows] = moment

    def _match(self, state: State, rows: Tensor, marginals: dict[int, Tensor], step: int) -> None:
        """Scale D to the diagonals of the factors, which are its row and column sums."""
        moment = state["second_moment"][rows] / self.recipe.correction(step - 1)
        for _ in range(_SCALINGS):
            for side, wanted in marginals.items():
                others = [k for k in range(1, moment.ndim) if k != side + 1]
                sums = moment.sum(dim=others, keepdim=True)
                target = wanted.view([s if k in (0, side + 1) else 1 for k, s in enumerate(moment.shape)])
                floor = _FLOOR * target.amax(dim=side + 1, keepdim=True)
                moment = moment * torch.where(sums > floor, target / sums, 1.0)
        state["second_moment"][rows] = moment * self.recipe.correction(step - 1)

    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        rotated = self._rotate(state, gradients)
        keep, weight = self.recipe.weights()
        state["second_moment"].mul_(keep).addcmul_(rotated, rotated, value=weight)
        average = self.average(state, rotated)
        direction = divided(average, self._denominator(state["second_moment"], step))
        return self._rotate_back(state, direction)

    def _denominator(self, moment: Tensor, step: int) -> Tensor:
        """D^power + epsilon, a new tensor."""
        spectrum = self.recipe.spectrum
        power = spectrum.power if spectrum.exponent is None else -spectrum.exponent
        root = powered(moment, self.recipe.correction(step), power)
        if not spectrum.relative:
            return root.add_(spectrum.epsilon)
        largest = root.flatten(1).amax(1).view(-1, *[1] * (root.ndim - 1))
        return root.add_(spectrum.epsilon * largest)

    def filtered(self, state: State, gradients: Tensor, step: int) -> Tensor:
        if "momentum" not in state:
            return gradients
        return self._rotate_back(state, state["momentum"])

    def _rotate(self, state: State, blocks: Tensor) -> Tensor:
        for side, end in self.each():
            blocks = contract(blocks, state[f"basis_{end}"].mT, side)
        return blocks

    def _rotate_back(self, state: State, blocks: Tensor) -> Tensor:
        for side, end in self.each():
            blocks = contract(blocks, state[f"basis_{end}"], side)
        return blocks

    def ready(self, state: State, step: int) -> bool:
        # the identity is a basis, in which this is Adam
        return True

    def operator(self, state: State, block: int, step: int) -> EigenOperator:
        moment = state["second_moment"][block : block + 1].double()
        power = self.recipe.spectrum.power
        values = self._denominator(moment, step)[0].pow(1 / power)
        bases = [
            state[f"basis_{side}"][block].double()
            if side in self.sides
            else torch.eye(size, dtype=torch.float64, device=state_device(state))
            for side, size in enumerate(self.block)
        ]
        left, *others = bases
        right = others[0] if others else left.new_ones(1, 1)
        for one in others[1:]:
            right = torch.kron(right, one)
        return EigenOperator(left, right, values.reshape(len(left), -1))
