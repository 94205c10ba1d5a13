"""The demo with its tracker against the same training without one; weights compared bitwise."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import environment, interleaved, paired_ratio
from kronecker_probe.optim import Shampoo
from kronecker_probe.tracking.schedule import spread
from kronecker_probe.tracking.tracker import Tracker
from kronecker_probe.tracking.training import TrainingOptions
from kronecker_probe.workloads import load_workload

BOTH = ("plugin", "population")


def train(steps: int, out: Path | None, estimates: Sequence[str] = BOTH) -> list[Tensor]:
    """The demo's training, with a tracker that writes to ``out`` if that is given."""
    workload = load_workload("digits-mlp", 0)
    model, loss_fn = workload.model, workload.loss_fn
    optimizer = Shampoo(model.named_parameters(), lr=workload.lr)
    tracker = None
    if out is not None:
        probe = workload.probe(TrainingOptions.probe_size)
        every = spread(steps, TrainingOptions.probes, "early")
        tracker = Tracker(
            model, loss_fn, optimizer=optimizer, out=out, every=every, probe=probe,
            estimates=estimates,
        )  # fmt: skip
    for step in range(steps):
        batch = workload.batch(step, workload.batch_size)
        optimizer.zero_grad()
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        if tracker is not None:
            tracker.log(train_loss=loss.item())
            tracker.step(batch)
        optimizer.step()
    if tracker is not None:
        tracker.finish()
    return [p.detach() for p in model.parameters()]


def tracked(steps: int, estimates: Sequence[str] = BOTH) -> list[Tensor]:
    """The same with a tracker, its run directory included."""
    with tempfile.TemporaryDirectory() as folder:
        return train(steps, Path(folder) / "run", estimates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=load_workload("digits-mlp").steps)
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(load_workload("digits-mlp").threads or torch.get_num_threads())
    print(f"Tracker on the demo ({options.steps} steps, 21 probes); {environment()}")
    contenders = {
        "plain": lambda: train(options.steps, None),
        "plug-in": lambda: tracked(options.steps, ["plugin"]),
        "estimates": lambda: tracked(options.steps),
    }
    timed = interleaved(contenders, options.repetitions)
    same = all(map(torch.equal, train(options.steps, None), tracked(options.steps)))
    plain = timed["plain"]
    ratios = {name: paired_ratio(one, plain) for name, one in timed.items()}
    print(
        f"  plain {plain.median:.2f} s; plug-in numbers alone {ratios['plug-in']:.2f}x (goal 1.3), "
        f"with population estimates, the default, {ratios['estimates']:.2f}x; weights bitwise "
        f"equal: {same}"
    )


if __name__ == "__main__":
    main()
