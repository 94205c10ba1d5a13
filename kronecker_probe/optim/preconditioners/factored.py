"""The factors that all preconditioners with bases or roots accumulate."""

from __future__ import annotations

import math
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from kronecker_probe.linalg.basis_refresh import (
    BasisRefresh,
    refresh_by_eigh,
    renewed,
    warm_qr,
)
from kronecker_probe.optim.blocks.contractions import (
    add_outer,
    completed,
    contract,
    packed_identity,
    per_block,
    unfold,
)
from kronecker_probe.optim.options.kinds import CorrectedOptions, KroneckerOptions, Solver, Whitened
from kronecker_probe.optim.preconditioners.base import Failure, Preconditioner, State

# The step of the last refresh; tests, refreshes, iterations, and failures in a row.
COUNTERS = ("refreshed", "tests", "refreshes", "iterations", "failures")


FactoredT = TypeVar("FactoredT", KroneckerOptions, CorrectedOptions)


class Factored(Preconditioner[FactoredT]):
    """Factors of a stack of blocks: one for each side, "factor_0", "factor_1", ...

    With ``statistics.rule`` "whitened", what is held of the other sides whitens the gradient:
    "whitener_k", W with W W^T = R^{q-1}, and "whitened_trace_k", Tr R^q.

    Attributes:
        renewed: What a refresh renews for each side, in the dtype of the state.
    """

    renewed: ClassVar[str]

    def factors(self, like: Tensor) -> State:
        """Their state before the first step."""
        state: State = {}
        for side, end in self.each():
            size = self.block[side]
            eye = torch.eye(size, dtype=like.dtype, device=like.device)
            # a partial trace of initial I
            initial = self.options.moments.initial * (math.prod(self.block) // size)
            held = packed_identity(size, like)
            held = (initial * held).to(torch.bfloat16 if self.options.bfloat16 else like.dtype)
            state[f"factor_{end}"] = held.repeat(len(like), *[1] * held.ndim)
            if self._whitens:
                state[f"whitener_{end}"] = eye.repeat(len(like), 1, 1)
                state[f"whitened_trace_{end}"] = like.new_zeros(len(like))
        for name in COUNTERS:
            state[name] = torch.zeros(len(like), len(self.sides), dtype=torch.int64)
        return state

    def update(self, state: State, gradients: Tensor, step: int) -> None:
        moments, update = self.options.moments, self.options.moments.update_at(step)
        if update is None:
            return
        if self._whitens:
            self._start_whiteners(state, gradients)
        keep, weight = moments.weights(moments.every)
        for row, layer in enumerate(self.layers):
            for side, end in self.each():
                layer.add_factor(state[f"factor_{end}"][row], side, keep, weight, update)
        if self.layers:
            return
        if isinstance(self.options.source, Whitened):
            weight /= self.missing  # sides without a factor are whitened by the identity
        for side, end in self.each():
            rows = gradients
            if self._whitens:
                rows = self._whitened(state, gradients, side)
            add_outer(state[f"factor_{end}"], unfold(rows, side), keep, weight, update)

    @property
    def _q(self) -> float:
        assert isinstance(self.options.source, Whitened)
        return self.options.source.q

    @property
    def _whitens(self) -> bool:
        return isinstance(self.options.source, Whitened) and len(self.sides) > 1

    def _start_whiteners(self, state: State, gradients: Tensor) -> None:
        """Let factors of the first gradient that is not zero be whitened in its own units.

        Each factor is found from what is held of the others. If those are off by c, it is by 1/c,
        and their product goes to and fro between c and 1/c. So they start as multiples of the
        identity whose product has the mean square of G.
        """
        square = gradients.square().flatten(1).mean(1)
        unset = (state[f"whitened_trace_{self.sides[0]}"] == 0) & (square > 0)
        if not bool(unset.any()):
            return
        scale = square[unset].pow(1 / len(self.sides))
        q = self._q
        for side, end in self.each():
            state[f"whitener_{end}"][unset] *= scale.pow((q - 1) / 2)[:, None, None]
            state[f"whitened_trace_{end}"][unset] = self.block[side] * scale.pow(q)

    def _whitened(self, state: State, gradients: Tensor, side: int) -> Tensor:
        """G times the whiteners of all other sides, over the roots of their traces."""
        for other, end in self.each():
            if other != side:
                gradients = contract(gradients, state[f"whitener_{end}"].mT, other)
                held = state[f"whitened_trace_{end}"]
                trace = torch.where(held > 0, held, 1.0)  # 0 before the first gradient
                gradients = gradients / per_block(trace.sqrt(), gradients)
        return gradients

    def hold_whitener(
        self, state: State, end: str, rows: Tensor, values: Tensor, vectors: Tensor
    ) -> None:
        """Keep Q lambda^{(q-1)/2} of refreshed factors, within their rank; of zero, what was held.

        Args:
            state: Of the stack.
            end: The side.
            rows: Which blocks.
            values: Eigenvalues with what damps them, descending, [b, r].
            vectors: [b, r, r].
        """
        if not self._whitens:
            return
        q = self._q
        some = values[:, 0] > 0
        rows, values, vectors = rows[some.to(rows.device)], values[some], vectors[some]
        null = values <= 0
        powers = values.masked_fill(null, 1.0).pow((q - 1) / 2).masked_fill(null, 0.0)
        state[f"whitener_{end}"][rows] = vectors * powers.unsqueeze(-2)
        state[f"whitened_trace_{end}"][rows] = values.pow(q).masked_fill(null, 0.0).sum(-1)

    def count_failures(
        self, state: State, place: int, rows: Tensor, ok: Tensor, what: str
    ) -> list[Failure]:
        """Count failures in a row of one side's factors, and tell of those of now.

        Args:
            state: Of the stack.
            place: Which of the sides.
            rows: Blocks that were due.
            ok: Which of them succeeded, [b].
            what: What was looked for.
        """
        where, ok = rows.cpu(), ok.cpu()
        counts = state["failures"]
        counts[where, place] = torch.where(ok, 0, counts[where, place] + 1)
        return [Failure(block, self.sides[place], what) for block in where[~ok].tolist()]

    def refreshed_basis(
        self,
        state: State,
        place: int,
        rows: Tensor,
        factor: Tensor,
        solver: Solver,
        quotients: bool,
    ) -> BasisRefresh:
        """Bases [b, r, r] of one side's factors A after a refresh, or a test, which are counted.

        Args:
            state: Of the stack, with the bases until now; they are not replaced.
            place: Which of the sides.
            rows: Which blocks.
            factor: A, [b, r, r].
            solver: How.
            quotients: Whether diag(Q^T A Q) is asked for.
        """
        old = state[f"basis_{self.sides[place]}"][rows]
        by_qr = solver.method == "qr"
        if solver.tolerance is None:
            iterations = solver.max_iterations if by_qr else None
            found = renewed(factor, old, iterations, quotients=quotients)
        elif by_qr:
            found = warm_qr(factor, old, solver.tolerance, solver.max_iterations)
        else:
            found = refresh_by_eigh(factor, old, solver.tolerance)
        where = rows.cpu()
        state["tests"][where, place] += int(solver.tolerance is not None)
        state["refreshes"][where, place] += found.refreshed.cpu().long()
        state["iterations"][where, place] += found.iterations.cpu()
        return found

    def full_factor(self, state: State, end: str, step: int, rows: Tensor) -> Tensor:
        """A / b of some blocks, [b, r, r], both triangles, in the dtype of the state."""
        factor = state[f"factor_{end}"]
        chosen = factor if len(rows) == len(factor) else factor[rows]
        dtype = state[f"{self.renewed}_{end}"].dtype
        return completed(chosen, self.block[int(end)]).to(
            dtype
        ) / self.options.moments.correction_at(step)

    def due(self, state: State, step: int) -> Tensor:
        """The blocks whose turn it is to be refreshed in this step."""
        refresh, count = self.options.refresh, len(state["offset"])
        if not refresh.stagger:
            return torch.arange(count if refresh.is_due(step, 0) else 0)
        offsets = state["offset"].tolist()
        return torch.tensor([k for k in range(count) if refresh.is_due(step, offsets[k])]).long()

    @property
    def first(self) -> int:
        return self.options.refresh.first

    def ready(self, state: State, step: int) -> Tensor | bool:
        if step < self.first:
            return False
        found = (state["refreshed"] > 0).all(dim=1)
        return True if bool(found.all()) else found
