"""The sums over samples in each of their ways, and the API that estimates are built from."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kronecker_probe as kp
from kronecker_probe.linalg import gram, symmetric
from kronecker_probe.operators.factors.factor import MatrixFactor
from kronecker_probe.operators.second_moment.cost_model import OPERATIONS
from kronecker_probe.operators.second_moment.kernels import matrix as matrix_kernels
from kronecker_probe.operators.second_moment.kernels.base import Kernels
from kronecker_probe.operators.second_moment.kernels.choose import (
    SharedKernels,
    kernels_for,
    ways_of,
)
from kronecker_probe.operators.second_moment.kernels.factored import FactorKernels
from kronecker_probe.operators.second_moment.kernels.matrix import MatrixKernels
from kronecker_probe.operators.second_moment.routes import alternation
from tests import oracle
from tests.cases import Case, as_numpy, assert_close, factors_case
from tests.grid import Checks, on_every_route
from tests.tolerances import ENTRIES, SCALAR

# A float32 half step: products of numbers rounded to 6e-8, over sums of a few dozen terms.
SINGLE = 1e-6

GRID = [
    factors_case(
        f"N{n_examples}-C{columns}-T{positions}-{m}x{n}",
        n_examples,
        m,
        n,
        columns=columns,
        positions=positions,
        seed=seed,
        given_weights=np.linspace(0, 1.3, n_examples) if weighted else None,
    )
    for seed, (n_examples, columns, positions, (m, n), weighted) in enumerate(
        itertools.product((1, 6), (1, 3), (2, 7), ((5, 3), (2, 6)), (False, True))
    )
]
KINDS = {"factors": FactorKernels, "matrices": MatrixKernels, "shared": SharedKernels}


@pytest.fixture(params=["whole", "chunked"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one chunk and panel; or a datum a chunk, panels of two, nothing held."""
    if request.param == "chunked":
        monkeypatch.setattr(gram, "CHUNK_ELEMENTS", 1)
        monkeypatch.setattr(symmetric, "PANEL", 2)
        monkeypatch.setattr(matrix_kernels, "HELD_BYTES", 0)


@pytest.fixture
def _single(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternation, "SINGLE_FLOPS", 0.0)


def random_matrix(size: int, sign: int, seed: int) -> torch.Tensor:
    X = np.random.default_rng(seed).standard_normal((size, size))
    return torch.tensor(X + sign * X.T)


# ---------------------------------------------------------------- half steps and forms


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("case", GRID, ids=str)
def test_kernels(case: Case, kind: str) -> None:
    kernels = KINDS[kind](case.samples())
    with Checks() as check:
        for sign in (1, -1):
            check(f"sign {sign}", steps, case, kernels, sign)
        check(kind, partial_traces_and_quadratic_forms, case, kernels)
        check(kind, projected_diagonal, case, kernels)
        check(kind, pair_products, case, kernels)


def steps(case: Case, kernels: Kernels, sign: int) -> None:
    (m, n), w, G = case.shape, case.weights, case.G
    V, U = random_matrix(n, sign, 0), random_matrix(m, sign, 1)
    left = np.einsum("i,icab,bd,iced->ae", w, G, V.numpy(), G)
    right = np.einsum("i,icab,ae,iced->bd", w, G, U.numpy(), G)
    # relative to the terms, whose sum vanishes where the image of a skew matrix does
    scale = float(np.einsum("i,icab->", w, G**2))
    assert_close(as_numpy(kernels.left_step(V, sign)), left, ENTRIES, scale=scale)
    assert_close(as_numpy(kernels.right_step(U, sign)), right, ENTRIES, scale=scale)


