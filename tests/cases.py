"""Data sets that exercise every shape, and their bridge to the package under test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

import kronecker_probe as kp
from tests import oracle
from tests.oracle import Array

APPROXIMATIONS = (
    "optimal",
    "shampoo",
    "shampoo-squared",
    "kfac",
    "eigen-corrected",
    "diagonal",
)
KRONECKER = ("optimal", "shampoo", "shampoo-squared", "kfac")


@dataclass(frozen=True)
class Case:
    """Arrays as handed to the package; either ``matrices`` or both factors are present."""

    name: str
    matrices: Array | None = None  # [N, m, n] or [N, C, m, n]
    output_grads: Array | None = None
    inputs: Array | None = None
    given_weights: Array | None = None
    dtype: torch.dtype = torch.float64

    @property
    def factored(self) -> bool:
        return self.output_grads is not None

    @property
    def shared(self) -> bool:
        """Several positions a datum, so that R(H) is not a sum of one rank-one term a datum."""
        return self.inputs is not None and self.inputs.ndim == 3 and self.inputs.shape[1] > 1

    @cached_property
    def G(self) -> Array:
        """Columns ``[N, C, m, n]``."""
        if self.matrices is not None:
            return self.matrices if self.matrices.ndim == 4 else self.matrices[:, None]
        assert self.output_grads is not None
        assert self.inputs is not None
        return oracle.columns(self.output_grads, self.inputs)

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.G.shape[-2:]
        return m, n

    @cached_property
    def weights(self) -> Array:
        n_examples = len(self.G)
        return (
            np.full(n_examples, 1 / n_examples)
            if self.given_weights is None
            else self.given_weights
        )

    @cached_property
    def H(self) -> Array:
        return oracle.second_moment(self.G, self.weights)

    @property
    def routes(self) -> tuple[str, ...]:
        common = ("auto", "parameter", "dense")
        return (*common, "sample") if self.factored and not self.shared else common

    @property
    def approximations(self) -> tuple[str, ...]:
        return tuple(name for name in APPROXIMATIONS if self.factored or name != "kfac")

    def dense(self, name: str) -> Array:
        """An approximation by the oracle, ``[mn, mn]``; computed once."""
        if name not in self._dense:
            self._dense[name] = self._compute(name)
        return self._dense[name]

    @cached_property
    def _dense(self) -> dict[str, Array]:
        return {}

    def _compute(self, name: str) -> Array:
        if name == "kfac":
            assert self.output_grads is not None
            assert self.inputs is not None
            return oracle.kfac(self.output_grads, self.inputs, self.weights)
        if name == "diagonal":
            return oracle.diagonal(self.H)
        by_name = {
            "optimal": oracle.optimal,
            "shampoo": oracle.shampoo,
            "shampoo-squared": oracle.shampoo_squared,
            "eigen-corrected": oracle.eigen_corrected,
        }
        return by_name[name](self.H, self.shape)

    def samples(self) -> kp.GradientSamples:
        weights = None if self.given_weights is None else torch.as_tensor(self.given_weights)
        if self.matrices is not None:
            return kp.GradientSamples.from_matrices(self._tensor(self.matrices), weights)
        return kp.GradientSamples.from_factors(
            self._tensor(self.output_grads), self._tensor(self.inputs), weights
        )

    def operator(self, route: str = "auto") -> kp.SecondMoment:
        return kp.SecondMoment(self.samples(), route=route)

    def cast(self, dtype: torch.dtype) -> Case:
        """The same data rounded to ``dtype``; the oracle gets the rounded values in float64."""
        return replace(
            self,
            dtype=dtype,
            **{
                field: self._rounded(getattr(self, field), dtype)
                for field in ("matrices", "output_grads", "inputs")
            },
        )

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def _tensor(self, array: Array | None) -> torch.Tensor:
        assert array is not None
        return torch.tensor(array, dtype=self.dtype)

    @staticmethod
    def _rounded(array: Array | None, dtype: torch.dtype) -> Array | None:
        return None if array is None else torch.tensor(array).to(dtype).double().numpy()

    def __str__(self) -> str:
        return self.name


def matrices_case(
    name: str,
    n_examples: int,
    m: int,
    n: int,
    columns: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    rng = np.random.default_rng(seed)
    blocks = () if columns is None else (columns,)
    return Case(name, matrices=rng.standard_normal((n_examples, *blocks, m, n)), **options)


def factors_case(
    name: str,
    n_examples: int,
    m: int,
    n: int,
    columns: int | None = None,
    positions: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random factors; ``positions=None`` hands over ``[N, m]`` and ``[N, n]``."""
    rng = np.random.default_rng(seed)
    middle = () if positions is None else (positions,)
    blocks = () if columns is None else (columns,)
    # a shared part makes H far from white, as gradients are, and its eigenvalues distinct
    d = rng.standard_normal((n_examples, *blocks, *middle, m)) * np.linspace(2, 0.5, m)
    a = rng.standard_normal((n_examples, *middle, n)) + np.linspace(0.2, 1.0, n)
    return Case(name, output_grads=d, inputs=a, **options)


