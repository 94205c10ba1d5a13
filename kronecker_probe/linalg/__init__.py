"""Plain linear algebra, batched over leading dimensions: roots, bases, Lanczos, Grams, precision.

In: tensors. Out: tensors, or small results with their residuals.
May import: torch, numpy and errors; no models, samples or optimizers.
"""
