"""A sum of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import InvalidInputError, UnsupportedError
from kronecker_probe.operators.base import Operator
from kronecker_probe.operators.structures.kronecker import KroneckerOperator


@dataclass(frozen=True)
class SkewTerm:
    """scale * left kron right of two skew-symmetric matrices, together a symmetric term.

    Attributes:
        left: A = -A^T, float64 [m, m].
        right: C = -C^T, float64 [n, n].
        scale: A factor in front of both.
    """

    left: Tensor
    right: Tensor
    scale: float

    def apply(self, x: Tensor) -> Tensor:
        """scale * A x C^T."""
        return self.scale * (self.left @ x @ self.right.T)

    def inner(self, other: SkewTerm) -> float:
        """<A kron C, A' kron C'>, scales included."""
        sides = float((self.left * other.left).sum()) * float((self.right * other.right).sum())
        return self.scale * other.scale * sides


@final
class KroneckerSum(Operator):
    """P = sum_j c_j A_j kron C_j, symmetric, and *not* PSD in general.

    The truncated singular value decomposition of R(H) is of this kind: its first term is PSD,
    later ones have symmetric indefinite factors, or skew-symmetric ones where positions are
    shared.

    Args:
        terms: At least one product of symmetric factors, all of one shape.
        skew: Products of skew-symmetric factors.
        info: How it was found.

    Raises:
        InvalidInputError: No terms, or shapes that differ.
    """

    inner_rank = 3

    def __init__(
        self,
        terms: Sequence[KroneckerOperator],
        skew: Sequence[SkewTerm] = (),
        info: Mapping[str, float] | None = None,
    ) -> None:
        shapes = [one.shape for one in terms]
        shapes += [(one.left.shape[0], one.right.shape[0]) for one in skew]
        if not terms or len(set(shapes)) > 1:
            raise InvalidInputError(
                f"A Kronecker sum got terms of shapes {shapes}; give at least one symmetric term, "
                "and all of one shape."
            )
        self.shape, self.device = terms[0].shape, terms[0].device
        self.terms = tuple(terms)
        self.skew = tuple(skew)
        self.info = dict(info or {})

    @property
    def rank(self) -> int:
        """How many products are summed."""
        return len(self.terms) + len(self.skew)

    def norm(self) -> float:
        pairs = [p.inner(q) for p in self.terms for q in self.terms]
        pairs += [p.inner(q) for p in self.skew for q in self.skew]
        return math.sqrt(max(0.0, math.fsum(pairs)))

    def trace(self) -> float:
        return math.fsum(one.trace() for one in self.terms)

    def _inner(self, other: Operator) -> float:
        found = [term.inner(other) for term in self.terms]
        found += [skew.scale * other.kronecker_inner(skew.left, skew.right) for skew in self.skew]
        return math.fsum(found)

    def power(self, p: float) -> KroneckerSum:
        """Refused: a sum of products is not PSD, and its powers are no such sums.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"power({p}) of a sum of {self.rank} Kronecker products, which may have negative "
            "eigenvalues; use rank 1, or kp.DenseOperator(P.to_dense(), P.shape) of a small layer."
        )

    def projected_diagonal(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        found = [one.projected_diagonal(left_basis, right_basis) for one in self.terms]
        return torch.stack(found).sum(dim=0)  # q^T A q = 0 of a skew-symmetric A

    def diagonal(self) -> Tensor:
        return torch.stack([one.diagonal() for one in self.terms]).sum(dim=0)

    def kronecker_inner(self, left: Tensor, right: Tensor) -> float:
        found = [one.kronecker_inner(left, right) for one in self.terms]
        found += [one.inner(SkewTerm(left, right, 1.0)) for one in self.skew]
        return math.fsum(found)

    def block(self, rows: slice, columns: slice) -> KroneckerSum:
        skew = [
            SkewTerm(one.left[rows, rows], one.right[columns, columns], one.scale)
            for one in self.skew
        ]
        return KroneckerSum([one.block(rows, columns) for one in self.terms], skew)

    def _apply(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for term in self.terms:
            out += term.apply(x)
        for skew in self.skew:
            out += skew.apply(x)
        return out

    def __repr__(self) -> str:
        m, n = self.shape
        return f"KroneckerSum({m} x {m} kron {n} x {n}, {self.rank} terms)"
