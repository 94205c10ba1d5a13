"""Gradient samples as the rows of X with H = X^T X, so that the rank of H is at most N C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias, final

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.operators.second_moment.kernels.choose import kernels_for

Transform: TypeAlias = Callable[[Tensor], Tensor]


@final
class SampleRows:
    """X [K, mn] with the K = N C rows sqrt(w_i) vec(G_ic), never held as a whole."""

    def __init__(self, samples: GradientSamples) -> None:
        self.samples = samples
        self.shape = samples.shape
        self.roots = samples.weights.sqrt()
        self._kernels = kernels_for(samples)

    @property
    def count(self) -> int:
        """K."""
        return self.samples.n_examples * self.samples.n_columns

    def coefficients(self, x: Tensor) -> Tensor:
        """X vec(x) of float64 ``x`` [b, m, n], as [b, K]."""
        return (self._kernels.coefficients(x) * self.roots[:, None]).flatten(1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """X^T c of float64 ``coefficients`` [b, K], as [b, m, n]."""
        c = coefficients.view(len(coefficients), -1, self.samples.n_columns)
        return self._kernels.combine(c * self.roots[:, None])

    def gram(self) -> Tensor:
        """X X^T, float64 [K, K]; its nonzero eigenvalues are those of H."""
        roots = self.roots.repeat_interleave(self.samples.n_columns)
        return self._kernels.gram().mul_(roots[:, None]).mul_(roots)

    def transformed(self, transform: Transform) -> Tensor:
        """The rows after a linear map of matrices [k, m, n], float64 [K, mn]; held as a whole."""

        def rows(g: Tensor) -> Tensor:
            return transform(g.flatten(0, 1)).view(*g.shape[:2], -1)

        out = self._kernels.over_matrices(rows)
        return out.mul_(self.roots[:, None, None]).flatten(0, 1)

    def gradients(self, count: int, seed: int) -> Iterator[Tensor]:
        """Some gradients sum_c s_c G_ic with random signs s_c, of examples drawn by weight, [m, n].

        For equal weights E[g g^T] = H / sum(w). Examples are drawn without replacement, so there
        are at most as many as examples of positive weight.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = self.samples.weights.cpu()
        k = min(count, int((weights > 0).sum()))
        if k == 0:
            return
        chosen = torch.multinomial(weights, k, replacement=False, generator=generator)
        signs = torch.randint(0, 2, (k, self.samples.n_columns), generator=generator)
        for i, sign in zip(chosen.tolist(), (2.0 * signs - 1.0).double(), strict=True):
            columns = self.samples.matrices(i, i + 1)[0]
            yield torch.einsum("c,cmn->mn", sign.to(columns.device), columns)
