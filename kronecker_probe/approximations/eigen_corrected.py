"""The exact diagonal in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from kronecker_probe.operators.eigen import EigenOperator
from kronecker_probe.operators.second_moment import SecondMoment


def eigen_corrected(target: SecondMoment) -> EigenOperator:
    """(Q_L kron Q_R) diag(D) (Q_L kron Q_R)^T with D = E[(Q_L^T G Q_R)^{o2}].

    George et al. (2018) in the bases of L and R, as eigenvalue-corrected Shampoo and SOAP hold
    it: the Frobenius-best diagonal in that basis. Where L or R has repeated eigenvalues the
    basis, and with it this operator, is not unique.
    """
    left, right = target.left_factor.eigen().basis, target.right_factor.eigen().basis
    return EigenOperator(left, right, target.eigen_diagonal(left, right))
