"""Gradients and Gauss-Newton matrices by torch.func, from the model and the user's loss alone.

It knows nothing of hooks, layers or analytic loss Hessians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.functional import one_hot

from kronecker_probe.gradients.samples.base import (
    EmbeddingSamples,
    FactoredSamples,
    GradientSamples,
    MatrixSamples,
)

# float64 sums of a few hundred products each, in another order.
RELATIVE = 1e-10

Loss = Callable[[Tensor, Tensor], Tensor]
Parameters = dict[str, Tensor]


def parameters_of(model: nn.Module) -> Parameters:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _call(model: nn.Module, parameters: Parameters, x: Tensor) -> Tensor:
    return functional_call(model, (parameters, dict(model.named_buffers())), (x,))


def per_sample_gradients(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> Parameters:
    """Gradient of the loss of each datum alone, ``[N, *parameter]``."""

    def one(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return loss(_call(model, parameters, x[None]), y[None])

    batched = vmap(grad(one), in_dims=(None, 0, 0))
    return batched(parameters_of(model), inputs, targets)


def share_gradients(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, names: Sequence[str]
) -> Parameters:
    """Gradient of each datum's loss in the forward pass of the whole batch, ``[N, *parameter]``."""
    parameters = parameters_of(model)

    def losses(some: Parameters) -> Tensor:
        outputs = _call(model, parameters | some, inputs)
        return torch.stack([loss(z[None], y[None]) for z, y in zip(outputs, targets, strict=True)])

    return jacrev(losses)({name: parameters[name] for name in names})


def gauss_newton(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, names: Sequence[str]
) -> Parameters:
    """``1/N sum_i J_i^T H_i J_i`` of each named parameter, ``[mn, mn]``.

    ``J_i`` is the Jacobian of datum i's outputs in the forward pass of the whole batch, ``H_i``
    the Hessian of the loss of datum i alone in its outputs.
    """
    parameters = parameters_of(model)
    chosen = {name: parameters[name] for name in names}
    jacobians = jacrev(
        lambda some: _call(model, parameters | some, inputs).reshape(len(inputs), -1)
    )(chosen)
    outputs = model(inputs).detach()

    def loss_hessian(z: Tensor, y: Tensor) -> Tensor:
        flat = hessian(lambda v: loss(v.view(1, *z.shape), y[None]))
        return flat(z.reshape(-1))

    hessians = torch.stack([loss_hessian(z, y) for z, y in zip(outputs, targets, strict=True)])
    result = {}
    for name, jacobian in jacobians.items():
        J = jacobian.flatten(2)  # [N, outputs, mn]
        result[name] = torch.einsum("iap,iab,ibq->pq", J, hessians, J) / len(inputs)
    return result


def matrices(samples: GradientSamples) -> Tensor:
    """``G_ic``, [N, C, m, n], by definition, from whatever the samples hold."""
    if isinstance(samples, FactoredSamples):
        d, a = samples.output_grads.double(), samples.inputs.double()
        return torch.einsum("ictm,itn->icmn", d, a)
    if isinstance(samples, EmbeddingSamples):
        hot = one_hot(samples.tokens, samples.vocabulary).double()
        return torch.einsum("itv,ictd->icvd", hot, samples.output_grads.double())
    assert isinstance(samples, MatrixSamples)
    return samples.values.double()


def second_moment(samples: GradientSamples) -> Tensor:
    """``sum_i w_i sum_c vec(G_ic) vec(G_ic)^T``, by definition."""
    G = matrices(samples).flatten(2)
    return torch.einsum("i,icp,icq->pq", samples.weights, G, G)


def assert_close(got: Tensor, expected: Tensor, relative: float = RELATIVE) -> None:
    assert got.shape == expected.shape
    assert float(expected.norm()) > 0
    assert float((got - expected).norm()) <= relative * float(expected.norm())
