"""Four 2 x 3 samples of equal weight, and what is known about their second moment.

L, R, the trace and the norm are checked by hand (test_oracle.py); the six-digit numbers were
computed once elsewhere, by dense linear algebra, and are kept as printed.
"""

from __future__ import annotations

import numpy as np

SAMPLES = np.array(
    [
        [[1, 2, 0], [0, 1, -1]],
        [[0, 1, 1], [2, 0, 1]],
        [[1, -1, 0], [1, 1, 2]],
        [[2, 0, 1], [0, 1, 0]],
    ],
    dtype=np.float64,
)
LEFT = np.array([[3.5, 0.75], [0.75, 3.5]])
RIGHT = np.array([[2.75, 0.5, 1.5], [0.5, 2.25, 0.5], [1.5, 0.5, 2.0]])
TRACE = 7.0
SQUARED_NORM = 16.5
SPECTRUM = (3.495806, 1.294255, 1.274755, 0.989568)
COSINE = {"optimal": 0.860608, "shampoo-squared": 0.851041, "shampoo": 0.814559}
RELATIVE_ERROR = {"optimal": 0.509268, "shampoo-squared": 0.525277, "eigen-corrected": 0.504315}
BEST_SCALE_OF_SHAMPOO_SQUARED = 1.016288
ALTERNATING_COSINES = (0.853842, 0.860482, 0.860606, 0.860608, 0.860608)
