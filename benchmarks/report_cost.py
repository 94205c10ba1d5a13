"""What the report of a run costs: seconds and memory by number of layers and of rows.

Run: ``python -m benchmarks.report_cost`` (about a minute). Each case is a made-up run directory,
reported in a process of its own; the budget is 20 s and 1 GB for 500 layers with two probes each,
and for 500,000 rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kronecker_probe.table.schema import empty_table
from kronecker_probe.tracking.run_directory.store import RunStore

SECONDS, GIGABYTES = 20.0, 1.0
RULES = ("optimal", "shampoo-squared", "kfac", "shampoo", "eigen-corrected", "diagonal", "in-use")
METRICS = ("cosine", "relative_error", "best_scale_error", "best_scale")
# name -> (layers, probed steps, singular values per layer)
CASES = {
    "50 layers, 2 probes": (50, 2, 60),
    "500 layers, 2 probes": (500, 2, 60),
    "50 layers, 100 probes": (50, 100, 60),
}
MEASURE = (
    "import json, resource, sys, time\n"
    "started = time.perf_counter()\n"
    "from kronecker_probe.report.run_page import write_report\n"
    "write_report(sys.argv[1])\n"
    "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20\n"
    "print(json.dumps([time.perf_counter() - started, peak]))\n"
)


def part(step: int, layers: int, values: int) -> pd.DataFrame:
    """The rows of one probe: plug-in and population numbers, factors, norms and spectra."""
    random = np.random.default_rng(step)
    rows: list[dict[str, object]] = [{"step": step, "metric": "train_loss", "value": 2.0}]
    for number in range(layers):
        about = {"step": step, "parameter": f"blocks.{number}.weight", "m": 64, "n": 128,
                 "n_examples": 512, "n_columns": 10, "n_positions": 1, "target": "ggn"}  # fmt: skip
        top = 0.95 - 0.1 * random.random()
        for place, rule in enumerate(RULES):
            cosine = top - 0.02 * place + 0.003 * random.standard_normal()
            for metric in METRICS:
                row = about | {"approximation": rule, "metric": metric, "value": cosine}
                bars = {"stderr": 0.01, "low": cosine - 0.02, "high": cosine + 0.02}
                rows += [row | {"kind": "plugin"}, row | {"kind": "population"} | bars]
        rows += [
            about | {"metric": metric, "kind": "plugin", "value": value}
            for metric, value in (("norm", 1.2), ("in_use_fresh", 0.1), ("in_use_blocking", 0.05))
        ]
        rows += [
            about | {"metric": "singular_value", "kind": "plugin", "index": k, "value": 0.9**k}
            for k in range(values)
        ]
        rows += [
            about | {"metric": metric, "index": side, "value": 3.0}
            for side in (0, 1) for metric in ("factor_rank", "steps_since_refresh")
        ]  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=empty_table().columns)


def write_run(path: Path, layers: int, probes: int, values: int) -> int:
    """A run directory of so many layers and probes; returns the number of its rows."""
    store, count = RunStore.create(path, {"workload": "made-up"}, seed=0), 0
    for step in range(probes):
        rows = part(10 * step, layers, values)
        store.write_part(10 * step, rows)
        count += len(rows)
    store.set_status("done")
    return count


def measured(path: Path) -> tuple[float, float]:
    """Seconds and peak gigabytes of a process that writes the report."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout)
    return float(seconds), float(peak)


def main(names: Sequence[str] = tuple(CASES)) -> pd.DataFrame:
    """One row per case; prints them."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / name.replace(" ", "-").replace(",", "")
            count = write_run(path, *CASES[name])
            seconds, peak = measured(path)
            row = {"case": name, "rows": count, "seconds": seconds, "GB": peak}
            rows.append(row | {"time/budget": seconds / SECONDS, "GB/budget": peak / GIGABYTES})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    print(main(sys.argv[1:] or tuple(CASES)).to_string(index=False))
