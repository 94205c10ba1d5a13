"""Runs the analysis: ``python -m analyses.root_free``."""

from . import SCRIPT

SCRIPT.main()
