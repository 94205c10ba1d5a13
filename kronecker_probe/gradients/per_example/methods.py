"""Two ways to per-sample gradients: vmap over examples, and one example after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from kronecker_probe.gradients.layers.base import matrix_shape
from kronecker_probe.gradients.tracing.isolation import isolated

# Bytes of gradients that are computed at once, before they are stored.
CHUNK_BYTES = 128 << 20


class CoupledError(Exception):
    """An example alone gives other outputs than in the batch."""


@dataclass(frozen=True)
class Problem:
    """One model, one batch, and the cotangents of all columns.

    Attributes:
        model: In evaluation mode.
        inputs: [N, ...].
        outputs: Of the whole batch, [N, ...], detached.
        cotangents: [N, C, ...], in the dtype of the outputs.
        parameters: Name to each parameter to differentiate.
        stand_ins: Name to the leaf that is differentiated in place of the parameter.
        expected: Name to the gradient of <outputs, mixed cotangents> of the whole batch.
        mixture: [N, C], the weights of that mixture.
    """

    model: nn.Module
    inputs: Tensor
    outputs: Tensor
    cotangents: Tensor
    parameters: dict[str, Tensor]
    stand_ins: dict[str, Tensor]
    expected: dict[str, Tensor]
    mixture: Tensor

    def part(self, names: Iterable[str]) -> Problem:
        """The same of some of the parameters."""
        chosen = {name: self.parameters[name] for name in names}
        return replace(self, parameters=chosen)

    @property
    def n_examples(self) -> int:
        return self.cotangents.shape[0]

    @property
    def n_columns(self) -> int:
        return self.cotangents.shape[1]

    @cached_property
    def eps(self) -> float:
        """Of the coarsest arithmetic that takes part."""
        found = [self.outputs.dtype, *(p.dtype for p in self.model.parameters())]
        device = self.outputs.device.type
        if torch.is_autocast_enabled(device):
            found.append(torch.get_autocast_dtype(device))
        eps = [torch.finfo(dtype).eps for dtype in found if dtype.is_floating_point]
        if device == "cuda" and (
            torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        ):
            eps.append(2.0**-10)  # TensorFloat-32 keeps ten bits
        return float(max(eps))

    @property
    def tolerance(self) -> float:
        """How far two results of the same sums may lie apart, relative to the whole."""
        return float(self.eps ** (2 / 3))

    @cached_property
    def norms(self) -> Tensor:
        """Of each example's outputs, [N]."""
        outputs = self.outputs.double().reshape(self.n_examples, -1)
        norms: Tensor = torch.linalg.vector_norm(outputs, dim=1)
        return norms

    @cached_property
    def noise(self) -> float:
        """What rounding leaves of a gradient that is zero.

        A key's bias has none, because a softmax does not see a shift.
        """
        mixed = mix(self.cotangents, self.mixture).double()
        return float(64 * self.eps * torch.linalg.vector_norm(mixed) * (1 + self.norms.max()))

    def run_one(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Outputs [1, ...] of one example [1, ...], with ``values`` in place of the parameters."""
        outputs = run(self.model, values, x)
        # A model that squeezes its outputs drops the batch dimension, too.
        return outputs.reshape(1, *self.outputs.shape[1:])

    def chunks(self) -> tuple[int, int]:
        """Examples and columns treated at once.

        No more rows than the batch has, so that activations take no more than in training, and
        no more than CHUNK_BYTES of gradients.
        """
        matrix = sum(value.nbytes for value in self.parameters.values())
        fit = max(1, CHUNK_BYTES // max(matrix, 1))
        columns = min(self.n_columns, self.n_examples, fit)
        return max(1, min(self.n_examples, fit) // columns), columns


def run(model: nn.Module, values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The model with other tensors in place of its parameters; the inputs are not written."""
    inputs = inputs.clone()
    outputs: Tensor = functional_call(model, dict(values), (inputs,)) if values else model(inputs)
    return outputs


def mix(cotangents: Tensor, mixture: Tensor) -> Tensor:
    """One cotangent of the whole batch, [N, ...]: each example's columns with random weights."""
    weights = mixture.to(cotangents.dtype)
    return (cotangents * weights.view(*weights.shape, *[1] * (cotangents.ndim - 2))).sum(1)


def by_vmap(problem: Problem) -> dict[str, Tensor]:
    """G, [N, C, m, n], through one vjp per chunk of examples.

    Raises:
        CoupledError: An example alone gives other outputs than in the batch.
        Exception: Of any kind, where an operation has no rule.
    """
    size, columns = problem.chunks()
    parameters = {name: p.detach() for name, p in problem.parameters.items()}

    def one(x: Tensor, cotangents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, pull_back, *_ = vjp(lambda values: problem.run_one(values, x), parameters)
        return outputs, vmap(pull_back, chunk_size=columns)(cotangents)[0]

    result = _allocate(problem)
    # Each example draws random numbers of its own, as it does within the batch.
    batched = vmap(one, in_dims=(0, 0), randomness="different")
    with isolated(problem.model), torch.no_grad():
        for start in range(0, problem.n_examples, size):
            part = slice(start, start + size)
            # Batches of one example, [k, 1, ...], because models count on a batch dimension.
            outputs, gradients = batched(
                problem.inputs[part, None], problem.cotangents[part, :, None]
            )
            _check_outputs(problem, part, outputs[:, 0])
            for name, gradient in gradients.items():
                result[name][part] = gradient.reshape(result[name][part].shape)
    return result


def by_loop(problem: Problem) -> dict[str, Tensor]:
    """G, [N, C, m, n], through a forward pass per example, whatever its operations.

    The parameters themselves are differentiated, where they have no hooks: a weight that was
    computed from them and kept, or a reference outside of the module, is differentiated, too.

    Raises:
        CoupledError: An example alone gives other outputs than in the batch.
        Exception: Of any kind, where the model does not run on one example.
    """
    leaves = {**problem.parameters, **problem.stand_ins}
    leaves = {name: leaves[name] for name in problem.parameters}
    _, size = problem.chunks()
    result = _allocate(problem)
    for i in range(problem.n_examples):
        one = slice(i, i + 1)
        outputs = problem.run_one(problem.stand_ins, problem.inputs[one])
        _check_outputs(problem, one, outputs.detach())
        for start in range(0, problem.n_columns, size):
            cotangents = problem.cotangents[i, start : start + size, None]
            for name, gradient in _pull_back(outputs, cotangents, leaves).items():
                block = result[name][i, start : start + size]
                block.copy_(gradient.reshape(block.shape))
    return result


def _pull_back(
    outputs: Tensor, cotangents: Tensor, leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients [k, *parameter] of k cotangents; zero for parameters without use here."""
    if not outputs.requires_grad:
        return {name: leaf.new_zeros(len(cotangents), *leaf.shape) for name, leaf in leaves.items()}

    def pull(cotangent: Tensor, batched: bool) -> list[Tensor]:
        rows = [len(cotangents)] if batched else []
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), cotangent,
            retain_graph=True, allow_unused=True, is_grads_batched=batched,
        )  # fmt: skip
        return [
            leaf.new_zeros(*rows, *leaf.shape) if gradient is None else gradient.to_dense()
            for leaf, gradient in zip(leaves.values(), gradients, strict=True)
        ]

    try:
        found = pull(cotangents, True)
    except RuntimeError:  # a backward without a rule for vmap
        columns = [pull(cotangent, False) for cotangent in cotangents]
        found = [torch.stack(gradients) for gradients in zip(*columns, strict=True)]
    return dict(zip(leaves, found, strict=True))


def _allocate(problem: Problem) -> dict[str, Tensor]:
    shape = problem.n_examples, problem.n_columns
    return {
        name: value.new_empty(*shape, *matrix_shape(value))
        for name, value in problem.parameters.items()
    }


def _check_outputs(problem: Problem, part: slice, outputs: Tensor) -> None:
    expected = problem.outputs[part]
    if outputs.shape != expected.shape:
        raise CoupledError
    scale = problem.norms[part].clamp_min(problem.norms.square().mean().sqrt())
    difference = (outputs.double() - expected.double()).reshape(len(expected), -1)
    if not bool((torch.linalg.vector_norm(difference, dim=1) <= problem.tolerance * scale).all()):
        raise CoupledError
