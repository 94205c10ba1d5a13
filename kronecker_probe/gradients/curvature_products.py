"""Products of a curvature matrix with vectors, by forward over reverse mode or by two reverses."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronecker_probe.errors import NonFiniteError, UnsupportedError
from kronecker_probe.gradients.losses import ResolvedLoss
from kronecker_probe.gradients.tracing.isolation import isolated

Tensors = dict[str, Tensor]
OutputMap = Callable[[Tensor], Tensor]


class Forward:
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


class Products(abc.ABC):
    """Products with a curvature matrix, one direction after another."""

    def __init__(self, forward: Forward, selected: Tensors) -> None:
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
class GaussNewtonProducts(Products):
    """v -> J^T M J v."""

    def __init__(self, forward: Forward, selected: Tensors, through: OutputMap) -> None:
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
class HessianProducts(Products):
    """v -> the derivative along v of the gradient of the mean share."""

    def __init__(
        self, forward: Forward, selected: Tensors, loss: ResolvedLoss, targets: Tensor
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
