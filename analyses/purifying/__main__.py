"""Runs the analysis: ``python -m analyses.purifying``."""

from . import SCRIPT

SCRIPT.main()
