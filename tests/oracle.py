"""Dense oracle, in numpy float64: everything by its definition, nothing clever, nothing shared.

It forms ``H = sum_i w_i sum_c vec(G_ic) vec(G_ic)^T`` with row-major ``vec``, rearranges it, and
builds each approximation as an ``[mn, mn]`` matrix. It imports neither torch nor the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Shape = tuple[int, int]


def as_blocks(output_grads: Array, inputs: Array) -> tuple[Array, Array]:
    """Factors of any accepted rank as ``[N, C, T, m]`` and ``[N, T, n]``."""
    if output_grads.ndim == 2:
        return output_grads[:, None, None, :], inputs[:, None, :]
    if output_grads.ndim == 3:
        return output_grads[:, None, :, :], inputs
    return output_grads, inputs


def columns(output_grads: Array, inputs: Array) -> Array:
    """``G_ic = sum_t d_ict a_it^T``, as ``[N, C, m, n]``, one outer product at a time."""
    d, a = as_blocks(output_grads, inputs)
    n_examples, n_columns, n_positions, m = d.shape
    G = np.zeros((n_examples, n_columns, m, a.shape[-1]))
    for i in range(n_examples):
        for c in range(n_columns):
            for t in range(n_positions):
                G[i, c] += np.outer(d[i, c, t], a[i, t])
    return G


def second_moment(G: Array, weights: Array) -> Array:
    """``H`` from columns ``[N, C, m, n]`` and weights ``[N]``."""
    m, n = G.shape[-2:]
    H = np.zeros((m * n, m * n))
    for weight, block in zip(weights, G, strict=True):
        for matrix in block:
            g = matrix.reshape(-1)
            H += weight * np.outer(g, g)
    return H


def rearrange(H: Array, shape: Shape) -> Array:
    """``R(H)[(i, k), (j, l)] = H[(i, j), (k, l)]``, so that ``R(A kron C) = vec(A) vec(C)^T``."""
    m, n = shape
    return H.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n)


def kronecker_spectrum(H: Array, shape: Shape) -> Array:
    return np.linalg.svd(rearrange(H, shape), compute_uv=False)


def left_factor(H: Array, shape: Shape) -> Array:
    """``E[G G^T]`` as the partial trace of ``H`` over the inputs."""
    m, n = shape
    return np.trace(H.reshape(m, n, m, n), axis1=1, axis2=3)


def right_factor(H: Array, shape: Shape) -> Array:
    """``E[G^T G]`` as the partial trace of ``H`` over the outputs."""
    m, n = shape
    return np.trace(H.reshape(m, n, m, n), axis1=0, axis2=2)


def matrix_power(A: Array, power: float) -> Array:
    """``A^p`` of a PSD matrix by ``eigh``; the null space stays null, whatever the sign of p."""
    values, vectors = np.linalg.eigh((A + A.T) / 2)
    cutoff = len(values) * np.finfo(np.float64).eps * max(values.max(), 0.0)
    kept = values > cutoff
    powers = np.zeros_like(values)
    powers[kept] = values[kept] ** power
    return (vectors * powers) @ vectors.T


@dataclass(frozen=True)
class LeadingTriple:
    sigma: float
    left: Array
    right: Array

    def dense(self) -> Array:
        return self.sigma * np.kron(self.left, self.right)


def leading_triple(H: Array, shape: Shape) -> LeadingTriple:
    """Leading singular triple of ``R(H)`` as matrices, with the sign that makes them PSD."""
    m, n = shape
    u, s, vt = np.linalg.svd(rearrange(H, shape))
    left, right = u[:, 0].reshape(m, m), vt[0].reshape(n, n)
    sign = 1.0 if np.trace(left) >= 0 else -1.0
    return LeadingTriple(float(s[0]), sign * left, sign * right)


def optimal(H: Array, shape: Shape) -> Array:
    return leading_triple(H, shape).dense()


def shampoo(H: Array, shape: Shape) -> Array:
    return np.kron(
        matrix_power(left_factor(H, shape), 0.5), matrix_power(right_factor(H, shape), 0.5)
    )


def shampoo_squared(H: Array, shape: Shape) -> Array:
    left, right = left_factor(H, shape), right_factor(H, shape)
    return np.kron(left, right) / np.trace(left)


def kfac_factors(output_grads: Array, inputs: Array, weights: Array) -> tuple[Array, Array]:
    """``sum w d d^T`` and the mean of ``a a^T`` over data (by weight) and positions (evenly)."""
    d, a = as_blocks(output_grads, inputs)
    left = np.zeros((d.shape[-1],) * 2)
    right = np.zeros((a.shape[-1],) * 2)
    for weight, grads, activations in zip(weights, d, a, strict=True):
        for vector in grads.reshape(-1, d.shape[-1]):
            left += weight * np.outer(vector, vector)
        for vector in activations:
            right += weight * np.outer(vector, vector)
    return left, right / (a.shape[1] * weights.sum())


def kfac(output_grads: Array, inputs: Array, weights: Array) -> Array:
    return np.kron(*kfac_factors(output_grads, inputs, weights))


def eigenbasis(A: Array) -> Array:
    """Eigenvectors in columns, eigenvalues descending."""
    return np.linalg.eigh(A)[1][:, ::-1]


def best_diagonal_in(Q: Array, H: Array) -> Array:
    """``Q diag(Q^T H Q) Q^T``: the nearest matrix to ``H`` that ``Q`` diagonalizes."""
    return (Q * np.diag(Q.T @ H @ Q)) @ Q.T


def eigen_corrected(H: Array, shape: Shape) -> Array:
    Q = np.kron(eigenbasis(left_factor(H, shape)), eigenbasis(right_factor(H, shape)))
    return best_diagonal_in(Q, H)


def diagonal(H: Array) -> Array:
    return np.diag(np.diag(H))


def inner(P: Array, Q: Array) -> float:
    return float(np.sum(P * Q))


def norm(P: Array) -> float:
    return float(np.sqrt(np.sum(P * P)))


def cosine(H: Array, P: Array) -> float:
    return inner(H / norm(H), P / norm(P))


def relative_error(H: Array, P: Array) -> float:
    return norm(H - P) / norm(H)


def best_scale(H: Array, P: Array) -> float:
    return inner(H, P) / inner(P, P)


def best_scale_error(H: Array, P: Array) -> float:
    """Relative error of ``c P`` at the best ``c``, measured and not by a formula."""
    return relative_error(H, best_scale(H, P) * P)


def alternating_least_squares(H: Array, shape: Shape, rounds: int) -> list[tuple[Array, Array]]:
    """Sequential sweeps ``U <- R(H) V``, ``V <- R(H)^T U`` from ``V = I``; one pair a round."""
    m, n = shape
    R = rearrange(H, shape)
    v = np.eye(n).reshape(-1)
    pairs = []
    for _ in range(rounds):
        u = R @ v
        u = u / np.linalg.norm(u)
        v = R.T @ u
        v = v / np.linalg.norm(v)
        pairs.append((u.reshape(m, m), v.reshape(n, n)))
    return pairs


def apply(P: Array, X: Array) -> Array:
    """``P vec(X)`` reshaped, for ``X [..., m, n]``."""
    return (X.reshape(-1, P.shape[0]) @ P.T).reshape(X.shape)


def swap_sides(P: Array, shape: Shape) -> Array:
    """The same operator on transposed matrices: ``(i, j) -> (j, i)`` on both sides."""
    m, n = shape
    return P.reshape(m, n, m, n).transpose(1, 0, 3, 2).reshape(m * n, m * n)
