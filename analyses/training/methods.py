"""The methods that train, and how each is built from two settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronecker_probe import optim
from kronecker_probe.workloads import Workload

Row = dict[str, Any]

Build = Callable[[Workload, float, float], Optimizer]


def _sgd(workload: Workload, lr: float, forgets: float) -> Optimizer:
    return torch.optim.SGD(workload.model.parameters(), lr=lr, momentum=1 - forgets)


def _adamw(workload: Workload, lr: float, forgets: float) -> Optimizer:
    betas = (0.9, 1 - forgets)
    return torch.optim.AdamW(workload.model.parameters(), lr=lr, betas=betas, weight_decay=0.0)


def _averaging(preset: Any, workload: Workload, lr: float, forgets: float) -> Optimizer:
    """A preset with its own beta1."""
    known = inspect.signature(preset).parameters
    more = {"batch_size": workload.batch_size} if "batch_size" in known else {}
    betas = (known["betas"].default[0], 1 - forgets)
    found: Optimizer = preset(workload.model.named_parameters(), lr=lr, betas=betas, **more)
    return found


def _rmsprop_free(workload: Workload, lr: float, forgets: float) -> Optimizer:
    named, size = workload.model.named_parameters(), workload.batch_size
    return optim.RMSpropRootFree(named, lr=lr, beta2=1 - forgets, batch_size=size)


def _adagrad_free(workload: Workload, lr: float, forgets: float) -> Optimizer:
    named, size = workload.model.named_parameters(), workload.batch_size
    return optim.AdaGradRootFree(named, lr=lr, batch_size=size, momentum=1 - forgets)


def _inverse_free(workload: Workload, lr: float, rate: float) -> Optimizer:
    named, size = workload.model.named_parameters(), workload.batch_size
    return optim.InverseFreeShampoo(named, lr=lr, batch_size=size, inverse={"lr": rate})


def _hooked(preset: Any, workload: Workload, lr: float, damping: float) -> Optimizer:
    found: Optimizer = preset(workload.model, lr=lr, epsilon=damping)
    return found


def _muon(workload: Workload, lr: float, rate: float) -> Optimizer:
    """Hidden matrices by Muon, as it is meant; embeddings, the head and vectors by Adam."""
    hidden, others = split_for_muon(workload.model)
    adam = {
        "lr": rate,
        "betas": (0.9, 0.999),
        "nesterov": False,
        "scale_by_shape": False,
        "statistics": optim.Statistics(),
        "basis": optim.Basis(start=1),
        "spectrum": optim.Spectrum(epsilon=1e-8),
        "shapes": optim.Shapes(max_dim=1),
    }
    groups: list[Row] = [{"params": hidden}, {"params": others, **adam}]
    return optim.Muon(groups, lr=lr)


def split_for_muon(
    model: nn.Module,
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """The hidden matrices, and all others; the head is the last matrix."""
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    *_, head = matrices(model)
    hidden: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, param in model.named_parameters():
        inner = param.ndim > 1 and name != head and id(param) not in embeddings
        (hidden if inner else others).append((name, param))
    return hidden, others


@dataclass(frozen=True)
class Method:
    """A method and what is tuned beside its learning rate.

    Attributes:
        build: From the workload, the rate and the second setting.
        tuned: Name of that setting.
        low: Least value of it.
        high: Largest.
        color: Of its family.
        marker: Its own within the family.
    """

    build: Build
    tuned: str
    low: float
    high: float
    color: str
    marker: str


def _by_beta2(build: Build, color: str, marker: str) -> Method:
    return Method(build, "1 - beta2", 1e-3, 1e-1, color, marker)


# Okabe and Ito's colours, one a family
FAMILIES = {
    "without factors": "#000000",
    "Shampoo": "#0072b2",
    "eigenvalue-corrected": "#d55e00",
    "KL": "#cc79a7",
    "root-free": "#009e73",
    "K-FAC": "#e69f00",
    "Muon": "#56b4e9",
}

_PLAIN, _ROOTS, _CORRECTED, _KL, _FREE, _KFAC, _POLAR = FAMILIES.values()

METHODS = {
    "SGD": Method(_sgd, "1 - momentum", 0.01, 0.5, _PLAIN, "o"),
    "AdamW": _by_beta2(_adamw, _PLAIN, "s"),
    "Shampoo": _by_beta2(partial(_averaging, optim.Shampoo), _ROOTS, "o"),
    "ShampooSquared": _by_beta2(partial(_averaging, optim.ShampooSquared), _ROOTS, "s"),
    "EShampoo": _by_beta2(partial(_averaging, optim.EShampoo), _CORRECTED, "o"),
    "SOAP": _by_beta2(partial(_averaging, optim.SOAP), _CORRECTED, "s"),
    "KLShampoo": _by_beta2(partial(_averaging, optim.KLShampoo), _KL, "o"),
    "KLSOAP": _by_beta2(partial(_averaging, optim.KLSOAP), _KL, "s"),
    "RootFreeShampoo": _by_beta2(partial(_averaging, optim.RootFreeShampoo), _FREE, "o"),
    "InverseFreeShampoo": Method(_inverse_free, "inverse.lr", 1e-3, 1e-1, _FREE, "s"),
    "RMSpropRootFree": _by_beta2(_rmsprop_free, _FREE, "D"),
    "AdaGradRootFree": Method(_adagrad_free, "1 - momentum", 0.01, 0.5, _FREE, "^"),
    "KFAC": Method(partial(_hooked, optim.KFAC), "damping", 0.02, 2.0, _KFAC, "o"),
    "EKFAC": Method(partial(_hooked, optim.EKFAC), "damping", 0.003, 0.3, _KFAC, "s"),
    "Muon": Method(_muon, "Adam's lr", 1e-4, 1e-2, _POLAR, "o"),
}


def matrices(model: nn.Module) -> list[str]:
    """Names of the parameters that have two sides, in order."""
    return [name for name, param in model.named_parameters() if param.ndim > 1]
