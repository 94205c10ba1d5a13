"""Time and memory of a Shampoo step beside AdamW's and beside the floor of its matrix products.

The floor is what no implementation of the method can leave out in a step without a refresh: the
two products that update the factors and the two that apply the inverse roots, for the same
shapes. Everything is measured in one run, in turn, and medians are printed.

    python benchmarks/shampoo_step.py [--device cuda] [--seconds 12]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import kronecker_probe as kp

MODELS = {"MLP 784-512-512-10": (784, 512, 512, 10), "MLP 64-128-64-10": (64, 128, 64, 10)}
FREQUENCY = 10
WARM_UP = 2 * FREQUENCY
MEASURED = "the measured step"

Build = Callable[[], torch.optim.Optimizer]


def parameters(widths: tuple[int, ...], device: str) -> list[nn.Parameter]:
    """The weights and biases of an MLP, with gradients of a realistic size."""
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in itertools.pairwise(widths)]
    params = list(nn.Sequential(*layers).to(device).parameters())
    for param in params:
        param.grad = torch.randn_like(param).mul_(1e-2)
    return params


def matrix_products(params: list[nn.Parameter]) -> Callable[[], None]:
    """The floor: factor updates and applications alone, on tensors of the right shapes."""
    work = []
    for param in params:
        assert param.grad is not None
        matrix = param.grad.reshape(param.shape[0], -1)
        sides = [size for size in matrix.shape if size > 1]
        factors = [torch.zeros(size, size, device=matrix.device) for size in sides]
        roots = [torch.randn(size, size, device=matrix.device) for size in sides]
        work.append((matrix, factors, roots))

    def products() -> None:
        for matrix, factors, roots in work:
            factors[0].addmm_(matrix, matrix.T, beta=0.999, alpha=0.001)
            applied = roots[0] @ matrix
            if len(factors) > 1:
                factors[1].addmm_(matrix.T, matrix, beta=0.999, alpha=0.001)
                applied = applied @ roots[1]

    return products


def timer(device: str) -> Callable[[Callable[[], object]], float]:
    """Milliseconds of a call, the device's queue included."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(call: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return 1e3 * (time.perf_counter() - start)

    return milliseconds


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drops what the profiler's C++ library writes about itself."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def peak_temporary_bytes(build: Build, step: int, device: str) -> int:
    """The most that step number ``step`` of a new optimizer allocates above what it started with.

    On the CPU every event of torch's allocator counts, those inside operators included (the
    private buffers of the BLAS library do not pass through it).
    """
    if device == "cuda":
        optimizer = build()
        for _ in range(step - 1):
            optimizer.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [ProfilerActivity.CPU]
    with quiet_stderr(), profile(activities=activities, profile_memory=True) as recorded:
        optimizer = build()  # inside, so that every block that a step frees is known
        for _ in range(step - 1):
            optimizer.step()
        with record_function(MEASURED):
            optimizer.step()
    assert recorded.profiler is not None
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    (mark,) = (e for e in events if e.name() == MEASURED)
    held = peak = 0
    for event in events:
        inside = mark.start_ns() <= event.start_ns() <= mark.start_ns() + mark.duration_ns()
        if inside and event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    def tensors() -> Iterator[Tensor]:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    return sum(t.numel() * t.element_size() for t in tensors() if t.numel() > 1)


def measure_times(
    adamw: torch.optim.Optimizer,
    shampoo: torch.optim.Optimizer,
    products: Callable[[], None],
    seconds: float,
    device: str,
) -> dict[str, float]:
    """Median milliseconds of each, in turn; a Shampoo cycle ends with its refresh."""
    milliseconds = timer(device)
    times: dict[str, list[float]] = {name: [] for name in ("adamw", "floor", "plain", "amortized")}
    for _ in range(WARM_UP):
        adamw.step(), shampoo.step(), products()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["amortized"]) < 3:
        cycle = []
        for _ in range(FREQUENCY):
            times["adamw"].append(milliseconds(adamw.step))
            times["floor"].append(milliseconds(products))
            cycle.append(milliseconds(shampoo.step))
        times["plain"].extend(cycle[:-1])
        times["amortized"].append(statistics.mean(cycle))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(widths: tuple[int, ...], device: str, seconds: float) -> list[tuple[str, ...]]:
    """The rows of the table of one model."""

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters(widths, device), lr=1e-6, foreach=True)

    def shampoo() -> torch.optim.Optimizer:
        params = parameters(widths, device)
        return kp.optim.Shampoo(params, lr=1e-6, basis={"frequency": FREQUENCY})

    count = sum(param.numel() for param in parameters(widths, device))
    ours, theirs = shampoo(), adamw()
    products = matrix_products(parameters(widths, device))
    median = measure_times(theirs, ours, products, seconds, device)

    def row(name: str, key: str, held: int, peak: int) -> tuple[str, ...]:
        ratios = (median[key] / median["adamw"], median[key] / median["floor"])
        memory = (f"{held / count:.1f}", f"{peak / count:.1f}") if held else ("", "")
        return (name, f"{median[key]:.3f}", *(f"{ratio:.2f}" for ratio in ratios), *memory)

    held = state_bytes(ours)
    plain = peak_temporary_bytes(shampoo, WARM_UP + 1, device)
    refresh = peak_temporary_bytes(shampoo, WARM_UP, device)
    baseline = peak_temporary_bytes(adamw, WARM_UP, device)
    return [
        row("AdamW (foreach)", "adamw", state_bytes(theirs), baseline),
        row("matrix products alone", "floor", 0, 0),
        row("Shampoo, no refresh", "plain", held, plain),
        row(f"Shampoo, a refresh in {FREQUENCY} steps", "amortized", held, refresh),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    parser.add_argument("--seconds", type=float, default=12.0, help="time for each model")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    print(
        f"Shampoo step; torch {torch.__version__}, {arguments.device}, {threads} threads, float32"
    )
    heads = ("", "ms/step", "x AdamW", "x products", "state B/param", "peak temp B/param")
    for name, widths in MODELS.items():
        rows = measure(widths, arguments.device, arguments.seconds)
        print(f"\n{name}")
        for cells in (heads, *rows):
            print(f"  {cells[0]:<30}" + "".join(f"{cell:>18}" for cell in cells[1:]))


if __name__ == "__main__":
    main()
