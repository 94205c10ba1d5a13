"""Runs the analysis: ``python -m analyses.training``."""

from . import SCRIPT

SCRIPT.main()
