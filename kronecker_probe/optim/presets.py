"""Named combinations of the choices; each a function that returns a :class:`KroneckerOptimizer`.

Every option of a section can be set by a dict or the section itself::

    SOAP(model.parameters(), lr=3e-3, basis={"tolerance": 0.1}, shapes={"block_size": 512})
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch.optim.optimizer import ParamsT

from kronecker_probe.errors import unknown_name
from kronecker_probe.optim.engine.engine import KroneckerOptimizer
from kronecker_probe.optim.options.base import Config
from kronecker_probe.optim.options.sections import (
    SECTIONS,
    Basis,
    Inverse,
    Magnitude,
    Shapes,
    Spectrum,
    Statistics,
    Storage,
)

Betas = tuple[float, float]

ADAM: Mapping[str, Any] = MappingProxyType(
    {
        "betas": (0.9, 0.999),
        "momentum": 0.0,
        "nesterov": False,
        "scale_by_shape": False,
        "statistics": Statistics(),
        "basis": Basis(start=1),
        "spectrum": Spectrum(epsilon=1e-8),
        "inverse": Inverse(),
        "magnitude": Magnitude(),
        "shapes": Shapes(max_dim=1),
        "storage": Storage(),
    }
)
"""Options that make a parameter group one of Adam, in whatever preset."""


def built(
    params: ParamsT,
    lr: float,
    betas: Betas,
    sections: Mapping[str, Config],
    options: dict[str, Any],
) -> KroneckerOptimizer:
    """The optimizer of a preset's sections with what the caller changes."""
    known = [name for name in inspect.signature(KroneckerOptimizer).parameters if name != "params"]
    chosen: dict[str, Any] = dict(sections)
    for name, value in options.items():
        if name not in known:
            raise unknown_name("option", name, known)
        if name in SECTIONS and value is None:
            continue  # the preset's own
        if name in SECTIONS and isinstance(value, Mapping):
            value = chosen.get(name, SECTIONS[name]()).replace(**value)
        chosen[name] = value
    return KroneckerOptimizer(params, lr, **{"betas": betas, **chosen})


def Shampoo(
    params: ParamsT,
    lr: float = 1e-2,
    betas: Betas = (0.9, 0.999),
    epsilon: float = 1e-8,
    **options: Any,
) -> KroneckerOptimizer:
    """Shampoo (arXiv 1802.09568) as in Distributed Shampoo (2309.06497): L^-1/4 M R^-1/4, grafted.

    Args:
        params: Parameters, named parameters or groups.
        lr: With Adam grafting that of Adam transfers.
        betas: Decays of the gradient's average and of the statistics.
        epsilon: Added to the eigenvalues of the factors, in units of squared gradients.
        options: Of :class:`KroneckerOptimizer`, sections also as dicts.
    """
    sections = {
        "statistics": Statistics(),
        "spectrum": Spectrum(epsilon=epsilon),
        "magnitude": Magnitude(grafting="adam"),
    }
    return built(params, lr, betas, sections, options)


def ShampooSquared(
    params: ParamsT,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    epsilon: float = 1e-3,
    **options: Any,
) -> KroneckerOptimizer:
    """Power 1/2 with the trace scale: L kron R / Tr L as the estimate of H (arXiv 2406.17748).

    It divides by more than Shampoo does; so ``epsilon`` is relative to the largest eigenvalue of
    each factor, as an absolute 1e-12 diverges. Roots are there from the first step on, which makes
    the steps free of the loss's scale; the first, singular factors need an epsilon of about 1e-3,
    and a later ``basis.start`` trains with less of it.
    Arguments as in :func:`Shampoo`.
    """
    sections = {
        "statistics": Statistics(),
        "basis": Basis(start=1),
        "spectrum": Spectrum(trace_scale=True, epsilon=epsilon, relative=True),
    }
    return built(params, lr, betas, sections, options)


