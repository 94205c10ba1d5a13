"""Samples of a table look-up: the same numbers as from one-hot inputs, by every route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, NonFiniteError
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.operators.second_moment.kernels.choose import cross_products, kernels_for
from tests import functional_oracle as oracle

# sums of a few hundred float64 products in another order
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(
    n_examples: int, columns: int, positions: int, width: int, vocabulary: int
) -> GradientSamples:
    """Random samples in which tokens repeat, with weights of which one is zero."""
    g = generator(n_examples + vocabulary)
    tokens = torch.randint(vocabulary, (n_examples, positions), generator=g)
    tokens[0] = vocabulary - 1
    d = torch.randn(n_examples, columns, positions, width, generator=g, dtype=torch.float64)
    weights = torch.linspace(0, 2, n_examples) if n_examples > 1 else None
    return GradientSamples.from_embedding(tokens, d, vocabulary, weights)


CASES = {
    "tokens repeat": drawn(6, 1, 5, 3, 4),
    "columns": drawn(5, 3, 4, 2, 6),
    "large vocabulary": drawn(7, 2, 3, 4, 40),
    "one token": drawn(6, 1, 1, 3, 5),
    "one datum": drawn(1, 1, 4, 3, 5),
    "vocabulary of one": drawn(4, 1, 3, 2, 1),
}

every_case = pytest.mark.parametrize("samples", CASES.values(), ids=CASES.keys())


def symmetric(size: int, seed: int) -> Tensor:
    a = torch.randn(size, size, generator=generator(seed), dtype=torch.float64)
    return a @ a.T


@every_case
def test_matrices_are_those_of_one_hot_inputs(samples: GradientSamples) -> None:
    torch.testing.assert_close(samples.matrices(), oracle.matrices(samples), **CLOSE)
    part = samples.matrices(1, 3)
    torch.testing.assert_close(part, oracle.matrices(samples)[1:3], **CLOSE)


@every_case
def test_sums_are_those_of_the_matrices(samples: GradientSamples) -> None:
    kernels, w, G = kernels_for(samples), samples.weights, oracle.matrices(samples)
    v, width = samples.shape
    U, V = symmetric(v, 1), symmetric(width, 2)
    skew_u, skew_v = (torch.triu(one, 1) - torch.triu(one, 1).T for one in (U, V))

    def moment(formula: str, *operands: Tensor) -> Tensor:
        return torch.einsum(formula, w, *operands)

    left, right = "i,icab,bd,iced->ae", "i,icab,ae,iced->bd"
    for matrix, sign in ((V, 1), (skew_v, -1)):
        expected = moment(left, G, matrix, G)
        torch.testing.assert_close(kernels.left_step(matrix, sign), expected, **CLOSE)
    for matrix, sign in ((U, 1), (skew_u, -1)):
        expected = moment(right, G, matrix, G)
        torch.testing.assert_close(kernels.right_step(matrix, sign), expected, **CLOSE)
    torch.testing.assert_close(kernels.left_step(None), moment("i,icab,iceb->ae", G, G), **CLOSE)
    torch.testing.assert_close(kernels.right_step(None), moment("i,icab,icad->bd", G, G), **CLOSE)
    for one in (U, None):
        for two in (V, None):
            image = (G if one is None else one @ G) if two is None else (
                (G if one is None else one @ G) @ two
            )  # fmt: skip
            expected = (image * G).sum(dim=(1, 2, 3))
            torch.testing.assert_close(kernels.quadratic_forms(one, two), expected, **CLOSE)
    x = torch.randn(2, v, width, generator=generator(3), dtype=torch.float64)
    expected = moment("i,icab,icde,kde->kab", G, G, x)
    torch.testing.assert_close(kernels.apply(x), expected, **CLOSE)


@every_case
def test_projected_diagonals(samples: GradientSamples) -> None:
    kernels, w, G = kernels_for(samples), samples.weights, oracle.matrices(samples)
    v, width = samples.shape
    left = torch.linalg.qr(symmetric(v, 4)).Q[:, : max(1, v - 1)]
    right = torch.linalg.qr(symmetric(width, 5)).Q
    for one in (left, None):
        for two in (right, None):
            rotated = G if one is None else one.T @ G
            rotated = rotated if two is None else rotated @ two
            expected = torch.einsum("i,icab->ab", w, rotated.square())
            torch.testing.assert_close(kernels.projected_diagonal(one, two), expected, **CLOSE)


@every_case
def test_pair_products(samples: GradientSamples) -> None:
    G = oracle.matrices(samples)
    expected = torch.einsum("icab,jdab->icjd", G, G).square().sum(dim=(1, 3))
    torch.testing.assert_close(kernels_for(samples).pair_products(), expected, **CLOSE)
    v, width = samples.shape
    other = drawn(3, 2, 6, width, v)
    expected = torch.einsum("icab,jdab->icjd", G, oracle.matrices(other)).square().sum(dim=(1, 3))
    torch.testing.assert_close(cross_products(samples, other), expected, **CLOSE)
    plain = GradientSamples.from_matrices(oracle.matrices(other), other.weights)
    torch.testing.assert_close(cross_products(samples, plain), expected, **CLOSE)


@pytest.mark.parametrize("route", ["parameter", "dense", "auto"])
@every_case
def test_second_moments_agree_with_those_of_the_matrices(
    samples: GradientSamples, route: str
) -> None:
    plain = GradientSamples.from_matrices(oracle.matrices(samples), samples.weights)
    H, K = kp.SecondMoment(samples, route=route), kp.SecondMoment(plain, route="dense")
    torch.testing.assert_close(H.to_dense(), K.to_dense(), **CLOSE)
    assert H.norm() == pytest.approx(K.norm(), rel=1e-10)
    for name in ("optimal", "shampoo", "shampoo-squared", "eigen-corrected", "diagonal"):
        one = kp.cosine_similarity(H, kp.approximate(H, name))
        two = kp.cosine_similarity(K, kp.approximate(K, name))
        assert one == pytest.approx(two, rel=1e-7), name


def test_float32_gradients_are_summed_in_float64() -> None:
    exact = CASES["columns"]
    tokens, d = exact.tensors
    low = GradientSamples.from_embedding(tokens, d.float(), exact.shape[0], exact.weights)
    rounded = GradientSamples.from_embedding(
        tokens, d.float().double(), exact.shape[0], exact.weights
    )
    got, expected = kernels_for(low).left_step(None), kernels_for(rounded).left_step(None)
    torch.testing.assert_close(got, expected, **CLOSE)


@every_case
def test_parts_of_samples(samples: GradientSamples) -> None:
    G = oracle.matrices(samples)
    v, width = samples.shape
    block = samples.block(slice(v // 2, v), slice(0, width - 1))
    assert torch.equal(oracle.matrices(block), G[:, :, v // 2 :, : width - 1])
    assert torch.equal(oracle.matrices(samples.subset([0])), G[:1])
    padded = samples.padded(samples.n_columns + 1, samples.tensors[0].shape[1] + 2)
    assert torch.equal(oracle.matrices(padded)[:, :-1], G)
    assert float(oracle.matrices(padded)[:, -1].abs().max()) == 0
    stacked = GradientSamples.stack([samples, padded])
    assert torch.equal(oracle.matrices(stacked)[: len(G), :-1], G)
    mixed = GradientSamples.stack([samples, GradientSamples.from_matrices(G, samples.weights)])
    torch.testing.assert_close(mixed.matrices(), torch.cat([G, G]), **CLOSE)
    assert samples.n_positions is None


TOKENS, D = torch.zeros(4, 2, dtype=torch.int64), torch.randn(4, 2, 3)


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (InvalidInputError, (TOKENS.numpy(), D, 5), "tokens is a ndarray"),
        (InvalidInputError, (TOKENS[0], D, 5), r"tokens \[2\].*give \[N, T\]"),
        (InvalidInputError, (TOKENS, D[:, :1], 5), r"\[4, 1, 3\]"),
        (InvalidInputError, (TOKENS.float(), D, 5), "float32; give int64"),
        (InvalidInputError, (TOKENS, D.long(), 5), "real floating point"),
        (InvalidInputError, (TOKENS + 5, D, 5), r"5\.\.5, and vocabulary=5.*0\.\.4"),
        (InvalidInputError, (TOKENS - 1, D, 5), r"-1\.\.-1"),
        (InvalidInputError, (TOKENS[:0], D[:0], 5), "empty"),
        (NonFiniteError, (TOKENS, D * float("nan"), 5), "24 NaN"),
        (InvalidInputError, (TOKENS, D, 5, torch.ones(3)), "4 examples need shape"),
    ],
)
def test_bad_arguments(error: type[Exception], arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(error, match=words):
        GradientSamples.from_embedding(*arguments)
