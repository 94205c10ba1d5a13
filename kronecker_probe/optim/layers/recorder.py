"""Hooks on the layers of a model that record what K-FAC's factors are made of."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.optim.layers.samples import LAYERS, Call, Layer, LayerSamples, Pass

# (parameter, backward pass)
Key = tuple[int, int]


@final
class LayerRecorder:
    """Records inputs and output gradients of layers.

    A call counts once a backward pass went through it and on to the parameter's ``grad``, as long
    as that is there; what ``torch.autograd.grad`` computes leaves no trace. Inputs and output
    gradients are held until :meth:`clear`. Hooks change no value, do nothing in copies of the
    model, and end with this object.

    Args:
        model: The model.
        params: Weights and biases of layers of it that :func:`layer_parameters` lists.
        name_of: The name of a parameter in messages.
        loss_scale: What losses are multiplied by before a backward pass.

    Raises:
        InvalidInputError: One that is of no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Tensor],
        name_of: Callable[[Tensor], str],
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._loss_scale = loss_scale
        self._scale = (-1, 1.0)  # of the last backward pass
        self._name_of = name_of
        self._sampled = False
        self._handles: list[RemovableHandle] = []
        known = layer_parameters(model)
        self._biases: dict[int, bool] = {}
        layers: dict[nn.Module, list[Tensor]] = {}
        for param in params:
            if param not in known:
                raise InvalidInputError(
                    f"{name_of(param)} is no weight or bias of an nn.Linear, or of an nn.Conv1d, "
                    "2d or 3d with groups=1, of this model alone: K-FAC has no statistics of it. "
                    "Put it into a group with statistics={'rule': 'gradient'}."
                )
            for layer, is_bias in known[param]:
                self._biases[id(param)] = is_bias
                layers.setdefault(layer, []).append(param)
        self._params = {id(p): weakref.ref(p) for members in layers.values() for p in members}
        self.clear()
        own = weakref.ref(self)
        for layer, members in layers.items():
            hook = _ForwardHook(own, [id(param) for param in members])
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        for param in {id(p): p for members in layers.values() for p in members}.values():
            self._handles.append(param.register_post_accumulate_grad_hook(_GradHook(own)))  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Forget what was recorded."""
        self._passes: dict[bool, dict[Key, Pass]] = {False: {}, True: {}}
        self._reached: set[Key] = set()

    def forget_gradients(self) -> None:
        """Forget the passes of gradients that were zeroed, and what was sampled beside them.

        What was sampled before any gradient arrived is for the one that comes.
        """
        if self._passes[False]:
            self.clear()

    @property
    def is_sampling(self) -> bool:
        """Whether :meth:`sampling` is entered."""
        return self._sampled

    def remove(self) -> None:
        """Take the hooks off the model, and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    @contextlib.contextmanager
    def sampling(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Backward passes in here are for statistics only: the ``grad`` of ``params`` stays."""
        grads = [param.grad for param in params]
        for param in params:
            param.grad = None
        self._sampled = True
        try:
            yield
        finally:
            self._sampled = False
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad

    def add(self, members: Sequence[int], call: Call) -> None:
        """Take in a call, in the backward pass that goes on right now."""
        task = torch._C._current_graph_task_id()
        for param in members:
            if not self._sampled and (param, task) not in self._passes[False]:
                self._forget_discarded(param)
            passes, key = self._passes[self._sampled], (param, task)
            if key not in passes:
                passes[key] = Pass(scale=self._scale_of(task))
            passes[key].calls.append(call)

    def _scale_of(self, task: int) -> float:
        """Of a backward pass, asked for once: it waits for an accelerator."""
        if self._scale[0] != task:
            self._scale = task, self._loss_scale()
        return self._scale[1]

    def _forget_discarded(self, param: int) -> None:
        """Forget earlier passes whose gradient is no more, as after ``model.zero_grad()``.

        What was sampled before them goes too: a scaler may have left out their step.
        """
        earlier = [key for key in self._passes[False] if key[0] == param and key in self._reached]
        held = self._params[param]()
        if earlier and held is not None and (held.grad is None or not bool(held.grad.any())):
            for key in earlier:
                del self._passes[False][key]
            last = max(task for _, task in earlier)
            for key in [k for k in self._passes[True] if k[0] == param and k[1] < last]:
                del self._passes[True][key]

    def reach(self, param: Tensor) -> None:
        """Note that the backward pass that goes on right now has changed ``param.grad``."""
        self._reached.add((id(param), torch._C._current_graph_task_id()))

    def knows(self, params: Iterable[Tensor]) -> bool:
        """Whether all of ``params`` are of the layers."""
        return all(id(param) in self._biases for param in params)

    def samples(self, params: Mapping[Tensor, str]) -> dict[int, LayerSamples]:
        """The samples of parameters with a gradient, by their id.

        Args:
            params: With the reduction of their loss.

        Raises:
            InvalidInputError: Nothing was recorded for one of them.
            NonFiniteError: What was recorded is not finite, or its squares overflow.
            UnsupportedError: It cannot be told which calls belong to the same data.
        """
        passes = self._passes[True] or self._passes[False]
        found: dict[int, list[Pass]] = {}
        for key, one in passes.items():
            if key in self._reached:
                found.setdefault(key[0], []).append(one)
        result: dict[int, LayerSamples] = {}
        for param, reduction in params.items():
            if id(param) not in found:
                raise InvalidInputError(self._missing(param))
            for one in found[id(param)]:
                one.check(self._name_of(param))
                if not one.is_finite:
                    raise NonFiniteError(
                        f"The inputs or output gradients that were recorded for "
                        f"{self._name_of(param)} hold a NaN or an infinity, or numbers whose "
                        "squares overflow. Nothing was changed: skip this batch, or scale the "
                        "loss down."
                    )
            is_bias = self._biases[id(param)]
            result[id(param)] = LayerSamples(found[id(param)], is_bias, reduction)
        return result

    def _missing(self, param: Tensor) -> str:
        drawn = " (sampling() was used, and its backward pass did not reach it)"
        return (
            f"{self._name_of(param)} has a gradient, but nothing was recorded of its layer since "
            f"the last step or zero_grad(){drawn if self._passes[True] else ''}. Nothing was "
            "changed. Run the model itself, with gradients, and backward() between zero_grad() and "
            "step(); gradients of other parameters should be None, which "
            "zero_grad(set_to_none=True) makes them."
        )


@final
class _ForwardHook:
    """Lets a recorder know of a layer's calls; copies of it, with those of a model, do nothing."""

    def __init__(self, recorder: Callable[[], LayerRecorder | None], members: list[int]) -> None:
        self._recorder = recorder
        self._members = members

    def __call__(
        self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        recorder = self._recorder()
        if recorder is None or not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            return
        a: Tensor = (args[0] if args else kwargs["input"]).detach()
        version, members = a._version, self._members

        def receive(d: Tensor) -> None:
            recorder = self._recorder()
            if recorder is None:
                return
            if a._version != version:
                raise UnsupportedError(
                    f"The input of {type(layer).__name__} was changed in place after the layer "
                    "read it, so that K-FAC has lost it; use an operation that is not in place."
                )
            # the gradient itself, where it can be: autograd then does not add to it in place
            recorder.add(members, Call(layer, a, d.detach() if d.requires_grad else d))

        output.register_hook(receive)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardHook:
        return _ForwardHook(_nobody, [])

    def __reduce__(self) -> tuple[Any, ...]:
        return _ForwardHook, (_nobody, [])


@final
class _GradHook:
    """Lets a recorder know that a gradient arrived."""

    def __init__(self, recorder: Callable[[], LayerRecorder | None]) -> None:
        self._recorder = recorder

    def __call__(self, param: Tensor) -> None:
        recorder = self._recorder()
        if recorder is not None:
            recorder.reach(param)


def _nobody() -> None:
    return None


def layer_parameters(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, bool]]]:
    """Weights and biases that K-FAC has statistics of, with their layers and whether a bias.

    They are those of modules that are exactly an nn.Linear or an nn.Conv1d, 2d or 3d with groups=1,
    and of no other module; those of subclasses may be used in other ways.

    Args:
        model: Any module.
    """
    found: dict[Tensor, list[tuple[nn.Module, bool]]] = {}
    others: set[Tensor] = set()
    for module in model.modules():
        fits = type(module) in LAYERS and getattr(module, "groups", 1) == 1
        for name, param in module._parameters.items():
            if param is None:
                continue
            if fits and name in ("weight", "bias") and param.requires_grad:
                found.setdefault(param, []).append((module, name == "bias"))
            else:
                others.add(param)
    mixed = {p for p, uses in found.items() if len({is_bias for _, is_bias in uses}) > 1}
    return {p: uses for p, uses in found.items() if p not in others and p not in mixed}