def EShampoo(
    params: ParamsT,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    epsilon: float = 1e-8,
    **options: Any,
) -> KroneckerOptimizer:
    """Corrected eigenvalues in Shampoo's bases (arXiv 2506.03595): Adam's rate transfers.

    Arguments as in :func:`Shampoo`; ``epsilon`` is Adam's.
    """
    sections = {
        "statistics": Statistics(),
        "basis": Basis(start=1),
        "spectrum": Spectrum(eigenvalues="corrected", epsilon=epsilon),
    }
    return built(params, lr, betas, sections, options)


def SOAP(
    params: ParamsT,
    lr: float = 3e-3,
    betas: Betas = (0.95, 0.95),
    epsilon: float = 1e-8,
    **options: Any,
) -> KroneckerOptimizer:
    """Adam in Shampoo's bases (arXiv 2409.11321): one QR iteration every 10 steps, Adam on vectors.

    Arguments as in :func:`Shampoo`. It is EShampoo with other defaults: an average that is turned
    with complete bases is the average of the parameter's own frame.
    """
    sections = {
        "statistics": Statistics(),
        "basis": Basis(start=1, solver="qr"),
        "spectrum": Spectrum(eigenvalues="corrected", epsilon=epsilon),
        "shapes": Shapes(vectors="diagonal", max_dim=10_000),
    }
    return built(params, lr, betas, sections, options)


def KLShampoo(
    params: ParamsT,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.98),
    epsilon: float = 1e-3,
    **options: Any,
) -> KroneckerOptimizer:
    """Factors that minimize KL (arXiv 2509.03378), power 1/2, no grafting.

    Arguments as in :func:`ShampooSquared`. ``epsilon`` bounds what the null space of the first,
    singular factors does to the steps until the next refresh.
    """
    sections = {
        "statistics": Statistics(rule="whitened"),
        "basis": Basis(start=1),
        "spectrum": Spectrum(exponent=-0.5, epsilon=epsilon, relative=True),
        "shapes": Shapes(vectors="diagonal"),
    }
    return built(params, lr, betas, sections, options)


def KLSOAP(
    params: ParamsT,
    lr: float = 3e-3,
    betas: Betas = (0.9, 0.98),
    epsilon: float = 1e-8,
    **options: Any,
) -> KroneckerOptimizer:
    """SOAP in the bases of the factors that minimize KL (arXiv 2509.03378).

    Arguments as in :func:`SOAP`.
    """
    sections = {
        "statistics": Statistics(rule="whitened"),
        "basis": Basis(start=1, solver="qr"),
        "spectrum": Spectrum(eigenvalues="corrected", epsilon=epsilon),
        "shapes": Shapes(vectors="diagonal", max_dim=10_000),
    }
    return built(params, lr, betas, sections, options)


def RootFreeShampoo(
    params: ParamsT,
    lr: float = 1e-2,
    betas: Betas = (0.0, 0.99),
    epsilon: float = 1e-3,
    batch_size: int = 1,
    **options: Any,
) -> KroneckerOptimizer:
    """P^-1 M with P = B L kron R / Tr L: Shampoo squared without the root (arXiv 2402.03496).

    Arguments as in :func:`ShampooSquared`, and B, the batch over which the loss is a mean. P starts
    from the identity, as a step without the root has the units of 1 / G: from 0 the first ones
    would be huge. The update's own momentum is .9.
    """
    sections = {
        "statistics": Statistics(bias_correction=False, batch_size=batch_size, initial=1.0),
        "basis": Basis(start=1),
        "spectrum": Spectrum(power=1.0, trace_scale=True, epsilon=epsilon, relative=True),
        "shapes": Shapes(vectors="diagonal"),
    }
    return built(params, lr, betas, sections, {"momentum": 0.9, **options})


