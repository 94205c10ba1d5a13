"""How much memory a computation may take, and the refusal of what would not fit."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from kronecker_probe.errors import MemoryBudgetError


def available_bytes(device: torch.device) -> float:
    """Bytes that are free on ``device`` now; file caches count as free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_machine_bytes(), _container_bytes())


def _machine_bytes() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return 8 << 30


def _container_bytes() -> float:
    """What a control group's limit leaves; infinite without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii")
        return math.inf if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return math.inf


def require_memory(needed: float, what: str, device: torch.device) -> None:
    """Refuse, with the figure in GB, what would not fit in the memory that is free.

    Raises:
        MemoryBudgetError: ``needed`` bytes are more than are free.
    """
    free = available_bytes(device)
    if needed > free:
        raise MemoryBudgetError(
            f"{what} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {device}; "
            "use matrix-free methods, fewer samples or a smaller layer."
        )
