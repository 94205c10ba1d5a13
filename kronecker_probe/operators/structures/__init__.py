"""The structures of approximations: Kronecker, sum of Kronecker, eigen, diagonal, block, dense.

In: factors or tensors. Out: operators. May import: operators.base and factors, linalg, errors.
"""
