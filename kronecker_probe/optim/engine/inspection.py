"""What an optimizer holds of a parameter, part by part: for those who measure it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.operators.base import Operator
from kronecker_probe.optim.engine.operator import operator_of
from kronecker_probe.optim.engine.stack import Member, Stack
from kronecker_probe.optim.preconditioners.base import Preconditioner
from kronecker_probe.optim.preconditioners.diagonal import Diagonal
from kronecker_probe.optim.preconditioners.eigenbasis import Rotated
from kronecker_probe.optim.preconditioners.factored import Factored
from kronecker_probe.optim.preconditioners.kronecker import Kronecker


@final
@dataclass(frozen=True)
class FactorInUse:
    """A factor of one block.

    Attributes:
        block: Which block of the parameter.
        side: Which dimension of the block: 0 for the left factor, 1 for the right one.
        factor: A [r, r], both triangles, bias-corrected, in the dtype of the state.
        dtype: In which it is held between steps.
        basis: Q [r, r], the eigenvectors held of it; None where roots alone are held, or none yet.
        epsilon: ``spectrum.epsilon``; None where it is not added to eigenvalues of the factor.
        relative: Whether it counts in the largest eigenvalue.
        exponent: The power taken of A + epsilon I; None where epsilon is.
        staleness: Steps since the last refresh, or test that found none needed; None before the
            first.
        tests: Of the basis.
        refreshes: Of basis or root.
        iterations: Of QR or Newton, in all.
    """

    block: int
    side: int
    factor: Tensor
    dtype: torch.dtype
    basis: Tensor | None
    epsilon: float | None
    relative: bool
    exponent: float | None
    staleness: int | None
    tests: int
    refreshes: int
    iterations: int


@final
class Inspection:
    """What is held of one parameter after a step.

    Args:
        param: The parameter.
        stacks: Those of its group.
        step: Its steps.
        name: For messages.
    """

    def __init__(self, param: Tensor, stacks: Sequence[Stack], step: int, name: str) -> None:
        self.param = param
        self.stacks = stacks
        self.step = step
        self.name = name

    def __repr__(self) -> str:
        lines = [f"{self.name}, step {self.step}: {self.rule or 'no single rule'}"]
        lines += [
            f"  block {one.block}, side {one.side}: {len(one.factor)} rows in {one.dtype}, "
            + (
                "no refresh yet"
                if one.staleness is None
                else f"refreshed {one.staleness} steps ago"
            )
            + f", {one.refreshes} refreshes"
            for one in self.factors
        ]
        return "\n".join(lines)

    @property
    def factors(self) -> tuple[FactorInUse, ...]:
        """Those of all blocks; none where the preconditioner accumulates none."""
        return tuple(
            factor
            for stack, member in self._members()
            if isinstance(stack.preconditioner, Factored)
            for factor in _factors(stack.preconditioner, stack, member, self.step)
        )

    @property
    def rule(self) -> str | None:
        """The approximation that each block follows; None where there is none, or several."""
        rules = {stack.preconditioner.rule for stack, _ in self._members()}
        return rules.pop() if len(rules) == 1 else None

    @property
    def block_size(self) -> int | None:
        """The longest side of a block; None for a parameter that is not cut."""
        for _, member in self._members():
            if not member.layout.is_whole:
                return max(max(tile.block) for tile in member.layout.tiles)
        return None

    @property
    def epsilon(self) -> float | None:
        """``spectrum.epsilon`` where it is added to eigenvalues of factors; None elsewhere."""
        found = [one.epsilon for one in self.factors if one.epsilon is not None]
        return max(found, default=None)

    def in_use(self) -> Operator:
        """The preconditioner in use: stale, damped and cut into blocks.

        Raises:
            UnsupportedError: There is none yet, or it cannot be resolved.
        """
        return operator_of(self.param, self.stacks, self.step, self.name)

    def fresh(self, *, damped: bool) -> Operator:
        """What a refresh right now would make of the same statistics.

        Args:
            damped: With epsilon, or without.

        Raises:
            UnsupportedError: There is no preconditioner yet; or corrected eigenvalues, whose
                second moments are known in the held basis only.
        """

        def of_block(stack: Stack, row: int, step: int) -> Operator:
            one = stack.preconditioner
            if not isinstance(one, Kronecker):
                raise UnsupportedError("second moments are known in the held basis only")
            return one.fresh(stack.state, row, step, damped=damped)

        return operator_of(self.param, self.stacks, self.step, self.name, of_block)

    def undamped(self) -> Operator:
        """What is held, without epsilon.

        Raises:
            UnsupportedError: There is no preconditioner yet; or one whose epsilon is in the roots
                that it holds.
        """
        return operator_of(self.param, self.stacks, self.step, self.name, _undamped)

    def _members(self) -> Iterator[tuple[Stack, Member]]:
        for stack in self.stacks:
            for member in stack.members:
                if member.param is self.param:
                    yield stack, member


def _undamped(stack: Stack, row: int, step: int) -> Operator:
    one = stack.preconditioner
    if not isinstance(one, (Rotated, Diagonal)):
        raise UnsupportedError("its damping is in what it holds")
    epsilon = dataclasses.replace(one.options.epsilon, value=0.0)
    plain = dataclasses.replace(one.options, epsilon=epsilon)
    kind: type[Preconditioner[Any]] = type(one)
    same = kind(plain, one.beta1, one.block, one.sides, one.scratch)
    return same.operator(stack.state, row, step)


def _factors(one: Factored[Any], stack: Stack, member: Member, step: int) -> Iterator[FactorInUse]:
    state, epsilon = stack.state, one.options.epsilon
    damps = isinstance(one, Kronecker)
    first = sum(tile.count for tile in member.layout.tiles[: member.tile])
    for k in range(member.blocks.count):
        row = member.start + k
        for place, (side, end) in enumerate(one.each()):
            refreshed = int(state["refreshed"][row, place])
            held = state.get(f"basis_{end}") if refreshed else None
            yield FactorInUse(
                block=first + k,
                side=side,
                factor=one.full_factor(state, end, step, torch.tensor([row]))[0],
                dtype=state[f"factor_{end}"].dtype,
                basis=None if held is None else held[row].clone(),
                epsilon=epsilon.value if damps else None,
                relative=epsilon.relative,
                exponent=one.exponent if isinstance(one, Kronecker) else None,
                staleness=step - refreshed if refreshed else None,
                tests=int(state["tests"][row, place]),
                refreshes=int(state["refreshes"][row, place]),
                iterations=int(state["iterations"][row, place]),
            )
