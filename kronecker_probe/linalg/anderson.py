"""Anderson acceleration of a fixed-point iteration."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

# Plain steps after a failure, doubled by each further one.
LONGEST_WAIT = 16


@final
class Anderson:
    """Combines the last images of x -> f(x) so that their residuals f(x) - x cancel.

    Anderson (1965), in the form of Walker and Ni (2011), equation 2.1: type II without mixing.
    It needs a few times fewer images than plain iteration where that converges linearly. Where a
    combination has a larger residual than the best point so far, the iteration goes back to that
    point, takes plain steps, and more of them every time.

    Args:
        depth: Earlier images that are combined with the newest.
    """

    def __init__(self, depth: int = 6) -> None:
        self._depth = depth
        self._images: list[Tensor] = []
        self._residuals: list[Tensor] = []
        self._best: tuple[float, Tensor] | None = None
        self._wait, self._plain = 1, 0

    def forget(self) -> None:
        """Drop the history: the next steps are plain ones."""
        self._images, self._residuals, self._best = [], [], None
        self._plain = self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def step(self, x: Tensor, image: Tensor) -> Tensor:
        """The next iterate, of the shape of ``x``, from f(x) = ``image``."""
        residual = (image - x).reshape(-1)
        size = float(torch.linalg.vector_norm(residual))
        if self._plain > 0:
            self._plain -= 1
            return image
        if self._best is not None and not size < self._best[0]:
            back = self._best[1]
            self.forget()
            return back
        self._best = size, image
        self._images = [*self._images[-self._depth :], image.reshape(-1)]
        self._residuals = [*self._residuals[-self._depth :], residual]
        if len(self._images) == 1:
            return image
        changes = torch.stack(self._residuals).diff(dim=0)
        # changes of very different sizes, the newest smallest: scale them before solving
        sizes = torch.linalg.vector_norm(changes, dim=1, keepdim=True)
        sizes = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
        weights = torch.linalg.lstsq((changes / sizes).T, residual[:, None]).solution
        steps = torch.stack(self._images).diff(dim=0) / sizes
        accelerated: Tensor = image.reshape(-1) - steps.T @ weights[:, 0]
        finite = bool(torch.isfinite(accelerated).all())
        return accelerated.view(image.shape) if finite else image
