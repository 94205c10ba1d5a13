"""The embedded optimizers: presets of one engine, and the choices that they are made of.

In: parameters (or a model, for K-FAC) and options as sections, dicts or text.
Out: a torch optimizer that steps, and the operator that it has in use of each parameter.
May import: operators, gradients, linalg, errors; inside: presets and build on engine, on
preconditioners, on layers, on blocks, on options.
"""

from __future__ import annotations

from kronecker_probe.optim.engine.engine import KroneckerOptimizer
from kronecker_probe.optim.kfac import EKFAC, KFAC, MODEL_PRESETS
from kronecker_probe.optim.options.sections import (
    Basis,
    Inverse,
    Magnitude,
    Shapes,
    Spectrum,
    Statistics,
    Storage,
)
from kronecker_probe.optim.param_groups import hidden_groups
from kronecker_probe.optim.presets import (
    ADAM,
    KLSOAP,
    PRESETS,
    SOAP,
    AdaGradRootFree,
    EShampoo,
    InverseFreeShampoo,
    KLShampoo,
    Muon,
    RMSpropRootFree,
    RootFreeShampoo,
    Shampoo,
    ShampooSquared,
)

__all__ = [
    "ADAM",
    "EKFAC",
    "KFAC",
    "KLSOAP",
    "MODEL_PRESETS",
    "PRESETS",
    "SOAP",
    "AdaGradRootFree",
    "Basis",
    "EShampoo",
    "Inverse",
    "InverseFreeShampoo",
    "KLShampoo",
    "KroneckerOptimizer",
    "Magnitude",
    "Muon",
    "RMSpropRootFree",
    "RootFreeShampoo",
    "Shampoo",
    "ShampooSquared",
    "Shapes",
    "Spectrum",
    "Statistics",
    "Storage",
    "hidden_groups",
]
