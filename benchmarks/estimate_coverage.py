"""Bias and coverage of the estimates on populations whose true quality is known.

From every population of ``benchmarks/populations.py`` N independent data are drawn, again and
again, and every estimate of every approximation is compared with the truth. Bias and coverage are
over the repetitions that gave a number; the rest abstained, and their share is in the table. What
the held-out estimate estimates is the quality of factors fitted to N / 2 data, which differs from
that in the limit; its truth is measured by such fits against the population's H.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import kronecker_probe as kp
from benchmarks import acceptance
from benchmarks.populations import POPULATIONS, Population
from benchmarks.timing import environment
from kronecker_probe.quality.estimates.estimator import Estimator

UNSHARED = (
    "shampoo-squared", "kfac", "left-only", "right-only", "identity", "diagonal",
    "shampoo-squared:block_size=5", "optimal", "optimal:rank=2", "shampoo-squared-sequential",
    "shampoo", "divergence:q=0", "divergence:q=0.5", "eigen-corrected", "ekfac",
)  # fmt: skip
# without shared positions these are K-FAC and Shampoo^2 themselves
SHARED = (*UNSHARED, "kfac-reduce", "tkfac")
METRICS = ("cosine", "relative_error")
KINDS = ("plugin", "held-out", "population")
COUNTS = (64, 128, 256, 1024)
LEVEL = 0.95
CELL = ["population", "n", "approximation", "metric", "kind"]
QUICK = ("teacher", "teacher-heavy", "kronecker", "mlp-hidden")

Row = dict[str, Any]


def approximations(population: Population) -> tuple[str, ...]:
    """All that apply, each once."""
    return SHARED if population.shared else UNSHARED


@cache
def limit(name: str, refinement: int = 2) -> kp.SecondMoment:
    """H of a population."""
    return kp.SecondMoment(POPULATIONS[name].limit(refinement))


@cache
def dense_limit(name: str, refinement: int = 2) -> kp.SecondMoment:
    """The same H as few matrices, its scaled eigenvectors: quick, but without (d, a)."""
    H = limit(name, refinement)
    size = math.prod(H.shape)
    values, vectors = torch.linalg.eigh(H.to_dense())
    roots = (vectors * values.clamp_min(0).sqrt()).T.reshape(size, *H.shape)
    return kp.SecondMoment(kp.GradientSamples.from_matrices(roots, [1.0] * size))


def quality(H: kp.SecondMoment, P: Any) -> dict[str, float]:
    """The metrics as estimates give them: errors squared."""
    return {"cosine": kp.cosine_similarity(H, P), "relative_error": kp.relative_error(H, P) ** 2}


@cache
def truths(name: str) -> pd.DataFrame:
    """The true quality of every approximation, and how exactly it is known."""
    rows = []
    for label in approximations(POPULATIONS[name]):
        of_factors = label in ("kfac", "kfac-reduce", "tkfac", "ekfac")
        targets = [limit(name, r) if of_factors else dense_limit(name, r) for r in (2, 1)]
        fine, coarse = (quality(H, kp.approximate(H, label)) for H in targets)
        rows += [
            {
                "population": name,
                "approximation": label,
                "metric": metric,
                "truth": fine[metric],
                "truth_error": abs(fine[metric] - coarse[metric]),
            }
            for metric in METRICS
        ]
    return pd.DataFrame(rows)


def draw(name: str, count: int, repetition: int) -> kp.GradientSamples:
    """The data of one repetition; always the same."""
    seed = zlib.crc32(f"{name} {count} {repetition}".encode())
    return POPULATIONS[name].sample(count, torch.Generator().manual_seed(seed))


def repeat(task: tuple[str, int, range]) -> list[Row]:
    """Some repetitions at one population and N: one estimate a row."""
    torch.set_num_threads(1)
    name, count, repetitions = task
    labels = approximations(POPULATIONS[name])
    rows: list[Row] = []
    for repetition in repetitions:
        samples = draw(name, count, repetition)
        cell = {"population": name, "n": count, "repetition": repetition}
        rows += [cell | row for row in estimates(kp.SecondMoment(samples), labels)]
        half = kp.SecondMoment(first_half(samples))
        for label in labels:
            rows += [cell | row for row in of_half(name, half, label)]
    return rows


def first_half(samples: kp.GradientSamples) -> kp.GradientSamples:
    """N / 2 of the data, weights of sum 1."""
    size = len(samples) // 2
    half = samples.subset(slice(size))
    return half.with_tensors(half.tensors, torch.full((size,), 1.0 / size, dtype=torch.float64))


def estimates(H: kp.SecondMoment, labels: Sequence[str]) -> Iterator[Row]:
    """What kp.estimate gives of each kind, with the work in common done once."""
    shared = Estimator(H)
    for label in labels:
        try:
            yield from map(as_row, shared.plugin(label, kp.approximate(H, label), METRICS))
        except kp.errors.UnsupportedError:  # KL of few draws: no estimate
            continue
    for kind in KINDS[1:]:
        for found in shared.estimates(labels, METRICS, kind).values():
            yield from map(as_row, found)


def as_row(one: Any) -> Row:
    """An estimate as a row."""
    low, high = one.interval(LEVEL)
    return {
        "approximation": one.approximation,
        "metric": one.metric,
        "kind": one.kind,
        "value": one.value,
        "stderr": one.stderr,
        "low": low,
        "high": high,
        "bracket": one.bracket is not None,
        "n_eff": one.n_eff,
    }


def of_half(name: str, half: kp.SecondMoment, label: str) -> Iterator[Row]:
    """The true quality of factors fitted to half of the data: what held-out estimates."""
    try:
        found = quality(dense_limit(name), kp.approximate(half, label))
    except kp.errors.UnsupportedError:
        return
    for metric, value in found.items():
        yield {"approximation": label, "metric": metric, "kind": "half", "value": value}


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a cell: bias, calibration, coverage and abstentions, against its truth."""
    known = pd.concat([truths(name) for name in rows["population"].unique()])
    keys = CELL[:-1]
    halves = rows[rows["kind"] == "half"].groupby(keys)["value"].mean().rename("of_halves")
    repetitions = rows.groupby(["population", "n"])["repetition"].nunique().rename("repetitions")
    n_eff = rows[rows["kind"] == "population"].groupby(["population", "n"])["n_eff"].median()
    rows = rows[rows["kind"] != "half"].drop(columns="n_eff")
    rows = rows.merge(known, on=["population", "approximation", "metric"])
    rows = rows.merge(halves, on=keys, how="left").merge(n_eff, on=["population", "n"])
    held_out = rows["kind"] == "held-out"
    rows.loc[held_out, "truth"] = rows.loc[held_out, "of_halves"]
    plugin = rows.loc[rows["kind"] == "plugin", [*keys, "repetition", "value"]]
    rows = rows.merge(
        plugin.rename(columns={"value": "plugin"}), on=[*keys, "repetition"], how="left"
    )
    rows = rows.merge(repetitions, on=["population", "n"])
    return rows.groupby(CELL, sort=False).apply(_cell).reset_index()


