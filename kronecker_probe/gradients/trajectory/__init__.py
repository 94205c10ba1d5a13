"""The gradients of a training run: windows, their memory, and their truncation.

In: parameters with a ``grad``. Out: ``GradientSamples`` that are not independent.
May import: gradients.samples, gradients.layers, linalg and errors.
"""
