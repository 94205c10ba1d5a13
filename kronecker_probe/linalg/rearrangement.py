"""The rearranged matrix R(H) of a matrix on m x n matrices, and sums over one-hot rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rearrange(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """R(H), [m^2, n^2], of H [mn, mn]: R(A kron C) = vec(A) vec(C)^T (Van Loan, Pitsianis)."""
    m, n = shape
    return matrix.view(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)


def restore(rearranged: Tensor, shape: tuple[int, int]) -> Tensor:
    """H [mn, mn] from R(H) [m^2, n^2]; the inverse of :func:`rearrange`."""
    m, n = shape
    return rearranged.view(m, m, n, n).permute(0, 2, 1, 3).reshape(m * n, m * n)


def project_rearranged(rearranged: Tensor, left_basis: Tensor, right_basis: Tensor) -> Tensor:
    """diag((Q_L kron Q_R)^T H (Q_L kron Q_R)), [r, s], from R(H) [m^2, n^2]."""
    m, n = left_basis.shape[0], right_basis.shape[0]
    # column i of a Khatri-Rao square is vec(q_i q_i^T)
    left = (left_basis[:, None] * left_basis[None]).reshape(m * m, -1)
    right = (right_basis[:, None] * right_basis[None]).reshape(n * n, -1)
    return left.T @ (rearranged @ right)


def one_hot_products(tokens: Tensor, d: Tensor, vocabulary: int) -> Tensor:
    """sum_t e_k(t) d_t^T of tokens [..., T] and ``d`` [..., T, D], as [prod(...), V, D]."""
    count, width = tokens.shape[:-1].numel(), d.shape[-1]
    first = torch.arange(count, device=d.device)[:, None] * vocabulary
    rows = tokens.reshape(count, tokens.shape[-1]) + first
    g = d.new_zeros(count * vocabulary, width)
    return g.index_add_(0, rows.flatten(), d.reshape(-1, width)).view(count, vocabulary, width)
