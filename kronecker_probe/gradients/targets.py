"""Which output gradients are pulled back: the exact Gauss-Newton, sampled labels, true labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnknownNameError, unknown_name
from kronecker_probe.gradients.losses import ResolvedLoss
from kronecker_probe.gradients.samples.checks import check_count

CAPTURE_TARGETS = ("ggn", "fisher", "empirical-fisher")
# Kinds that are made otherwise, and by what.
MADE_OTHERWISE = {
    "batch-gradient": "kp.batch_gradients(samples, batch_size) of an 'empirical-fisher' capture",
    "trajectory": "kp.GradientWindow, which records the gradients of a training run",
}


def check_target(
    target: str, label_draws: int, option: str = "target", known: Sequence[str] = CAPTURE_TARGETS
) -> None:
    """Refuse an unknown target, and several label samples where no labels are sampled.

    Raises:
        UnknownNameError: No such target.
        InvalidInputError: ``label_draws`` is no positive whole number, or not 1 without sampled
            labels.
    """
    if target not in known and target in MADE_OTHERWISE:
        raise UnknownNameError(
            f"{option}={target!r} is not captured from a batch: it comes from "
            f"{MADE_OTHERWISE[target]}. Known: {', '.join(known)}."
        )
    if target not in known:
        raise unknown_name(option, target, known)
    check_count("label_draws", label_draws)
    if target != "fisher" and label_draws != 1:
        raise InvalidInputError(
            f"label_draws={label_draws} with {option}={target!r}: labels are sampled only by "
            "'fisher'."
        )


def n_columns(target: str, loss: ResolvedLoss, outputs: Tensor, label_draws: int) -> int:
    """C, the gradient columns of an example."""
    if target == "ggn":
        return loss.n_columns(outputs)
    return label_draws if target == "fisher" else 1


def output_gradients(
    target: str, loss: ResolvedLoss, outputs: Tensor, targets: Tensor, label_draws: int, seed: int
) -> Iterator[Tensor]:
    """The C cotangents of the outputs, of their shape, at least float32; all examples at once."""
    if target == "ggn":
        yield from loss.root_columns(outputs)
    elif target == "fisher":
        generator = torch.Generator(device=outputs.device).manual_seed(seed)
        for _ in range(label_draws):
            yield loss.sampled(outputs, generator)
    else:
        yield loss.true_gradient(outputs, targets)
