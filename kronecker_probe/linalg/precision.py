"""The precision of statistics, and of the matrix products with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def full_precision(device_types: Iterable[str]) -> Iterator[None]:
    """No autocast and no reduced-precision float32 products inside.

    In TensorFloat-32 or bfloat16 the small eigenvalues of a factor are noise and can turn
    strongly negative; a caller's setting for the model must not reach the statistics.
    """
    with contextlib.ExitStack() as stack:
        for device_type in sorted(set(device_types)):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type=device_type, enabled=False))
        stack.enter_context(_ieee_products())
        yield


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch 2.8
        with _highest_matmul_precision():
            yield
        return
    before = [(backend, backend.fp32_precision) for backend in backends]
    reduced = [(backend, held) for backend, held in before if held not in ("none", "ieee")]
    for backend, _ in reduced:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, held in reduced:
            backend.fp32_precision = held


@contextlib.contextmanager
def _highest_matmul_precision() -> Iterator[None]:
    held = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(held)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's statistics: its own, but at least float32."""
    return torch.promote_types(dtype, torch.float32)
