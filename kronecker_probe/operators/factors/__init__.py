"""One side of a Kronecker product, never formed before it must be.

In: a matrix, or vectors and weights. Out: ``Factor``. May import: linalg and errors.
"""
