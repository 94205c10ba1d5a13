"""Windows of gradients against dense sums, the recursion of an average, and Shampoo's factors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from kronecker_probe.gradients.trajectory.buffers import truncated
from kronecker_probe.gradients.trajectory.truncation import truncate
from kronecker_probe.tracking.run_directory.checkpoint import load_checkpoint, save_checkpoint
from tests import oracle
from tests.tiny_training import assert_same_tree

# Float64 sums of the same terms in another order, relative to the result.
EXACT = 1e-12
# Float32 factors of float32 gradients.
SINGLE = 1e-5


def parameter(m: int, n: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.zeros(m, n, dtype=dtype))


def run(window: kp.GradientWindow, p: nn.Parameter, gradients: np.ndarray) -> None:
    for g in gradients:
        p.grad = torch.from_numpy(g).to(p.dtype)
        window.update()


def dense(samples: kp.GradientSamples) -> np.ndarray:
    return oracle.second_moment(samples.matrices().numpy(), samples.weights.numpy())


def average(gradients: np.ndarray, beta: float) -> np.ndarray:
    """A <- beta A + (1 - beta) g g^T from zero."""
    size = gradients[0].size
    A = np.zeros((size, size))
    for g in gradients:
        A = beta * A + (1 - beta) * np.outer(g.reshape(-1), g.reshape(-1))
    return A


def total(gradients: np.ndarray) -> np.ndarray:
    return sum(np.outer(g.reshape(-1), g.reshape(-1)) for g in gradients)


@pytest.mark.parametrize("steps", [1, 5, 6, 13])
@pytest.mark.parametrize("decay", [None, 0.9, 0.5])
def test_the_moment_of_a_window(steps: int, decay: float | None, rng: np.random.Generator):
    p = parameter(4, 3)
    window = kp.GradientWindow([("w", p)], size=6, decay=decay)
    gradients = rng.standard_normal((steps, 4, 3))
    run(window, p, gradients)
    held, older = gradients[-6:], gradients[:-6]
    # the last gradients' part of the recursion: it starts at zero before the oldest one
    expected = total(held) if decay is None else average(held, decay)
    samples = window.samples()["w"]
    assert oracle.norm(dense(samples) - expected) <= EXACT * oracle.norm(expected)
    assert not samples.independent
    # what is left out, against the whole run
    whole = total(gradients) if decay is None else average(gradients, decay)
    share = 1 - np.trace(expected) / np.trace(whole)
    assert window.truncated_energy["w"] == pytest.approx(share, abs=EXACT)
    weight = len(older) if decay is None else 1 - decay**steps - float(samples.weights.sum())
    assert window.truncated_weight["w"] == pytest.approx(weight, abs=EXACT)
    if decay is not None and steps > 6:
        assert window.truncated_weight["w"] == pytest.approx(decay**6 - decay**steps, abs=EXACT)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 4)
    ).double()


def batch(step: int, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (size,), generator=generator)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, between: Callable[[], None]
) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        between()
        optimizer.step()


@pytest.mark.parametrize(("statistics", "decay"), [("average", 0.9), ("sum", None)])
def test_the_partial_traces_are_the_factors_of_shampoo(statistics: str, decay: float | None):
    model = network()
    optimizer = kp.optim.Shampoo(
        model.named_parameters(), lr=0.1, betas=(0.0, 0.9), statistics={"accumulate": statistics}
    )
    window = kp.GradientWindow(model, size=30, decay=decay)
    with window.attach(optimizer):
        train(model, optimizer, range(20), lambda: None)
    samples = window.samples()
    assert list(samples) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        H = kp.SecondMoment(samples[name])
        state = optimizer.state[p]
        for side, factor in enumerate((H.left_factor, H.right_factor)):
            if f"factor_{side}" in state:
                (expected,) = state[f"factor_{side}"]  # of its only block
                error = torch.linalg.matrix_norm(factor.matrix - expected)
                assert float(error) <= EXACT * float(torch.linalg.matrix_norm(expected))
    assert {"factor_0", "factor_1"} <= optimizer.state[model[3].weight].keys()


@pytest.mark.parametrize("options", [{}, {"form": "low-rank", "rank": 2}])
def test_training_stays_bitwise_the_same(options: dict):
    plain, watched = network(), network()
    for model, window in ((plain, None), (watched, kp.GradientWindow(watched, 4, **options))):
        torch.manual_seed(1)
        optimizer = kp.optim.Shampoo(model.named_parameters(), lr=0.1, basis={"frequency": 2})
        train(model, optimizer, range(6), window.update if window else lambda: None)
        model.random = torch.rand(3)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)
    assert torch.equal(plain.random, watched.random)


# ---------------------------------------------------------------- low rank


def test_low_rank_is_the_best_one_and_says_what_it_drops(rng: np.random.Generator):
    p = parameter(9, 14)
    window = kp.GradientWindow([("w", p)], size=4, form="low-rank", rank=3, decay=0.8)
    gradients = rng.standard_normal((7, 9, 14))
    run(window, p, gradients)
    samples = window.samples()["w"]
    assert samples.n_positions == 3
    assert window.nbytes == 4 * 3 * (9 + 14) * 8
    weights = 0.2 * 0.8 ** np.arange(3, -1, -1)
    tails = []
    for g, held in zip(gradients[-4:], samples.matrices()[:, 0].numpy(), strict=True):
        u, s, vt = np.linalg.svd(g)
        best = (u[:, :3] * s[:3]) @ vt[:3]
        assert oracle.norm(held - best) <= EXACT * oracle.norm(g) * 1e3  # gaps of singular values
        tails.append(float(np.sum(s[3:] ** 2)))
    share = weights @ tails / (weights @ np.sum(gradients[-4:] ** 2, axis=(1, 2)))
    assert window.dropped_energy["w"] == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("shape", [(300, 280), (270, 400)])
def test_large_matrices_by_random_projections(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    exact = draw(shape[0], 5) @ draw(5, shape[1])
    before = torch.get_rng_state()
    d, a = truncated(exact, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.linalg.norm(d.T @ a - exact) <= EXACT * torch.linalg.norm(exact)
    # a decaying spectrum, as gradients have: within 2% of the best error
    u, v = torch.linalg.qr(draw(*shape)).Q, torch.linalg.qr(draw(*shape[::-1])).Q
    k = min(shape)
    values = torch.arange(1, k + 1, dtype=torch.float64) ** -1.0
    g = (u[:, :k] * values) @ v[:, :k].T
    d, a = truncated(g, 10)
    best = float(values[10:].square().sum().sqrt())
    assert float(torch.linalg.norm(d.T @ a - g)) <= 1.02 * best


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factors_of_batch_gradients_are_exact(dtype: torch.dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 12)).to(dtype)
    dense_window = kp.GradientWindow(model, size=5)
    factored = kp.GradientWindow(model, size=5, form="factored", rank=3)
    for _ in range(7):
        model.zero_grad()
        x = torch.randn(3, 30, dtype=dtype)
        nn.functional.mse_loss(model(x), torch.randn(3, 12, dtype=dtype)).backward()
        dense_window.update()
        factored.update()
    assert factored.nbytes < dense_window.nbytes
    tolerance = EXACT if dtype == torch.float64 else SINGLE
    whole, thin = dense_window.samples(), factored.samples()
    assert (thin["0.weight"].n_positions, thin["0.bias"].n_positions) == (3, None)
    for name in whole:
        expected = dense(whole[name])
        assert oracle.norm(dense(thin[name]) - expected) <= tolerance * oracle.norm(expected)
    assert max(factored.dropped_energy.values()) <= tolerance**2


def test_factors_refuse_a_higher_rank_and_record_nothing(rng: np.random.Generator):
    first, second = parameter(8, 9), parameter(8, 9)
    window = kp.GradientWindow({"a": first, "b": second}, size=2, form="factored", rank=2)
    low = rng.standard_normal((4, 8, 2)) @ rng.standard_normal((4, 2, 9))
    for g in low[:3]:
        first.grad = second.grad = torch.from_numpy(g)
        window.update()
    before = copy.deepcopy(window.state_dict())
    first.grad = torch.from_numpy(low[3])
    second.grad = torch.from_numpy(rng.standard_normal((8, 9)))
    with pytest.raises(UnsupportedError, match=r"'b' has a rank above rank=2.*Nothing was"):
        window.update()
    assert_same_tree(window.state_dict(), before)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
@pytest.mark.parametrize("tolerance", [0.05, 0.4])
def test_truncation_keeps_all_but_a_share(
    shape: tuple[int, int], tolerance: float, rng: np.random.Generator
):
    G = rng.standard_normal((5, *shape)) * 0.5 ** np.arange(shape[1])
    weights = rng.random(5)
    samples = kp.GradientSamples.from_matrices(torch.from_numpy(G), weights.tolist())
    samples.independent = False
    found = truncate(samples, tolerance)
    dropped = found.dropped_energy
    u, s, vt = np.linalg.svd(G, full_matrices=False)
    shares = weights @ s**2 / (weights @ np.sum(s**2, axis=1))
    rank = found.n_positions
    assert dropped == pytest.approx(shares[rank:].sum(), rel=1e-9)
    assert shares[rank:].sum() <= tolerance < shares[rank - 1 :].sum()
    best = (u[:, :, :rank] * s[:, None, :rank]) @ vt[:, :rank]
    assert np.abs(found.matrices()[:, 0].numpy() - best).max() <= 1e-9 * np.abs(G).max()
    assert torch.equal(found.weights, samples.weights)
    assert not found.independent


def test_truncation_in_single_precision_is_as_good(rng: np.random.Generator):
    G = rng.standard_normal((5, 9, 14)) * 0.2 ** np.arange(14)
    single = kp.GradientSamples.from_matrices(torch.from_numpy(G).float())
    for tolerance in (1e-2, 1e-5):  # roughly, and not
        found = truncate(single, tolerance)
        expected = truncate(kp.GradientSamples.from_matrices(single.matrices()), tolerance)
        dropped, share = found.dropped_energy, expected.dropped_energy
        assert found.n_positions == expected.n_positions
        assert found.output_grads.dtype == torch.float32
        assert dropped == pytest.approx(share, rel=1e-4)
        error = float((found.matrices() - expected.matrices()).abs().max())
        assert error <= 10 * SINGLE * np.abs(G).max()


def test_truncation_leaves_alone_what_it_cannot_make_smaller(rng: np.random.Generator):
    flat = kp.GradientSamples.from_matrices(torch.eye(6).expand(3, 6, 6))
    assert truncate(flat, 1e-3) is flat
    zero = kp.GradientSamples.from_matrices(torch.zeros(3, 6, 6))
    assert truncate(zero, 1e-3) is zero
    columns = kp.GradientSamples.from_matrices(torch.ones(3, 2, 6, 6))
    assert truncate(columns, 1e-3) is columns
    low = kp.GradientSamples.from_matrices(torch.ones(3, 6, 6))
    assert truncate(low, 0.0) is low
    factors = truncate(low, 1e-9)
    dropped = factors.dropped_energy
    assert (factors.n_positions, dropped) == (1, pytest.approx(0.0, abs=1e-12))
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(InvalidInputError, match="tolerance="):
            truncate(low, bad)


# ---------------------------------------------------------------- memory


def test_auto_is_dense_where_that_fits_and_low_rank_where_not():
    p = {"big": parameter(40, 50), "small": parameter(3, 2), "bias": nn.Parameter(torch.zeros(7))}
    dense_bytes = 10 * (8 * (40 * 50 + 6) + 4 * 7)
    window = kp.GradientWindow(p, size=10, memory=dense_bytes)
    assert window.nbytes == dense_bytes
    assert set(window.coverage["form"]) == {"dense"}
    window = kp.GradientWindow(p, size=10, memory=dense_bytes - 1)
    coverage = window.coverage.set_index("parameter")
    assert coverage["form"].to_dict() == {"big": "factors", "small": "dense", "bias": "dense"}
    assert coverage.loc["big", "rank"] == 22  # the largest with r (40 + 50) < 40 50
    window = kp.GradientWindow(p, size=10, memory=dense_bytes // 4)
    rank = window.coverage.set_index("parameter").loc["big", "rank"]
    assert window.nbytes <= dense_bytes // 4 < window.nbytes + 10 * 8 * (40 + 50)
    assert 1 <= rank < 22
    assert window.coverage["bytes"].sum() == window.nbytes


@pytest.mark.parametrize("form", ["dense", "auto"])
def test_a_window_that_does_not_fit_says_bytes_and_a_size_that_does(form: str):
    p = [parameter(40, 50)]
    with pytest.raises(MemoryBudgetError, match=r"takes [\d.e+-]+ GB") as found:
        kp.GradientWindow(p, size=1000, form=form, memory="100 kB")
    size = int(re.search(r"size=(\d+) fits", str(found.value))[1])
    one = 8 * (2000 if form == "dense" else 90)
    assert size == 100_000 // one
    assert kp.GradientWindow(p, size=size, form=form, memory="100kB").nbytes <= 100_000
    with pytest.raises(MemoryBudgetError, match="not even one"):
        kp.GradientWindow(p, size=10, form=form, memory=100)
    with pytest.raises(MemoryBudgetError, match="GB free"):
        kp.GradientWindow(p, size=10**12, form=form, memory="1e9TB")


@pytest.mark.parametrize(
    ("said", "size"),
    [("100B", 100), ("2kB", 2000), ("1.5 MB", 1_500_000), ("1KiB", 1024), ("3000", 3000)],
)
def test_memory_by_units(said: str, size: int):
    p = [parameter(1, 1)]
    assert kp.GradientWindow(p, size=size // 8, memory=said).nbytes <= size
    with pytest.raises(MemoryBudgetError):
        kp.GradientWindow(p, size=size // 8 + 1, memory=said)


# ---------------------------------------------------------------- steps and gradients


def test_a_parameter_without_a_gradient_is_left_alone(rng: np.random.Generator):
    always, sometimes = parameter(3, 2), parameter(2, 2)
    window = kp.GradientWindow({"a": always, "s": sometimes}, size=5, decay=0.9)
    gradients = rng.standard_normal((4, 2, 2))
    for step in range(8):
        always.grad = torch.ones(3, 2, dtype=torch.float64)
        sometimes.grad = torch.from_numpy(gradients[step // 2]) if step % 2 == 0 else None
        window.update()
    samples = window.samples()
    assert (len(samples["a"]), len(samples["s"])) == (5, 4)
    expected = average(gradients, 0.9)
    assert oracle.norm(dense(samples["s"]) - expected) <= EXACT * oracle.norm(expected)
    assert window.coverage["steps"].tolist() == [8, 4]


def test_a_parameter_that_never_had_one_is_absent():
    p, q = parameter(2, 2), parameter(2, 2)
    window = kp.GradientWindow({"p": p, "q": q}, size=2)
    with pytest.raises(InvalidInputError, match="0 calls of update"):
        window.samples()
    window.update()
    with pytest.raises(InvalidInputError, match=r"1 calls of update.*zero_grad"):
        window.samples()
    p.grad = torch.ones_like(p)
    window.update()
    assert list(window.samples()) == ["p"]
    assert window.dropped_energy == {"p": 0.0, "q": 0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_gradients_that_are_not_finite_are_refused_whole(bad: float):
    p, q = parameter(2, 2), parameter(2, 2)
    window = kp.GradientWindow({"p": p, "q": q}, size=2)
    p.grad, q.grad = torch.ones_like(p), torch.full_like(q, bad)
    with pytest.raises(NonFiniteError, match=r"'q'.*Nothing was recorded"):
        window.update()
    assert window.coverage["steps"].tolist() == [0, 0]


def test_sparse_gradients_are_refused():
    layer = nn.Embedding(5, 2, sparse=True)
    window = kp.GradientWindow(layer, size=2)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse=False"):
        window.update()


def test_samples_are_copies(rng: np.random.Generator):
    for options in ({}, {"form": "low-rank", "rank": 1}):
        p = parameter(4, 5)
        window = kp.GradientWindow([p], size=3, **options)
        run(window, p, rng.standard_normal((3, 4, 5)))
        samples = window.samples()["0"]
        before = samples.matrices()
        run(window, p, rng.standard_normal((3, 4, 5)))
        assert torch.equal(samples.matrices(), before)
        assert not torch.equal(window.samples()["0"].matrices(), before)


def test_the_gradient_is_recorded_as_it_is_and_kept_so():
    p = parameter(2, 3)
    window = kp.GradientWindow([p], size=2)
    p.grad = torch.arange(6.0, dtype=torch.float64).reshape(3, 2).T  # not contiguous
    kept, version = p.grad, p.grad._version
    window.update()
    assert p.grad is kept
    assert p.grad._version == version
    assert torch.equal(window.samples()["0"].matrices()[0, 0], kept)


def test_half_precision_gradients_are_held_exactly():
    p = parameter(3, 4, torch.bfloat16)
    window = kp.GradientWindow([p], size=2)
    p.grad = torch.randn(3, 4).bfloat16()
    window.update()
    assert window.nbytes == 2 * 12 * 2
    assert torch.equal(window.samples()["0"].matrices()[0, 0], p.grad.double())


# ---------------------------------------------------------------- hooks


def test_an_attached_window_sees_every_step_until_it_is_removed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached, called = kp.GradientWindow(model, 9), kp.GradientWindow(model, 9)
    handle = attached.attach(optimizer)
    train(model, optimizer, range(3), called.update)
    assert_same_tree(attached.state_dict(), called.state_dict())
    handle.remove()
    train(model, optimizer, range(2), called.update)
    assert attached.coverage["steps"].tolist() == [3] * 6


def test_a_closure_is_refused():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    window = kp.GradientWindow(model)
    with window.attach(optimizer), pytest.raises(UnsupportedError, match="end of the closure"):
        optimizer.step(lambda: torch.tensor(0.0))
    with window.attach(optimizer), pytest.raises(UnsupportedError, match="end of the closure"):
        optimizer.step(closure=lambda: torch.tensor(0.0))


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("stop", [2, 4, 7])
@pytest.mark.parametrize("options", [{}, {"form": "low-rank", "rank": 1, "decay": 0.9}])
def test_a_resumed_window_is_the_same_to_the_bit(stop: int, options: dict, tmp_path: Path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = kp.GradientWindow(model, size=4, **options)
    train(model, optimizer, range(stop), window.update)
    save_checkpoint(tmp_path / "window", window.state_dict())
    resumed = kp.GradientWindow(model, size=4, **options)
    resumed.load_state_dict(load_checkpoint(tmp_path / "window"))

    def both() -> None:
        window.update()
        resumed.update()

    for count in (0, 1, 5):
        train(model, optimizer, range(count), both)
        assert_same_tree(resumed.state_dict(), window.state_dict())
        for name, one in window.samples().items():
            other = resumed.samples()[name]
            assert torch.equal(one.matrices(), other.matrices())
            assert torch.equal(one.weights, other.weights)
        assert resumed.coverage.equals(window.coverage)


def test_the_state_of_another_window_is_refused():
    model = network()
    window = kp.GradientWindow(model, size=4)
    for other, said in [
        (kp.GradientWindow(model, size=5), "size=5"),
        (kp.GradientWindow(model, size=4, decay=0.9), "decay=0.9"),
        (kp.GradientWindow(model, size=4, layers="*.weight"), "0.weight, 3.weight"),
        (kp.GradientWindow(model, size=4, form="low-rank", rank=1), "another shape, form"),
    ]:
        with pytest.raises(InvalidInputError, match=said):
            window.load_state_dict(other.state_dict())


# ---------------------------------------------------------------- options


def test_what_may_be_given():
    model = network()
    names = [name for name, _ in model.named_parameters()]
    numbered = [str(i) for i in range(6)]
    for given, expected in [
        (model, names),
        (model.parameters(), numbered),
        (model.named_parameters(), names),
        (dict(model.named_parameters()), names),
        (torch.optim.SGD(model.parameters(), lr=1.0), numbered),
        (kp.optim.Shampoo(model.named_parameters()), names),
    ]:
        assert kp.GradientWindow(given, 1).coverage["parameter"].tolist() == expected
    model[0].weight.requires_grad_(False)
    found = kp.GradientWindow(model, 1, layers=["0.*", "5.w*"]).coverage
    assert found["parameter"].tolist() == ["0.bias", "5.weight"]
    assert found["shape"].tolist() == ["3 x 1", "4 x 5"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"size": 0}, InvalidInputError, "size=0"),
        ({"size": 1.5}, InvalidInputError, "size=1.5"),
        ({"form": "thin"}, UnknownNameError, "form of a window 'thin'"),
        ({"decay": 1.0}, InvalidInputError, "decay=1.0"),
        ({"decay": 0}, InvalidInputError, "decay=0"),
        ({"rank": 3}, InvalidInputError, "'auto' has no use for rank=3"),
        ({"form": "low-rank"}, InvalidInputError, "'low-rank' needs a rank"),
        ({"form": "factored", "rank": 0}, InvalidInputError, "rank=0"),
        ({"memory": "much"}, InvalidInputError, "memory='much'"),
        ({"memory": "1.2.3GB"}, InvalidInputError, "1.2.3GB"),
        ({"memory": "1XB"}, InvalidInputError, "1XB"),
        ({"memory": 0}, InvalidInputError, "memory=0"),
        ({"memory": float("nan")}, InvalidInputError, "memory=nan"),
        ({"layers": "weights"}, UnknownNameError, "weights"),
        ({"layers": []}, InvalidInputError, "layers is empty"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        kp.GradientWindow(network(), **options)


def test_bad_parameters():
    model = network().requires_grad_(False)
    for given, error, said in [
        (model, InvalidInputError, "requires a gradient"),
        ([], InvalidInputError, "There is no parameter"),
        ([("a", parameter(1, 1)), ("a", parameter(1, 1))], InvalidInputError, "name 'a'"),
        ({"a": 3}, InvalidInputError, "'a' is a int"),
        (nn.LazyLinear(3), InvalidInputError, "not initialized"),
        ([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], UnsupportedError, "complex64"),
    ]:
        with pytest.raises(error, match=said):
            kp.GradientWindow(given)
