"""What do grafting and corrected eigenvalues repair in Shampoo, and when is a basis worth renewing?

Every member of the family rotates the gradient, divides it entrywise and rotates it back, so that
eigenvalues alone decide the length of the step, and bases its direction (Eschenhagen et al., 2025,
arXiv 2506.03595). Three measurements:

- ``magnitude``: gradients are white noise, of which every optimizer gets the same. The root mean
  square of an update of a fresh gradient, after factors of so many that they are well determined,
  is 1 for full-matrix Adam, (mn)^-1/4 for Shampoo, and (mn)^-1/2 for its square without the trace.
- ``drift``: EShampoo trains a network on ten digits. Others get its gradients and never move
  it: Shampoo and EShampoo with refreshes 100 steps apart, and both renewed in every step. Until
  the next refresh the error |P - H| / |H| is split exactly into that of the basis and that of the
  eigenvalues, and the updates are compared with those of EShampoo that is renewed in every step.
  H is H_Ada, the average of g g^T with the optimizers' beta2. A grafted update s P^-1/2 M is that
  of P / s^2, which is scored as such.
- ``refresh``: EShampoo trains the network with bases that are renewed at fixed intervals, or when
  their off-diagonal mass exceeds a tolerance, which is tested every ten steps for each factor. The
  loss is that of all training data after the last step, at the best of a few learning rates, the
  same for each rule; the seconds are those of the optimizer's steps in CPU time of one thread.

The table (purifying.csv) has one number a row: a ``part``, what was ``measured``, the ``variant``,
and whatever else the part varies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.cli.analysis import Script
from kronecker_probe.workloads import Workload, load_workload

from .figure import draw
from .tables import (
    BETAS,
    FOLLOWERS,
    GRAFTED,
    MAGNITUDES,
    NAME,
    REFERENCE,
    TESTED,
    WINDOW,
    WORKLOAD,
    sentences,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        seeds: Seeds 0, 1, ... of model, batches and noise.
        shapes: Of the white noise.
        samples: Gradients for the factors, times the larger of m / n and n / m.
        interval: Steps from one refresh of the held bases to the next.
        cycles: Refreshes after which the drift is measured.
        ages: Steps since the refresh.
        steps: Training with fixed intervals and tolerances.
        rates: Learning rates of that.
        intervals: Steps from one refresh to the next.
        tolerances: Of the off-diagonal mass.
    """

    seeds: int
    shapes: tuple[tuple[int, int], ...]
    samples: int
    interval: int
    cycles: int
    ages: tuple[int, ...]
    steps: int
    rates: tuple[float, ...]
    intervals: tuple[int, ...] = (1, 10, 100)
    tolerances: tuple[float, ...] = (0.01, 0.1, 0.5)


SHAPES = ((8, 8), (16, 16), (64, 16), (16, 64), (64, 64), (256, 64), (256, 16), (128, 128),
          (16, 256), (256, 256))  # fmt: skip

PRESETS = {
    "quick": Preset(1, SHAPES[:7], 50, 100, 1, (0, 5, 20, 99), 150, (3e-3, 1e-2)),
    "default": Preset(
        3, SHAPES, 100, 100, 3, (0, 1, 2, 5, 10, 20, 50, 99), 300, (1e-3, 3e-3, 1e-2)
    ),
}


def collect(preset: Preset) -> pd.DataFrame:
    """The table: all three parts, one number a row."""
    rows: list[Row] = []
    for seed in track(range(preset.seeds), description="seeds"):
        for name, part in (("magnitude", magnitude), ("drift", drift), ("refresh", refresh)):
            rows += ({"part": name, "seed": seed} | row for row in part(seed, preset))
    return pd.DataFrame(rows)


def magnitude(seed: int, preset: Preset) -> Iterator[Row]:
    """Root mean squares of updates of white noise."""
    generator = torch.Generator().manual_seed(seed)
    for m, n in preset.shapes:
        count = preset.samples * max(m, n) // min(m, n)
        options = {"betas": (0.0, 1 - 1e-6), "basis": {"frequency": count, "start": count}}
        params = {name: torch.zeros(m, n, requires_grad=True) for name in MAGNITUDES}
        optimizers = {
            name: build([params[name]], lr=0.0, **(options | more))
            for name, (build, more, _) in MAGNITUDES.items()
        }
        for number in range(count + 1):
            noise = torch.randn(m, n, generator=generator)
            for name, optimizer in optimizers.items():
                params[name].grad = noise
                # the last one is none of those that the factors are of
                optimizer.param_groups[0]["lr"] = float(number == count)
                optimizer.step()
        for name, param in params.items():
            size = float(param.detach().square().mean().sqrt())
            yield {"measured": "rms", "variant": name, "m": m, "n": n, "value": size}


