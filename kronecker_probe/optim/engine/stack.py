"""Equal blocks of several parameters, treated as one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kronecker_probe.optim.blocks.contractions import per_block
from kronecker_probe.optim.blocks.scratch import Scratch
from kronecker_probe.optim.blocks.tiles import Layout, Tile, factored_sides, layout
from kronecker_probe.optim.layers.samples import LayerSamples
from kronecker_probe.optim.options.kinds import (
    CorrectedOptions,
    DiagonalOptions,
    FactoredOptions,
    FromLayers,
    InverseFreeOptions,
    KroneckerOptions,
    PolarOptions,
    Recipe,
)
from kronecker_probe.optim.preconditioners.base import Failure, Preconditioner, State
from kronecker_probe.optim.preconditioners.diagonal import Diagonal
from kronecker_probe.optim.preconditioners.eigenbasis import Rotated
from kronecker_probe.optim.preconditioners.grafting import Graft
from kronecker_probe.optim.preconditioners.inverse_free import InverseFree
from kronecker_probe.optim.preconditioners.kronecker import Kronecker
from kronecker_probe.optim.preconditioners.polar import Polar

_KINDS: dict[type[Any], type[Preconditioner[Any]]] = {
    KroneckerOptions: Kronecker,
    CorrectedOptions: Rotated,
    PolarOptions: Polar,
    InverseFreeOptions: InverseFree,
    DiagonalOptions: Diagonal,
}


@dataclass(frozen=True)
class Member:
    """A tile of a parameter, and where its blocks are in the stack."""

    param: Tensor
    layout: Layout
    tile: int
    start: int

    @property
    def blocks(self) -> Tile:
        """The tile."""
        return self.layout.tiles[self.tile]

    @property
    def rows(self) -> slice:
        """Its places in the stack."""
        return slice(self.start, self.start + self.blocks.count)

    def key(self, name: str) -> str:
        """What the parameter's state calls a tensor of this tile."""
        return name if len(self.layout.tiles) == 1 else f"tile{self.tile}.{name}"

    def read(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The blocks of a tensor of the parameter's shape, [count, *block]."""
        return self.blocks.read(tensor.reshape(self.layout.shape)).to(dtype)

    def copy(self, tensor: Tensor, out: Tensor) -> None:
        """Copy these blocks into ``out``."""
        self.blocks.copy(tensor.reshape(self.layout.shape), out)


@dataclass(frozen=True)
class Failed:
    """A factor that was not refreshed.

    Attributes:
        param: Of which parameter.
        tile: Of which tile.
        block: Which block of the tile.
        side: Which dimension.
        what: What was not found.
        count: How many times in a row.
    """

    param: Tensor
    tile: int
    block: int
    side: int
    what: str
    count: int

    @property
    def key(self) -> tuple[int, int, int, int]:
        """The same for every failure of the factor."""
        return id(self.param), self.tile, self.block, self.side


@dataclass(frozen=True)
class Turn:
    """What a step of some members gave: their directions, and what was not refreshed."""

    directions: dict[tuple[int, int], Tensor]
    failures: list[Failed]


def preconditioner_of(
    recipe: Recipe, block: tuple[int, ...], order: int, scratch: Scratch
) -> Preconditioner[Any]:
    """The preconditioner of blocks of this shape, of a parameter of ``order`` dimensions.

    Blocks without any factor have a second moment of every entry, or diagonal inverse factors.
    """
    kind: Any = recipe.kind
    sides = factored_sides(block, recipe.shapes, order)
    if isinstance(kind, FactoredOptions):
        if isinstance(kind.source, FromLayers):  # a single output or input has a scale, too
            sides = tuple(range(len(block)))
        if not sides:
            kind = kind.without_factors()
    elif isinstance(kind, InverseFreeOptions) and not sides:
        sides = tuple(k for k, size in enumerate(block) if size > 1) or (0,)
        kind = dataclasses.replace(kind, diagonal=True)
    return _KINDS[type(kind)](kind, recipe.beta1, block, sides, scratch)


@final
class Stack:
    """Members of one block shape, dtype and device, with their state in single tensors.

    Args:
        recipe: The choices of their group.
        members: The members, in the order of their blocks.
        order: Dimensions of their parameters.
        dtype: Of the state.
        first: Number of their first block among all of the optimizer, by which refreshes stagger.
        scratch: Memory for intermediate results, which stacks can share.
    """

    def __init__(
        self,
        recipe: Recipe,
        members: Sequence[Member],
        order: int,
        dtype: torch.dtype,
        first: int,
        scratch: Scratch,
    ) -> None:
        self.scratch = scratch
        self.members = list(members)
        self.block = members[0].blocks.block
        self.blocks = sum(member.blocks.count for member in members)
        self.order = order
        self.dtype = dtype
        self.follow(recipe)
        device = members[0].param.device
        like = torch.zeros(self.blocks, *self.block, dtype=dtype, device=device)
        self.state = self.preconditioner.initial(like)
        self.state["offset"] = torch.arange(first, first + self.blocks)
        if recipe.graft.has_moment:
            self.state["graft_moment"] = torch.zeros_like(like)

    def follow(self, recipe: Recipe) -> None:
        """Go on with other choices, for which the state is of the same form."""
        self.recipe = recipe
        self.preconditioner = preconditioner_of(recipe, self.block, self.order, self.scratch)
        self.graft = Graft(recipe.graft, self.scratch)

    def views(self, member: Member) -> dict[str, Tensor]:
        """A member's part of the state, by the names that the parameter's state has."""
        return {member.key(name): tensor[member.rows] for name, tensor in self.state.items()}

    def fill(self, member: Member, given: Mapping[str, Any]) -> None:
        """Copy a member's part from the state of its parameter."""
        for name, tensor in self.state.items():
            tensor[member.rows].copy_(given[member.key(name)])

    @torch.no_grad()
    def step(self, active: Sequence[Member], step: int, layers: Mapping[int, LayerSamples]) -> Turn:
        """One step of some members, all at the same count of steps.

        Args:
            active: The members.
            step: The count.
            layers: What was recorded of the layers of parameters, by their id.
        """
        state, rows = self._select(active)
        G = self._gradients(active)
        one = self.preconditioner
        self.graft.update(state, G)
        one.layers = [layers[id(m.param)] for m in active if id(m.param) in layers]
        one.update(state, G, step)
        failures = one.refresh(state, step)
        direction = self._direction(state, G, step)
        one.layers = ()
        if rows is not None:
            for name, tensor in state.items():
                self.state[name][rows.to(self.state[name].device)] = tensor
        directions, start = {}, 0
        for member in active:
            stop = start + member.blocks.count
            directions[id(member.param), member.tile] = direction[start:stop]
            start = stop
        return Turn(directions, self._failed(active, failures, state))

    def _gradients(self, active: Sequence[Member]) -> Tensor:
        """Those of the blocks, [K, *block]: the gradient itself where it is a single block."""
        first = _gradient(active[0].param)
        count = sum(member.blocks.count for member in active)
        if count == 1 and first.dtype == self.dtype:
            return active[0].read(first, self.dtype)
        out = self.scratch.take(
            "gradients", (count, *self.block), first.new_empty(0, dtype=self.dtype)
        )
        start = 0
        for member in active:
            stop = start + member.blocks.count
            member.copy(_gradient(member.param), out[start:stop])
            start = stop
        return out

    def _failed(
        self, active: Sequence[Member], failures: Sequence[Failure], state: State
    ) -> list[Failed]:
        """Failures by parameter, tile and block."""
        found = []
        places = [(one, k) for one in active for k in range(one.blocks.count)] if failures else []
        sides = self.preconditioner.sides
        for failure in failures:
            member, block = places[failure.block]
            count = int(state["failures"][failure.block, sides.index(failure.side)])
            found.append(
                Failed(member.param, member.tile, block, failure.side, failure.what, count)
            )
        return found

    def _direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        one = self.preconditioner
        ready = one.ready(state, step)
        direction = one.direction(state, gradients, step)
        if self.graft.options.method == "none" and ready is True:
            return direction
        filtered = one.filtered(state, gradients, step)
        graft = self.graft.direction(state, filtered, step)
        if ready is False:
            return graft.clone()
        direction = self.graft.scaled(direction, graft)
        if ready is True:
            return direction
        return torch.where(per_block(ready.to(direction.device), direction), direction, graft)

    def _select(self, active: Sequence[Member]) -> tuple[State, Tensor | None]:
        """The state of some members; with their rows where it is a copy."""
        if len(active) == len(self.members):
            return self.state, None
        rows = torch.cat([torch.arange(one.rows.start, one.rows.stop) for one in active])
        return {name: t[rows.to(t.device)] for name, t in self.state.items()}, rows


def stacks_of(
    params: Sequence[Tensor], recipe: Recipe, first: int, scratch: Scratch
) -> list[Stack]:
    """Stacks for parameters that have none yet.

    Args:
        params: The parameters.
        recipe: The choices of their group.
        first: Number of the first block.
        scratch: Memory for intermediate results.
    """
    found: dict[tuple[Any, ...], list[Member]] = {}
    counts: dict[tuple[Any, ...], int] = {}
    for param in params:
        cut = layout(param.shape, recipe.shapes)
        dtype = recipe.state_dtype(param.dtype)
        for place, tile in enumerate(cut.tiles):
            vector = param.ndim <= 1
            key = tile.block, dtype, param.device, vector
            start = counts.get(key, 0)
            found.setdefault(key, []).append(Member(param, cut, place, start))
            counts[key] = start + tile.count
    stacks = []
    for key, members in found.items():
        stacks.append(Stack(recipe, members, 1 if key[3] else 2, key[1], first, scratch))
        first += counts[key]
    return stacks


def state_shapes(param: Tensor, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that stacks hold for a parameter."""
    ghost = param.to("meta")
    return {
        name: tuple(view.shape)
        for stack in stacks_of([ghost], recipe, 0, Scratch())
        for member in stack.members
        for name, view in stack.views(member).items()
    }


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad
