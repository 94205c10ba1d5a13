"""A batch loss as a sum of shares, one per example: Hessians, their roots, and sampled labels."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from kronecker_probe.errors import UnsupportedError
from kronecker_probe.gradients.losses.evaluation import Evaluator, at_least_float32, derivative
from kronecker_probe.linalg.memory import require_memory


@dataclass(frozen=True)
class ResolvedLoss(abc.ABC):
    """The loss of one batch, example by example, as a function of the model's outputs.

    l_i is example i's additive share of the batch loss, times N for a mean and times 1 for a sum.
    What a loss normalizes by the batch (class weights, labels that are not ignored) stays as it
    is in this batch, and a weight that depends on the label is that of the given label: Hessians
    are those of the loss at hand, and sampled labels have them as covariance.

    Attributes:
        kind: "cross-entropy", "mse", "binary-cross-entropy" or "custom".
        reduction: "mean" or "sum": how the loss combines examples.
        value: The loss of the whole batch, as loss_fn returned it.
        evaluator: Calls loss_fn.
        factor: N for a mean, 1 for a sum.
    """

    kind: str
    reduction: str
    value: float
    evaluator: Evaluator
    factor: int

    def true_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of l_i in the outputs at the given labels: autograd of the loss itself.

        Returns:
            A tensor of the outputs' shape, at least float32.
        """
        return self.factor * self.evaluator.gradient(outputs, targets)

    def n_columns(self, outputs: Tensor) -> int:
        """Columns of the loss-Hessian root of one example: its number of outputs.

        Ignored positions have zero columns, so that all batches have as many.
        """
        return outputs[0].numel()

    @abc.abstractmethod
    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """Columns s of S with S S^T = the Hessian of l_i in the outputs, all examples at once.

        Yields:
            Tensors of the outputs' shape, at least float32.

        Raises:
            UnsupportedError: The Hessian is not positive semidefinite, or zero everywhere.
        """

    @abc.abstractmethod
    def hessian_product(self, outputs: Tensor, direction: Tensor) -> Tensor:
        """The Hessian of each l_i in its outputs, times that example's part of ``direction``."""

    @abc.abstractmethod
    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Output gradient for labels drawn from the model, with covariance the Hessian of l_i.

        Returns:
            A tensor of the outputs' shape, at least float32.

        Raises:
            UnsupportedError: The loss has no model of its labels.
        """

    def accuracy(self, outputs: Tensor, targets: Tensor) -> float | None:
        """Share of correct labels among those that count; None where labels are no classes."""
        return None


@final
@dataclass(frozen=True)
class SoftmaxLoss(ResolvedLoss):
    """Cross-entropies, one per position: l_i = sum_t s_it (-q_it . log softmax(f_it)).

    q sums to one: a class, a distribution over classes, or either of them smoothed. Class weights
    and the mean over what is not ignored are part of s (0 where ignored), so that whatever the
    labels, the Hessian is s_it (diag p - p p^T).

    Attributes:
        class_dim: The dimension of the outputs that holds the classes.
        scales: s, of the outputs' shape with 1 at ``class_dim``.
    """

    class_dim: int
    scales: Tensor

    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """sqrt(s p_k) (e_k - p) for each position t and class k."""
        p = self._probabilities(outputs)
        flat = p.reshape(p.shape[0], -1, p.shape[-1])
        roots = (self._positions() * flat).sqrt()
        for t in range(flat.shape[1]):
            for k in range(flat.shape[2]):
                column = torch.zeros_like(flat)
                column[:, t] = -roots[:, t, k, None] * flat[:, t]
                column[:, t, k] += roots[:, t, k]
                yield column.view(p.shape).movedim(-1, self.class_dim)

    def hessian_product(self, outputs: Tensor, direction: Tensor) -> Tensor:
        p = at_least_float32(outputs).softmax(self.class_dim)
        product = p * direction
        return self.scales * (product - p * product.sum(self.class_dim, keepdim=True))

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """sqrt(s) (p - e_k), a class k drawn from softmax at every position."""
        p = self._probabilities(outputs)
        labels = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
        onehot = torch.zeros_like(p).view(-1, p.shape[-1]).scatter_(1, labels, 1.0).view(p.shape)
        return self.scales.sqrt() * (p - onehot).movedim(-1, self.class_dim)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> float | None:
        counted = self.scales.squeeze(self.class_dim) > 0
        if targets.dtype.is_floating_point or targets.shape != counted.shape:
            return None
        correct = outputs.argmax(dim=self.class_dim) == targets
        return float(correct[counted].double().mean())

    def _probabilities(self, outputs: Tensor) -> Tensor:
        return at_least_float32(outputs).movedim(self.class_dim, -1).softmax(dim=-1)

    def _positions(self) -> Tensor:
        """s as [N, T, 1]."""
        return self.scales.movedim(self.class_dim, -1).reshape(self.scales.shape[0], -1, 1)


@final
@dataclass(frozen=True)
class ElementwiseLoss(ResolvedLoss):
    """Squares or binary cross-entropies, one an output: dl_i / df_ij = s_ij (phi(f_ij) - y_ij).

    phi is the identity for "mse" and the sigmoid for "binary-cross-entropy". Weights (``weight``
    and ``pos_weight`` alike) are part of s, so that the Hessian is diag(s phi').

    Attributes:
        scales: s, of the outputs' shape.
    """

    scales: Tensor

    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """sqrt(s phi') e_j for each output j."""
        roots = self._curvature(at_least_float32(outputs)).sqrt().reshape(len(outputs), -1)
        for j in range(roots.shape[1]):
            column = torch.zeros_like(roots)
            column[:, j] = roots[:, j]
            yield column.view(outputs.shape)

    def hessian_product(self, outputs: Tensor, direction: Tensor) -> Tensor:
        return self._curvature(at_least_float32(outputs)) * direction

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """sqrt(s) times normal noise, or times sigmoid(f) - y with y drawn as 1 by sigmoid(f)."""
        flat = at_least_float32(outputs)
        if self.kind == "mse":
            noise = torch.randn(
                flat.shape, dtype=flat.dtype, device=flat.device, generator=generator
            )
            return self.scales.sqrt() * noise
        p = flat.sigmoid()
        return self.scales.sqrt() * (p - torch.bernoulli(p, generator=generator))

    def accuracy(self, outputs: Tensor, targets: Tensor) -> float | None:
        if self.kind == "mse" or targets.shape != outputs.shape:
            return None
        if not bool(((targets == 0) | (targets == 1)).all()):
            return None
        counted = self.scales > 0
        return float(((outputs > 0) == (targets > 0))[counted].double().mean())

    def _curvature(self, flat: Tensor) -> Tensor:
        if self.kind == "mse":
            return self.scales
        return self.scales * flat.sigmoid() * (-flat).sigmoid()


@final
@dataclass(frozen=True)
class CustomLoss(ResolvedLoss):
    """Any other mean or sum over examples, by its own derivatives.

    Attributes:
        targets: Of the batch.
    """

    targets: Tensor

    def root_columns(self, outputs: Tensor) -> Iterator[Tensor]:
        """sqrt(lambda) v of each example's output Hessian, largest lambda first."""
        hessians = self._hessians(outputs)
        values, vectors = torch.linalg.eigh((hessians + hessians.mT) / 2)
        self._check_eigenvalues(values, outputs)
        columns = vectors * values.clamp(min=0).sqrt()[:, None]
        for k in range(columns.shape[2] - 1, -1, -1):
            yield columns[:, :, k].reshape(outputs.shape).to(at_least_float32(outputs).dtype)

    def hessian_product(self, outputs: Tensor, direction: Tensor) -> Tensor:
        leaf, gradient = self._twice(outputs)
        return self.factor * self._product(leaf, gradient, direction)

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        raise UnsupportedError(
            "'fisher' draws labels from the model, and loss_fn is none of cross-entropy, MSE "
            "and binary cross-entropy on logits, so that it says nothing of how labels are drawn; "
            "use 'ggn' or 'empirical-fisher' (or move what scales the logits, such as a "
            "temperature, into the model)."
        )

    def _hessians(self, outputs: Tensor) -> Tensor:
        """The Hessian of each l_i, float64 [N, K, K]."""
        n_examples, size = outputs.shape[0], outputs[0].numel()
        require_memory(
            4 * 8 * n_examples * size**2,  # the Hessians, their eigenvectors, and scratch
            f"The Hessian of loss_fn in {size} outputs of each of {n_examples} examples "
            "('empirical-fisher' takes none)",
            outputs.device,
        )
        leaf, gradient = self._twice(outputs)
        rows = outputs.new_empty((n_examples, size, size), dtype=torch.float64)
        for k in range(size):
            direction = torch.zeros_like(leaf).reshape(n_examples, size)
            direction[:, k] = self.factor
            product = self._product(leaf, gradient, direction.view(leaf.shape))
            rows[:, k] = product.reshape(n_examples, size)
        return rows

    def _twice(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs as a leaf, and the loss's gradient in them with its own graph."""
        leaf = at_least_float32(outputs).requires_grad_(True)
        with torch.enable_grad():
            value = self.evaluator.value(leaf, self.targets)
            return leaf, derivative(value, leaf, create_graph=True)

    @staticmethod
    def _product(leaf: Tensor, gradient: Tensor, direction: Tensor) -> Tensor:
        if not gradient.requires_grad:  # linear pieces
            return torch.zeros_like(leaf)
        try:
            found = torch.autograd.grad(
                gradient, leaf, direction, retain_graph=True, allow_unused=True
            )[0]
        except RuntimeError as error:
            raise UnsupportedError(
                f"loss_fn has no second derivative in the outputs ({error}); use "
                "'empirical-fisher', or write it in differentiable operations."
            ) from error
        return torch.zeros_like(leaf) if found is None else found

    def _check_eigenvalues(self, values: Tensor, outputs: Tensor) -> None:
        """``values`` ascend for each example."""
        if not bool(torch.isfinite(values).all()):
            raise UnsupportedError(
                "The Hessian of loss_fn in the outputs is not finite at the model's outputs; use "
                "'empirical-fisher'."
            )
        largest, smallest = float(values.abs().max()), float(values.min())
        if largest == 0:
            raise UnsupportedError(
                f"The Hessian of loss_fn in outputs {list(outputs.shape)} is zero: the loss is "
                "linear there, and so is its Gauss-Newton matrix 0; use 'empirical-fisher'. (For "
                "NLLLoss on log-probabilities, cross_entropy is the same loss, and has one.)"
            )
        # gradients reach the outputs in their own precision, whatever that of the loss
        given = replace(self.evaluator, dtype=at_least_float32(outputs).dtype)
        tolerance = max(self.evaluator.tolerance, given.tolerance)
        if smallest < -tolerance * largest * outputs[0].numel() ** 0.5:
            example = int(values[:, 0].argmin())
            raise UnsupportedError(
                f"loss_fn is not convex in the outputs: at example {example} its Hessian has the "
                f"eigenvalue {smallest:.3g} (the largest of the batch is {largest:.3g}), so that "
                "the Gauss-Newton matrix is not positive semidefinite; use 'empirical-fisher'."
            )
