"""Curvature-vector products of a whole model or of chosen parameters, by torch.func."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.gradients.batch_checks import check_batch, check_outputs, not_finite
from kronecker_probe.gradients.losses import LossFunction, ResolvedLoss, resolve_loss
from kronecker_probe.gradients.selection import select
from kronecker_probe.gradients.targets import CAPTURE_TARGETS, check_target, output_gradients
from kronecker_probe.gradients.tracing.isolation import isolated

KINDS = (*CAPTURE_TARGETS, "hessian")

Tensors = dict[str, Tensor]
OutputMap = Callable[[Tensor], Tensor]


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

    def __init__(self, kind: str, loss: float, products: _Products, selected: Tensors) -> None:
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

    With f_i a datum's outputs, J_i their Jacobian in the parameters, and l_i the datum's share of
    the batch loss (times N for a mean, times 1 for a sum), all but the last are the mean over
    data of J_i^T M_i J_i:

    - "ggn": M_i the Hessian of l_i in f_i (Schraudolph, Neural Computation 14, 2002), whether or
      not l_i is convex;
    - "fisher": M_i = c c^T, c the output gradient for a label drawn from the model, a mean over
      ``label_draws``; the same labels as ``kp.capture`` draws with this seed;
    - "empirical-fisher": M_i = c c^T for the given label;
    - "hessian": the Hessian of the mean of l_i in the parameters.

    The diagonal block of a parameter is the second moment that ``kp.capture`` samples; blocks off
    the diagonal couple layers, which no sampled operator holds. Each product takes a forward, a
    forward-mode and a backward pass (Pearlmutter, Neural Computation 6, 1994); where an operation
    has no forward mode, two backward passes. Evaluation mode, as in ``kp.capture``; parameters,
    buffers and batch are those at the time of this call.

    Args:
        model: Any module.
        loss_fn: ``loss_fn(outputs, targets)``, a mean or a sum over data.
        batch: (inputs, targets), data in the first dimension of both.
        kind: See above.
        layers: Glob, or several, of parameter names.
        label_draws: Sampled labels a datum, for "fisher".
        seed: Of the sampled labels.

    Returns:
        A scipy LinearOperator, float64 [P, P] on the CPU, whatever the model's dtype and device.

    Raises:
        InvalidInputError: The batch is empty or malformed, or no parameter is selected.
        NonFiniteError: NaN or infinity in parameters, outputs, loss or a product.
        UnsupportedError: The loss is none of the supported ones, or the model cannot be
            differentiated this way.
        UnknownNameError: Unknown ``kind``, or a glob that matches nothing.
    """
    check_target(kind, label_draws, "kind", KINDS)
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
    inputs, targets = check_batch(batch)
    chosen, skipped = select(model, layers)
    if not chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:10])
        raise InvalidInputError(f"No parameter can be differentiated. {reasons}.")
    if broken := not_finite(dict(model.named_parameters())):
        raise NonFiniteError(broken)
    with isolated(model):
        state = _state(model)
        inputs, targets = inputs.detach().clone(), targets.detach().clone()
        outputs = check_outputs(model(inputs.clone()), len(targets))
        if not bool(torch.isfinite(outputs).all()):
            raise NonFiniteError("The model's outputs on this batch hold NaN or infinite values.")
        loss = resolve_loss(loss_fn, outputs, targets)
        selected = {name: state[name] for name in chosen}
        forward = _Forward(model, state, inputs)
        products: _Products
        if kind == "hessian":
            products = _HessianProducts(forward, selected, loss, targets)
        else:
            seen = outputs.detach()
            through = _output_map(kind, loss, seen, targets, label_draws, seed)
            products = _GaussNewtonProducts(forward, selected, through)
    return CurvatureOperator(kind, loss.value, products, selected)


