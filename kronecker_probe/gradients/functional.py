"""Curvature-vector products of a whole model or of chosen parameters, by torch.func."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, NonFiniteError
from kronecker_probe.gradients.batch_checks import check_batch, check_outputs, not_finite
from kronecker_probe.gradients.capture import check_model
from kronecker_probe.gradients.curvature_products import (
    Forward,
    GaussNewtonProducts,
    HessianProducts,
    OutputMap,
    Products,
    Tensors,
)
from kronecker_probe.gradients.losses import LossFunction, ResolvedLoss, resolve_loss
from kronecker_probe.gradients.selection import select
from kronecker_probe.gradients.targets import CAPTURE_TARGETS, check_target, output_gradients
from kronecker_probe.gradients.tracing.isolation import isolated

KINDS = (*CAPTURE_TARGETS, "hessian")


@final
class CurvatureOperator(LinearOperator):
    """A symmetric curvature matrix over selected parameters, applied without being formed.

    Built by :func:`curvature_operator`. Vectors are float64 of length P, the parameters one after
    another, each flattened row by row.

    Attributes:
        kind: "ggn", "fisher", "empirical-fisher" or "hessian".
        loss: The loss of the batch.
        shapes: Parameter name to its shape, in the order of the vectors.
        slices: Parameter name to its place in the vectors.
    """

    def __init__(self, kind: str, loss: float, products: Products, selected: Tensors) -> None:
        self.kind = kind
        self.loss = loss
        self.shapes = {name: tuple(p.shape) for name, p in selected.items()}
        ends = np.cumsum([p.numel() for p in selected.values()]).tolist()
        starts = [0, *ends[:-1]]
        self.slices = {
            name: slice(start, end) for name, start, end in zip(selected, starts, ends, strict=True)
        }
        self._products = products
        super().__init__(np.float64, (ends[-1], ends[-1]))  # type: ignore[call-arg]

    @property
    def names(self) -> tuple[str, ...]:
        """The selected parameters, in the order of the vectors."""
        return tuple(self.shapes)

    def _matmat(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        """Column by column, on one forward pass."""
        columns = np.asarray(vectors, dtype=np.float64)
        if not np.isfinite(columns).all():
            raise NonFiniteError("The vectors hold NaN or infinite values.")
        split = (
            {
                name: torch.from_numpy(np.ascontiguousarray(column[place])).view(self.shapes[name])
                for name, place in self.slices.items()
            }
            for column in columns.T
        )
        found = [
            torch.cat([part[name].reshape(-1).double().cpu() for name in self.shapes]).numpy()
            for part in self._products.of(split)
        ]
        return np.stack(found, axis=1) if found else np.zeros((self.shape[0], 0))

    def _matvec(self, vector: NDArray[Any]) -> NDArray[np.float64]:
        return self._matmat(vector.reshape(-1, 1))

    def _adjoint(self) -> CurvatureOperator:
        return self


def curvature_operator(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Tensor, Tensor],
    kind: str = "ggn",
    layers: str | Sequence[str] = "*",
    label_draws: int = 1,
    seed: int = 0,
) -> CurvatureOperator:
    """The curvature matrix of the selected parameters together, as matrix-vector products.

    With f_i the outputs of example i, J_i their Jacobian in the parameters, and l_i its share of
    the batch loss (times N for a mean, times 1 for a sum), all but the last are the mean of
    J_i^T M_i J_i over examples:

    - "ggn": M_i the Hessian of l_i in f_i (Schraudolph, Neural Computation 14, 2002), whether or
      not l_i is convex;
    - "fisher": M_i = c c^T, c the output gradient for a label sampled from the model, a mean over
      ``label_draws``; the same labels as in ``kp.capture`` with this seed;
    - "empirical-fisher": M_i = c c^T for the given label;
    - "hessian": the Hessian of the mean of l_i in the parameters.

    The diagonal block of a parameter is the second moment that ``kp.capture`` samples; blocks off
    the diagonal couple layers. Each product takes a forward, a forward-mode and a backward pass
    (Pearlmutter, Neural Computation 6, 1994); where an operation has no forward mode, two backward
    passes. Evaluation mode, and parameters, buffers and batch as they are at this call.

    Args:
        model: Any module.
        loss_fn: ``loss_fn(outputs, targets)``, a mean or a sum over examples.
        batch: (inputs, targets), examples in the first dimension of both.
        kind: One of the four above.
        layers: Glob, or several, of parameter names.
        label_draws: Sampled labels per example, for "fisher".
        seed: Of the sampled labels.

    Returns:
        A scipy LinearOperator, float64 [P, P] on the CPU, whatever the model's dtype and device.

    Raises:
        InvalidInputError: The batch is empty or malformed, or no parameter is selected.
        NonFiniteError: NaN or infinity in parameters, outputs, loss or a product.
        UnsupportedError: The loss, or an operation of the model, cannot be differentiated so.
        UnknownNameError: Unknown ``kind``, or a glob that matches nothing.
    """
    check_target(kind, label_draws, "kind", KINDS)
    check_model(model, loss_fn)
    inputs, targets = check_batch(batch)
    chosen, skipped = select(model, layers)
    if not chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:10])
        raise InvalidInputError(f"No parameter can be differentiated. {reasons}.")
    if broken := not_finite(dict(model.named_parameters())):
        raise NonFiniteError(broken)
    return _operator(model, loss_fn, (inputs, targets), list(chosen), kind, label_draws, seed)


def _operator(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Tensor, Tensor],
    chosen: Sequence[str],
    kind: str,
    label_draws: int,
    seed: int,
) -> CurvatureOperator:
    with isolated(model):
        named = (*model.named_parameters(), *model.named_buffers())
        state = {name: tensor.detach().clone() for name, tensor in named}
        inputs, targets = (part.detach().clone() for part in batch)
        outputs = check_outputs(model(inputs.clone()), len(targets))
        if not bool(torch.isfinite(outputs).all()):
            raise NonFiniteError("The model's outputs on this batch hold NaN or infinite values.")
        loss = resolve_loss(loss_fn, outputs, targets)
        selected = {name: state[name] for name in chosen}
        forward = Forward(model, state, inputs)
        products: Products
        if kind == "hessian":
            products = HessianProducts(forward, selected, loss, targets)
        else:
            seen = outputs.detach()
            through = _output_map(kind, loss, seen, targets, label_draws, seed)
            products = GaussNewtonProducts(forward, selected, through)
    return CurvatureOperator(kind, loss.value, products, selected)


def _output_map(
    kind: str, loss: ResolvedLoss, outputs: Tensor, targets: Tensor, label_draws: int, seed: int
) -> OutputMap:
    """u_i -> M_i u_i / N for all examples."""
    n_examples = len(outputs)
    if kind == "ggn":
        return lambda u: loss.hessian_product(outputs, u) / n_examples
    drawn = output_gradients(kind, loss, outputs, targets, label_draws, seed)
    columns = torch.stack(
        [column.reshape(n_examples, -1) for column in drawn], dim=1
    )  # [N, K, ...]

    def outer(u: Tensor) -> Tensor:
        along = columns @ u.reshape(n_examples, -1, 1).to(columns.dtype)
        return (columns.mT @ along).view(outputs.shape) / (n_examples * columns.shape[1])

    return outer
