"""K-FAC and the optimal Kronecker product of curvlinops beside ours, on the same layer and data.

Needs curvlinops (``make peers``).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys

import torch
from torch import nn

import kronecker_probe as kp
from benchmarks.timing import Timing, environment, interleaved
from kronecker_probe.approximations import DEFAULT_APPROXIMATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--n-data", type=int, default=512)
    options = parser.parse_args(sys.argv[1:])
    print(f"Beside curvlinops; {environment()}")
    try:
        peer = importlib.import_module("curvlinops")
    except ImportError as error:
        print(f"  skipped: curvlinops cannot be imported ({error}); install it by `make peers`")
        return
    version = importlib.metadata.version("curvlinops-for-pytorch")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    inputs = torch.randn(options.n_examples, 64)
    targets = torch.randint(0, 10, (options.n_examples,))
    loss_fn = nn.CrossEntropyLoss()
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]

    def their_kfac() -> None:
        operator = peer.KFACLinearOperator(
            model, loss_fn, weights, [(inputs, targets)], fisher_type="type-2"
        )
        operator.compute_kronecker_factors()

    def ours(*names: str) -> list[float]:
        samples = kp.capture(model, loss_fn, (inputs, targets), target="ggn")
        cosines = []
        for one in samples.values():
            target = kp.SecondMoment(one)
            cosines += [
                kp.cosine_similarity(target, kp.approximate(target, name)) for name in names
            ]
        return cosines

    def our_factors() -> None:
        for one in kp.capture(model, loss_fn, (inputs, targets), target="ggn").values():
            product = kp.approximate(kp.SecondMoment(one), "kfac")
            assert isinstance(product, kp.KroneckerOperator)
            _ = product.left, product.right

    contenders = {
        "ours: K-FAC (factors only)": our_factors,
        "curvlinops KFAC (factors only)": their_kfac,
        "ours: K-FAC and its cosine": lambda: ours("kfac"),
        "ours: all six approximations and their cosines": lambda: ours(*DEFAULT_APPROXIMATIONS),
    }
    if not hasattr(peer, "KFOCLinearOperator"):
        print(f"  curvlinops {version} has no optimal-Kronecker operator to time")
    try:
        timed: dict[str, Timing] = interleaved(contenders, options.repetitions)
    except (AttributeError, TypeError) as error:
        print(f"  skipped: curvlinops {version} has another interface ({error})")
        return
    print(
        f"  MLP 64-128-128-10, N = {options.n_examples}, exact Gauss-Newton, curvlinops {version}"
    )
    for name, timing in timed.items():
        print(f"    {1e3 * timing.median:8.1f} ms  {name}")


if __name__ == "__main__":
    main()
