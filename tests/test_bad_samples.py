"""Samples and arguments that cannot be measured: an error that names what and why, never a NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, NonFiniteError
from tests import oracle
from tests.cases import assert_close, dense
from tests.tolerances import ENTRIES, SCALAR

G = torch.ones(4, 3, 2, dtype=torch.float64)
D = torch.ones(4, 3, dtype=torch.float64)
A = torch.ones(4, 2, dtype=torch.float64)


def _with(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[1] = value
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_samples_are_refused(value: float) -> None:
    from_matrices, from_factors = kp.GradientSamples.from_matrices, kp.GradientSamples.from_factors
    named = r"(?i)nan|inf|finite"
    with pytest.raises(NonFiniteError, match=named):
        from_matrices(_with(G, value))
    with pytest.raises(NonFiniteError, match=r"output_grads"):
        from_factors(_with(D, value), A)
    with pytest.raises(NonFiniteError, match=r"inputs"):
        from_factors(D, _with(A, value))
    with pytest.raises(NonFiniteError, match=r"weights"):
        from_matrices(G, _with(torch.ones(4), value))
    with pytest.raises(NonFiniteError, match=r"weights"):
        from_factors(D, A, _with(torch.ones(4), value))


def test_negative_weights_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"weights.*-0\.5"):
        kp.GradientSamples.from_matrices(G, _with(torch.ones(4), -0.5))
    with pytest.raises(InvalidInputError, match=r"weights.*-0\.5"):
        kp.GradientSamples.from_factors(D, A, _with(torch.ones(4), -0.5))


@pytest.mark.parametrize(
    ("output_grads", "inputs"),
    [
        (torch.ones(4, 3), torch.ones(5, 2)),  # N
        (torch.ones(4, 6, 3), torch.ones(4, 5, 2)),  # T
        (torch.ones(4, 2, 6, 3), torch.ones(4, 5, 2)),  # T, with columns
        (torch.ones(4, 6, 3), torch.ones(4, 2)),  # positions on one side only
        (torch.ones(4, 3), torch.ones(4, 5, 2)),
        (torch.ones(3), torch.ones(2)),  # no data dimension
        (torch.ones(4, 2, 2, 2, 3), torch.ones(4, 2, 2)),
    ],
)
def test_mismatched_factors_are_refused(output_grads: torch.Tensor, inputs: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError) as caught:
        kp.GradientSamples.from_factors(output_grads, inputs)
    message = str(caught.value)
    shapes = (tuple(output_grads.shape), tuple(inputs.shape))
    assert any(str(s) in message or str(list(s)) in message for s in shapes), message


@pytest.mark.parametrize("shape", [(3, 2), (4,), (4, 1, 1, 3, 2)])
def test_matrices_of_a_wrong_rank_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"\[N, m, n\]"):
        kp.GradientSamples.from_matrices(torch.ones(shape))


def test_strided_views_are_read_as_they_look(rng: np.random.Generator) -> None:
    d, a = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    expected = oracle.second_moment(oracle.columns(d, a), np.full(6, 1 / 6))
    views = torch.tensor(d.T.copy()).T, torch.tensor(np.repeat(a, 2, axis=1))[:, ::2]
    assert not any(view.is_contiguous() for view in views)
    for route in ("sample", "parameter", "dense"):
        H = kp.SecondMoment(kp.GradientSamples.from_factors(*views), route=route)
        assert_close(dense(H), expected, ENTRIES)
        assert_close(H.norm(), oracle.norm(expected), SCALAR)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (5,), ()])
def test_mismatched_weights_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"weights"):
        kp.GradientSamples.from_matrices(G, torch.ones(shape))
    with pytest.raises(InvalidInputError, match=r"weights"):
        kp.GradientSamples.from_factors(D, A, torch.ones(shape))


def test_no_data_is_refused() -> None:
    empty = r"(?i)empty|no data|no samples|N = 0|at least one"
    with pytest.raises(InvalidInputError, match=empty):
        kp.GradientSamples.from_matrices(torch.ones(0, 3, 2))
    with pytest.raises(InvalidInputError, match=empty):
        kp.GradientSamples.from_factors(torch.ones(0, 3), torch.ones(0, 2))


@pytest.mark.parametrize("shape", [(4, 0, 2), (4, 3, 0)])
def test_empty_matrices_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError):
        kp.GradientSamples.from_matrices(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64, torch.bool])
def test_other_than_real_floating_point_is_refused(dtype: torch.dtype) -> None:
    named = str(dtype).removeprefix("torch.")
    with pytest.raises(InvalidInputError, match=named):
        kp.GradientSamples.from_matrices(G.to(dtype))
    with pytest.raises(InvalidInputError, match=named):
        kp.GradientSamples.from_factors(D.to(dtype), A)
    with pytest.raises(InvalidInputError, match=named):
        kp.GradientSamples.from_factors(D, A.to(dtype))


def test_complex_weights_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"weights.*complex128"):
        kp.GradientSamples.from_matrices(G, torch.ones(4, dtype=torch.complex128))


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
def test_samples_that_carry_a_graph_are_measured_without_it(route: str) -> None:
    samples = kp.GradientSamples.from_factors(D.clone().requires_grad_(), A)
    H = kp.SecondMoment(samples, route=route)
    expected = kp.SecondMoment(kp.GradientSamples.from_factors(D, A), route=route)
    assert H.norm() == expected.norm()
    assert not H.to_dense().requires_grad
    assert not H.kronecker_spectrum().requires_grad
    assert not kp.approximate(H, "shampoo").left.requires_grad
    np.testing.assert_array_equal(H.to_scipy() @ np.ones(6), expected.to_scipy() @ np.ones(6))


def test_samples_do_not_alias_a_later_change_of_weights() -> None:
    weights = torch.ones(4, dtype=torch.float64)
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(G, weights))
    trace = H.trace()
    weights.mul_(2)
    assert kp.SecondMoment(kp.GradientSamples.from_matrices(G, weights)).trace() == 2 * trace
    assert H.trace() == trace


@pytest.mark.parametrize("route", ["sample", "parameter", "dense"])
@pytest.mark.parametrize("shape", [(2, 3), (3,), (6,), (5, 3, 3)])
def test_apply_to_a_wrong_shape_is_refused(route: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"3.*2"):
        kp.SecondMoment(kp.GradientSamples.from_factors(D, A), route=route).apply(
            torch.ones(shape, dtype=torch.float64)
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_apply_to_other_than_real_floating_point_is_refused(dtype: torch.dtype) -> None:
    """A product rounded to integers, or without its imaginary part, is a wrong number."""
    H = kp.SecondMoment(kp.GradientSamples.from_factors(D, A))
    with pytest.raises(InvalidInputError, match=str(dtype).removeprefix("torch.")):
        H.apply(torch.ones(3, 2, dtype=dtype))
