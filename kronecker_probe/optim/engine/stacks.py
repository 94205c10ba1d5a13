"""The stacks of an optimizer, group by group, and what their parameters may not do meanwhile."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.blocks.scratch import Scratch
from kronecker_probe.optim.blocks.tiles import layout
from kronecker_probe.optim.engine.stack import Failed, Stack, stacks_of
from kronecker_probe.optim.options.groups import Group, check_change, recipe_of, structure


@final
class Stacks:
    """Built on demand from, and viewed by, the states of the parameters.

    Args:
        name_of: The name of a parameter in messages.
    """

    def __init__(self, name_of: Callable[[Tensor], str]) -> None:
        self._name_of = name_of
        self._built: dict[int, list[Stack]] = {}
        self._structures: dict[int, dict[str, object]] = {}  # the options that the state is of
        self._scratch = Scratch()
        self._homes: dict[int, int] = {}  # the group in which a parameter's state was built
        self._warned: set[tuple[int, int, int, int]] = set()

    def of(
        self,
        number: int,
        group: Group,
        params: Sequence[Tensor],
        states: Mapping[Tensor, dict[str, Any]],
    ) -> list[Stack]:
        """The stacks of a group, with new ones for those of ``params`` that have none.

        Parameters with a state, after a copy or a load, come first, and together as they were
        before: the rounding of a batched product can depend on the batch.

        Args:
            number: Of the group.
            group: Its options.
            params: Some of its parameters.
            states: Of all parameters; tensors in them become views of the stacks.
        """
        if number not in self._built:
            self._built[number] = []
            self._structures[number] = structure(group)
            having = [p for p in group["params"] if "batch" in states.get(p, {})]
            for members in _by_batch(having, lambda p: int(states[p]["batch"])):
                self._build(number, group, members, states)
        new = [param for param in params if "batch" not in states.get(param, {})]
        if new:
            held = (states[p]["batch"] for p in group["params"] if states.get(p))
            batch = 1 + max(held, default=-1)
            self._build(number, group, new, states)
            for param in new:
                states[param].update({"step": 0, "batch": batch})
        return self._built[number]

    def _build(
        self,
        number: int,
        group: Group,
        params: Sequence[Tensor],
        states: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        first = sum(stack.blocks for stacks in self._built.values() for stack in stacks)
        for stack in stacks_of(params, recipe_of(group), first, self._scratch):
            self._built[number].append(stack)
            for member in stack.members:
                state = states[member.param]
                if "batch" in state:
                    stack.fill(member, state)
                state.update(stack.views(member))
                self._homes[id(member.param)] = number

    def check_changes(self, groups: Sequence[Group]) -> None:
        """Let the stacks follow what changed since the last step, or refuse it.

        Raises:
            InvalidInputError: An option or a shape that the state does not fit, or a parameter that
                moved to another group.
        """
        for number, group in enumerate(groups):
            for param in group["params"]:
                if (home := self._homes.get(id(param), number)) != number:
                    raise InvalidInputError(
                        f"{self._name_of(param)} has moved from parameter group {home} to "
                        f"{number}, and its state is of the options there. Nothing was changed. "
                        "Move it back, or change the options of its group."
                    )
        for number, stacks in self._built.items():
            recipe = recipe_of(groups[number])
            for stack in stacks:
                if stack.recipe is not recipe and stack.recipe != recipe:
                    where = f" of parameter group {number}"
                    check_change(self._structures[number], groups[number], where)
                    stack.follow(recipe)
                self._check_shapes(stack)

    def _check_shapes(self, stack: Stack) -> None:
        for one in stack.members:
            if layout(one.param.shape, stack.recipe.shapes) != one.layout:
                raise InvalidInputError(
                    f"{self._name_of(one.param)} had another shape when its state was built. "
                    "Nothing was changed. Give it back, or build another optimizer."
                )

    def note(self, failures: Iterable[Failed], step: int, allowed: int) -> None:
        """Warn of a factor's first failed refresh, and stop after too many in a row.

        Args:
            failures: Factors that were not refreshed.
            step: Of their parameters.
            allowed: Failures in a row that are tolerated.

        Raises:
            InvalidInputError: More than those.
        """
        for failed in failures:
            name = self._name_of(failed.param)
            message = f"No {failed.what} of factor {failed.side} of {name} was found at step {step}"
            if failed.count > allowed:
                raise InvalidInputError(
                    f"{message}, {failed.count} times in a row. Raise spectrum.epsilon, or lower "
                    "the learning rate. No weight was changed."
                )
            if failed.key not in self._warned:
                self._warned.add(failed.key)
                warnings.warn(
                    f"{message}: going on with the last good one, or the grafted direction.",
                    RuntimeWarning,
                    stacklevel=6,  # the caller's step, below two wrappers of torch
                )


def _by_batch(params: Sequence[Tensor], batch: Callable[[Tensor], int]) -> Iterator[list[Tensor]]:
    for _, members in itertools.groupby(sorted(params, key=batch), key=batch):
        yield list(members)
