"""Part "batch" of ``root_free``: second moments at fixed weights against the batch size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.workloads import Workload

from .methods import CNN, Preset, Row, workload_of

WARMUP = 20  # steps before the second moments are measured
SCALINGS = ("B g²", "g²")


def batches(seed: int, preset: Preset) -> Iterator[Row]:
    """Mean second moments at fixed weights over E[g_1^2], and what theory says of them."""
    workload = workload_of(CNN, seed)
    model, loss_fn = workload.model, workload.loss_fn
    warm = torch.optim.Adam(model.parameters(), lr=workload.lr)
    for step in range(WARMUP):
        inputs, targets = workload.batch(step, workload.batch_size, seed)
        warm.zero_grad()
        loss_fn(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        warm.step()
    inputs, targets = workload.probe(preset.data, seed)
    for labels, draws in (("sampled", "ggn"), ("true", "empirical-fisher")):
        single, mean = moments(workload, draws, (inputs, targets))
        for size in preset.sizes:
            shared = {"labels": labels, "batch_size": size}
            expected = 1 if labels == "sampled" else 1 + (size - 1) * mean / single
            theory = (expected, expected / size)
            pair = held(workload, (inputs, targets), labels, size, preset.draws, seed)
            for name, value, found in zip(SCALINGS, theory, pair, strict=True):
                row = shared | {"method": name}
                yield row | {"measured": "theory", "value": value}
                yield row | {"measured": "held", "value": found / single}


def moments(workload: Workload, draws: str, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Means over the weights of E[g_1^2] and mu^2, from all of the data."""
    captured = kp.capture(workload.model, workload.loss_fn, data, draws, workload.layers)
    weights = [workload.model.get_parameter(name) for name in captured]
    count = sum(weight.numel() for weight in weights)
    single = sum(kp.SecondMoment(captured[name]).trace() for name in captured)
    loss = workload.loss_fn(workload.model(data[0]), data[1])
    mean = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, weights))
    return single / count, mean / count


def held(
    workload: Workload, data: tuple[Tensor, Tensor], labels: str, size: int, draws: int, seed: int
) -> tuple[float, float]:
    """Mean of s over the weights, with the factor B and without it."""
    model, (inputs, targets) = workload.model, data
    generator = torch.Generator().manual_seed(seed)
    named = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    pair = [
        # the sum of B g^2 alone; a rate of 0 leaves the weights
        optim.AdaGradRootFree(named, lr=0.0, batch_size=scale, statistics={"initial": 0.0})
        for scale in (size, 1)
    ]
    for _ in range(draws):
        chosen = torch.randint(len(targets), (size,), generator=generator)
        outputs = model(inputs[chosen])
        answers = targets[chosen]
        if labels == "sampled":
            shares = outputs.detach().softmax(1)
            answers = torch.multinomial(shares, 1, generator=generator)[:, 0]
        model.zero_grad()
        workload.loss_fn(outputs, answers).backward()  # type: ignore[no-untyped-call]
        for optimizer in pair:
            optimizer.step()
    count = sum(param.numel() for _, param in named)
    one, other = (
        sum(float(o.state[p]["second_moment"].sum()) for _, p in named) / (draws * count)
        for o in pair
    )
    return one, other
