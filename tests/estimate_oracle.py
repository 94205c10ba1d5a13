"""Estimates by the definition: enumeration of distinct indices, and refits without each datum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


def second_moments(d: Array, a: Array) -> Array:
    """H_i of factors d [N, C, m] and a [N, n]: dense [N, mn, mn]."""
    columns = np.einsum("icm,in->icmn", d, a).reshape(*d.shape[:2], -1)
    return np.einsum("icp,icq->ipq", columns, columns)


def distinct_mean(count: int, order: int, weights: Array, term: Callable[..., float]) -> float:
    """sum w_i w_j ... f(i, j, ...) / sum w_i w_j ... over tuples of distinct indices."""
    total = normal = 0.0
    for indices in itertools.permutations(range(count), order):
        weight = math.prod(weights[list(indices)])
        total += weight * term(*indices)
        normal += weight
    return total / normal


class Products:
    """The U-statistics of one product of sample means, by enumeration.

    Args:
        moments: H_i, [N, mn, mn].
        left: L_j, [N, m, m].
        right: R_k, [N, n, n].
        weights: [N].
        by_trace: Whether P = L kron R / Tr H.
        order: Distinct indices of <H, P>: 3, or 2 where one factor is no mean but given.
    """

    def __init__(
        self,
        moments: Array,
        left: Array,
        right: Array,
        weights: Array,
        by_trace: bool,
        order: int = 3,
    ) -> None:
        self.moments, self.left, self.right = moments, left, right
        self.weights, self.by_trace, self.order = weights, by_trace, order

    def triple(self) -> tuple[float, float, float]:
        """<H, P>, |H|^2, |P|^2."""
        count = len(self.weights)

        def cross(i: int, j: int, *rest: int) -> float:
            k = rest[0] if rest else j
            return float((self.moments[i] * np.kron(self.left[j], self.right[k])).sum())

        def pairs(of: Array) -> float:
            return distinct_mean(count, 2, self.weights, lambda i, j: float((of[i] * of[j]).sum()))

        trace = np.trace(np.average(self.moments, axis=0, weights=self.weights))
        scale = float(trace) if self.by_trace else 1.0
        return (
            distinct_mean(count, self.order, self.weights, cross) / scale,
            pairs(self.moments),
            pairs(self.left) * pairs(self.right) / scale**2,
        )

    def without(self, index: int) -> Products:
        """The same draws but one."""
        parts = (np.delete(x, index, axis=0) for x in (self.moments, self.left, self.right))
        return Products(*parts, np.delete(self.weights, index), self.by_trace, self.order)


def metric_value(metric: str, cross: float, target: float, approximation: float) -> float:
    """A metric of the three inner products, errors squared."""
    if metric == "cosine":
        return cross / math.sqrt(target * approximation)
    if metric == "relative_error":
        return 1 - 2 * cross / target + approximation / target
    if metric == "best_scale_error":
        return 1 - cross**2 / (target * approximation)
    return cross / approximation


def jackknife(whole: float, without: list[float]) -> tuple[float, float, float]:
    """Bias-corrected value, standard error, degrees of freedom, all by the definition."""
    n = len(without)
    pseudo = [n * whole - (n - 1) * part for part in without]
    mean = sum(pseudo) / n
    psi = [p - mean for p in pseudo]
    second, fourth = sum(x**2 for x in psi), sum(x**4 for x in psi)
    return mean, math.sqrt(second / (n * (n - 1))), second**2 / (2 * fourth)
