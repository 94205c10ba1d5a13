"""What gradient samples are, in factors, tokens or matrices; their checks and their memory.

In: tensors. Out: ``GradientSamples``. May import: linalg and errors.
"""
