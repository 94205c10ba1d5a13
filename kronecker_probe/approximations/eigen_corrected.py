"""The exact diagonal of H in a Kronecker-factored eigenbasis."""

from __future__ import annotations

from kronecker_probe.operators.factors.factor import Factor
from kronecker_probe.operators.second_moment.target import SecondMoment
from kronecker_probe.operators.structures.eigen import EigenOperator


def eigen_corrected(target: SecondMoment) -> EigenOperator:
    """(Q_L kron Q_R) diag(D) (Q_L kron Q_R)^T with D = E[(Q_L^T G Q_R)^{o2}].

    George et al. (2018) in the bases of L and R, as eigenvalue-corrected Shampoo and SOAP hold
    it: the Frobenius-best diagonal in that basis. Where L or R has repeated eigenvalues the
    basis, and with it this operator, is not unique.
    """
    return _corrected(target, target.left_factor, target.right_factor)


def ekfac(target: SecondMoment) -> EigenOperator:
    """The same in the eigenbases of K-FAC's factors: EK-FAC (George et al., 2018).

    K-FAC is diagonal in that basis too, so its error is never below this one's.

    Raises:
        UnsupportedError: The samples have no factors.
    """
    return _corrected(target, *target.kfac_factors())


def _corrected(target: SecondMoment, left: Factor, right: Factor) -> EigenOperator:
    left_basis, right_basis = left.eigen().basis, right.eigen().basis
    return EigenOperator(left_basis, right_basis, target.eigen_diagonal(left_basis, right_basis))
