"""Anderson acceleration of a fixed-point iteration."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

# Growth of the residual at which the history misleads and is dropped.
GROWTH = 2.0


@final
class Anderson:
    """Combines the last images of x -> f(x) so that their residuals f(x) - x cancel.

    Anderson (1965), in the form of Walker and Ni (2011), equation 2.1: type II without mixing.
    It needs a few times fewer images than plain iteration where that converges linearly, and
    falls back to it where the residual grows.

    Args:
        depth: Earlier images that are combined with the newest.
    """

    def __init__(self, depth: int = 6) -> None:
        self._depth = depth
        self._images: list[Tensor] = []
        self._residuals: list[Tensor] = []

    def forget(self) -> None:
        """Drop the history: the next step is a plain one."""
        self._images, self._residuals = [], []

    def step(self, x: Tensor, image: Tensor) -> Tensor:
        """The next iterate, of the shape of ``x``, from f(x) = ``image``."""
        residual = (image - x).reshape(-1)
        if self._residuals:
            before = torch.linalg.vector_norm(self._residuals[-1])
            if bool(torch.linalg.vector_norm(residual) > GROWTH * before):
                self.forget()
        self._images = [*self._images[-self._depth :], image.reshape(-1)]
        self._residuals = [*self._residuals[-self._depth :], residual]
        if len(self._images) == 1:
            return image
        changes = torch.stack(self._residuals).diff(dim=0)
        # columns of very different sizes, the newest smallest: scale them before solving
        sizes = torch.linalg.vector_norm(changes, dim=1, keepdim=True)
        sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
        weights = torch.linalg.lstsq((changes / sizes).T, residual[:, None]).solution
        steps = torch.stack(self._images).diff(dim=0) / sizes
        accelerated: Tensor = image.reshape(-1) - steps.T @ weights[:, 0]
        finite = bool(torch.isfinite(accelerated).all())
        return accelerated.view(image.shape) if finite else image
