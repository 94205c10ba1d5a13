"""Plug-in and population estimates, with their error bars, against the plug-in numbers alone.

All approximations with closed forms in sample means, of one unshared layer, each call from fresh
samples: the plug-in needs two Grams (or the factors), the estimates and all of their
leave-one-out values a few N x N products more.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

import kronecker_probe as kp
from benchmarks.timing import device, environment, interleaved, paired_ratio

CLOSED = ("shampoo-squared", "kfac", "tkfac", "left-only", "right-only", "identity", "diagonal")
FITTED = ("optimal", "shampoo", "eigen-corrected")
GOAL = 3.0
# m, n, N, columns of a datum
LAYERS = (
    (512, 512, 256, 1), (512, 512, 1024, 1), (1024, 1024, 1024, 1), (128, 64, 512, 10),
    (10, 64, 512, 10), (1024, 256, 2048, 1),
)  # fmt: skip


def layer(m: int, n: int, n_examples: int, columns: int) -> kp.GradientSamples:
    """Draws with dependent factors."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n_examples, 1, n, generator=generator)
    d = torch.randn(n_examples, columns, 1, m, generator=generator) * a[:, None, :, :1].abs()
    return kp.GradientSamples.from_factors(d.to(device()), a.to(device()))


def scored(
    samples: kp.GradientSamples, names: tuple[str, ...], kinds: tuple[str, ...]
) -> kp.Scores:
    """The table of one layer."""
    return kp.compare(samples, names, estimates=kinds, singular_values=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args(sys.argv[1:])
    print(f"Estimates beside plug-in numbers (goal {GOAL:g}x, closed forms); {environment()}")
    worst = 0.0
    for m, n, n_examples, columns in LAYERS:
        samples = layer(m, n, n_examples, columns)
        contenders = {
            f"{which} {'both' if len(kinds) > 1 else 'plug-in'}": partial(
                scored, samples, names, kinds
            )
            for which, names in (("closed", CLOSED), ("fitted", FITTED))
            for kinds in (("plugin",), ("plugin", "population"))
        }
        timed = interleaved(contenders, options.repetitions)
        ratios = {
            which: paired_ratio(timed[f"{which} both"], timed[f"{which} plug-in"])
            for which in ("closed", "fitted")
        }
        worst = max(worst, ratios["closed"])
        print(
            f"  {m:4d} x {n:4d}, N = {n_examples:4d}, C = {columns:2d}: closed forms plug-in "
            f"{timed['closed plug-in'].median:.4f} s, both {timed['closed both'].median:.4f} s, "
            f"{ratios['closed']:.2f}x; fitted {timed['fitted plug-in'].median:.4f} s, both "
            f"{timed['fitted both'].median:.4f} s, {ratios['fitted']:.2f}x",
            flush=True,
        )
    verdict = "reached" if worst <= GOAL else "missed"
    print(f"  closed forms: at most {worst:.2f}x (goal {GOAL:g}x, {verdict})")


if __name__ == "__main__":
    main()
