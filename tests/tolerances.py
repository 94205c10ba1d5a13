"""Every tolerance of the operator tests, each with its reason. Nothing here is tuned to a result.

Quantities are compared relative to the natural scale of the problem (``norm(H)``, the largest
singular value, ...), because the tests run at scales from 1e-12 to 1e12.
"""

from __future__ import annotations

import numpy as np

EPS = float(np.finfo(np.float64).eps)

# Norms, cosines, squared relative errors: float64 sums, all routes and the oracle alike.
SCALAR = 1e-10

# Entries of a matrix that is a sum of products of the data, relative to its Frobenius norm.
ENTRIES = 1e-10

# Entries that pass through the square root of a singular matrix, or an unconverged direction: an
# error of eps (respectively 1e-14) in a squared quantity is an error of its root here.
ROOT_ENTRIES = 1e-6

# A relative error that is exactly zero: the root of a difference of squares, each good to eps.
ZERO_ERROR = 100 * float(np.sqrt(EPS))

# Kronecker singular values relative to the largest: from a Gram matrix they are roots of
# eigenvalues, so the small ones are good to sqrt(eps) only.
SPECTRUM = 1e-7

# Slack of an inequality between two scalars that are each good to SCALAR.
INEQUALITY = 2 * SCALAR

# Negative or real powers of a matrix of condition number kappa lose kappa * eps.
CONDITION = 1e3 * EPS

# Printed decimals of the reference numbers (six digits).
PRINTED = 6e-7

# Inputs of lower precision are widened without error, but an operator applied to a float32 tensor
# may answer in float32.
FLOAT32 = 1e-5
