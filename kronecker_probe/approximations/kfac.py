"""K-FAC."""

from __future__ import annotations

from kronecker_probe.operators.kronecker import KroneckerOperator
from kronecker_probe.operators.second_moment import SecondMoment


def kfac(target: SecondMoment) -> KroneckerOperator:
    """E[d d^T] kron E[a a^T] of output gradients d and inputs a.

    Martens and Grosse (2015); with T > 1 shared positions the expand form of Eschenhagen et al.
    (2023): d d^T is summed over positions, a a^T averaged.

    Raises:
        UnsupportedError: The samples have no factors.
    """
    return KroneckerOperator(*target.kfac_factors())
