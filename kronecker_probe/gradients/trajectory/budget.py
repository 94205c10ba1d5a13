"""Which form the window of each parameter takes under a memory budget."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, MemoryBudgetError, unknown_name
from kronecker_probe.gradients.samples.checks import check_count
from kronecker_probe.gradients.trajectory.buffers import ring_bytes, smaller_rank
from kronecker_probe.linalg.memory import available_bytes

FORMS = ("auto", "dense", "low-rank", "factored")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip

# (m, n) and dtype of each parameter
Costs = Mapping[str, tuple[tuple[int, int], torch.dtype]]


def check_window(size: int, form: str, decay: float | None, rank: int | None) -> None:
    """Refuse options of a window that are out of range or have no effect.

    Raises:
        InvalidInputError: One of them is.
        UnknownNameError: No such form.
    """
    if form not in FORMS:
        raise unknown_name("form of a window", form, FORMS)
    check_count("size", size)
    if rank is not None:
        check_count("rank", rank)
    if decay is not None and not (isinstance(decay, (int, float)) and 0 < decay < 1):
        raise InvalidInputError(
            f"decay={decay!r}; give the optimizer's beta2, between 0 and 1, or None for a sum."
        )
    if (rank is None) == (form in ("low-rank", "factored")):
        what = "needs a rank" if rank is None else f"has no use for rank={rank}"
        raise InvalidInputError(f"form={form!r} {what}; rank= goes with 'low-rank' and 'factored'.")


def parse_bytes(memory: str | int) -> int:
    """Bytes of a number, or of a string like "1GB", "500 MB" or "512MiB".

    Raises:
        InvalidInputError: Something else, or nothing positive.
    """
    amount = 0.0
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", memory.lower())
        if found and found[1].count(".") <= 1 and found[2] in _UNITS:
            amount = float(found[1]) * _UNITS[found[2]]
    elif not isinstance(memory, bool):
        amount = memory
    if not 1 <= amount < float("inf"):
        raise InvalidInputError(
            f"memory={memory!r}; give a number of bytes, or a string like '1GB' or '512MiB'."
        )
    return int(amount)


def plan_ranks(
    costs: Costs, size: int, form: str, rank: int | None, memory: int, devices: Iterable[Tensor]
) -> dict[str, int]:
    """Rank of each parameter's factors, 0 for whole matrices.

    Args:
        costs: Shapes and dtypes.
        size: Gradients in the window.
        form: One of :data:`FORMS`.
        rank: For "low-rank" and "factored".
        memory: Bytes that the window may take.
        devices: Tensors on the devices that the window will lie on.

    Raises:
        MemoryBudgetError: It takes more than ``memory``, or than is free.
    """
    free = min(available_bytes(device) for device in {tensor.device for tensor in devices})
    budget = min(memory, free)

    def ranks_at(most: int) -> dict[str, int]:
        return {name: smaller_rank(*cost, most) if most else 0 for name, cost in costs.items()}

    def needed(ranks: Mapping[str, int]) -> int:
        return sum(ring_bytes(*cost, ranks[name]) for name, cost in costs.items())

    ranks = ranks_at(rank or 0)
    if form == "auto" and size * needed(ranks) > budget:
        low, high = 0, max(min(shape) for shape, _ in costs.values())
        while low < high:  # the largest rank that fits
            middle = (low + high + 1) // 2
            if size * needed(ranks_at(middle)) <= budget:
                low = middle
            else:
                high = middle - 1
        ranks = ranks_at(max(1, low))
    one = needed(ranks)
    if size * one > budget:
        limit = f"memory={memory / 1e9:g} GB" if memory <= free else f"{free / 1e9:.2f} GB free"
        fits = int(budget // one)
        remedy = f"size={fits} fits" if fits else "not even one gradient fits"
        smallest = " even at rank 1" if form == "auto" else ""
        more = "" if form == "auto" else ", or form='auto'"
        raise MemoryBudgetError(
            f"A window of {size} gradients takes {size * one / 1e9:.3g} GB{smallest}, more than "
            f"{limit}: {remedy}. Or give more memory, fewer layers{more}."
        )
    return ranks
