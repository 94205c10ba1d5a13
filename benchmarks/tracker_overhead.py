"""The demo with its tracker against the same training without one; weights compared bitwise."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import environment, interleaved, paired_ratio
from kronecker_probe.optim import Shampoo
from kronecker_probe.tracking.training import Training, TrainingOptions
from kronecker_probe.workloads import load_workload


def plain(steps: int) -> list[Tensor]:
    """The demo's training alone."""
    workload = load_workload("digits-mlp", 0)
    model = workload.model
    optimizer = Shampoo(model.named_parameters(), lr=workload.lr)
    for step in range(steps):
        inputs, targets = workload.batch(step, workload.batch_size)
        optimizer.zero_grad()
        workload.loss_fn(model(inputs), targets).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def tracked(steps: int) -> list[Tensor]:
    """The demo, without figures and report."""
    workload = load_workload("digits-mlp", 0)
    options = TrainingOptions(steps, workload.batch_size, workload.lr)
    folder = tempfile.mkdtemp()
    try:
        Training(workload, "digits-mlp", Path(folder) / "run", options).run()
    finally:
        shutil.rmtree(folder)
    return [p.detach() for p in workload.model.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=load_workload("digits-mlp").steps)
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(load_workload("digits-mlp").threads or torch.get_num_threads())
    print(f"Tracker on the demo ({options.steps} steps, 21 probes); {environment()}")
    contenders = {"plain": lambda: plain(options.steps), "tracked": lambda: tracked(options.steps)}
    timed = interleaved(contenders, options.repetitions)
    same = all(map(torch.equal, plain(options.steps), tracked(options.steps)))
    print(
        f"  plain {timed['plain'].median:.2f} s, tracked {timed['tracked'].median:.2f} s, ratio "
        f"{paired_ratio(timed['tracked'], timed['plain']):.2f} (goal 1.3); "
        f"weights bitwise equal: {same}"
    )


if __name__ == "__main__":
    main()
