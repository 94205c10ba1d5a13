"""Records, in the user's own forward and backward passes, what K-FAC's factors are made of.

Reads of parameters are found and accounted for as :func:`kronecker_probe.capture` does it: by a
torch function mode while the model runs, and by the autograd graph of what it returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.gradients.layers.base import Call, Form, Layout
from kronecker_probe.gradients.tracing.graph import account
from kronecker_probe.gradients.tracing.record import Recorder, Recording
from kronecker_probe.optim.layers.samples import LayerSamples, Pass, Use

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# (parameter, backward pass)
Key = tuple[int, int]


@final
class LayerRecorder:
    """Records inputs and output gradients of the calls that read parameters of layers.

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
        loss_scale: Callable[[], float],
    ) -> None:
        self._loss_scale = loss_scale
        self._scale = (-1, 1.0)  # of the last backward pass
        self._name_of = name_of
        self._sampled = False
        self._biases: dict[int, bool] = {}
        known = layer_parameters(model)
        for param in params:
            if param not in known:
                raise InvalidInputError(
                    f"{name_of(param)} is no weight or bias of an nn.Linear, or of an nn.Conv1d, "
                    "2d or 3d with groups=1, of this model alone: K-FAC has no statistics of it. "
                    "Put it into a group with statistics={'rule': 'gradient'}."
                )
            self._biases[id(param)] = known[param]
        self._params = {
            name: weakref.ref(param)
            for name, param in model.named_parameters()
            if id(param) in self._biases
        }
        self._by_id = {id(ref()): ref for ref in self._params.values()}
        self._model_name = type(model).__name__
        self.clear()
        # of the modules that run right now; the outermost one has what its pass is recorded with
        self._open: list[tuple[Recorder, dict[str, nn.Parameter], set[Any]] | None] = []
        own = weakref.ref(self)
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if any(id(param) in self._biases for param in module.parameters()):
                enter, leave = _Hook(own, "enter", slice(1, 3)), _Hook(own, "leave", 2)
                self._handles += [
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, always_call=True),
                ]
        for ref in self._params.values():
            self._handles.append(ref().register_post_accumulate_grad_hook(_Hook(own, "reach", 0)))  # type: ignore[union-attr]

    def clear(self) -> None:
        """Forget what was recorded."""
        self._passes: dict[bool, dict[Key, Pass]] = {False: {}, True: {}}
        self._reached: set[Key] = set()
        self._problems: dict[int, str] = {}  # of parameters without a call that could be recorded

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

    def enter(self, inputs: object) -> None:
        """A module starts; where no other one runs, calls are recorded from here on."""
        if any(self._open) or not torch.is_grad_enabled():
            self._open.append(None)
            return
        params = {n: p for n, ref in self._params.items() if isinstance(p := ref(), nn.Parameter)}
        mode = Recorder(Recording(), params, self._model_name)
        nodes = {x.grad_fn for x in tree_leaves(inputs) if isinstance(x, Tensor)}
        self._open.append((mode, params, nodes - {None}))
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, outputs: object) -> None:
        """The last module that started ends; its calls wait for their output gradients."""
        if not self._open or (entered := self._open.pop()) is None:
            return
        mode, params, ends = entered
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        roots = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
        if not roots or not (mode.record.calls or mode.record.problems):
            return
        problems = account(roots, mode.record, params, ends).unaccounted
        self._problems |= {id(params[name]): why for name, why in problems.items()}
        for call in mode.record.calls:
            if call.edge is None:
                continue
            reads = {
                id(params[read.parameter]): problems.get(read.parameter)
                or self._misfit(call, role, params[read.parameter])
                for role, read in call.reads.items()
            }
            # without the edge: the node would hold itself by its own hook
            layout = Layout(1, math.prod(call.lead[1:]))
            kept = dataclasses.replace(call, edge=None, layout=layout)
            receive = _Receive(weakref.ref(self), kept, reads, call.edge.output_nr)
            call.edge.node.register_prehook(receive)

    def _misfit(self, call: Call, role: str, param: Tensor) -> str:
        """Why a call has no factors of the whole parameter; empty if it has."""
        if self._biases[id(param)] != (role == "bias"):
            return "it is read as a weight and as a bias"
        if call.reads[role].rows is not None:
            return f"layer {call.name!r} reads some of its rows"
        if call.rule.form(role, call) is not (Form.VECTOR if role == "bias" else Form.FACTORS):
            return (
                f"it is also read by {call.rule.function.__name__}, which K-FAC has no factors for"
            )
        return ""

    def add(self, call: Call, gradient: Tensor, reads: Mapping[int, str]) -> None:
        """Take in a call, in the backward pass that goes on right now."""
        task = torch._C._current_graph_task_id()
        for param, problem in reads.items():
            if not self._sampled and (param, task) not in self._passes[False]:
                self._forget_discarded(param)
            passes, key = self._passes[self._sampled], (param, task)
            if key not in passes:
                passes[key] = Pass(self._scale_of(task))
            passes[key].uses.append(Use(call, gradient, problem))

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
        held = self._by_id[param]()
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
            UnsupportedError: A parameter has other readers than layers, or it cannot be said which
                calls belong to the same examples.
        """
        passes = self._passes[True] or self._passes[False]
        found: dict[int, list[Pass]] = {}
        for key, one in passes.items():
            if key in self._reached:
                found.setdefault(key[0], []).append(one)
        result: dict[int, LayerSamples] = {}
        for param, reduction in params.items():
            name = self._name_of(param)
            if id(param) not in found:
                raise InvalidInputError(self._missing(param, name))
            for one in found[id(param)]:
                one.check(name)
                if not one.is_finite:
                    raise NonFiniteError(
                        f"The inputs or output gradients that were recorded for {name} hold a NaN "
                        "or an infinity, or numbers whose squares overflow. Nothing was changed: "
                        "skip this batch, or scale the loss down."
                    )
            is_bias = self._biases[id(param)]
            n = 1 if is_bias else param[0].numel()
            result[id(param)] = LayerSamples(found[id(param)], n, is_bias, reduction)
        return result

    def _missing(self, param: Tensor, name: str) -> str:
        if why := self._problems.get(id(param)):
            why = f" ({why})"
        elif self._passes[True]:
            why = " (sampling() was used, and its backward pass did not reach it)"
        return (
            f"{name} has a gradient, but nothing was recorded of its layer since the last step or "
            f"zero_grad(){why or ''}. Nothing was changed. Run the model itself, with gradients, "
            "and backward() between zero_grad() and step(); gradients of other parameters should "
            "be None, which zero_grad(set_to_none=True) makes them."
        )


@final
class _Hook:
    """Calls a method of a recorder while it lives; a copy, with that of a model, does nothing."""

    def __init__(
        self, recorder: Callable[[], LayerRecorder | None], method: str, argument: int | slice
    ) -> None:
        self._recorder = recorder
        self._method = method
        self._argument = argument

    def __call__(self, *args: Any) -> None:
        if recorder := self._recorder():
            getattr(recorder, self._method)(args[self._argument])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(_nobody, self._method, self._argument)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nobody, self._method, self._argument)


@final
class _Receive:
    """Hands the gradient of a call's output to the recorder."""

    def __init__(
        self,
        recorder: Callable[[], LayerRecorder | None],
        call: Call,
        reads: Mapping[int, str],
        output: int,
    ) -> None:
        self._recorder = recorder
        self._call = call
        self._reads = reads
        self._output = output

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        recorder, gradient = self._recorder(), gradients[self._output]
        if recorder is None or gradient is None:
            return
        if self._call.x._version != self._call.version:
            raise UnsupportedError(
                f"The input of layer {self._call.name!r} was changed in place after the layer "
                "read it, so that K-FAC has lost it; use an operation that is not in place."
            )
        # the gradient itself, where it can be: autograd then does not add to it in place
        gradient = gradient.detach() if gradient.requires_grad else gradient
        recorder.add(self._call, gradient, self._reads)


def _nobody() -> None:
    return None


def layer_parameters(model: nn.Module) -> dict[Tensor, bool]:
    """Weights and biases that K-FAC has statistics of, and whether each is a bias.

    They are those of modules that are exactly an nn.Linear or an nn.Conv1d, 2d or 3d with groups=1,
    and of no other module; those of subclasses may be used in other ways.

    Args:
        model: Any module.
    """
    found: dict[Tensor, set[str]] = {}
    others: set[Tensor] = set()
    for module in model.modules():
        fits = type(module) in LAYERS and getattr(module, "groups", 1) == 1
        for name, param in module._parameters.items():
            if param is None:
                continue
            if fits and name in ("weight", "bias") and param.requires_grad:
                found.setdefault(param, set()).add(name)
            else:
                others.add(param)
    return {p: "bias" in roles for p, roles in found.items() if p not in others and len(roles) == 1}
