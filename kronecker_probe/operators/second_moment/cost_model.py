"""Operation counts, and the rates of a machine that turn them into seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

# Half of the full rate of a matrix product is reached where its smallest dimension is this.
HALF_RATE = 16


@final
@dataclass(frozen=True)
class Machine:
    """Rates that turn counts into seconds; rough, for choosing a way and refusing early.

    Attributes:
        flops: Float64 matrix products, floating-point operations a second.
        eigh: The same for a symmetric eigendecomposition counted as 9 n^3 operations.
        stream: Bytes a second of element-wise passes and matrix-vector products.
        call: Seconds that one tensor operation costs at least.
    """

    flops: float
    eigh: float
    stream: float
    call: float


def machine_of(device: torch.device) -> Machine:
    """Rates of the device; a CPU's scale with torch.get_num_threads()."""
    if device.type == "cuda":
        return Machine(flops=1e13, eigh=2e11, stream=1e12, call=1e-5)
    threads = torch.get_num_threads()
    return Machine(flops=4e10 * threads, eigh=8e9 * threads**0.5, stream=1e10, call=5e-6)


@final
@dataclass(frozen=True)
class Work:
    """What one sum over the samples takes.

    Attributes:
        flops: Floating-point operations of matrix products, at the full rate.
        stream: Bytes that element-wise passes move.
        calls: Tensor operations.
    """

    flops: float = 0.0
    stream: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.stream + other.stream, self.calls + other.calls)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.stream * times, self.calls * times)

    def seconds(self, machine: Machine) -> float:
        """Predicted time."""
        return self.flops / machine.flops + self.stream / machine.stream + self.calls * machine.call


def product(rows: float, inner: float, columns: float, batch: float = 1.0) -> Work:
    """A batch of products [rows, inner] x [inner, columns], slower where a dimension is small."""
    smallest = max(1.0, min(rows, inner, columns))
    return Work(flops=2 * batch * rows * inner * columns * (1 + HALF_RATE / smallest))


@final
@dataclass(frozen=True)
class Costs:
    """The work of each sum over the samples.

    Attributes:
        left: A half step sum w G V G^T.
        right: A half step sum w G^T U G.
        forms: The quadratic forms <G, A G C>.
        diagonal: The projected diagonal.
        pairs: All <G_ic, G_jd>^2.
        apply: H x of one x.
        nbytes: Memory above the samples, while any of them runs.
    """

    left: Work
    right: Work
    forms: Work
    diagonal: Work
    pairs: Work
    apply: Work
    nbytes: float


OPERATIONS = ("left", "right", "forms", "diagonal", "pairs", "apply")