def rank_deficient(
    n_examples: int, m: int, n: int, rank: int, positions: int | None = None
) -> Case:
    """Output gradients and inputs in proper subspaces, so that L, R and H are singular."""
    full = factors_case("", n_examples, m, n, positions=positions, seed=5)
    rng = np.random.default_rng(6)
    assert full.output_grads is not None
    assert full.inputs is not None
    return Case(
        f"rank-deficient-T{positions or 1}",
        output_grads=full.output_grads[..., :rank]
        @ np.linalg.qr(rng.standard_normal((m, rank)))[0].T,
        inputs=full.inputs[..., :rank] @ np.linalg.qr(rng.standard_normal((n, rank)))[0].T,
    )


def with_zero_rows(case: Case) -> Case:
    """Output 0 never receives a gradient, input 1 is always off, and datum 2 is all zero."""
    if case.matrices is not None:
        G = case.matrices.copy()
        G[:, 0, :], G[:, :, 1], G[2] = 0, 0, 0
        return case.with_(matrices=G)
    assert case.output_grads is not None
    assert case.inputs is not None
    d, a = case.output_grads.copy(), case.inputs.copy()
    d[..., 0], a[..., 1], d[2] = 0, 0, 0
    return case.with_(output_grads=d, inputs=a)


def _weights(n_examples: int, zeros: bool = False) -> Array:
    weights = np.linspace(0.1, 1.7, n_examples)
    if zeros:
        weights[::3] = 0
    return weights


CASES = (
    matrices_case("matrices", 7, 4, 3),
    matrices_case("matrices-weighted", 6, 3, 5, given_weights=_weights(6)),
    matrices_case("matrices-one-datum", 1, 3, 4),
    matrices_case("matrices-N-gt-mn", 30, 3, 2),
    matrices_case("matrices-C3", 5, 4, 3, columns=3, given_weights=_weights(5)),
    matrices_case("matrices-m1", 6, 1, 4),
    matrices_case("matrices-n1", 6, 4, 1),
    matrices_case("matrices-zero-weights", 9, 3, 4, given_weights=_weights(9, zeros=True)),
    with_zero_rows(matrices_case("matrices-zero-rows", 8, 4, 3)),
    factors_case("T1", 6, 4, 3),
    factors_case("T1-explicit", 6, 4, 3, positions=1),
    factors_case("T1-weighted", 6, 4, 3, given_weights=_weights(6)),
    factors_case("T1-N-lt-m", 3, 6, 5),
    factors_case("T1-N-gt-mn", 40, 2, 3),
    factors_case("T1-one-datum", 1, 4, 3),
    factors_case("T1-m1", 6, 1, 4),
    factors_case("T1-n1", 6, 4, 1),
    factors_case("T1-m1-n1", 5, 1, 1),
    factors_case("T1-zero-weights", 9, 4, 3, given_weights=_weights(9, zeros=True)),
    with_zero_rows(factors_case("T1-zero-rows", 8, 4, 3)),
    rank_deficient(9, 6, 5, 2),
    factors_case("T1-many-data", 300, 3, 4),
    factors_case("T1-wide", 40, 4, 24),
    factors_case("T1-tall", 60, 12, 2),
    factors_case("T1-larger", 40, 12, 9),
    factors_case("T3", 5, 4, 3, positions=3),
    factors_case("T5-larger", 20, 12, 9, positions=5),
    factors_case("T2-many-data", 300, 3, 4, positions=2),
    factors_case("T3-weighted", 5, 3, 4, positions=3, given_weights=_weights(5)),
    factors_case("T3-N-gt-mn", 15, 2, 3, positions=3),
    factors_case("T2-m1", 5, 1, 4, positions=2),
    factors_case("T2-n1", 5, 4, 1, positions=2),
    with_zero_rows(factors_case("T3-zero-rows", 6, 4, 3, positions=3)),
    rank_deficient(4, 6, 5, 2, positions=3),
    factors_case("C3-T1", 5, 4, 3, columns=3, positions=1),
    factors_case("C3-T1-weighted", 5, 4, 3, columns=3, positions=1, given_weights=_weights(5)),
    factors_case("C3-T2", 5, 4, 3, columns=3, positions=2),
    factors_case(
        "C2-T3-zero-weights",
        7,
        3,
        4,
        columns=2,
        positions=3,
        given_weights=_weights(7, zeros=True),
    ),
)


def dense(operator: Any) -> Array:
    """``to_dense()`` of anything, as numpy."""
    return as_numpy(operator.to_dense())


def as_numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def assert_close(actual: Any, expected: Any, rel: float, scale: float | None = None) -> None:
    """``|actual - expected| <= rel * scale`` in the Frobenius norm; scale is ``|expected|``."""
    left, right = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert left.shape == right.shape
    size = float(np.linalg.norm(right)) if scale is None else scale
    difference = float(np.linalg.norm(left - right))
    assert difference <= rel * size, f"|difference| {difference:.3e} > {rel:.1e} * {size:.3e}"
