"""kp.capture against a plain forward and backward pass: time, work and peak memory."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import kronecker_probe as kp
from benchmarks.timing import device, environment, interleaved, paired_ratio

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise


@dataclass(frozen=True)
class Problem:
    """A model and a batch, and how many times a plain pass one draw may take."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    goal: float

    def plain(self) -> list[Tensor]:
        loss = F.cross_entropy(self.model(self.inputs), self.targets)
        return list(torch.autograd.grad(loss, list(self.model.parameters())))

    def draw(self, draws: str, layers: str = "*") -> kp.Capture:
        return kp.capture(
            self.model, F.cross_entropy, (self.inputs, self.targets), target=draws, layers=layers
        )


class Attention(nn.Module):
    """One pre-norm transformer block over tokens, pooled and classified."""

    def __init__(self, width: int, heads: int, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.table(tokens)).mean(1))


def problems(on: torch.device) -> list[Problem]:
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    conv = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    attention = Attention(128, 4, 256, 10)
    return [
        Problem("MLP 784-512-512-10, N = 512", mlp.to(on), torch.randn(512, 784, device=on),
                torch.randint(10, (512,), device=on), 1.0),
        Problem("the same, N = 2048", mlp, torch.randn(2048, 784, device=on),
                torch.randint(10, (2048,), device=on), 1.0),
        Problem("conv net on 32 x 32, N = 64", conv.to(on), torch.randn(64, 3, 32, 32, device=on),
                torch.randint(10, (64,), device=on), 2.5),
        Problem("attention block, d = 128, T = 64, N = 64", attention.to(on),
                torch.randint(256, (64, 64), device=on), torch.randint(10, (64,), device=on), 2.5),
    ]  # fmt: skip


def flops(function: Callable[[], object]) -> int:
    """Operations of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that the function's tensors held at one time, above those before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    del kept
    # each event carries what is allocated once it has happened
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def held_bytes(samples: kp.Capture) -> int:
    """Bytes of the samples, a block that two of them read counted once."""
    blocks = {t.data_ptr(): t.nbytes for one in samples.values() for t in one.tensors}
    return sum(blocks.values())


def report(problem: Problem, repetitions: int) -> None:
    classes = 10
    contenders: dict[str, Callable[[], object]] = {
        "plain": problem.plain,
        "fisher": lambda: problem.draw("fisher"),
        "empirical-fisher": lambda: problem.draw("empirical-fisher"),
        "ggn": lambda: problem.draw("ggn"),
    }
    timed = interleaved(contenders, repetitions)
    work = {name: flops(function) for name, function in contenders.items()}
    print(f"{problem.name}: plain forward + backward {1e3 * timed['plain'].median:.1f} ms")
    most = peak_bytes(problem.plain)
    for name in ("fisher", "empirical-fisher", "ggn"):
        goal = problem.goal
        if name == "ggn":
            goal = 1 + 0.2 * classes if problem.goal == 1 else problem.goal * classes
        samples = problem.draw(name)
        held = held_bytes(samples)
        peak = peak_bytes(contenders[name])
        print(
            f"  {name:17s} {paired_ratio(timed[name], timed['plain']):5.2f} x the time "
            f"(goal {goal:.1f}), {work[name] / work['plain']:5.2f} x the operations; peak "
            f"{peak / 1e6:.1f} MB = {peak / (held + most):.2f} x (samples {held / 1e6:.1f} MB + "
            f"plain pass {most / 1e6:.1f} MB), goal 1.2"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args(sys.argv[1:])
    print(f"Capture of all parameters; {environment()}")
    for problem in problems(device()):
        report(problem, options.repetitions)


if __name__ == "__main__":
    main()
