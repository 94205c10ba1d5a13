"""``kp.capture``: the gradient samples of a model on a batch, or on a loader of batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from kronecker_probe.gradients.batch_checks import Pair, several_pairs
from kronecker_probe.gradients.capture import Request, capture_batch, check_model
from kronecker_probe.gradients.coverage import Capture
from kronecker_probe.gradients.loader import capture_loader
from kronecker_probe.gradients.losses import LossFunction


def capture(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Pair | Iterable[Pair],
    target: str = "ggn",
    layers: str | Sequence[str] = "*",
    seed: int = 0,
    label_draws: int = 1,
    bias: str = "separate",
    fallback: bool = True,
) -> Capture:
    """Gradient samples whose second moment is each layer's curvature matrix.

    Model, random generators, ``.grad``, training mode, buffers, hooks and the contents of lists,
    dicts and sets among the attributes are left as they were; the samples share no memory with it.
    Hooks of the model run with it, also in a second, small forward pass that checks on batches of
    more than 16 examples that these do not mix (``tracing.batch_dimension`` says how); not where
    the model writes into tensors of its own. Dropout and batch normalization run in evaluation
    mode.

    Linear maps, convolutions, embeddings, attention's projections, normalizations over one
    dimension, biases, and tables that are added to every example are measured from their inputs and
    output gradients, wherever the model calls the function that they end in (F.linear and so on),
    however often, and with whatever weights it shares; so are modules with a rule of the user's own
    (``kp.register_layer_rule``). A matrix takes its parameter's layout, shape[0] x the rest: out x
    (in k k) for a convolution, V x D for an embedding, m x 1 for a bias or a normalization.

    Args:
        model: Any module.
        loss_fn: ``loss_fn(outputs, targets)``, a mean or a sum over examples. It is recognized by
            its values and gradient, so a lambda will do.
        data: (inputs, targets), examples in the first dimension of both; or an iterable of such
            pairs (a DataLoader), see ``kp.capture_loader``.
        target: "ggn" (exact Gauss-Newton: columns of the loss-Hessian root pulled back),
            "fisher" (labels sampled from the model) or "empirical-fisher" (the given labels).
        layers: Glob, or several, of parameter names.
        seed: Of the sampled labels.
        label_draws: K sampled labels per example, for "fisher".
        bias: "separate", or "joint" for one m x (n + 1) matrix [W b] where a module has both and
            both are selected, named "<module>.weight+bias".
        fallback: Whether parameters that are used in any other way are measured by per-example
            gradients, one matrix per example and column; else they are skipped.

    Returns:
        Parameter name to samples. Output gradients are those of l_i, example i's share of the
        batch loss times N (mean) or 1 (sum); ggn columns weigh 1/N, K sampled labels 1/(N K).

    Raises:
        InvalidInputError: A malformed batch, an option out of range, a wrong layer rule, or no
            parameter can be measured.
        NonFiniteError: NaN or infinity in parameters, loss, outputs, activations or gradients.
        UnsupportedError: The loss is none of the supported ones.
        UnknownNameError: Unknown ``target`` or ``bias``, or a glob that matches nothing.
        MemoryBudgetError: The samples would not fit; the message says the GB.
    """
    request = Request(target, layers, seed, label_draws, bias, fallback)
    check_model(model, loss_fn)
    if several_pairs(data):
        return capture_loader(model, loss_fn, data, **vars(request))
    return capture_batch(model, loss_fn, data, request)
