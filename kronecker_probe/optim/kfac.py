"""K-FAC and EK-FAC: presets that take the model, whose layers they hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.engine.engine import KroneckerOptimizer
from kronecker_probe.optim.layers.attached import longest_side
from kronecker_probe.optim.layers.recorder import layer_parameters
from kronecker_probe.optim.options.sections import Basis, Shapes, Spectrum, Statistics
from kronecker_probe.optim.presets import ADAM, Betas, built


def KFAC(
    model: nn.Module,
    lr: float = 3e-3,
    betas: Betas = (0.9, 0.95),
    epsilon: float = 0.2,
    loss_reduction: str = "mean",
    diagonal_lr: float = 1e-3,
    **options: Any,
) -> KroneckerOptimizer:
    """B^-1 M A^-1 with B = E[d d^T], A = E[a a^T] of a layer's inputs and output gradients.

    K-FAC (Martens and Grosse, 2015), where positions are shared in the expand form (arXiv
    2311.00636), for nn.Linear and ungrouped nn.Conv1d, 2d and 3d. A bias has a block of its own,
    B^-1. With training labels these are of the empirical Fisher matrix; ``optimizer.sampling()``
    takes sampled ones. Norms, embeddings, weights that are shared with them, subclasses of layers,
    and sides above shapes.max_dim get Adam in a second parameter group. How passes through the
    model count: :meth:`KroneckerOptimizer.attach`, which has been called.

    Args:
        model: Its parameters that require a gradient are optimized.
        lr: Learning rate of the layers.
        betas: Decays of the gradient's average and of the statistics.
        epsilon: Added to the eigenvalues of each factor, relative to the largest: what is right at
            all widths (arXiv 2312.12226), unlike a split of one damping by the traces.
        loss_reduction: Whether the loss is a "mean" or a "sum" over examples.
        diagonal_lr: Learning rate of Adam.
        options: Of :class:`KroneckerOptimizer`, for the layers, sections also as dicts.

    Raises:
        InvalidInputError: The model has no such layer, or an option is out of range.
    """
    spectrum = Spectrum(power=1.0, exponent=-1.0, epsilon=epsilon, relative=True)
    return _attached(model, lr, betas, spectrum, loss_reduction, diagonal_lr, options)


def EKFAC(
    model: nn.Module,
    lr: float = 3e-3,
    betas: Betas = (0.9, 0.95),
    epsilon: float = 0.03,
    loss_reduction: str = "mean",
    diagonal_lr: float = 1e-3,
    **options: Any,
) -> KroneckerOptimizer:
    """M over E[(Q_B^T G_i Q_A)^2] in the eigenbases of K-FAC's factors (George et al., 2018).

    The second moment is that of single examples' gradients, updated in every step; the bases are
    refreshed as ``basis`` says. Arguments as in :func:`KFAC`, ``epsilon`` relative to the largest
    entry of the second moment.
    """
    spectrum = Spectrum(eigenvalues="corrected", power=1.0, epsilon=epsilon, relative=True)
    return _attached(model, lr, betas, spectrum, loss_reduction, diagonal_lr, options)


def _attached(
    model: nn.Module,
    lr: float,
    betas: Betas,
    spectrum: Spectrum,
    loss_reduction: str,
    diagonal_lr: float,
    options: Mapping[str, Any],
) -> KroneckerOptimizer:
    """The optimizer of the layers' parameters and, in a second group, of all others."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"K-FAC takes the model, an nn.Module, as it hooks its layers; got "
            f"{type(model).__name__}. Pass the model in place of its parameters."
        )
    shapes = Shapes(max_dim=8192)
    if given := options.get("shapes"):
        shapes = shapes.replace(**given) if isinstance(given, Mapping) else Shapes.of(given)
    known = layer_parameters(model)
    layers: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            fits = param in known and longest_side(param) <= shapes.max_dim
            (layers if fits else others).append((name, param))
    if not layers:
        raise InvalidInputError(
            "The model has no nn.Linear, and no nn.Conv1d, 2d or 3d with groups=1, whose weight "
            f"requires a gradient and is within shapes.max_dim={shapes.max_dim}: K-FAC has nothing "
            "to do. Use another preset, such as EShampoo."
        )
    optimizer = built(
        layers, lr, betas, {**options, "shapes": shapes},
        statistics=Statistics(rule="kfac", loss_reduction=loss_reduction),
        basis=Basis(start=1),
        spectrum=spectrum,
    )  # fmt: skip
    if others:
        optimizer.add_param_group({"params": others, "lr": diagonal_lr, **ADAM})
    optimizer.attach(model)
    return optimizer


MODEL_PRESETS: MappingProxyType[str, Callable[..., KroneckerOptimizer]] = MappingProxyType(
    {"kfac": KFAC, "ekfac": EKFAC}
)
"""Name -> preset that takes the model in place of its parameters."""
