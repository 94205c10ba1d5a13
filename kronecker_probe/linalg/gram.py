"""Sample-space Gram matrices and weighted outer sums, accumulated in float64, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest temporary of one chunk, in float64 elements (32 MB).
CHUNK_ELEMENTS = 1 << 22


def chunk_rows(row_elements: int) -> int:
    """Rows of ``row_elements`` float64 numbers that fit one chunk; at least one."""
    return max(1, CHUNK_ELEMENTS // max(1, row_elements))


def gram(rows: Tensor) -> Tensor:
    """X X^T of ``rows`` [M, k], as float64 [M, M]; only half of the products are computed."""
    count, width = rows.shape
    out = torch.empty(count, count, dtype=torch.float64, device=rows.device)
    step = min(chunk_rows(width), chunk_rows(count), max(256, -(-count // 8)))
    blocks = [(i, min(i + step, count)) for i in range(0, count, step)]
    for i0, i1 in blocks:
        left = rows[i0:i1].double()
        for j0, j1 in blocks:
            if j0 < i0:
                continue
            right = left if j0 == i0 else rows[j0:j1].double()
            out[i0:i1, j0:j1] = left @ right.T
            if j0 > i0:
                out[j0:j1, i0:i1] = out[i0:i1, j0:j1].T
    return out


def squared_gram(rows: Tensor) -> Tensor:
    """K_ij = sum_cd <x_ic, x_jd>^2 of ``rows`` [N, C, k], as float64 [N, N].

    These are the inner products of the matrices S_i = sum_c x_ic x_ic^T, the entries
    (D D^T)^{o2} of the sample-space route when C = 1 (then :func:`gram` squared is cheaper).
    """
    count, columns, width = rows.shape
    packed = width * (width + 1) // 2
    if packed < columns**2 * width // 2 and count * packed <= CHUNK_ELEMENTS:
        return gram(_packed_outer(rows))
    out = torch.empty(count, count, dtype=torch.float64, device=rows.device)
    side = max(1, int(CHUNK_ELEMENTS**0.5) // columns)
    step = min(side, chunk_rows(columns * width), max(16, -(-count // 8)))
    blocks = [(i, min(i + step, count)) for i in range(0, count, step)]
    for i0, i1 in blocks:
        left = rows[i0:i1].double().flatten(0, 1)
        for j0, j1 in blocks:
            if j0 < i0:
                continue
            right = left if j0 == i0 else rows[j0:j1].double().flatten(0, 1)
            products = (left @ right.T).square_()
            folded = products.view(i1 - i0, columns, j1 - j0, columns).sum(dim=(1, 3))
            out[i0:i1, j0:j1] = folded
            if j0 > i0:
                out[j0:j1, i0:i1] = folded.T
    return out


def _packed_outer(rows: Tensor) -> Tensor:
    """sum_c x_ic x_ic^T as vectors [N, k (k + 1) / 2] with the same inner products."""
    x = rows.double()
    width = rows.shape[2]
    i, j = torch.triu_indices(width, width, device=rows.device)
    upper = (x.mT @ x).flatten(1).index_select(1, i * width + j)
    return upper.mul_(torch.where(i == j, 1.0, 2.0).double().sqrt())


def weighted_outer(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_i u_i sum_c x_ic x_ic^T of ``rows`` [N, C, k] and ``weights`` [N], float64 [k, k]."""
    count, columns, width = rows.shape
    out = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    step = chunk_rows(columns * width)
    for i0 in range(0, count, step):
        x = rows[i0 : i0 + step].double()
        weighted = x * weights[i0 : i0 + step, None, None]
        out.addmm_(x.flatten(0, 1).T, weighted.flatten(0, 1))
    return out


def quadratic_forms(rows: Tensor, matrix: Tensor) -> Tensor:
    """sum_c x_ic^T A x_ic of ``rows`` [N, C, k] and a float64 ``matrix`` [k, k], float64 [N]."""
    count, columns, width = rows.shape
    out = torch.empty(count, dtype=torch.float64, device=rows.device)
    step = chunk_rows(columns * width)
    for i0 in range(0, count, step):
        x = rows[i0 : i0 + step].double()
        out[i0 : i0 + step] = ((x @ matrix) * x).sum(dim=(1, 2))
    return out


def squared_norms(rows: Tensor) -> Tensor:
    """sum_c |x_ic|^2 of ``rows`` [N, C, k], float64 [N]."""
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float64)
    return norms.square_()
