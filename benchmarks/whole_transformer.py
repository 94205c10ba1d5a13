"""A whole transformer: every layer, all Kronecker approximations, three kinds of estimate.

Six layers of width 256 on bytes, 128 positions, a probe batch of 64 sequences; Fisher draws, one
label a token, and a sequence is one draw. The goals: under 3 GB at the peak, under 10 minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from benchmarks.timing import environment

BYTES, WIDTH, HIDDEN, HEADS, BLOCKS, CONTEXT = 256, 256, 1024, 4, 6, 128
APPROXIMATIONS = (
    "optimal", "shampoo-squared", "kfac", "shampoo", "left-only", "right-only", "divergence:q=0",
)  # fmt: skip
ESTIMATES = ("plugin", "held-out", "population")


class Transformer(nn.Module):
    """Tokens [N, T] to logits [N, T, 256]: pre-norm encoder layers under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte after each position."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.tokens(tokens) + self.positions(places)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=x.device)
        logits: Tensor = self.head(self.norm(self.layers(x, mask=mask, is_causal=True)))
        return logits


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over positions."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def windows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows of Python's own help texts, and the same one byte later."""
    text = torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()))
    starts = torch.randint(len(text) - CONTEXT - 1, (count,), generator=generator)
    tokens = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return tokens[:, :-1], tokens[:, 1:]


def trained(steps: int) -> nn.Module:
    """A model after a few steps of AdamW, so that its layers are not random."""
    torch.manual_seed(0)
    model, generator = Transformer(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(steps):
        inputs, targets = windows(16, generator)
        loss = loss_fn(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def resident(key: str) -> float:
    """GB of the process: "VmRSS" now, "VmHWM" at its peak since the last :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e6


def forget_peak() -> None:
    """Start a new high-water mark."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="training steps before the probe")
    parser.add_argument("--layers", default="*weight", help="glob of parameter names")
    options = parser.parse_args(sys.argv[1:])
    print(f"A whole transformer (goals: 3 GB, 10 minutes); {environment()}", flush=True)
    model = trained(options.steps)
    batch = windows(options.sequences, torch.Generator().manual_seed(1))
    forget_peak()
    begun, busy_before = time.perf_counter(), time.process_time()
    captured = kp.capture(model, loss_fn, batch, target="fisher", layers=options.layers)
    held = sum(one.nbytes for one in captured.values()) / 1e9
    peak = resident("VmHWM")
    print(
        f"  capture of {len(captured)} parameters: {time.perf_counter() - begun:.1f} s, samples "
        f"{held:.2f} GB, peak {peak:.2f} GB",
        flush=True,
    )
    for name, samples in captured.items():
        forget_peak()
        start, busy = time.perf_counter(), time.process_time()
        scores = kp.compare({name: samples}, APPROXIMATIONS, singular_values=1, estimates=ESTIMATES)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        here = resident("VmHWM")
        peak = max(peak, here)
        cosine = scores.table.query("metric == 'cosine' and kind == 'plugin'")
        best = cosine.set_index("approximation")["value"].get("optimal", float("nan"))
        m, n = samples.shape
        print(
            f"  {name:40s} {m:5d} x {n:4d} {seconds:7.2f} s ({busy:.1f} of CPU), peak "
            f"{here:.2f} GB, cosine of the optimum {best:.3f}",
            flush=True,
        )
    total, busy = time.perf_counter() - begun, time.process_time() - busy_before
    print(
        f"  whole model: {total / 60:.1f} minutes (goal 10; {busy / 60:.1f} of CPU), peak "
        f"{peak:.2f} GB (goal 3)"
    )


if __name__ == "__main__":
    main()
