"""The factors that all preconditioners with bases or roots accumulate."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from kronecker_probe.linalg.basis_refresh import BasisRefresh
from kronecker_probe.optim.blocks.contractions import (
    add_outer,
    completed,
    contract,
    packed_identity,
    per_block,
    unfold,
)
from kronecker_probe.optim.preconditioners.base import Failure, Preconditioner, State

# The step of the last refresh; tests, refreshes, iterations, and failures in a row.
COUNTERS = ("refreshed", "tests", "refreshes", "iterations", "failures")


class Factored(Preconditioner):
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
        statistics = self.recipe.statistics
        for side, end in self.each():
            size = self.block[side]
            eye = torch.eye(size, dtype=like.dtype, device=like.device)
            # a partial trace of initial I
            initial = statistics.initial * (math.prod(self.block) // size)
            held = packed_identity(size, like)
            held = (initial * held).to(self._factor_dtype(like.dtype))
            state[f"factor_{end}"] = held.repeat(len(like), *[1] * held.ndim)
            if self._whitens:
                state[f"whitener_{end}"] = eye.repeat(len(like), 1, 1)
                state[f"whitened_trace_{end}"] = like.new_zeros(len(like))
        for name in COUNTERS:
            state[name] = torch.zeros(len(like), len(self.sides), dtype=torch.int64)
        return state

    def update(self, state: State, gradients: Tensor, step: int) -> None:
        if not self.updates_now(step):
            return
        if self._whitens:
            self._start_whiteners(state, gradients)
        keep, weight = self.recipe.weights(self.recipe.statistics.every)
        update = self.updates(step)
        for row, layer in enumerate(self.layers):
            for side, end in self.each():
                layer.add_factor(state[f"factor_{end}"][row], side, keep, weight, update)
        if self.layers:
            return
        if self.recipe.statistics.rule == "whitened":
            weight /= self.missing  # sides without a factor are whitened by the identity
        for side, end in self.each():
            rows = gradients
            if self._whitens:
                rows = self._whitened(state, gradients, side)
            add_outer(state[f"factor_{end}"], unfold(rows, side), keep, weight, update)

    def _factor_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.recipe.storage.factors == "bfloat16" else dtype

    @property
    def _whitens(self) -> bool:
        return self.recipe.statistics.rule == "whitened" and len(self.sides) > 1

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
        q = self.recipe.statistics.q
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
        q = self.recipe.statistics.q
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

    def count_tests(self, state: State, place: int, rows: Tensor, found: BasisRefresh) -> None:
        """Count tests, refreshes and QR iterations of one side's bases."""
        where = rows.cpu()
        state["tests"][where, place] += int(self.recipe.basis.tolerance is not None)
        state["refreshes"][where, place] += found.refreshed.cpu().long()
        state["iterations"][where, place] += found.iterations.cpu()

    def full_factor(self, state: State, end: str, step: int, rows: Tensor) -> Tensor:
        """A / b of some blocks, [b, r, r], both triangles, in the dtype of the state."""
        factor = state[f"factor_{end}"]
        chosen = factor if len(rows) == len(factor) else factor[rows]
        dtype = state[f"{self.renewed}_{end}"].dtype
        return completed(chosen, self.block[int(end)]).to(dtype) / self.correction(step)

    def due(self, state: State, step: int) -> Tensor:
        """The blocks whose turn it is to be refreshed in this step."""
        basis, count = self.recipe.basis, len(state["offset"])
        if not basis.stagger:
            return torch.arange(count if basis.is_due(step, 0) else 0)
        offsets = state["offset"].tolist()
        return torch.tensor([k for k in range(count) if basis.is_due(step, offsets[k])]).long()

    def ready(self, state: State, step: int) -> Tensor | bool:
        if step < self.recipe.basis.first:
            return False
        found = (state["refreshed"] > 0).all(dim=1)
        return True if bool(found.all()) else found
