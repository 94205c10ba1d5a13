"""Named combinations of the choices; each a function that returns a :class:`KroneckerOptimizer`.

Every option of a section can be set by a dict or the section itself::

    SOAP(model.parameters(), lr=3e-3, basis={"tolerance": 0.1}, shapes={"block_size": 512})
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

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


class Preset(Protocol):
    """What most presets are called with."""

    def __call__(
        self,
        params: ParamsT,
        lr: float = ...,
        betas: Betas = ...,
        epsilon: float = ...,
        **options: Any,
    ) -> KroneckerOptimizer: ...


def built(
    params: ParamsT, lr: float, betas: Betas, options: Mapping[str, Any], **own: Any
) -> KroneckerOptimizer:
    """The optimizer of a preset's ``own`` options with what the caller changes."""
    known = [name for name in inspect.signature(KroneckerOptimizer).parameters if name != "params"]
    chosen: dict[str, Any] = {"betas": betas, **own}
    for name, value in options.items():
        if name not in known:
            raise unknown_name("option", name, known)
        if name in SECTIONS and value is None:
            continue  # the preset's own
        if name in SECTIONS and isinstance(value, Mapping):
            value = chosen.get(name, SECTIONS[name]()).replace(**value)
        chosen[name] = value
    return KroneckerOptimizer(params, lr, **chosen)


_ARGS = """

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate.
        betas: Decays of the gradient's average and of the statistics.
        epsilon: {epsilon}
        options: Of :class:`KroneckerOptimizer`, sections also as dicts.
    """
_ABSOLUTE = "Added to the eigenvalues of the factors, in units of squared gradients."
_RELATIVE = "Added to the eigenvalues of each factor, in units of the largest."
_OF_ROOTS = "Added to the roots of the second moments, as in Adam."


def _preset(
    name: str,
    doc: str,
    lr: float,
    betas: Betas,
    epsilon: float,
    about_epsilon: str,
    spectrum: Spectrum | None = None,
    **sections: Config,
) -> Preset:
    """A preset whose ``epsilon`` is that of the spectrum, as a function with these defaults."""

    def build(
        params: ParamsT,
        lr: float = lr,
        betas: Betas = betas,
        epsilon: float = epsilon,
        **options: Any,
    ) -> KroneckerOptimizer:
        damped = (spectrum or Spectrum()).replace(epsilon=epsilon)
        return built(params, lr, betas, options, spectrum=damped, **sections)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = doc + _ARGS.format(epsilon=about_epsilon)
    return build


Shampoo = _preset(
    "Shampoo",
    """Shampoo (arXiv 1802.09568) as in Distributed Shampoo (2309.06497): L^-1/4 M R^-1/4, grafted.

    With its Adam grafting a learning rate of Adam transfers.""",
    lr=1e-2,
    betas=(0.9, 0.999),
    epsilon=1e-8,
    about_epsilon=_ABSOLUTE,
    magnitude=Magnitude(grafting="adam"),
)

ShampooSquared = _preset(
    "ShampooSquared",
    """Power 1/2 with the trace scale: L kron R / Tr L as the estimate of H (arXiv 2406.17748).

    It divides by more than Shampoo does; so ``epsilon`` is relative to the largest eigenvalue of
    each factor: an absolute 1e-12 diverges. The first roots are found in the first step, which
    makes the steps independent of the loss's scale; the first, singular factors need an epsilon of
    about 1e-3, and a later ``basis.start`` trains with less of it.""",
    lr=1e-3,
    betas=(0.9, 0.999),
    epsilon=1e-3,
    about_epsilon=_RELATIVE,
    basis=Basis(start=1),
    spectrum=Spectrum(trace_scale=True, relative=True),
)

EShampoo = _preset(
    "EShampoo",
    "Corrected eigenvalues in Shampoo's bases (arXiv 2506.03595): a rate of Adam transfers.",
    lr=1e-3,
    betas=(0.9, 0.999),
    epsilon=1e-8,
    about_epsilon=_OF_ROOTS,
    basis=Basis(start=1),
    spectrum=Spectrum(eigenvalues="corrected"),
)

SOAP = _preset(
    "SOAP",
    """Adam in Shampoo's bases (arXiv 2409.11321): one QR iteration every 10 steps, Adam on vectors.

    It is EShampoo with other defaults: an average that is turned with complete bases is the average
    of the parameter's own frame.""",
    lr=3e-3,
    betas=(0.95, 0.95),
    epsilon=1e-8,
    about_epsilon=_OF_ROOTS,
    basis=Basis(start=1, solver="qr"),
    spectrum=Spectrum(eigenvalues="corrected"),
    shapes=Shapes(vectors="diagonal", max_dim=10_000),
)

