"""Training steps of several optimizers, and timers around the parts of theirs."""

from __future__ import annotations

import functools
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronecker_probe import optim
from kronecker_probe.optim.engine import engine
from kronecker_probe.optim.preconditioners.base import Preconditioner
from kronecker_probe.optim.preconditioners.factored import Factored
from kronecker_probe.optim.preconditioners.grafting import Graft
from kronecker_probe.plots.panels import Style

NAME, ADAMW, LIMIT = "overhead", "AdamW", 10.0

CYCLE = 2  # F while parts are timed

LENGTH = 64  # tokens of a sequence

PARTS = ("statistics", "refresh", "application", "other")

Row = dict[str, Any]

Key = tuple[str, int]  # optimizer and block size


class GPT(nn.Module):
    """Two causal blocks of width 128, a byte vocabulary, 64 positions."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, 256] of tokens [B, T]."""
        inner = self.tokens(tokens) + self.positions.weight
        return self.head(self.blocks(inner, mask=self.mask, is_causal=True))  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    one, two, three = (nn.Linear(n, m) for n, m in itertools.pairwise((784, 512, 512, 10)))
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), three)


@dataclass(frozen=True)
class Problem:
    """A model, random data, batch sizes, that at which knobs are turned, and what they count."""

    build: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    sizes: tuple[int, ...]
    reference: int
    unit: str


PROBLEMS = {
    "MLP 784-512-512-10": Problem(
        mlp, lambda B: (torch.randn(B, 784), torch.randint(10, (B,))),
        (64, 256, 1024, 4096, 16384), 1024, "vectors",
    ),
    "GPT 2 x 128": Problem(
        GPT, lambda B: (torch.randint(256, (B, LENGTH)), torch.randint(256, (B, LENGTH))),
        (1, 4, 16, 64, 256), 16, f"sequences of {LENGTH}",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """An optimizer, its options, how it is drawn, and whether F and block_size are its knobs."""

    build: Callable[..., optim.KroneckerOptimizer]
    options: Mapping[str, Any]
    look: Style
    knobs: bool = True


# Okabe and Ito's colours: half of them for optimizers, half for parts
METHODS = {
    "Shampoo": Method(optim.Shampoo, {}, Style("#0072b2", "o", "-")),
    "Shampoo by matmul": Method(
        optim.Shampoo, {"spectrum": {"root": "matmul"}}, Style("#56b4e9", "s", "-")
    ),
    "SOAP": Method(optim.SOAP, {}, Style("#cc79a7", "D", "-")),
    "Muon": Method(optim.Muon, {}, Style("#000000", "^", "-"), knobs=False),
}


def clock(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, with what it queued on an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def covered() -> list[tuple[Any, str, str]]:
    """What is timed: owner, name of the function, and the part that it belongs to."""
    known = {"update": "statistics", "refresh": "refresh"}
    known |= dict.fromkeys(("direction", "filtered", "scaled", "apply_updates"), "application")
    kinds = [Preconditioner, *Preconditioner.__subclasses__(), *Factored.__subclasses__()]
    owners = (engine, Graft, *kinds)
    return [(one, name, known[name]) for one in owners for name in known if name in vars(one)]


@contextmanager
def split(device: torch.device) -> Iterator[dict[str, float]]:
    """Milliseconds by part of all steps inside, whose functions are wrapped for that long."""
    spent = dict.fromkeys(PARTS, 0.0)
    running: list[str] = []

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if running:  # of nested calls the outermost counts
                return function(*args, **options)
            found = []
            running.append(part)
            try:
                spent[part] += clock(lambda: found.append(function(*args, **options)), device)
            finally:
                running.clear()
            return found[0]

        return call

    before = [(owner, name, vars(owner)[name], part) for owner, name, part in covered()]
    try:
        for owner, name, function, part in before:
            setattr(owner, name, timed(function, part))
        yield spent
    finally:
        for owner, name, function, _ in before:
            setattr(owner, name, function)


def timed_step(optimizer: Optimizer, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by part, which add up to all of it."""
    if not isinstance(optimizer, optim.KroneckerOptimizer):
        return {"update": clock(optimizer.step, device)}
    with split(device) as spent:
        whole = clock(optimizer.step, device)
    return spent | {"other": whole - sum(spent.values())}


def build(key: Key, params: list[nn.Parameter], frequency: int) -> Optimizer:
    """An optimizer that refreshes in its first step, and every ``frequency`` steps from there."""
    name, block = key
    if name == ADAMW:
        return torch.optim.AdamW(params, lr=1e-6, foreach=True)
    method = METHODS[name]
    options = {"shapes": {"vectors": "diagonal", "block_size": block or None}, **method.options}
    if method.knobs:
        options["basis"] = {"frequency": frequency, "start": 1}
    return method.build(params, 1e-6, **options)


def posed(name: str, size: int, seed: int, on: torch.device) -> tuple[nn.Module, Any]:
    """A model, and its forward and backward pass on a batch."""
    torch.manual_seed(seed)
    model = PROBLEMS[name].build().to(on)
    inputs, targets = (one.to(on) for one in PROBLEMS[name].data(size))

    def run() -> None:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]

    return model, run


def machine(device: torch.device) -> str:
    """On what it ran."""
    known, where = Path("/proc/cpuinfo"), platform.machine()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    elif known.exists():
        told = [line for line in known.read_text("utf-8").splitlines() if "model name" in line]
        where = told[0].partition(":")[2].strip() if told else where
    threads = f"CPU threads: {torch.get_num_threads()}"
    return f"{where} ({device.type}), {threads}, torch {torch.__version__}, float32"
