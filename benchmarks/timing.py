"""Interleaved timing: what is compared runs in turn, and ratios are taken pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender.

    Attributes:
        median: Median over the repetitions.
        seconds: All of them.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def clock(function: Callable[[], object]) -> float:
    """Seconds of one call, the accelerator's queue included."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def interleaved(
    contenders: dict[str, Callable[[], object]], repetitions: int, warmup: int = 1
) -> dict[str, Timing]:
    """Time the contenders in turn, A B C A B C ..."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + repetitions):
        for name, function in contenders.items():
            elapsed = clock(function)
            if round_ >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def paired_ratio(one: Timing, other: Timing) -> float:
    """Median of the ratios one / other, repetition by repetition."""
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> str:
    """The line that says on what a benchmark ran."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
