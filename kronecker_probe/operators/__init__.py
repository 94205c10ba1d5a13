"""PSD operators on m x n matrices, and inner products between any two.

In: gradient samples, factors, or tensors. Out: ``Operator``, with norm, trace and products.
May import: gradients (its samples), linalg and errors.
"""