def partial_traces_and_quadratic_forms(case: Case, kernels: Kernels) -> None:
    (m, n), G = case.shape, case.G
    assert_close(as_numpy(kernels.left_step(None)), oracle.left_factor(case.H, (m, n)), ENTRIES)
    assert_close(as_numpy(kernels.right_step(None)), oracle.right_factor(case.H, (m, n)), ENTRIES)
    A, C = random_matrix(m, 1, 2), random_matrix(n, 1, 3)
    for left, right in ((A, C), (None, C), (A, None), (None, None)):
        a = np.eye(m) if left is None else left.numpy()
        c = np.eye(n) if right is None else right.numpy()
        expected = np.einsum("icab,ae,bd,iced->i", G, a, c, G)
        found = as_numpy(kernels.quadratic_forms(left, right))
        assert_close(found, expected, ENTRIES, scale=float(np.sum(G**2)) * max(m, n))


def projected_diagonal(case: Case, kernels: Kernels) -> None:
    m, n = case.shape
    q_left = torch.linalg.qr(random_matrix(m, 1, 4))[0][:, : max(1, m - 1)]
    q_right = torch.linalg.qr(random_matrix(n, 1, 5))[0]
    for left, right in ((q_left, q_right), (None, q_right), (q_left, None), (None, None)):
        a = np.eye(m) if left is None else left.numpy()
        c = np.eye(n) if right is None else right.numpy()
        projected = np.einsum("ar,icab,bs->icrs", a, case.G, c)
        expected = np.einsum("i,icrs->rs", case.weights, projected**2)
        assert_close(as_numpy(kernels.projected_diagonal(left, right)), expected, ENTRIES)


def pair_products(case: Case, kernels: Kernels) -> None:
    rows = case.G.reshape(*case.G.shape[:2], -1)
    expected = np.einsum("ick,jdk->icjd", rows, rows) ** 2
    found = as_numpy(kernels.pair_products())
    assert_close(found, expected.sum(axis=(1, 3)), ENTRIES)


@pytest.mark.parametrize("size", [100, 128, 300])
def test_panels_of_layers_larger_than_one(size: int) -> None:
    rng = np.random.default_rng(0)
    d, a = torch.tensor(rng.standard_normal((2, 3, 4, size)))
    V = random_matrix(size, 1, 0)
    G = (d.mT @ a)[:, None]
    expected = torch.einsum("icab,bd,iced->ae", G, V, G) / 3
    for kernels in (FactorKernels, MatrixKernels):
        found = kernels(kp.GradientSamples.from_factors(d, a)).left_step(V)
        assert_close(as_numpy(found), as_numpy(expected), ENTRIES)


@pytest.mark.parametrize("positions", [(2, 3), (40, 40)])
def test_inner_product_of_samples_with_different_positions(positions: tuple[int, int]) -> None:
    one = factors_case("", 5, 4, 3, columns=2, positions=positions[0], seed=1)
    other = factors_case("", 6, 4, 3, positions=positions[1], seed=2)
    expected = oracle.inner(one.H, other.H)
    assert_close(one.operator("parameter").inner(other.operator("parameter")), expected, SCALAR)


# ---------------------------------------------------------------- on every route


@on_every_route()
def test_sums_over_samples(case: Case, route: str) -> None:
    H = case.operator(route)
    with Checks() as check:
        for one in (
            pairs_forms_and_steps,
            grouped_steps_add_up_and_are_those_of_subsets,
            grouped_forms_are_those_of_each_pair_of_factors,
            subsets,
        ):
            check(route, one, case, H)


def pairs_forms_and_steps(case: Case, H: kp.SecondMoment) -> None:
    (m, n), w, G = case.shape, case.weights, case.G
    K = as_numpy(H.pair_products())
    assert_close(w @ K @ w, oracle.norm(case.H) ** 2, SCALAR)
    assert_close(np.diag(K), [np.sum((g @ g.T) ** 2) for g in G.reshape(*G.shape[:2], -1)], SCALAR)
    scale = float(np.sum(G**2)) * m * n
    for seed, shift in enumerate((0.0, 2.0 * (m + n))):  # of any sign, and PSD
        A = random_matrix(m, 1, seed) + shift * torch.eye(m)
        C = random_matrix(n, 1, seed + 9) + shift * torch.eye(n)
        forms = np.einsum("icab,ae,bd,iced->i", G, A.numpy(), C.numpy(), G)
        bound = scale * (1 + shift) ** 2
        assert_close(as_numpy(H.quadratic_forms(A, C)), forms, ENTRIES, scale=bound)
        expected = np.einsum("i,icab,bd,iced->ae", w, G, C.numpy(), G)
        assert_close(as_numpy(H.left_step(C).matrix), expected, ENTRIES, scale=bound)
        expected = np.einsum("i,icab,ae,iced->bd", w, G, A.numpy(), G)
        assert_close(as_numpy(H.right_step(MatrixFactor(A)).matrix), expected, ENTRIES, scale=bound)
    assert H.left_step(None) is H.left_factor
    assert H.right_step(None) is H.right_factor