def _cell(rows: pd.DataFrame) -> pd.Series:
    """One cell, over the repetitions that gave a number."""
    first = rows.iloc[0]
    given = rows[rows["value"].notna()]
    truth = first["truth"]
    spread = given["value"].std()
    stderr = math.sqrt((given["stderr"] ** 2).mean()) if given["stderr"].notna().any() else math.nan
    inside = (given["low"] <= truth) & (truth <= given["high"])
    bounded = len(given) > 0 and given["low"].notna().all()
    return pd.Series(
        {
            "truth": truth,
            "truth_error": first["truth_error"],
            "bias": given["value"].mean() - truth,
            "bias_error": spread / math.sqrt(len(given)) if len(given) > 1 else math.nan,
            "plugin_bias": given["plugin"].mean() - truth,
            "sd": spread,
            "stderr": stderr,
            "stderr_over_sd": stderr / spread if spread > 0 else math.nan,
            "coverage": inside.mean() if bounded else math.nan,
            "bracketed": given["bracket"].mean() if len(given) else math.nan,
            "abstained": 1 - len(given) / first["repetitions"],
            "n_eff": first["n_eff"],
            "repetitions": first["repetitions"],
        }
    )


def run(names: Sequence[str], counts: Sequence[int], repetitions: int, processes: int) -> Any:
    """All repetitions, in ``processes`` processes, the slowest first."""
    parts = [range(start, min(start + 10, repetitions)) for start in range(0, repetitions, 10)]
    tasks = list(product(names, sorted(counts, reverse=True), parts))
    tasks.sort(key=lambda task: -task[1])
    start, rows = time.perf_counter(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for done, found in enumerate(pool.map(repeat, tasks), start=1):
            rows += found
            if done % 20 == 0 or done == len(tasks):
                seconds = time.perf_counter() - start
                print(f"  {done} of {len(tasks)} parts, {seconds:.0f} s", file=sys.stderr)
    return pd.DataFrame(rows)


def report(table: pd.DataFrame) -> Iterator[str]:
    """The table: a line for each population and approximation, a column for each N."""
    yield "Each N: bias of plug-in, held-out and population estimate; of the last, standard error"
    yield "over standard deviation and the coverage of its 95% interval (b: of its bracket)"
    table = table.assign(n=table["n"].astype(int)).sort_values("n", kind="stable")
    for name in table["population"].unique():
        one = table[table["population"] == name]
        yield f"\n{name}: {POPULATIONS[name].about}"
        groups = [group.iloc[-1] for _, group in one[one["kind"] == KINDS[-1]].groupby("n")]
        heads = (
            f"N = {g['n']}, N_eff {g['n_eff']:.0f}, {g['abstained']:.0%} abstain" for g in groups
        )
        yield f"{'':37}" + "".join(f"| {head:35}" for head in heads)
        for metric, title in zip(METRICS, ("cosine", "error^2"), strict=True):
            of_metric = one[one["metric"] == metric]
            columns = "| plug-in held-out  popul. se/sd  cov " * len(groups)
            yield f"{title:28} {'truth':>7} {columns}"
            for label, rows in of_metric.groupby("approximation", sort=False):
                truth = rows.loc[rows["kind"] == KINDS[-1], "truth"].iloc[0]
                cells = "".join(_numbers(cell) for _, cell in rows.groupby("n"))
                yield f"{label:28} {truth:7.3f} {cells}"


def _numbers(cell: pd.DataFrame) -> str:
    plugin, held_out, one = (row for _, row in cell.set_index("kind").loc[list(KINDS)].iterrows())
    biases = " ".join(
        f"{of['bias']:+{width}.{'3f' if abs(of['bias']) < 100 else '0e'}}"
        for of, width in ((plugin, 7), (held_out, 8), (one, 7))
    )
    bracket = "b" if one["bracketed"] > 0.5 else " "
    numbers = f"| {biases} {one['stderr_over_sd']:5.2f} {one['coverage']:4.2f}{bracket}"
    return numbers.replace("+nan", "   -").replace("nan", "  -")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--populations", nargs="+", choices=POPULATIONS, default=list(POPULATIONS))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), metavar="N")
    parser.add_argument(
        "--quick", action="store_true", help="20 repetitions, 4 populations, N = 64 and 256"
    )
    parser.add_argument("--out", type=Path, help="the table; default figures/estimate_coverage.csv")
    return parser.parse_args(sys.argv[1:])


def main() -> None:
    chosen = options()
    if chosen.quick:
        chosen.repetitions, chosen.populations, chosen.counts = 20, list(QUICK), [64, 256]
    print(f"Bias and coverage of estimates, {chosen.repetitions} repetitions; {environment()}")
    start = time.perf_counter()
    rows = run(chosen.populations, chosen.counts, chosen.repetitions, chosen.processes)
    table = summarize(rows)
    print(*report(table), sep="\n")
    print(*acceptance.report(table), sep="\n")
    if chosen.out or not chosen.quick:
        out = chosen.out or Path("figures/estimate_coverage.csv")
        table.to_csv(out, index=False, float_format="%.6g")
        print(f"{out}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
