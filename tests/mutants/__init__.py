"""Sixty numerical mistakes, and which test finds each: ``python -m tests.mutants``."""
