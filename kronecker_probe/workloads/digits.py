"""Scikit-learn's bundled handwritten digits: 1,797 real 8 x 8 images, no download."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kronecker_probe.workloads.registry import register_workload
from kronecker_probe.workloads.workload import Pair, Workload

TEST_SHARE = 0.2


def _digits(classes: tuple[int, ...]) -> tuple[Pair, Pair]:
    """Train and test pairs of the given digits, pixels scaled to [0, 1], the same split always."""
    data = load_digits()
    images = torch.from_numpy(np.asarray(data.data, dtype=np.float32) / 16.0)
    labels = torch.from_numpy(np.asarray(data.target, dtype=np.int64))
    keep = torch.isin(labels, torch.tensor(classes))
    images, labels = images[keep], torch.searchsorted(torch.tensor(classes), labels[keep])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = int(TEST_SHARE * len(labels))
    test, train = order[:held_out], order[held_out:]
    return _pair(images, labels, train), _pair(images, labels, test)


def _pair(images: Tensor, labels: Tensor, index: Tensor) -> Pair:
    return images[index], labels[index]


def _workload(model: nn.Module, data: tuple[Pair, Pair], steps: int, description: str) -> Workload:
    return Workload(
        model,
        nn.CrossEntropyLoss(),
        *data,
        steps=steps,
        batch_size=64,
        lr=1e-3,
        description=description,
        threads=1,
        layers=("*.weight",),
    )


@register_workload("digits-mlp")
def digits_mlp(seed: int) -> Workload:
    """A 64-128-64-10 ReLU network on all ten digits."""
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    what = "64-128-64-10 MLP on 8x8 handwritten digits (1,797 images, 10 classes)"
    return _workload(model, _digits(tuple(range(10))), 5000, what)


@register_workload("digits-logistic")
def digits_logistic(seed: int) -> Workload:
    """Binary logistic regression on the digits 3 and 8, as two-class cross-entropy."""
    what = "logistic regression on the digits 3 and 8, as 2-class cross-entropy"
    return _workload(nn.Sequential(nn.Linear(64, 2)), _digits((3, 8)), 400, what)


@register_workload("digits-cnn")
def digits_cnn(seed: int) -> Workload:
    """Two convolutions and a linear layer on all ten digits, as 1 x 8 x 8 images."""
    train, test = (
        (images.view(-1, 1, 8, 8), labels) for images, labels in _digits(tuple(range(10)))
    )
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    what = "CNN, 16 and 32 channels, on 8x8 handwritten digits (10 classes)"
    return _workload(model, (train, test), 1000, what)
