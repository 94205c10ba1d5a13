"""Which output gradients are pulled back: the exact Gauss-Newton, sampled labels, true labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnknownNameError, unknown_name
from kronecker_probe.gradients.losses import ResolvedLoss
from kronecker_probe.gradients.samples.checks import check_count

DRAWS = ("ggn", "fisher", "empirical-fisher")
# Kinds that are made otherwise, and by what.
MADE_OTHERWISE = {
    "batch-gradient": "kp.batch_gradients(samples, batch_size) of an 'empirical-fisher' capture",
    "trajectory": "kp.GradientWindow, which records the gradients of a training run",
}


def check_draws(
    draws: str, label_draws: int, option: str = "draws", known: Sequence[str] = DRAWS
) -> None:
    """Refuse an unknown kind, and label draws where no labels are drawn.

    Args:
        draws: The kind.
        label_draws: Sampled labels a datum.
        option: What the caller's argument is called.
        known: Kinds that the caller knows.

    Raises:
        UnknownNameError: No such kind of draws.
        InvalidInputError: ``label_draws`` is no positive whole number, or not 1 without sampled
            labels.
    """
    if draws not in known and draws in MADE_OTHERWISE:
        raise UnknownNameError(
            f"{option}={draws!r} is drawn by no backward pass over data: it is made by "
            f"{MADE_OTHERWISE[draws]}. Known: {', '.join(known)}."
        )
    if draws not in known:
        raise unknown_name(option, draws, known)
    check_count("label_draws", label_draws)
    if draws != "fisher" and label_draws != 1:
        raise InvalidInputError(
            f"label_draws={label_draws} with {option}={draws!r}: labels are sampled only by "
            "'fisher'."
        )


def n_columns(draws: str, loss: ResolvedLoss, outputs: Tensor, label_draws: int) -> int:
    """C, the gradient columns of a datum."""
    if draws == "ggn":
        return loss.n_columns(outputs)
    return label_draws if draws == "fisher" else 1


def output_gradients(
    draws: str,
    loss: ResolvedLoss,
    outputs: Tensor,
    targets: Tensor,
    label_draws: int,
    seed: int,
) -> Iterator[Tensor]:
    """The C cotangents of the outputs, of their shape, at least float32; all data at once."""
    if draws == "ggn":
        yield from loss.root_columns(outputs)
    elif draws == "fisher":
        generator = torch.Generator(device=outputs.device).manual_seed(seed)
        for _ in range(label_draws):
            yield loss.sampled(outputs, generator)
    else:
        yield loss.true_gradient(outputs, targets)
