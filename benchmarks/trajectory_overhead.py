"""The demo with the trajectory target against the demo with its plain tracker."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import environment, interleaved, paired_ratio
from kronecker_probe.tracking.target import DEFAULT_WINDOW
from kronecker_probe.tracking.training import Training, TrainingOptions
from kronecker_probe.workloads import load_workload


def train(steps: int, target: str, probes: int) -> list[Tensor]:
    """The demo as ``kronecker-probe track digits-mlp`` runs it, checkpoints included."""
    workload = load_workload("digits-mlp", 0)
    options = TrainingOptions(
        steps=steps,
        batch_size=workload.batch_size,
        lr=workload.lr,
        probes=probes,
        spacing="early",
        target=target,
        layers=workload.layers,
    )
    with tempfile.TemporaryDirectory() as folder:
        training = Training(workload, "digits-mlp", Path(folder) / "run", options)
        training.run()
    return [p.detach() for p in training.model.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=load_workload("digits-mlp").steps)
    parser.add_argument("--probes", type=int, default=TrainingOptions.probes)
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(load_workload("digits-mlp").threads or torch.get_num_threads())
    print(
        f"Trajectory target on the demo ({options.steps} steps, {options.probes} probes, a window "
        f"of {DEFAULT_WINDOW} gradients); {environment()}"
    )
    contenders = {
        target: lambda target=target: train(options.steps, target, options.probes)
        for target in ("ggn", "trajectory")
    }
    timed = interleaved(contenders, options.repetitions)
    same = all(map(torch.equal, *(run() for run in contenders.values())))
    print(
        f"  ggn {timed['ggn'].median:.2f} s, trajectory {timed['trajectory'].median:.2f} s, ratio "
        f"{paired_ratio(timed['trajectory'], timed['ggn']):.2f} (goal 1.5); "
        f"weights bitwise equal: {same}"
    )


if __name__ == "__main__":
    main()
