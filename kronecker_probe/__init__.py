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
    from kronecker_probe.approximations import register_approximation as register_approximation
    from kronecker_probe.approximations import resolve as resolve
    from kronecker_probe.findings.diagnose import diagnose as diagnose
    from kronecker_probe.findings.finding import Diagnosis as Diagnosis
    from kronecker_probe.findings.finding import Finding as Finding
    from kronecker_probe.gradients.api import capture as capture
    from kronecker_probe.gradients.batch_means import batch_gradients as batch_gradients
    from kronecker_probe.gradients.coverage import Capture as Capture
    from kronecker_probe.gradients.functional import CurvatureOperator as CurvatureOperator
    from kronecker_probe.gradients.functional import curvature_operator as curvature_operator
    from kronecker_probe.gradients.layers.modules import register_layer_rule as register_layer_rule
    from kronecker_probe.gradients.loader import capture_loader as capture_loader
    from kronecker_probe.gradients.samples.base import GradientSamples as GradientSamples
    from kronecker_probe.gradients.trajectory.window import GradientWindow as GradientWindow
    from kronecker_probe.operators.second_moment.target import SecondMoment as SecondMoment
    from kronecker_probe.operators.structures.block import BlockOperator as BlockOperator
    from kronecker_probe.operators.structures.dense import DenseOperator as DenseOperator
    from kronecker_probe.operators.structures.diagonal import DiagonalOperator as DiagonalOperator
    from kronecker_probe.operators.structures.eigen import EigenOperator as EigenOperator
    from kronecker_probe.operators.structures.kronecker import (
        KroneckerOperator as KroneckerOperator,
    )
    from kronecker_probe.operators.structures.kronecker_sum import KroneckerSum as KroneckerSum
    from kronecker_probe.quality.compare import compare as compare
    from kronecker_probe.quality.estimates.api import estimate as estimate
    from kronecker_probe.quality.estimates.api import samples_needed as samples_needed
    from kronecker_probe.quality.estimates.estimate import Estimate as Estimate
    from kronecker_probe.quality.metrics.catalog import register_metric as register_metric
    from kronecker_probe.quality.metrics.directions import DirectionAgreement as DirectionAgreement
    from kronecker_probe.quality.metrics.directions import (
        direction_agreement as direction_agreement,
    )
    from kronecker_probe.quality.metrics.divergences import Divergence as Divergence
    from kronecker_probe.quality.metrics.divergences import kl_divergence as kl_divergence
    from kronecker_probe.quality.metrics.divergences import stein_divergence as stein_divergence
    from kronecker_probe.quality.metrics.frobenius import best_scale as best_scale
    from kronecker_probe.quality.metrics.frobenius import best_scale_error as best_scale_error
    from kronecker_probe.quality.metrics.frobenius import cosine_similarity as cosine_similarity
    from kronecker_probe.quality.metrics.frobenius import relative_error as relative_error
    from kronecker_probe.quality.metrics.gap import GapDecomposition as GapDecomposition
    from kronecker_probe.quality.metrics.gap import decompose_gap as decompose_gap
    from kronecker_probe.quality.metrics.spectral import ErrorSpectrum as ErrorSpectrum
    from kronecker_probe.quality.metrics.spectral import ErrorSplit as ErrorSplit
    from kronecker_probe.quality.metrics.spectral import error_spectrum as error_spectrum
    from kronecker_probe.quality.metrics.spectral import (
        largest_error_eigenvalue as largest_error_eigenvalue,
    )
    from kronecker_probe.quality.metrics.spectral import off_diagonal_mass as off_diagonal_mass
    from kronecker_probe.quality.metrics.spectral import split_error as split_error
    from kronecker_probe.quality.metrics.spectral import trace_ratio as trace_ratio
    from kronecker_probe.quality.scores import Scores as Scores
    from kronecker_probe.tracking.optimizer_state.registry import (
        register_optimizer_state as register_optimizer_state,
    )
    from kronecker_probe.tracking.run_directory.store import RunStore as RunStore
    from kronecker_probe.tracking.tracker import Tracker as Tracker
    from kronecker_probe.workloads import Workload as Workload
    from kronecker_probe.workloads import register_workload as register_workload

__version__ = "0.1.0"

# public name -> module that defines it (a module of the same name is the name itself)
_PUBLIC = {
    "capture": "gradients.api",
    "Capture": "gradients.coverage",
    "GradientSamples": "gradients.samples.base",
    "register_layer_rule": "gradients.layers.modules",
    "curvature_operator": "gradients.functional",
    "CurvatureOperator": "gradients.functional",
    "batch_gradients": "gradients.batch_means",
    "capture_loader": "gradients.loader",
    "GradientWindow": "gradients.trajectory.window",
    "SecondMoment": "operators.second_moment.target",
    "KroneckerOperator": "operators.structures.kronecker",
    "EigenOperator": "operators.structures.eigen",
    "DiagonalOperator": "operators.structures.diagonal",
    "DenseOperator": "operators.structures.dense",
    "KroneckerSum": "operators.structures.kronecker_sum",
    "BlockOperator": "operators.structures.block",
    "approximate": "approximations",
    "resolve": "approximations",
    "register_approximation": "approximations",
    "register_metric": "quality.metrics.catalog",
    "kronecker_energy": "approximations",
    "APPROXIMATIONS": "approximations",
    "DEFAULT_APPROXIMATIONS": "approximations",
    "cosine_similarity": "quality.metrics.frobenius",
    "relative_error": "quality.metrics.frobenius",
    "best_scale": "quality.metrics.frobenius",
    "best_scale_error": "quality.metrics.frobenius",
    "DirectionAgreement": "quality.metrics.directions",
    "direction_agreement": "quality.metrics.directions",
    "Divergence": "quality.metrics.divergences",
    "kl_divergence": "quality.metrics.divergences",
    "stein_divergence": "quality.metrics.divergences",
    "GapDecomposition": "quality.metrics.gap",
    "decompose_gap": "quality.metrics.gap",
    "ErrorSpectrum": "quality.metrics.spectral",
    "ErrorSplit": "quality.metrics.spectral",
    "error_spectrum": "quality.metrics.spectral",
    "largest_error_eigenvalue": "quality.metrics.spectral",
    "off_diagonal_mass": "quality.metrics.spectral",
    "split_error": "quality.metrics.spectral",
    "trace_ratio": "quality.metrics.spectral",
    "compare": "quality.compare",
    "estimate": "quality.estimates.api",
    "Estimate": "quality.estimates.estimate",
    "samples_needed": "quality.estimates.api",
    "diagnose": "findings.diagnose",
    "Diagnosis": "findings.finding",
    "Finding": "findings.finding",
    "Scores": "quality.scores",
    "Tracker": "tracking.tracker",
    "register_optimizer_state": "tracking.optimizer_state.registry",
    "RunStore": "tracking.run_directory.store",
    "Workload": "workloads",
    "register_workload": "workloads",
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
