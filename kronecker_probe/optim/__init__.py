"""The embedded optimizers: presets of one engine, and the choices that they are made of."""

from __future__ import annotations

from kronecker_probe.optim.config import Basis, Magnitude, Shapes, Spectrum, Statistics
from kronecker_probe.optim.engine import KroneckerOptimizer
from kronecker_probe.optim.presets import (
    KLSOAP,
    PRESETS,
    SOAP,
    AdaGradRootFree,
    EShampoo,
    KLShampoo,
    Muon,
    RMSpropRootFree,
    RootFreeShampoo,
    Shampoo,
    ShampooSquared,
)

__all__ = [
    "KLSOAP",
    "PRESETS",
    "SOAP",
    "AdaGradRootFree",
    "Basis",
    "EShampoo",
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
]
