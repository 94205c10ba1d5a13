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
    from kronecker_probe.approximations import approximate as approximate
    from kronecker_probe.gradients.capture import Capture as Capture
    from kronecker_probe.gradients.capture import capture as capture
    from kronecker_probe.gradients.samples import GradientSamples as GradientSamples
    from kronecker_probe.operators.dense import DenseOperator as DenseOperator
    from kronecker_probe.operators.diagonal import DiagonalOperator as DiagonalOperator
    from kronecker_probe.operators.eigen import EigenOperator as EigenOperator
    from kronecker_probe.operators.kronecker import KroneckerOperator as KroneckerOperator
    from kronecker_probe.operators.second_moment import SecondMoment as SecondMoment
    from kronecker_probe.quality.compare import Scores as Scores
    from kronecker_probe.quality.compare import compare as compare
    from kronecker_probe.quality.diagnose import diagnose as diagnose
    from kronecker_probe.quality.findings import Diagnosis as Diagnosis
    from kronecker_probe.quality.findings import Finding as Finding
    from kronecker_probe.quality.metrics import best_scale as best_scale
    from kronecker_probe.quality.metrics import best_scale_error as best_scale_error
    from kronecker_probe.quality.metrics import cosine_similarity as cosine_similarity
    from kronecker_probe.quality.metrics import relative_error as relative_error
    from kronecker_probe.tracking.store import RunStore as RunStore
    from kronecker_probe.tracking.tracker import Tracker as Tracker
    from kronecker_probe.workloads import Workload as Workload

__version__ = "0.1.0"

# public name -> module that defines it (a module of the same name is the name itself)
_PUBLIC = {
    "capture": "gradients.capture",
    "Capture": "gradients.capture",
    "GradientSamples": "gradients.samples",
    "SecondMoment": "operators.second_moment",
    "KroneckerOperator": "operators.kronecker",
    "EigenOperator": "operators.eigen",
    "DiagonalOperator": "operators.diagonal",
    "DenseOperator": "operators.dense",
    "approximate": "approximations",
    "cosine_similarity": "quality.metrics",
    "relative_error": "quality.metrics",
    "best_scale": "quality.metrics",
    "best_scale_error": "quality.metrics",
    "compare": "quality.compare",
    "diagnose": "quality.diagnose",
    "Diagnosis": "quality.findings",
    "Finding": "quality.findings",
    "Scores": "quality.compare",
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