def _state(model: nn.Module) -> Tensors:
    """Copies of all parameters and buffers, tied ones once."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def _output_map(
    kind: str, loss: ResolvedLoss, outputs: Tensor, targets: Tensor, label_draws: int, seed: int
) -> OutputMap:
    """u_i -> M_i u_i / N for all data."""
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


class _Forward:
    """The model's outputs as a function of some of its parameters, in the state it was in."""

    def __init__(self, model: nn.Module, state: Tensors, inputs: Tensor) -> None:
        self.model = model
        self.state = state
        self.inputs = inputs

    def __call__(self, parameters: Tensors) -> Tensor:
        # Copies: a model may write into its buffers, its inputs or (max_norm) its parameters.
        state = {name: tensor.clone() for name, tensor in {**self.state, **parameters}.items()}
        outputs: Tensor = functional_call(self.model, state, (self.inputs.clone(),))
        return outputs

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """The model isolated, without fused kernels that can be differentiated only once."""
        fast = torch.backends.mha.get_fastpath_enabled()
        recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        with ExitStack() as stack:
            stack.enter_context(isolated(self.model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:
                stack.enter_context(_without_mkldnn())
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
            yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    with warnings.catch_warnings():  # of a precision that is left as it is
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


class _Products(abc.ABC):
    """Products with a curvature matrix, one direction after another."""

    def __init__(self, forward: _Forward, selected: Tensors) -> None:
        self.forward = forward
        self.selected = selected
        self._way: Callable[[list[Tensors]], list[Tensors]] | None = None

    def of(self, directions: Iterable[Tensors]) -> list[Tensors]:
        """The products, of the directions' names and shapes, in the parameters' dtypes.

        Raises:
            NonFiniteError: A product holds NaN or infinite values.
            UnsupportedError: The model cannot be differentiated twice.
        """
        cast = [
            {name: part.to(self.selected[name]) for name, part in direction.items()}
            for direction in directions
        ]
        with self.forward.differentiable():
            found = self._differentiated(cast)
        for name in self.selected:
            if not all(bool(torch.isfinite(part[name]).all()) for part in found):
                raise NonFiniteError(
                    f"A product at {name!r} holds NaN or infinite values; check the range of "
                    f"{self.selected[name].dtype}, or make the vector smaller."
                )
        return found

    def _differentiated(self, directions: list[Tensors]) -> list[Tensors]:
        if self._way is None:
            self._way = self._choose()
        return self._way(directions)

    def _choose(self) -> Callable[[list[Tensors]], list[Tensors]]:
        """The first way that works and gives a symmetric matrix.

        Forward mode does not where a backward pass is not that of its forward: the padding row of
        an embedding, straight-through estimators. Gradients are those of the backward pass.
        """
        try:
            if self._is_symmetric(self._by_func):
                return self._by_func
        except (RuntimeError, TypeError):  # an operation without forward mode, or torch.func
            pass
        name = type(self.forward.model).__name__
        try:
            symmetric = self._is_symmetric(self._by_autograd)
        except RuntimeError as error:
            raise UnsupportedError(
                f"{name} has no curvature products: an operation has neither a forward mode nor a "
                f"second backward pass ({error}); kp.capture needs neither."
            ) from error
        if not symmetric:
            raise UnsupportedError(
                f"Products of {name} are not symmetric: an operation's second derivative is not "
                "that of its first, as with torch's fused weight_norm; kind='ggn' needs none."
            )
        return self._by_autograd

    def _is_symmetric(self, way: Callable[[list[Tensors]], list[Tensors]]) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)
        one, other = (
            {name: _random_like(p, generator) for name, p in self.selected.items()} for _ in "12"
        )
        by_one, by_other = way([one, other])
        here, there = _inner(other, by_one), _inner(one, by_other)
        size = (_inner(by_one, by_one) * _inner(other, other)).sqrt()
        eps = max(torch.finfo(p.dtype).eps for p in self.selected.values())
        return bool((here - there).abs() <= 1e3 * eps * size) or not bool(torch.isfinite(size))

    @abc.abstractmethod
    def _by_func(self, directions: list[Tensors]) -> list[Tensors]:
        """By forward over reverse mode."""

    @abc.abstractmethod
    def _by_autograd(self, directions: list[Tensors]) -> list[Tensors]:
        """By two reverse passes."""

    def _leaves(self) -> Tensors:
        return {name: p.clone().requires_grad_(True) for name, p in self.selected.items()}


@final
class _GaussNewtonProducts(_Products):
    """v -> J^T M J v."""

    def __init__(self, forward: _Forward, selected: Tensors, through: OutputMap) -> None:
        super().__init__(forward, selected)
        self.through = through

    def _by_func(self, directions: list[Tensors]) -> list[Tensors]:
        outputs, pull = vjp(self.forward, self.selected)[:2]
        found = []
        for direction in directions:
            pushed = jvp(self.forward, (self.selected,), (direction,))[1]
            found.append(pull(self.through(pushed).to(outputs.dtype))[0])
        return found

    def _by_autograd(self, directions: list[Tensors]) -> list[Tensors]:
        leaves = self._leaves()
        outputs = self.forward(leaves)
        cotangent = torch.zeros_like(outputs).requires_grad_(True)
        # J^T w is linear in w, and its derivative in w along v is J v.
        pulled = _gradients(outputs, leaves, cotangent, create_graph=True)
        found = []
        for direction in directions:
            along = _inner(pulled, direction)
            pushed = _gradients(along, {"w": cotangent})["w"]
            found.append(_gradients(outputs, leaves, self.through(pushed).to(outputs.dtype)))
        return found


@final
class _HessianProducts(_Products):
    """v -> the derivative along v of the gradient of the mean share."""

    def __init__(
        self, forward: _Forward, selected: Tensors, loss: ResolvedLoss, targets: Tensor
    ) -> None:
        super().__init__(forward, selected)
        self.loss = loss
        self.targets = targets

    def _mean_share(self, parameters: Tensors) -> Tensor:
        total = self.loss.evaluator.value(self.forward(parameters), self.targets)
        return total * (self.loss.factor / len(self.targets))

    def _by_func(self, directions: list[Tensors]) -> list[Tensors]:
        gradient = grad(self._mean_share)
        return [jvp(gradient, (self.selected,), (direction,))[1] for direction in directions]

    def _by_autograd(self, directions: list[Tensors]) -> list[Tensors]:
        leaves = self._leaves()
        first = _gradients(self._mean_share(leaves), leaves, create_graph=True)
        return [_gradients(_inner(first, direction), leaves) for direction in directions]


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(tensor.shape, generator=generator, device="cpu", dtype=torch.float64)
    return drawn.to(tensor)


def _inner(one: Tensors, other: Tensors) -> Tensor:
    products = [(part.double() * other[name].double()).sum() for name, part in one.items()]
    return torch.stack(products).sum()


def _gradients(
    value: Tensor, leaves: Tensors, cotangent: Tensor | None = None, create_graph: bool = False
) -> Tensors:
    """Gradients of <value, cotangent>; zero where it does not depend on a leaf."""
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        value, list(leaves.values()), cotangent, retain_graph=True, create_graph=create_graph,
        allow_unused=True,
    )  # fmt: skip
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
