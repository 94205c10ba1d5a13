"""The approximation that a metric is asked about: an operator, or the name of one."""

from __future__ import annotations

from kronecker_probe.approximations import approximate
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.second_moment.target import SecondMoment


def as_operator(target: Operator, approximation: Operator | str) -> Operator:
    """The operator that ``approximation`` is, or that a name or spec makes of ``target``.

    Args:
        target: H.
        approximation: An operator, as it stands; or a name or spec as for ``kp.approximate``.

    Raises:
        InvalidInputError: Neither of these, or a name where ``target`` holds no draws, or
            ``target`` is no operator.
        UnknownNameError: No such approximation or option.
        UnsupportedError: The samples lack what it needs.
    """
    if not isinstance(target, Operator):
        raise InvalidInputError(
            f"A metric got a {type(target).__name__} for the target H; give an operator first "
            "(gradient samples become one by kp.SecondMoment), and the approximation second."
        )
    if isinstance(approximation, Operator):
        return approximation
    if not isinstance(approximation, str):
        raise InvalidInputError(
            f"A metric got a {type(approximation).__name__} for the approximation; give an "
            "operator (a matrix [mn, mn] becomes one by kp.DenseOperator), or the name of an "
            "approximation of H, for example 'kfac' or 'optimal:rank=2'."
        )
    if not isinstance(target, SecondMoment):
        raise InvalidInputError(
            f"The approximation {approximation!r} is fitted to draws, which a target of type "
            f"{type(target).__name__} does not hold; give H as kp.SecondMoment(samples), or an "
            "operator in place of the name."
        )
    return approximate(target, approximation)
