"""One call of a torch function that reads parameters, and how their gradients read off it."""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kronecker_probe.errors import InvalidInputError, NonFiniteError


class Form(enum.Enum):
    """In what form the gradient of a parameter comes out of one call."""

    FACTORS = enum.auto()  # sum_t d_t a_t^T, as (d, a)
    TOKENS = enum.auto()  # sum_t e_k(t) d_t^T, as (k, d)
    VECTOR = enum.auto()  # a vector [m], summed over positions
    MATRIX = enum.auto()  # G itself


@dataclass(frozen=True)
class Layout:
    """Where the N examples lie in the leading dimensions of a call, flattened: [before, N, after].

    [N, T] is Layout(1, T), [T, N] is Layout(T, 1), and so are both flattened to one dimension.
    """

    before: int
    after: int

    def fits(self, size: int, n_examples: int) -> bool:
        """Whether leading dimensions of ``size`` entries hold ``n_examples`` examples this way."""
        return self.before * n_examples * self.after == size

    def split(self, tensor: Tensor, n_lead: int) -> Tensor:
        """[before, N, after, ...] from [*lead, ...]."""
        size = math.prod(tensor.shape[:n_lead])
        n_examples = size // (self.before * self.after)
        return tensor.reshape(self.before, n_examples, self.after, *tensor.shape[n_lead:])

    def arrange(self, tensor: Tensor, n_lead: int) -> Tensor:
        """[N, T, k] from [*lead, ..., k]: all dimensions between are positions."""
        split = self.split(tensor, n_lead).movedim(1, 0)
        return split.reshape(split.shape[0], -1, tensor.shape[-1])


def layouts(lead: tuple[int, ...], n_examples: int) -> list[Layout]:
    """All ways in which ``n_examples`` examples can lie in ``lead``, batch first before others."""
    whole, split = [], []
    for k, size in enumerate(lead):
        before, after = math.prod(lead[:k]), math.prod(lead[k + 1 :])
        if size == n_examples:
            whole.append(Layout(before, after))
        elif size % n_examples == 0 and size:
            count = size // n_examples
            split += [Layout(before, count * after), Layout(before * count, after)]
    if n_examples == 1 and not lead:
        whole.append(Layout(1, 1))
    return list(dict.fromkeys(whole + split))


@dataclass(frozen=True)
class Read:
    """Which parameter an argument of a call is.

    Attributes:
        parameter: Its name.
        rows: First and last row (exclusive) if the argument is a slice of it; None for all.
        view: The autograd node and output of the slice.
        edges: How many edges of the autograd graph lead from the call to the parameter.
    """

    parameter: str
    rows: tuple[int, int] | None = None
    view: tuple[Any, int] | None = None
    edges: int = 1