def grouped_steps_add_up_and_are_those_of_subsets(case: Case, H: kp.SecondMoment) -> None:
    count = len(case.G)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    groups = [part for part in order.tensor_split(3) if len(part)]
    m, n = case.shape
    C, A = torch.eye(n) + 1.0, torch.eye(m) + 1.0
    for found, whole, alone in (
        (H.grouped_step(0, C, groups), H.left_step(C), lambda part: part.left_step(C)),
        (H.grouped_step(1, A, groups), H.right_step(A), lambda part: part.right_step(A)),
        (H.grouped_step(0, None, groups), H.left_factor, lambda part: part.left_factor),
    ):
        total = sum(as_numpy(one.matrix) for one in found)
        assert_close(total, as_numpy(whole.matrix), ENTRIES)
        size = float(np.linalg.norm(total))
        for group, one in zip(groups, found, strict=True):
            expected = as_numpy(alone(H.subset(group)).matrix)
            assert_close(as_numpy(one.matrix), expected, ENTRIES, scale=size)


def psd(count: int, size: int) -> torch.Tensor:
    X = torch.tensor(np.random.default_rng(size).standard_normal((count, size, size)))
    return X @ X.mT


def grouped_forms_are_those_of_each_pair_of_factors(case: Case, H: kp.SecondMoment) -> None:
    (m, n), G, w = case.shape, case.G, case.weights
    groups = [slice(0, 1), list(range(1, len(G)))] if len(G) > 1 else [[0]]
    lefts, rights = psd(3, m), psd(2, n)
    forms = np.einsum("icxy,bxz,eyv,iczv->ibe", G, lefts.numpy(), rights.numpy(), G)
    expected = np.stack([np.einsum("i,ibe->be", w[g], forms[g]) for g in groups])
    assert_close(as_numpy(H.grouped_forms(lefts, rights, groups)), expected, ENTRIES)


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("size", [1.0, 1e-11])
def test_grouped_forms_in_float32(size: float) -> None:
    """Of gradients whose fourth powers float32 could not hold, too."""
    case = factors_case("", 9, 80, 64, columns=2, positions=4)
    assert case.output_grads is not None
    case = case.with_(output_grads=size * case.output_grads).cast(torch.float32)
    lefts, rights = psd(3, 80) * size**2, psd(2, 64)
    groups = [slice(0, 4), slice(4, 9)]
    H = kp.SecondMoment(case.samples(), route="parameter")
    exact = kp.SecondMoment(case.cast(torch.float64).samples(), route="parameter")
    found, expected = (as_numpy(one.grouped_forms(lefts, rights, groups)) for one in (H, exact))
    assert not np.array_equal(found, expected)  # the path under test
    np.testing.assert_allclose(found, expected, rtol=SINGLE)


def subsets(case: Case, H: kp.SecondMoment) -> None:
    for index in (slice(0, 2), [len(case.G) - 1]):
        expected = oracle.second_moment(case.G[index], case.weights[index])
        part = H.subset(index)
        assert part.norm() == pytest.approx(
            oracle.norm(expected), rel=SCALAR, abs=SCALAR * oracle.norm(case.H)
        )
        assert_close(as_numpy(part.to_dense()), expected, ENTRIES, scale=oracle.norm(case.H))