class Follower:
    """An optimizer that gets the gradients of another run, and whose updates are read."""

    def __init__(self, name: str, model: torch.nn.Module, interval: int) -> None:
        self.params = {
            name: torch.zeros_like(p, requires_grad=True)
            for name, p in model.named_parameters()
            if p.ndim > 1
        }
        build, basis, more = FOLLOWERS[name]
        basis = {"frequency": interval, "start": 1} | basis
        self.optimizer = build(self.params.items(), lr=1.0, betas=BETAS, basis=basis, **more)

    def updates(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """What it would subtract from each weight now, at a learning rate of 1."""
        for name, param in self.params.items():
            param.grad = model.get_parameter(name).grad
            param.data.zero_()
        self.optimizer.step()
        return {name: -param.detach() for name, param in self.params.items()}

    def estimate(self, name: str) -> Any:
        """P of one layer."""
        return self.optimizer.operator(self.params[name])


def drift(seed: int, preset: Preset) -> Iterator[Row]:
    """Train once; errors and updates of the followers at the ages of their bases."""
    workload = _workload(seed)
    model = workload.model
    driver = optim.EShampoo(model.named_parameters(), lr=workload.lr, betas=BETAS)
    window = kp.GradientWindow(model, WINDOW, decay=BETAS[1], layers=workload.layers)
    window.attach(driver)
    layers = [name for name, p in model.named_parameters() if p.ndim > 1]
    followers = {name: Follower(name, model, preset.interval) for name in FOLLOWERS}
    for step in range(1, preset.interval * preset.cycles + max(preset.ages) + 2):
        train(workload, driver, step - 1, seed)  # leaves its gradients
        updates = {name: one.updates(model) for name, one in followers.items()}
        cycle, age = divmod(step - 1, preset.interval)
        if cycle and age in preset.ages:
            samples = window.samples()
            for layer in layers:
                H = kp.SecondMoment(samples[layer])
                shared = {"step": step, "age": age, "parameter": layer}
                found = {name: one[layer] for name, one in updates.items()}
                estimates = {name: one.estimate(layer) for name, one in followers.items()}
                for row in errors(H, estimates, found, 1 - BETAS[1] ** step):
                    yield shared | row


def errors(
    H: Any, estimates: dict[str, Any], updates: dict[str, Tensor], weight: float
) -> Iterator[Row]:
    """Both parts of each |P - H| / |H|, and the updates beside the reference's.

    Args:
        H: H_Ada, of total ``weight``.
        estimates: P of each follower.
        updates: Their updates.
        weight: 1 - beta2^t, by which the optimizers' estimates are corrected.
    """
    stretch = float(updates[GRAFTED].norm() / updates["Shampoo"].norm())
    splits = {}
    for name, P in estimates.items():
        scale = weight / stretch**2 if name == GRAFTED else weight
        splits[name] = kp.split_error(H, scaled(P, scale))
    best, U = splits[REFERENCE].basis, updates[REFERENCE].flatten()
    for name, split in splits.items():
        own = updates[name].flatten()
        numbers = {
            "basis_error": split.basis,
            "basis_ratio": split.basis / best,
            "eigenvalue_error": split.eigenvalues,
            "length": float(own.norm() / U.norm()),
            "cosine": float(torch.cosine_similarity(own, U, dim=0)),
        }
        for measured, value in numbers.items():
            yield {"measured": measured, "variant": name, "value": value}


def scaled(P: Any, scale: float) -> kp.KroneckerOperator | kp.EigenOperator:
    """``scale`` times a live operator."""
    if isinstance(P, kp.EigenOperator):
        return kp.EigenOperator(P.left_basis, P.right_basis, scale * P.eigenvalues)
    return kp.KroneckerOperator(P.left, P.right, scale * P.scale)


def refresh(seed: int, preset: Preset) -> Iterator[Row]:
    """Train with every rule of renewal: loss, seconds, and refreshes of each factor."""
    rules: list[tuple[str, float, dict[str, Any]]] = [
        ("interval", each, {"frequency": each}) for each in preset.intervals
    ]
    rules += [
        ("tolerance", tau, {"frequency": TESTED, "tolerance": tau}) for tau in preset.tolerances
    ]
    for rule, setting, basis in rules:
        for lr in preset.rates:
            shared = {"variant": rule, "setting": setting, "lr": lr, "step": preset.steps}
            for row in renewed(seed, preset.steps, lr, basis | {"start": 1}):
                yield shared | row


def renewed(seed: int, steps: int, lr: float, basis: dict[str, Any]) -> Iterator[Row]:
    """One training."""
    workload = _workload(seed)
    model = workload.model
    optimizer = optim.EShampoo(model.named_parameters(), lr=lr, basis=basis)
    seconds = sum(train(workload, optimizer, step, seed) for step in range(steps))
    with torch.no_grad():
        loss = float(workload.loss_fn(model(workload.train[0]), workload.train[1]))
    yield {"measured": "loss", "value": loss}
    yield {"measured": "seconds", "value": seconds}
    for name, param in model.named_parameters():
        for side, count in enumerate(optimizer.state[param]["refreshes"].flatten().tolist()):
            yield {"measured": "refreshes", "parameter": name, "side": side, "value": count}


def train(workload: Workload, optimizer: optim.KroneckerOptimizer, step: int, seed: int) -> float:
    """One step on its batch; the CPU seconds of the optimizer's part."""
    inputs, targets = workload.batch(step, workload.batch_size, seed)
    optimizer.zero_grad()
    workload.loss_fn(workload.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    before = time.process_time()
    optimizer.step()
    return time.process_time() - before


def _workload(seed: int) -> Workload:
    workload = load_workload(WORKLOAD, seed)
    torch.set_num_threads(workload.threads or torch.get_num_threads())
    return workload


SCRIPT = Script(NAME, __doc__.splitlines()[0], PRESETS, collect, draw, sentences)
