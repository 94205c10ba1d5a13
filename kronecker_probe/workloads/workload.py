"""A workload: a model with its loss and its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.losses import LossFunction

Pair = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True)
class Workload:
    """A model, its loss and its data, with defaults for training it.

    Attributes:
        model: Freshly initialized.
        loss_fn: ``loss_fn(outputs, targets)``, as for ``kp.capture``.
        train: (inputs, targets), examples in the first dimension.
        test: Held-out (inputs, targets) for the accuracy; None for none.
        steps: Optimizer steps of a full run.
        batch_size: Examples per step.
        lr: Learning rate of the embedded Shampoo.
        description: One line for ``kronecker-probe workloads``.
        threads: CPU threads for torch; None for torch's own choice. Matrices of a few hundred
            rows gain nothing from more than one, and lose much on a busy machine.
        target: The default target, as for ``kp.capture``; "fisher" where the exact Gauss-Newton
            matrix would take thousands of backward passes.
        layers: Globs of the parameters to measure by default.
    """

    model: nn.Module
    loss_fn: LossFunction
    train: Pair
    test: Pair | None = None
    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-3
    description: str = ""
    threads: int | None = None
    target: str = "ggn"
    layers: tuple[str, ...] = ("*weight",)

    def __post_init__(self) -> None:
        for name, pair in (("train", self.train), ("test", self.test)):
            if pair is None:
                continue
            tensors = len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)
            if not tensors or len(pair[0]) != len(pair[1]) or len(pair[0]) == 0:
                raise InvalidInputError(
                    f"Workload.{name} must be a pair (inputs, targets) of tensors of equal, "
                    "nonzero length."
                )
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise InvalidInputError(f"Workload.{name}={value}; give at least 1.")

    def probe(self, size: int, seed: int = 0) -> Pair:
        """A fixed subset of the training data to measure, drawn once.

        Raises:
            InvalidInputError: ``size`` is not positive.
        """
        if size < 1:
            raise InvalidInputError(f"probe size {size}; give at least 1 example.")
        inputs, targets = self.train
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        index = order[: min(size, len(targets))]
        return inputs[index], targets[index]

    def batch(self, step: int, size: int, seed: int = 0) -> Pair:
        """The batch of one step: epochs of shuffled data, a function of (seed, step) alone.

        So a resumed run sees the same batches. The last incomplete batch of an epoch is dropped;
        a ``size`` above the number of examples gives all of them.

        Raises:
            InvalidInputError: ``size`` is not positive.
        """
        if size < 1:
            raise InvalidInputError(f"batch size {size}; give at least 1 example.")
        inputs, targets = self.train
        size = min(size, len(targets))
        epoch, position = divmod(step, len(targets) // size)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        index = torch.randperm(len(targets), generator=generator)
        index = index[position * size : (position + 1) * size]
        return inputs[index], targets[index]
