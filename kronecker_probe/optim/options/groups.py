"""The options of a parameter group: what they may be, and what may change between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim import checks
from kronecker_probe.optim.options.combinations import check_together
from kronecker_probe.optim.options.sections import SECTIONS
from kronecker_probe.optim.preconditioners.base import Recipe

Group = dict[str, Any]

# Keys of a group that are no options: torch's own, a scheduler's, and a label.
NOT_OPTIONS = (
    "params",
    "param_names",
    "name",
    "initial_lr",
    "max_lr",
    "min_lr",
    "max_momentum",
    "base_momentum",
)

# What each group must have.
OPTIONS = ("lr", "betas", "weight_decay", "momentum", "nesterov", "scale_by_shape", *SECTIONS)


def recipe_of(group: Mapping[str, Any]) -> Recipe:
    """The choices of a group."""
    beta1, beta2 = group["betas"]
    return Recipe(
        statistics=group["statistics"],
        basis=group["basis"],
        spectrum=group["spectrum"],
        inverse=group["inverse"],
        magnitude=group["magnitude"],
        shapes=group["shapes"],
        storage=group["storage"],
        betas=(beta1, beta2),
        nesterov=group["nesterov"],
    )


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Refuse options out of range, and choices that do not go together.

    Args:
        group: All options.
        where: Which group, for messages.

    Raises:
        InvalidInputError: One of them; the message says which.
    """
    for name in OPTIONS:
        if name not in group:
            raise InvalidInputError(f"{name}{where} is not there any more; put it back.")
    for name, kind in SECTIONS.items():
        if not isinstance(group[name], kind):
            raise InvalidInputError(
                f"{name}{where} is {group[name]!r}; give a {kind.__name__}, or a dict of its "
                "fields where the group is added."
            )
    for name in ("lr", "weight_decay"):
        checks.check_number(group[name], f"{name}{where}", lambda v: v >= 0, "at least 0")
    checks.check_number(group["momentum"], f"momentum{where}", lambda v: 0 <= v < 1, "in [0, 1)")
    checks.check_betas(group["betas"], f"betas{where}")
    for name in ("nesterov", "scale_by_shape"):
        if not isinstance(group[name], bool):
            raise InvalidInputError(f"{name}{where} is {group[name]!r}; give True or False.")
    if group["nesterov"] and group["spectrum"].eigenvalues != "polar":
        raise InvalidInputError(
            f"nesterov{where} is about the average of a polar factor; use "
            "spectrum.eigenvalues='polar', or drop it."
        )
    check_together(**{name: group[name] for name in SECTIONS})


def check_change(before: Recipe, after: Recipe, where: str) -> None:
    """Refuse changes of choices that the state was built for.

    Args:
        before: The choices of the last step.
        after: Those of this step.
        where: Which group, for messages.

    Raises:
        InvalidInputError: One that needs another state.
    """
    old, new = _structure(before), _structure(after)
    for name, value in new.items():
        if value != old[name]:
            raise InvalidInputError(
                f"{name}{where} was {old[name]!r} and is {value!r} now, which the state built by "
                "the steps so far does not fit. Set it back, or build another optimizer."
            )


def _structure(recipe: Recipe) -> dict[str, object]:
    """What the tensors of the state, or what they mean, depend on."""
    statistics, magnitude = recipe.statistics.as_dict(), recipe.magnitude.grafting
    del statistics["batch_size"]
    found: dict[str, object] = {f"statistics.{name}": v for name, v in statistics.items()}
    found |= {f"shapes.{name}": v for name, v in recipe.shapes.as_dict().items()}
    found |= {f"storage.{name}": v for name, v in recipe.storage.as_dict().items()}
    return found | {
        "spectrum.eigenvalues": recipe.spectrum.eigenvalues,
        "spectrum.root": recipe.spectrum.root,
        "inverse.structure": recipe.inverse.structure,
        "inverse.precision": recipe.inverse.precision,
        "basis.solver": recipe.basis.solver,
        "basis.tolerance is None": recipe.basis.tolerance is None,
        "magnitude.grafting": magnitude,
        "betas[0] > 0": recipe.beta1 > 0,
    }
