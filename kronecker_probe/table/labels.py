"""The names of approximations in figures and sentences; those that users register join them."""

from __future__ import annotations

# in the order in which figures and tables list them
LABELS: dict[str, str] = {
    "optimal": "optimal Kronecker",
    "shampoo-squared": "Shampoo²",
    "kfac": "K-FAC",
    "shampoo": "Shampoo",
    "eigen-corrected": "eigenvalue-corrected",
    "diagonal": "diagonal",
    "shampoo-squared-sequential": "Shampoo², sequential",
    "kfac-reduce": "K-FAC reduce",
    "tkfac": "TKFAC",
    "ekfac": "EK-FAC",
    "divergence:q=0": "KL",
    "divergence:q=0.5": "SQ (q = 1/2)",
    "divergence": "divergence",
    "left-only": "left only",
    "right-only": "right only",
    "identity": "identity",
    "in-use": "in use (by the optimizer)",
}
