"""Diagnostics of Kronecker-factored preconditioners, with an embedded Shampoo optimizer.

The public names are resolved lazily (PEP 562), so that commands which only read a stored run
never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kronecker_probe import errors as errors
    from kronecker_probe import optim as optim
    from kronecker_probe import plots as plots
    from kronecker_probe.approximations import APPROXIMATIONS as APPROXIMATIONS
    from kronecker_probe.approximations import DEFAULT_APPROXIMATIONS as DEFAULT_APPROXIMATIONS
    from kronecker_probe.approximations import approximate as approximate
    from kronecker_probe.approximations import kronecker_energy as kronecker_energy
    from kronecker_probe.approximations import resolve as resolve
    from kronecker_probe.gradients.batches import batch_gradients as batch_gradients
    from kronecker_probe.gradients.capture import Capture as Capture
    from kronecker_probe.gradients.capture import capture as capture
    from kronecker_probe.gradients.functional import CurvatureOperator as CurvatureOperator
    from kronecker_probe.gradients.functional import curvature_operator as curvature_operator
    from kronecker_probe.gradients.samples import GradientSamples as GradientSamples
    from kronecker_probe.gradients.streaming import capture_loader as capture_loader
    from kronecker_probe.gradients.trajectory import GradientWindow as GradientWindow
    from kronecker_probe.operators.block import BlockOperator as BlockOperator
    from kronecker_probe.operators.dense import DenseOperator as DenseOperator
    from kronecker_probe.operators.diagonal import DiagonalOperator as DiagonalOperator
    from kronecker_probe.operators.eigen import EigenOperator as EigenOperator
    from kronecker_probe.operators.kronecker import KroneckerOperator as KroneckerOperator
    from kronecker_probe.operators.kronecker_sum import KroneckerSum as KroneckerSum
    from kronecker_probe.operators.second_moment import SecondMoment as SecondMoment
    from kronecker_probe.quality.compare import compare as compare
    from kronecker_probe.quality.diagnose import diagnose as diagnose
    from kronecker_probe.quality.directions import DirectionAgreement as DirectionAgreement
    from kronecker_probe.quality.directions import direction_agreement as direction_agreement
    from kronecker_probe.quality.divergences import Divergence as Divergence
    from kronecker_probe.quality.divergences import kl_divergence as kl_divergence
    from kronecker_probe.quality.divergences import stein_divergence as stein_divergence
    from kronecker_probe.quality.estimates.api import estimate as estimate
    from kronecker_probe.quality.estimates.api import samples_needed as samples_needed
    from kronecker_probe.quality.estimates.estimate import Estimate as Estimate
    from kronecker_probe.quality.findings import Diagnosis as Diagnosis
    from kronecker_probe.quality.findings import Finding as Finding
    from kronecker_probe.quality.gap import GapDecomposition as GapDecomposition
    from kronecker_probe.quality.gap import decompose_gap as decompose_gap
    from kronecker_probe.quality.metrics import best_scale as best_scale
    from kronecker_probe.quality.metrics import best_scale_error as best_scale_error
    from kronecker_probe.quality.metrics import cosine_similarity as cosine_similarity
    from kronecker_probe.quality.metrics import relative_error as relative_error
    from kronecker_probe.quality.scores import Scores as Scores
    from kronecker_probe.quality.spectral import ErrorSpectrum as ErrorSpectrum
    from kronecker_probe.quality.spectral import ErrorSplit as ErrorSplit
    from kronecker_probe.quality.spectral import error_spectrum as error_spectrum
    from kronecker_probe.quality.spectral import (
        largest_error_eigenvalue as largest_error_eigenvalue,
    )
    from kronecker_probe.quality.spectral import off_diagonal_mass as off_diagonal_mass
    from kronecker_probe.quality.spectral import split_error as split_error
    from kronecker_probe.quality.spectral import trace_ratio as trace_ratio
    from kronecker_probe.tracking.store import RunStore as RunStore
    from kronecker_probe.tracking.tracker import Tracker as Tracker
    from kronecker_probe.workloads import Workload as Workload

__version__ = "0.1.0"

# public name -> module that defines it (a module of the same name is the name itself)
_PUBLIC = {
    "capture": "gradients.capture",
    "Capture": "gradients.capture",
    "GradientSamples": "gradients.samples",
    "curvature_operator": "gradients.functional",
    "CurvatureOperator": "gradients.functional",
    "batch_gradients": "gradients.batches",
    "capture_loader": "gradients.streaming",
    "GradientWindow": "gradients.trajectory",
    "SecondMoment": "operators.second_moment",
    "KroneckerOperator": "operators.kronecker",
    "EigenOperator": "operators.eigen",
    "DiagonalOperator": "operators.diagonal",
    "DenseOperator": "operators.dense",
    "KroneckerSum": "operators.kronecker_sum",
    "BlockOperator": "operators.block",
    "approximate": "approximations",
    "resolve": "approximations",
    "kronecker_energy": "approximations",
    "APPROXIMATIONS": "approximations",
    "DEFAULT_APPROXIMATIONS": "approximations",
    "cosine_similarity": "quality.metrics",
    "relative_error": "quality.metrics",
    "best_scale": "quality.metrics",
    "best_scale_error": "quality.metrics",
    "DirectionAgreement": "quality.directions",
    "direction_agreement": "quality.directions",
    "Divergence": "quality.divergences",
    "kl_divergence": "quality.divergences",
    "stein_divergence": "quality.divergences",
    "GapDecomposition": "quality.gap",
    "decompose_gap": "quality.gap",
    "ErrorSpectrum": "quality.spectral",
    "ErrorSplit": "quality.spectral",
    "error_spectrum": "quality.spectral",
    "largest_error_eigenvalue": "quality.spectral",
    "off_diagonal_mass": "quality.spectral",
    "split_error": "quality.spectral",
    "trace_ratio": "quality.spectral",
    "compare": "quality.compare",
    "estimate": "quality.estimates.api",
    "Estimate": "quality.estimates.estimate",
    "samples_needed": "quality.estimates.api",
    "diagnose": "quality.diagnose",
    "Diagnosis": "quality.findings",
    "Finding": "quality.findings",
    "Scores": "quality.scores",
    "Tracker": "tracking.tracker",
    "RunStore": "tracking.store",
    "Workload": "workloads",
    "optim": "optim",
    "plots": "plots",
    "errors": "errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kronecker_probe' has no attribute {name!r}")
    module = importlib.import_module(f"kronecker_probe.{_PUBLIC[name]}")
    value = module if _PUBLIC[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
