"""Dense oracle of the further approximations, in numpy float64, each by its definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests import oracle
from tests.oracle import Array, Shape


def sequential(H: Array, shape: Shape) -> Array:
    """``L kron V`` with V the least-squares partner of ``L = E[G G^T]``."""
    left = oracle.left_factor(H, shape).reshape(-1)
    right = oracle.rearrange(H, shape).T @ left / (left @ left)
    m, n = shape
    return np.kron(left.reshape(m, m), right.reshape(n, n))


def left_only(H: Array, shape: Shape) -> Array:
    return np.kron(oracle.left_factor(H, shape), np.eye(shape[1])) / shape[1]


def right_only(H: Array, shape: Shape) -> Array:
    return np.kron(np.eye(shape[0]), oracle.right_factor(H, shape)) / shape[0]


def identity(H: Array, shape: Shape) -> Array:
    return np.eye(len(H)) * np.trace(H) / len(H)


def truncated(H: Array, shape: Shape, rank: int) -> Array:
    """The singular value decomposition of ``R(H)`` cut at ``rank``, put back."""
    m, n = shape
    u, s, vt = np.linalg.svd(oracle.rearrange(H, shape), full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return cut.reshape(m, m, n, n).transpose(0, 2, 1, 3).reshape(m * n, m * n)


def kfac_reduce(d: Array, a: Array, weights: Array) -> Array:
    """Means of d over positions, sums of a, one datum at a time."""
    d, a = oracle.as_blocks(d, a)
    left = np.zeros((d.shape[-1],) * 2)
    right = np.zeros((a.shape[-1],) * 2)
    for weight, grads, activations in zip(weights, d, a, strict=True):
        for column in grads:
            mean = column.mean(axis=0)
            left += weight * np.outer(mean, mean)
        total = activations.sum(axis=0)
        right += weight * np.outer(total, total)
    return np.kron(left, right / weights.sum())


def tkfac(d: Array, a: Array, weights: Array) -> Array:
    """delta Psi kron Phi, every position a draw of its own."""
    d, a = oracle.as_blocks(d, a)
    delta, psi, phi = 0.0, np.zeros((d.shape[-1],) * 2), np.zeros((a.shape[-1],) * 2)
    for weight, grads, activations in zip(weights, d, a, strict=True):
        for column in grads:
            for x, y in zip(column, activations, strict=True):
                delta += weight * (x @ x) * (y @ y)
                psi += weight * (y @ y) * np.outer(x, x)
                phi += weight * (x @ x) * np.outer(y, y)
    return np.kron(psi, phi) / delta


def ekfac(H: Array, d: Array, a: Array, weights: Array) -> Array:
    left, right = oracle.kfac_factors(d, a, weights)
    return oracle.best_diagonal_in(np.kron(oracle.eigenbasis(left), oracle.eigenbasis(right)), H)


def blocked(
    H: Array, shape: Shape, size: int, approximate: Callable[[Array, Shape], Array]
) -> Array:
    """Each block of the matrix approximated from its own principal sub-matrix of ``H``."""
    m, n = shape
    entry = np.arange(m * n).reshape(shape)
    out = np.zeros_like(H)
    for i in range(0, m, size):
        for k in range(0, n, size):
            block = entry[i : i + size, k : k + size]
            index = np.ix_(block.reshape(-1), block.reshape(-1))
            out[index] = approximate(H[index], block.shape)
    return out


def trace_power_divergence(H: Array, P: Array, q: float) -> float:
    """What P contributes to D_q(H, P), the Bregman divergence of Tr X^q / (q (q - 1))."""
    values, vectors = np.linalg.eigh(P)
    if q == 0:
        return float(np.log(values).sum() + np.trace(oracle.matrix_power(P, -1.0) @ H))
    if q == 1:
        logarithm = (vectors * np.log(values)) @ vectors.T
        return float(values.sum() - np.trace(logarithm @ H))
    power = (vectors * values ** (q - 1)) @ vectors.T
    return float((values**q).sum() / q - np.trace(power @ H) / (q - 1))


def alternate(H: Array, shape: Shape, q: float, rounds: int = 4000) -> Array:
    """The stationarity equations of D_q, one after the other, from the identity."""
    m, n = shape
    R = oracle.rearrange(H, shape)
    right = np.eye(n)
    for _ in range(rounds):
        left = (R @ oracle.matrix_power(right, q - 1).reshape(-1)).reshape(m, m)
        left /= trace_power(right, q)
        new = (R.T @ oracle.matrix_power(left, q - 1).reshape(-1)).reshape(n, n)
        new /= trace_power(left, q)
        new *= n / np.trace(new)
        if np.linalg.norm(new - right) <= 1e-13 * np.linalg.norm(new):
            break
        right = new
    right = (R.T @ oracle.matrix_power(left, q - 1).reshape(-1)).reshape(n, n)
    return np.kron(left, right) / trace_power(left, q)


def trace_power(A: Array, q: float) -> float:
    """``Tr A^q`` on the range, so the rank at q = 0."""
    values = np.linalg.eigvalsh(A)
    return float((values[values > 1e-12 * values.max()] ** q).sum())