@dataclass(eq=False)
class Call:
    """One call of a function with a rule.

    The gradient edge stands for the output as the function returned it: an in-place operation
    behind it rebases the tensor, and not the edge.

    Attributes:
        rule: How to read the gradients.
        name: Of the layer, for messages.
        options: The function's arguments by name.
        x: Its input.
        version: The input's version when it was read.
        edge: None where no gradient was tracked.
        output_shape: Of the output.
        output_dtype: Of the output.
        reads: Role ("weight", "bias", or the name that a user's module gives it) to the parameter.
        weight_shape: Of the weight that the call read; empty without one.
        layout: Where the examples lie; None until that is known.
    """

    rule: Rule
    name: str
    options: Mapping[str, Any]
    x: Tensor
    version: int
    edge: GradientEdge | None
    output_shape: torch.Size
    output_dtype: torch.dtype
    reads: Mapping[str, Read]
    weight_shape: tuple[int, ...] = ()
    layout: Layout | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions of the output among which the batch is."""
        return tuple(self.output_shape[: self.rule.n_lead(self)])

    def positions(self, role: str) -> int:
        """T, the rows of one example."""
        assert self.layout is not None
        return self.layout.before * self.layout.after * self.rule.inner_positions(role, self)

    def outputs(self, role: str, gradient: Tensor) -> Tensor:
        """d, [N, T, m], from the gradient of the output."""
        rows = self.rule.output_rows(role, self, gradient.reshape(self.output_shape))
        assert self.layout is not None
        return self.layout.arrange(rows, len(self.lead))

    def inputs(self, role: str) -> Tensor:
        """a, [N, T, n]; tokens [N, T, 1] for an embedding."""
        assert self.layout is not None
        assert isinstance(self.rule, ProductRule)
        return self.layout.arrange(self.rule.input_rows(role, self), len(self.lead))

    def matrices(self, role: str, d: Tensor, a: Tensor) -> Tensor:
        """G, [N, m, n], from outputs [N, T, m] and inputs [N, T, n]."""
        assert isinstance(self.rule, ProductRule)
        return self.rule.matrices(role, self, d, a)

    def examples(self, part: slice) -> Call:
        """The same call for some of its examples, to be treated in chunks; the layout is known."""
        x = self._cut(self.x, part)
        lead = self._cut(self.x.new_empty(self.output_shape, device="meta"), part)
        options = self.rule.options_of(self.options, part)
        return replace(self, x=x, output_shape=lead.shape, options=options)

    def examples_of(self, gradient: Tensor, part: slice) -> Tensor:
        """The output gradient of :meth:`examples`, from that of the whole call."""
        return self._cut(gradient.reshape(self.output_shape), part)

    def _cut(self, tensor: Tensor, part: slice) -> Tensor:
        assert self.layout is not None
        found = self.layout.split(tensor, len(self.lead))[:, part]
        found = found.squeeze(2) if self.layout.after == 1 else found
        return found.squeeze(0) if self.layout.before == 1 else found

    def rows_of(self, gradient: Tensor, layout: Layout, examples: Tensor) -> Tensor:
        """The rows of ``gradient`` that belong to the ``examples`` (a mask) if laid out so."""
        return layout.split(gradient.reshape(self.output_shape), len(self.lead))[:, examples]

    def scales_as(self, gradient: Tensor, scaled: Tensor, layout: Layout, scales: Tensor) -> bool:
        """Whether ``scaled`` is ``gradient`` times the [N] ``scales`` of examples laid out so.

        False where an entry underflows, because its bits say nothing then.
        """
        n_lead = len(self.lead)
        rows = layout.split(gradient.reshape(self.output_shape), n_lead)
        expected = rows * scales.to(rows.dtype).view(-1, *[1] * (rows.ndim - 2))
        small = expected.abs() < torch.finfo(rows.dtype).tiny
        if bool((small & (rows != 0)).any()):
            return False
        return torch.equal(expected, layout.split(scaled.reshape(self.output_shape), n_lead))

    def check(self) -> None:
        """Refuse an input that is not finite, or that was overwritten after the call.

        Raises:
            NonFiniteError: The input holds NaN or infinite values.
            InvalidInputError: The input was changed in place after the layer had read it.
        """
        if not all_finite(self.x):
            raise NonFiniteError(
                f"The input of layer {self.name!r} holds NaN or infinite values; "
                f"check the examples and the layers before it{half_range(self.x.dtype)}."
            )
        if self.x._version != self.version:
            raise InvalidInputError(
                f"The input of layer {self.name!r} was changed in place after the layer had read "
                "it; make that operation out of place (give the layer a clone of a buffer or cache "
                "that is written again in the same forward pass)."
            )


class Rule(abc.ABC):
    """How each example's gradient in a function's parameters follows from one of its calls.

    Attributes:
        function: The torch function.
        arguments: Names of its positional arguments.
    """

    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.arguments, args, strict=False)) | dict(kwargs)

    def options_of(self, options: Mapping[str, Any], part: slice) -> Mapping[str, Any]:
        """The options of a call for some of its examples."""
        return options

    @abc.abstractmethod
    def problem(self, options: Mapping[str, Any]) -> str:
        """Which argument has no exact treatment; empty when none."""

    @abc.abstractmethod
    def n_lead(self, call: Call) -> int:
        """How many leading dimensions of the output the batch can be among."""

    @abc.abstractmethod
    def width(self, call: Call) -> int:
        """m, the outputs of one position."""

    def inner_positions(self, role: str, call: Call) -> int:
        """Positions behind the leading dimensions, such as the pixels of a convolution."""
        return math.prod(call.output_shape[len(call.lead) :]) // self.width(call)

    @abc.abstractmethod
    def form(self, role: str, call: Call) -> Form:
        """In what form the gradient of the parameter in ``role`` comes."""

    @abc.abstractmethod
    def output_rows(self, role: str, call: Call, gradient: Tensor) -> Tensor:
        """[*lead, ..., m] from the gradient of the output."""


class ProductRule(Rule):
    """Gradients that are products of output gradients with inputs."""

    @abc.abstractmethod
    def input_rows(self, role: str, call: Call) -> Tensor:
        """[*lead, ..., n]."""

    def input_bytes(self, call: Call) -> int:
        """Bytes that the input rows take besides the input itself."""
        return 0

    def matrices(self, role: str, call: Call, d: Tensor, a: Tensor) -> Tensor:
        """G, [N, m, n], from outputs [N, T, m] and inputs [N, T, n]."""
        return d.mT @ a.to(d.dtype)


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """(m, n) of a parameter's gradient: the first dimension by the rest, m x 1 for a vector."""
    if parameter.ndim == 0:
        return 1, 1
    return parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])


def all_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite; one pass in the usual case."""
    if not tensor.is_floating_point():
        return True
    # a sum of finite values may overflow, and only then each is looked at
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def total(tensor: Tensor, dim: int = -1) -> Tensor:
    """Sum over a dimension, at least in float32."""
    return tensor.sum(dim, dtype=torch.promote_types(tensor.dtype, torch.float32))


def half_range(dtype: torch.dtype) -> str:
    """What to add to a message where half precision may be the cause; empty elsewhere."""
    if dtype not in (torch.float16, torch.bfloat16):
        return ""
    return f", and the range of half precision ({dtype} ends at {torch.finfo(dtype).max:.3g})"
