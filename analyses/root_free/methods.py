"""The methods that ``root_free`` compares, on what they are trained, and how much is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.plots.panels import Style
from kronecker_probe.workloads import Workload, load_workload

CNN, GPT = "digits-cnn", "pydoc-gpt"
DECAY, MOMENTUM = 0.99, 0.9
SEARCH_SEED = 1000  # none of those that are reported
SCORED, MANY = 128, 2000  # training data of which the loss is taken where there are many

Row = dict[str, Any]
Params = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... of model, batches and draws.
        trials: Learning rates that are tried for each method.
        steps: Of a training, by workload.
        sizes: Batch sizes of the second moments.
        draws: Batches of each size.
        data: Data that these are drawn from.
        compared: Steps of the reparameterized runs.
        dampings: Relative epsilons of the inverse roots that are computed in bfloat16.
    """

    seeds: int
    trials: int
    steps: Mapping[str, int]
    sizes: tuple[int, ...]
    draws: int
    data: int
    compared: int
    dampings: tuple[float, ...]


def _rmsprop(params: Params, lr: float, batch: int) -> Optimizer:
    values = [param for _, param in params]
    return torch.optim.RMSprop(values, lr=lr, alpha=DECAY, eps=1e-8, momentum=MOMENTUM)


def _rmsprop_free(params: Params, lr: float, batch: int) -> Optimizer:
    return optim.RMSpropRootFree(params, lr=lr, beta2=DECAY, batch_size=batch)


def _shampoo(params: Params, lr: float, batch: int) -> Optimizer:
    return optim.Shampoo(params, lr=lr, betas=(0.0, DECAY), momentum=MOMENTUM)


def _shampoo_free(params: Params, lr: float, batch: int) -> Optimizer:
    return optim.RootFreeShampoo(params, lr=lr, betas=(0.0, DECAY), batch_size=batch)


def _inverse_free(params: Params, lr: float, batch: int) -> Optimizer:
    rule = {"lr": 1 - DECAY}  # the weight of the newest gradient, as in the others
    return optim.InverseFreeShampoo(params, lr=lr, batch_size=batch, inverse=rule)


@dataclass(frozen=True)
class Method:
    """A method, and whether it takes the root."""

    build: Callable[[Params, float, int], Optimizer]
    root: bool
    look: Style


# Okabe and Ito's colours; dashed lines and open markers for methods with the root
METHODS = {
    "RMSprop": Method(_rmsprop, True, Style("#d55e00", "^", (0, (4, 2)))),
    "RMSpropRootFree": Method(_rmsprop_free, False, Style("#d55e00", "v", "-")),
    "Shampoo": Method(_shampoo, True, Style("#0072b2", "s", (0, (4, 2)))),
    "RootFreeShampoo": Method(_shampoo_free, False, Style("#0072b2", "D", "-")),
    "InverseFreeShampoo": Method(_inverse_free, False, Style("#009e73", "o", "-")),
}


def workload_of(name: str, seed: int) -> Workload:
    """A workload, with the threads of torch that suit it."""
    workload = load_workload(name, seed)
    torch.set_num_threads(workload.threads or torch.get_num_threads())
    return workload


def trained(
    workload: Workload,
    optimizer: Optimizer,
    seed: int,
    at: tuple[int, ...],
    after: Callable[[int], None] = lambda step: None,
) -> Iterator[tuple[int, float]]:
    """Training loss at some steps; infinite from a gradient that is not finite on.

    The loss is that of all training data, or of a fixed sample of many.

    Args:
        workload: With the model.
        optimizer: Of its parameters.
        seed: Of the batches.
        at: The steps, ascending.
        after: Called after every step with its number, counted from 1.
    """
    model, loss_fn = workload.model, workload.loss_fn
    many = len(workload.train[1]) > MANY
    scored = workload.probe(SCORED) if many else workload.train
    broken = False
    for step in range(at[-1] + 1):
        if step in at:
            with torch.no_grad():
                loss = float(loss_fn(model(scored[0]), scored[1]))
            yield step, loss if math.isfinite(loss) and not broken else math.inf
        if step < at[-1] and not broken:
            inputs, targets = workload.batch(step, workload.batch_size, seed)
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            try:
                optimizer.step()
                after(step + 1)
            except InvalidInputError:  # a rate that is too high
                broken = True