def InverseFreeShampoo(
    params: ParamsT,
    lr: float = 1e-2,
    batch_size: int = 1,
    **options: Any,
) -> KroneckerOptimizer:
    """(C C^T) G (K K^T) with inverse factors found by products alone (arXiv 2402.03496).

    Args:
        params: As in :func:`Shampoo`.
        lr: Learning rate.
        batch_size: B, the batch over which the loss is a mean.
        options: As in :func:`Shampoo`. The update's own momentum is .9, ``inverse`` has the rates
            of the factors.
    """
    sections = {
        "statistics": Statistics(bias_correction=False, batch_size=batch_size),
        "spectrum": Spectrum(eigenvalues="inverse-free", power=1.0),
    }
    return built(params, lr, (0.0, 0.0), sections, {"momentum": 0.9, **options})


def RMSpropRootFree(
    params: ParamsT,
    lr: float = 1e-2,
    beta2: float = 0.999,
    epsilon: float = 1e-5,
    batch_size: int = 1,
    **options: Any,
) -> KroneckerOptimizer:
    """g / (s + epsilon), s <- beta2 s + (1 - beta2) B g^2 from s = 1 (arXiv 2402.03496).

    Args:
        params: As in :func:`Shampoo`.
        lr: Learning rate.
        beta2: Of s.
        epsilon: Added to s.
        batch_size: B, the batch over which the loss is a mean.
        options: As in :func:`Shampoo`. The update's own momentum is .9.
    """
    sections = {
        "statistics": Statistics(bias_correction=False, batch_size=batch_size, initial=1.0),
        "spectrum": Spectrum(power=1.0, epsilon=epsilon),
        "basis": Basis(start=1),
        "shapes": Shapes(max_dim=1),
    }
    return built(params, lr, (0.0, beta2), sections, {"momentum": 0.9, **options})


def AdaGradRootFree(
    params: ParamsT,
    lr: float = 1e-1,
    epsilon: float = 1e-5,
    batch_size: int = 1,
    **options: Any,
) -> KroneckerOptimizer:
    """g / (s + epsilon), s the sum of B g^2 from s = 1 on.

    Arguments as in :func:`RMSpropRootFree`.
    """
    sections = {
        "statistics": Statistics(accumulate="sum", batch_size=batch_size, initial=1.0),
        "spectrum": Spectrum(power=1.0, epsilon=epsilon),
        "basis": Basis(start=1),
        "shapes": Shapes(max_dim=1),
    }
    return built(params, lr, (0.0, 0.0), sections, {"momentum": 0.9, **options})


def Muon(
    params: ParamsT, lr: float = 0.02, beta1: float = 0.95, **options: Any
) -> KroneckerOptimizer:
    """The polar factor of the averaged gradient by Newton-Schulz (Jordan et al., 2024).

    Shampoo without memory, times max(1, m / n)^1/2. Meant for hidden matrices: give it the groups
    of :func:`hidden_groups`, in which vectors, embeddings and heads have Adam.

    Args:
        params: As in :func:`Shampoo`.
        lr: Learning rate.
        beta1: Of the average, taken once more with the newest gradient (Nesterov).
        options: As in :func:`Shampoo`; spectrum={"root": "eigh"} takes the exact polar factor.
    """
    sections = {
        "statistics": Statistics(bias_correction=False),
        "spectrum": Spectrum(eigenvalues="polar", root="matmul"),
    }
    return built(
        params, lr, (beta1, 0.0), sections, {"nesterov": True, "scale_by_shape": True, **options}
    )


PRESETS: MappingProxyType[str, Callable[..., KroneckerOptimizer]] = MappingProxyType(
    {
        "shampoo": Shampoo,
        "shampoo-squared": ShampooSquared,
        "eshampoo": EShampoo,
        "soap": SOAP,
        "kl-shampoo": KLShampoo,
        "kl-soap": KLSOAP,
        "root-free-shampoo": RootFreeShampoo,
        "inverse-free-shampoo": InverseFreeShampoo,
        "rmsprop-root-free": RMSpropRootFree,
        "adagrad-root-free": AdaGradRootFree,
        "muon": Muon,
    }
)
"""Name -> preset, as the command line knows them."""
