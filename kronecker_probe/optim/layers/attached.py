"""The side of an optimizer that knows the model: hooks for statistics of layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.layers.recorder import LayerRecorder
from kronecker_probe.optim.layers.samples import LayerSamples
from kronecker_probe.optim.options.groups import Group


class ModelOptimizer(Optimizer):
    """An optimizer that finds its parameters by name, and can be attached to its model.

    The latter is for groups with statistics.rule="kfac".
    """

    # not of a copy, whose model is another one
    _recorder: LayerRecorder | None = None

    def _name(self, param: Tensor) -> str:
        """A parameter in messages."""
        for index, group in enumerate(self.param_groups):
            for position, other in enumerate(group["params"]):
                if other is param:
                    if "param_names" in group:
                        return f"parameter {group['param_names'][position]!r}"
                    shape = list(param.shape)
                    return f"parameter {position} of group {index}, of shape {shape}"
        raise AssertionError("a parameter of this optimizer")

    def _group_of(self, param: Tensor) -> int:
        for number, group in enumerate(self.param_groups):
            if any(param is one for one in group["params"]):
                return number
        raise InvalidInputError(
            f"A tensor of shape {list(param.shape)} is not a parameter of this optimizer. Pass one "
            "of those that it was built with."
        )

    def attach(self, model: nn.Module, scaler: torch.amp.GradScaler | None = None) -> None:
        """Record, from now on, what layers of ``model`` read and the gradients of their outputs.

        What counts are forward passes that a backward pass to the gradient of now followed, since
        the last step or since it was zeroed. The N examples of several backward passes (gradient
        accumulation) are one batch, of whose mean (or sum) the gradient is; so losses that are
        means are divided by the number of passes, as ever. Calls in one backward pass add up
        example by example, as shared positions. The first dimension of a layer's input is that of
        the examples. Inputs and output gradients are held until the step.

        Reads of a weight are recorded in all modules of the model, also by functions such as
        F.linear, and accounted for by the graph of what the model returns: a step refuses a
        parameter that is also read by an operation whose gradient has no factors. Penalties on
        weights in the loss are no part of the statistics. Pass the ``scaler`` of
        scaled losses: without it statistics are off by the square of the scale.

        Copies of an optimizer, by deepcopy or pickle, are attached to no model until this is
        called. Hooks that were there before are removed.

        Args:
            model: With a layer for each parameter of a group with statistics.rule="kfac".
            scaler: What scales the losses of all backward passes.

        Raises:
            InvalidInputError: Such a parameter is of no layer of the model, or there is none.
        """
        params = [
            (param, group)
            for group in self.param_groups
            if group["statistics"].rule == "kfac"
            for param in group["params"]
        ]
        if not params:
            raise InvalidInputError(
                "No parameter group has statistics={'rule': 'kfac'}, so that nothing would be "
                "recorded; attach optimizers that do, such as KFAC."
            )
        for param, group in params:
            longest, limit = longest_side(param), group["shapes"].max_dim
            if longest > limit:
                raise InvalidInputError(
                    f"{self._name(param)} has a side of {longest}, above shapes.max_dim={limit}, "
                    "and rule='kfac' needs both factors. Raise it, or use a group of another rule."
                )
        scale = scaler.get_scale if scaler is not None else lambda: 1.0
        recorder = LayerRecorder(model, [param for param, _ in params], self._name, scale)
        self.remove_hooks()
        self._recorder = recorder

    def remove_hooks(self) -> None:
        """Take all hooks off the model; ``attach`` puts them back."""
        if self._recorder is not None:
            self._recorder.remove()
        self._recorder = None

    def sampling(self) -> AbstractContextManager[None]:
        """Backward passes in this context are for statistics only, and change no gradient.

        With labels that are drawn from the model's own predictions the statistics are those of the
        Fisher matrix, where training labels give the empirical one::

            outputs = model(inputs)
            with optimizer.sampling():
                drawn = torch.distributions.Categorical(logits=outputs).sample()
                loss_fn(outputs, drawn).backward(retain_graph=True)
            loss_fn(outputs, labels).backward()

        A step uses these alone if there are any; it is taken outside of the context. A
        ``zero_grad`` between this context and the backward pass of the labels does not forget them.

        Raises:
            InvalidInputError: Not attached to a model.
        """
        if self._recorder is None:
            raise InvalidInputError("sampling() is of an optimizer that is attached to a model.")
        return self._recorder.sampling([p for group in self.param_groups for p in group["params"]])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch has it; what was recorded of the gradients is forgotten with them."""
        super().zero_grad(set_to_none)
        if self._recorder is not None:
            self._recorder.forget_gradients()

    def _refuse_sampling(self) -> None:
        """Refuse a step with the gradients of sampled labels.

        Raises:
            InvalidInputError: Inside :meth:`sampling`.
        """
        if self._recorder is not None and self._recorder.is_sampling:
            raise InvalidInputError(
                "step() inside sampling() would move the weights by the gradient of sampled "
                "labels. Leave the context first."
            )

    def _forget_records(self) -> None:
        if self._recorder is not None:
            self._recorder.clear()

    def _recorded(
        self, active: Sequence[tuple[Group, Sequence[Tensor]]]
    ) -> dict[int, LayerSamples]:
        """What was recorded of the layers of parameters with a gradient.

        Raises:
            InvalidInputError: Nothing of one of them; the message says why.
        """
        needed = {
            param: group["statistics"].loss_reduction
            for group, params in active
            if group["statistics"].rule == "kfac"
            for param in params
        }
        if not needed:
            return {}
        if self._recorder is None or not self._recorder.knows(needed):
            raise InvalidInputError(
                "Parameters with statistics.rule='kfac' are attached to no model, as those of a "
                "copy, of a new group, or after remove_hooks(): call optimizer.attach(model), then "
                "run the model again. Nothing was changed."
            )
        return self._recorder.samples(needed)


def longest_side(param: Tensor) -> int:
    """The larger one of m and n."""
    m = param.shape[0] if param.ndim else 1
    return max(m, param.numel() // max(1, m))