KLShampoo = _preset(
    "KLShampoo",
    """Factors that minimize KL (arXiv 2509.03378), power 1/2, no grafting.

    ``epsilon`` bounds what the null space of the first, singular factors does to the steps until
    the next refresh.""",
    lr=1e-3,
    betas=(0.9, 0.98),
    epsilon=1e-3,
    about_epsilon=_RELATIVE,
    statistics=Statistics(rule="whitened"),
    basis=Basis(start=1),
    spectrum=Spectrum(exponent=-0.5, relative=True),
    shapes=Shapes(vectors="diagonal"),
)

KLSOAP = _preset(
    "KLSOAP",
    "SOAP in the bases of the factors that minimize KL (arXiv 2509.03378).",
    lr=3e-3,
    betas=(0.9, 0.98),
    epsilon=1e-8,
    about_epsilon=_OF_ROOTS,
    statistics=Statistics(rule="whitened"),
    basis=Basis(start=1, solver="qr"),
    spectrum=Spectrum(eigenvalues="corrected"),
    shapes=Shapes(vectors="diagonal", max_dim=10_000),
)


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
    return built(
        params, lr, betas, options,
        statistics=Statistics(bias_correction=False, batch_size=batch_size, initial=1.0),
        basis=Basis(start=1),
        spectrum=Spectrum(power=1.0, trace_scale=True, epsilon=epsilon, relative=True),
        shapes=Shapes(vectors="diagonal"),
        momentum=0.9,
    )  # fmt: skip


def InverseFreeShampoo(
    params: ParamsT, lr: float = 1e-2, batch_size: int = 1, **options: Any
) -> KroneckerOptimizer:
    """(C C^T) G (K K^T) with inverse factors found by products alone (arXiv 2402.03496).

    Arguments as in :func:`RootFreeShampoo`. The update's own momentum is .9, ``inverse`` has the
    rates of the factors.
    """
    return built(
        params, lr, (0.0, 0.0), options,
        statistics=Statistics(bias_correction=False, batch_size=batch_size),
        spectrum=Spectrum(eigenvalues="inverse-free", power=1.0),
        momentum=0.9,
    )  # fmt: skip


def _entrywise(
    params: ParamsT,
    lr: float,
    beta2: float,
    epsilon: float,
    options: Mapping[str, Any],
    statistics: Statistics,
) -> KroneckerOptimizer:
    """g / (s + epsilon) with a second moment s that starts from 1."""
    return built(
        params, lr, (0.0, beta2), options,
        statistics=statistics,
        spectrum=Spectrum(power=1.0, epsilon=epsilon),
        basis=Basis(start=1),
        shapes=Shapes(max_dim=1),
        momentum=0.9,
    )  # fmt: skip


def RMSpropRootFree(
    params: ParamsT,
    lr: float = 1e-2,
    beta2: float = 0.999,
    epsilon: float = 1e-5,
    batch_size: int = 1,
    **options: Any,
) -> KroneckerOptimizer:
    """g / (s + epsilon), s <- beta2 s + (1 - beta2) B g^2 from s = 1 (arXiv 2402.03496).

    Arguments as in :func:`RootFreeShampoo`. The update's own momentum is .9.
    """
    moments = Statistics(bias_correction=False, batch_size=batch_size, initial=1.0)
    return _entrywise(params, lr, beta2, epsilon, options, moments)


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
    moments = Statistics(accumulate="sum", batch_size=batch_size, initial=1.0)
    return _entrywise(params, lr, 0.0, epsilon, options, moments)


def Muon(
    params: ParamsT, lr: float = 0.02, beta1: float = 0.95, **options: Any
) -> KroneckerOptimizer:
    """The polar factor of the averaged gradient by Newton-Schulz (Jordan et al., 2024).

    Shampoo without memory, times max(1, m / n)^1/2. Meant for hidden matrices: give it the groups
    of :func:`hidden_groups`, in which vectors, embeddings and heads have Adam. The average, of
    decay ``beta1``, is taken once more with the newest gradient (Nesterov);
    spectrum={"root": "eigh"} takes the exact polar factor.
    """
    return built(
        params, lr, (beta1, 0.0), options,
        statistics=Statistics(bias_correction=False),
        spectrum=Spectrum(eigenvalues="polar", root="matmul"),
        nesterov=True,
        scale_by_shape=True,
    )  # fmt: skip


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
