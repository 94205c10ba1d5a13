"""Runs the analysis: ``python -m analyses.overhead``."""

from . import main

main()