def test_scaled_identity_takes_the_partial_trace() -> None:
    H = factors_case("", 6, 5, 4, positions=3).operator("parameter")
    image = H.left_step(3.0 * torch.eye(4))
    assert_close(as_numpy(image.matrix), 3 * as_numpy(H.left_factor.matrix), ENTRIES)


# ---------------------------------------------------------------- the leading product


def decaying(dtype: torch.dtype, ratio: float = 0.5) -> kp.GradientSamples:
    """Draws whose leading singular value stands apart by about ``ratio``."""
    rng = np.random.default_rng(3)
    d = torch.tensor(rng.standard_normal((24, 5, 20)) * ratio ** np.arange(20))
    a = torch.tensor(rng.standard_normal((24, 5, 16)) * ratio ** np.arange(16))
    return kp.GradientSamples.from_factors(d.to(dtype), a.to(dtype))


@pytest.fixture
def half_steps(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the half steps taken, in order."""
    seen: list[torch.dtype] = []
    step = SharedKernels.left_step

    def counted(self: SharedKernels, right: Any, sign: int = 1) -> torch.Tensor:
        if right is not None:
            seen.append(right.dtype)
        return step(self, right, sign)

    monkeypatch.setattr(SharedKernels, "left_step", counted)
    return seen


def truth(samples: kp.GradientSamples) -> oracle.LeadingTriple:
    G = samples.matrices().numpy()
    return oracle.leading_triple(oracle.second_moment(G, samples.weights.numpy()), samples.shape)


@pytest.mark.usefixtures("_single")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_iterations_give_float64_numbers(
    dtype: torch.dtype, half_steps: list[torch.dtype]
) -> None:
    samples = decaying(dtype)
    found = kp.SecondMoment(samples, route="parameter").leading_product
    expected = truth(samples)
    assert torch.float32 in half_steps  # it is the path under test
    assert half_steps[-1] == torch.float64
    assert_close(found.singular_value, expected.sigma, SCALAR)
    assert_close(as_numpy(found.left.matrix), expected.left, 10 * alternation.CONFIRMED)
    assert_close(as_numpy(found.right.matrix), expected.right, 10 * alternation.CONFIRMED)
    assert found.residual <= alternation.CONFIRMED


@pytest.mark.usefixtures("_single")
def test_float64_samples_stay_in_float64(half_steps: list[torch.dtype]) -> None:
    _ = kp.SecondMoment(decaying(torch.float64), route="parameter").leading_product
    assert set(half_steps) == {torch.float64}


@pytest.mark.usefixtures("_single")
def test_float32_that_does_not_hold_up_goes_on_in_float64(
    monkeypatch: pytest.MonkeyPatch, half_steps: list[torch.dtype]
) -> None:
    monkeypatch.setattr(alternation, "CONFIRMED", 0.0)
    samples = decaying(torch.float32)
    found = kp.SecondMoment(samples, route="parameter").leading_product
    assert_close(found.singular_value, truth(samples).sigma, SCALAR)
    assert found.residual <= alternation.TOLERANCE
    assert half_steps.count(torch.float64) > 2


@pytest.mark.usefixtures("_single")
def test_gradients_below_the_range_of_float32_products() -> None:
    d, a = torch.tensor(np.random.default_rng(0).standard_normal((2, 8, 3, 6))).float()
    samples = kp.GradientSamples.from_factors(d * 1e-25, a)
    found = kp.SecondMoment(samples, route="parameter").leading_product
    assert_close(found.singular_value, truth(samples).sigma, SCALAR)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0])
def test_residual_of_the_leading_product_is_the_true_one(ratio: float) -> None:
    samples = decaying(torch.float64, ratio)
    found = kp.SecondMoment(samples, route="parameter").leading_product
    H = oracle.second_moment(samples.matrices().numpy(), samples.weights.numpy())
    R = oracle.rearrange(H, samples.shape)
    u, v = (as_numpy(f.matrix).reshape(-1) for f in (found.left, found.right))
    assert_close(np.linalg.norm(R.T @ u), found.singular_value, SCALAR)
    measured = np.linalg.norm(R @ v - found.singular_value * u) / found.singular_value
    assert measured <= 2 * alternation.TOLERANCE
    assert found.residual <= 2 * alternation.TOLERANCE
    assert 1 <= found.rounds <= 60


@pytest.mark.parametrize("kind", ["factors", "matrices"])
def test_float32_half_steps_keep_seven_digits(kind: str) -> None:
    case = factors_case("", 40, 12, 9, columns=2, positions=6).cast(torch.float32)
    kernels: Kernels = KINDS[kind](case.samples())
    V, U = random_matrix(9, 1, 0), random_matrix(12, 1, 1)
    for step, given in ((kernels.left_step, V), (kernels.right_step, U)):
        single, double = step(given.float()), step(given.float().double())
        assert single.dtype == torch.float64
        assert_close(as_numpy(single), as_numpy(double), SINGLE)


# ---------------------------------------------------------------- the plan, and memory


def layer(count: int, positions: int, m: int, n: int, columns: int = 1) -> kp.GradientSamples:
    """Samples of a given shape that hold no memory of their own."""
    d = torch.zeros(1, 1, 1, 1).expand(count, columns, positions, m)
    a = torch.zeros(1, 1, 1).expand(count, positions, n)
    return kp.GradientSamples.from_factors(d, a)


def test_few_positions_of_a_wide_layer_never_form_matrices() -> None:
    ways = ways_of(kernels_for(layer(128, 8, 1024, 1024)))
    assert ways == dict.fromkeys(OPERATIONS, "factors")


def test_norm_turns_to_matrices_before_half_steps_do() -> None:
    ways = ways_of(kernels_for(layer(128, 64, 256, 256)))
    assert ways["pairs"] == "matrices"
    assert ways["left"] == ways["right"] == ways["forms"] == "factors"


def test_positions_beyond_both_sides_turn_all_to_matrices() -> None:
    ways = ways_of(kernels_for(layer(64, 1024, 32, 64)))
    assert ways == dict.fromkeys(OPERATIONS, "matrices")


@pytest.mark.parametrize(("m", "n"), [(256, 256), (1024, 256), (512, 2048)])
def test_norm_turns_near_the_crossover(m: int, n: int) -> None:
    crossover = (m * n / (m + n)) ** 0.5
    turned = next(
        t for t in range(2, 400) if ways_of(kernels_for(layer(128, t, m, n)))["pairs"] == "matrices"
    )
    assert crossover / 2 <= turned <= 2 * crossover


def test_plan_says_the_way_of_each_sum() -> None:
    text = str(kp.SecondMoment(layer(128, 64, 256, 256)).plan())
    for operation in OPERATIONS:
        assert operation in text
    assert "matrices" in text
    assert "factors" in text


class Allocations(TorchDispatchMode):
    """The largest result of any operation, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        self.largest = max([self.largest, *(size // 8 for size in sizes)])
        return out


@pytest.mark.parametrize("operation", ["left", "right", "forms", "pairs", "diagonal"])
def test_sums_of_a_shared_layer_stay_in_their_chunks(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor as large as the matrices, or as the samples in float64."""
    elements = 1 << 14
    monkeypatch.setattr(gram, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(matrix_kernels, "HELD_BYTES", 0)
    count, t, m, n = 64, 4, 96, 80
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(count, t, m, generator=generator)
    a = torch.randn(count, t, n, generator=generator)
    kernels = kernels_for(kp.GradientSamples.from_factors(d, a))
    left, right = random_matrix(m, 1, 0), random_matrix(n, 1, 1)
    calls = {
        "left": lambda: kernels.left_step(right),
        "right": lambda: kernels.right_step(left),
        "forms": lambda: kernels.quadratic_forms(left, right),
        "pairs": kernels.pair_products,
        "diagonal": lambda: kernels.projected_diagonal(left, right),
    }
    with Allocations() as seen:
        calls[operation]()
    assert 0 < seen.largest <= 4 * elements < count * m * n
    assert seen.largest < count * t * (m + n) or operation == "pairs"
