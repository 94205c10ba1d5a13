"""Run every benchmark but estimate_coverage, which takes 40 minutes and is run by its name."""

from __future__ import annotations

import importlib
import sys

MODULES = (
    "kronecker_floor",
    "tracker_overhead",
    "optimizer_step",
    "many_blocks",
    "roots",
    "shared_layers",
    "planner_grid",
    "whole_transformer",
    "capture_speed",
    "estimate_speed",
    "trajectory_overhead",
    "peers",
)


def main() -> None:
    """All benchmarks, or those named on the command line."""
    names = sys.argv[1:] or list(MODULES)
    sys.argv = sys.argv[:1]
    for name in names:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
