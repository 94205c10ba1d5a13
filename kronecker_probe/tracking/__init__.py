"""Measuring along a training run, and storing what was measured."""
