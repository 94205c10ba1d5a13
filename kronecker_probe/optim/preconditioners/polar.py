"""The polar factor of the averaged gradient: Muon, Shampoo without memory."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.linalg.polar import newton_schulz, polar
from kronecker_probe.operators.structures.kronecker import KroneckerOperator
from kronecker_probe.optim.options.kinds import PolarOptions
from kronecker_probe.optim.preconditioners.base import Preconditioner, State


@final
class Polar(Preconditioner[PolarOptions]):
    """U V^T of M = U S V^T, exact ("eigh") or by five Newton-Schulz steps ("matmul").

    Where the exact one is not found, Newton-Schulz takes its place.

    It equals (M M^T)^{-1/4} M (M^T M)^{-1/4}: Shampoo whose factors hold M alone. With
    ``nesterov``, M is beta1 M + (1 - beta1) G once more.
    """

    def initial(self, like: Tensor) -> State:
        return self.with_momentum({}, like)

    def update(self, state: State, gradients: Tensor, step: int) -> None:
        pass

    def filtered(self, state: State, gradients: Tensor, step: int) -> Tensor:
        if "momentum" not in state:
            return gradients
        if not self.options.nesterov:
            return state["momentum"]
        return torch.lerp(state["momentum"], gradients, 1 - self.beta1)

    def direction(self, state: State, gradients: Tensor, step: int) -> Tensor:
        self.average(state, gradients)
        filtered = self.filtered(state, gradients, step)
        if self.options.exact:
            found = polar(filtered)
            if bool(found.isfinite().all()):
                return found
        return newton_schulz(filtered).to(gradients.dtype)

    def operator(self, state: State, block: int, step: int) -> KroneckerOperator:
        if "momentum" not in state:
            raise UnsupportedError(
                "a polar factor without momentum holds nothing between steps, so there is no "
                "preconditioner to measure; use betas[0] > 0"
            )
        u, s, vt = torch.linalg.svd(state["momentum"][block].double(), full_matrices=False)
        if not float(s[0]) > 0:
            raise UnsupportedError("the average of the gradients is zero")
        return KroneckerOperator((u * s) @ u.mT, (vt.mT * s) @ vt)
