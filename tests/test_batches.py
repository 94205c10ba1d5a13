"""Second moments of mini-batch mean gradients, against the enumeration of all batches."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, MemoryBudgetError, UnsupportedError
from kronecker_probe.gradients.samples.base import (
    EmbeddingSamples,
    FactoredSamples,
    GradientSamples,
    MatrixSamples,
)
from tests import oracle

# Sums of a few hundred float64 products, relative to the norm of the result.
EXACT = 1e-12
# Standard errors by which a Monte Carlo mean may be off; 300 entries at 5 sigma: one in 6,000.
SIGMAS = 5.0

Case = tuple[kp.GradientSamples, np.ndarray]


def samples_of(form: str, count: int, rng: np.random.Generator) -> Case:
    """Samples with a mean that is not zero, and their matrices [N, m, n]."""
    m, n = (2, 3) if form != "wide" else (12, 40)
    if form == "tokens":
        tokens = torch.from_numpy(rng.integers(0, m, (count, 4)))
        d = torch.from_numpy(rng.standard_normal((count, 4, n)) + 0.5)
        samples = GradientSamples.from_embedding(tokens, d, m, None)
        onehot = np.eye(m)[tokens.numpy()]
        return samples, np.einsum("itv,itd->ivd", onehot, d.numpy())
    if form == "matrices":
        G = rng.standard_normal((count, m, n)) + 1.0
        return kp.GradientSamples.from_matrices(torch.from_numpy(G)), G
    positions = 3 if form == "shared" else 1
    d = rng.standard_normal((count, positions, m)) + 0.5
    a = rng.standard_normal((count, positions, n)) + 0.5
    if form == "wide":  # the mean has rank 2, so that factors stay the smaller form
        d[..., 2:] = 0
    G = oracle.columns(d, a)[:, 0]
    return kp.GradientSamples.from_factors(torch.from_numpy(d), torch.from_numpy(a)), G


def dense(samples: kp.GradientSamples) -> np.ndarray:
    return oracle.second_moment(samples.matrices().numpy(), samples.weights.numpy())


def expectation(batches: list[tuple[int, ...]], probabilities: list[float], G: np.ndarray):
    means = np.stack([G[list(batch)].mean(axis=0) for batch in batches])
    return oracle.second_moment(means[:, None], np.asarray(probabilities))


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert oracle.norm(actual - expected) <= EXACT * oracle.norm(expected)


FORMS = ("unshared", "shared", "matrices", "wide", "tokens")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_with_replacement_equals_all_batches(form: str, size: int, rng: np.random.Generator):
    samples, G = samples_of(form, 4, rng)
    batches = list(itertools.product(range(4), repeat=size))
    expected = expectation(batches, [1 / len(batches)] * len(batches), G)
    close(dense(kp.batch_gradients(samples, size)), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_without_replacement_equals_all_subsets(form: str, size: int, rng: np.random.Generator):
    samples, G = samples_of(form, 5, rng)
    batches = list(itertools.combinations(range(5), size))
    expected = expectation(batches, [1 / len(batches)] * len(batches), G)
    close(dense(kp.batch_gradients(samples, size, replacement=False)), expected)


def test_data_are_drawn_in_proportion_to_their_weights(rng: np.random.Generator):
    plain, G = samples_of("shared", 4, rng)
    weights = torch.tensor([0.3, 0.0, 1.2, 0.5], dtype=torch.float64)
    samples = plain.with_tensors(plain.tensors, weights)
    shares = (weights / weights.sum()).numpy()
    batches = list(itertools.product(range(4), repeat=3))
    expected = expectation(batches, [math.prod(shares[i] for i in b) for b in batches], G)
    close(dense(kp.batch_gradients(samples, 3)), expected)


def test_one_datum_is_its_own_batch(rng: np.random.Generator):
    samples, _ = samples_of("shared", 1, rng)
    for options in ({"batch_size": 1, "replacement": False}, {"batch_size": 7}):
        close(dense(kp.batch_gradients(samples, **options)), dense(samples))


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("form", ["unshared", "shared", "matrices", "tokens"])
def test_drawn_batches_converge_to_the_exact_expectation(
    form: str, replacement: bool, rng: np.random.Generator
):
    samples, _ = samples_of(form, 6, rng)
    exact = dense(kp.batch_gradients(samples, 3, replacement=replacement))
    drawn = kp.batch_gradients(samples, 3, batches=4000, seed=1, replacement=replacement)
    g = drawn.matrices()[:, 0].flatten(1).numpy()
    products = g[:, :, None] * g[:, None, :]
    stderr = products.std(axis=0) / math.sqrt(len(g))
    assert np.all(np.abs(products.mean(axis=0) - exact) <= SIGMAS * stderr + EXACT)
    # and the noise is small enough for the comparison to mean something
    assert oracle.norm(stderr) < 0.1 * oracle.norm(exact)


def markers(count: int, columns: int) -> kp.GradientSamples:
    """G_ic has a single 1, at (i, c), so that a batch mean counts its members."""
    d = torch.zeros(count, columns, columns, count, dtype=torch.float64)
    for i in range(count):
        for c in range(columns):
            d[i, c, c, i] = 1
    a = torch.eye(columns, dtype=torch.float64).expand(count, columns, columns)
    return kp.GradientSamples.from_factors(d, a.contiguous())


@pytest.mark.parametrize("size", [2, 5])
def test_batches_hold_what_they_should(size: int):
    drawn = kp.batch_gradients(markers(7, 1), size, batches=50, replacement=False)
    counts = (size * drawn.matrices()[:, 0, :, 0]).numpy()
    assert counts == pytest.approx(np.round(counts), abs=EXACT)
    assert set(np.round(counts).ravel()) == {0, 1}  # no datum twice
    assert counts.sum(axis=1) == pytest.approx(np.full(50, size))
    with_replacement = kp.batch_gradients(markers(7, 1), size, batches=200)
    counts = (size * with_replacement.matrices()[:, 0, :, 0]).numpy()
    assert counts.sum(axis=1) == pytest.approx(np.full(200, size))
    assert counts.max() > 1 + EXACT  # some datum twice
    assert not np.allclose(counts[0], counts[1:])


def test_factors_and_matrices_hold_the_same_batches(rng: np.random.Generator):
    wide, G = samples_of("wide", 6, rng)
    factored = kp.batch_gradients(wide, 3, batches=20, seed=4)
    matrices = kp.batch_gradients(kp.GradientSamples.from_matrices(torch.from_numpy(G)), 3, 20, 4)
    assert isinstance(factored, FactoredSamples)
    assert isinstance(matrices, MatrixSamples)
    close(factored.matrices().numpy(), matrices.matrices().numpy())
    other = kp.batch_gradients(wide, 3, batches=20, seed=5)
    assert not torch.equal(other.matrices(), factored.matrices())


def test_tokens_stay_tokens_where_that_is_smaller(rng: np.random.Generator):
    tokens = torch.from_numpy(rng.integers(0, 50, (6, 2)))
    d = torch.from_numpy(rng.standard_normal((6, 2, 8)))
    samples = GradientSamples.from_embedding(tokens, d, 50, None)
    drawn = kp.batch_gradients(samples, 3, batches=20, seed=4)
    assert isinstance(drawn, EmbeddingSamples)
    as_matrices = kp.GradientSamples.from_matrices(samples.matrices())
    close(drawn.matrices().numpy(), kp.batch_gradients(as_matrices, 3, 20, 4).matrices().numpy())


def test_the_smaller_exact_form_is_taken(rng: np.random.Generator):
    assert isinstance(kp.batch_gradients(samples_of("wide", 4, rng)[0], 2), FactoredSamples)
    assert isinstance(kp.batch_gradients(samples_of("unshared", 4, rng)[0], 2), MatrixSamples)


def test_batches_of_the_same_data_are_no_independent_draws(rng: np.random.Generator):
    samples, _ = samples_of("unshared", 4, rng)
    assert not kp.batch_gradients(samples, 2).independent
    assert not kp.batch_gradients(samples, 2, batches=3).independent
    assert not kp.batch_gradients(samples, 2).subset([0, 1]).independent


# ---------------------------------------------------------------- on models


CLASSES = 3


def network() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    inputs = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    return model, inputs, torch.tensor([0, 2, 1, 0])


def gradient(model: nn.Module, name: str, inputs: Tensor, labels: Tensor) -> np.ndarray:
    loss = F.cross_entropy(model(inputs), labels)
    return torch.autograd.grad(loss, dict(model.named_parameters())[name])[0].numpy()


def test_true_labels_equal_the_gradients_of_all_actual_batches():
    model, inputs, labels = network()
    capture = kp.capture(model, nn.CrossEntropyLoss(), (inputs, labels), target="empirical-fisher")
    for size in (2, 3):
        batches = [list(b) for b in itertools.combinations(range(4), size)]
        found = kp.batch_gradients(capture, size, replacement=False)
        assert found.target == "batch-gradient"
        for name in ("0.weight", "2.weight"):
            G = np.stack([gradient(model, name, inputs[b], labels[b]) for b in batches])
            expected = oracle.second_moment(G[:, None], np.full(len(G), 1 / len(G)))
            close(dense(found[name]), expected)


def test_sampled_labels_give_gauss_newton_over_batch_size():
    """All pairs of data with all pairs of labels, by the model's probabilities."""
    model, inputs, labels = network()
    loss = nn.CrossEntropyLoss()
    probabilities = model(inputs).softmax(dim=1).detach()
    ggn = kp.capture(model, loss, (inputs, labels), target="ggn")
    for name in ("0.weight", "2.weight"):
        total: float | np.ndarray = 0.0
        for batch in itertools.product(range(4), repeat=2):
            for drawn in itertools.product(range(CLASSES), repeat=2):
                pairs = list(zip(batch, drawn, strict=True))
                chance = math.prod(float(probabilities[i, s]) for i, s in pairs) / 4**2
                g = gradient(model, name, inputs[list(batch)], torch.tensor(drawn))
                total = total + oracle.second_moment(g[None, None], np.array([chance]))
        assert isinstance(total, np.ndarray)
        close(total, dense(ggn[name]) / 2)
    # which is what the capture of sampled labels gives, for its own estimate of Gauss-Newton
    fisher = kp.capture(model, loss, (inputs, labels), target="fisher", label_draws=5)
    for replacement in (True, False):
        found = kp.batch_gradients(fisher, 2, replacement=replacement)
        for name in ("0.weight", "2.weight"):
            close(dense(found[name]), dense(fisher[name]) / 2)
            assert found[name].independent


def test_label_draws_are_members_of_batches_each_on_its_own():
    model, inputs, labels = network()
    capture = kp.capture(model, nn.CrossEntropyLoss(), (inputs, labels), target="fisher")
    capture = dataclasses.replace(capture, samples={"a": markers(4, 3), "b": markers(4, 3)})
    drawn = kp.batch_gradients(capture, 2, batches=300)
    counts = 2 * drawn["a"].matrices()[:, 0]
    assert torch.equal(counts, counts.round())
    assert torch.equal(counts.sum(dim=(1, 2)), torch.full((300,), 2.0, dtype=torch.float64))
    chosen = counts.mean(dim=0)
    # 12 equally likely pairs, binomial with 600 trials
    assert float((chosen - 1 / 6).abs().max()) < SIGMAS * math.sqrt(1 / 6 / 300)
    assert torch.equal(drawn["b"].matrices(), drawn["a"].matrices())  # the same batches


def test_a_capture_keeps_what_it_knows():
    model, inputs, labels = network()
    capture = kp.capture(model, nn.CrossEntropyLoss(), (inputs, labels), target="empirical-fisher")
    found = kp.batch_gradients(capture, 3, batches=5, replacement=False)
    assert (found.loss, found.accuracy) == (capture.loss, capture.accuracy)
    assert dict(found.skipped) == dict(capture.skipped)
    assert "batches of 3 without replacement" in found.note
    assert found["0.weight"].weights.tolist() == [1 / 5] * 5
    assert set(kp.compare(found).table["target"].dropna()) == {"batch-gradient"}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"batch_size": 0}, InvalidInputError, "batch_size=0"),
        ({"batch_size": 2.5}, InvalidInputError, "batch_size=2.5"),
        ({"batch_size": True}, InvalidInputError, "batch_size=True"),
        ({"batch_size": 2, "batches": 0}, InvalidInputError, "batches=0"),
        ({"batch_size": 5, "replacement": False}, InvalidInputError, "from 4 examples"),
        ({"batch_size": 2, "batches": 10**13}, MemoryBudgetError, "GB"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], said: str, rng: np.random.Generator):
    samples, _ = samples_of("matrices", 4, rng)
    with pytest.raises(error, match=said):
        kp.batch_gradients(samples, **options)


def test_draws_that_are_no_gradients_of_data(rng: np.random.Generator):
    model, inputs, labels = network()
    ggn = kp.capture(model, nn.CrossEntropyLoss(), (inputs, labels))
    samples, _ = samples_of("unshared", 4, rng)
    with pytest.raises(UnsupportedError, match="target='ggn'"):
        kp.batch_gradients(ggn, 2)
    with pytest.raises(UnsupportedError, match="3 columns"):
        kp.batch_gradients(ggn["2.weight"], 2)
    with pytest.raises(UnsupportedError, match="independent"):
        kp.batch_gradients(kp.batch_gradients(samples, 2), 2)
    with pytest.raises(InvalidInputError, match="a dict"):
        kp.batch_gradients({"a": samples}, 2)
    unequal = samples.with_tensors(samples.tensors, torch.arange(4.0).double())
    with pytest.raises(InvalidInputError, match="unequal weights"):
        kp.batch_gradients(unequal, 2, replacement=False)
    with pytest.raises(InvalidInputError, match="zero"):
        kp.batch_gradients(samples.with_tensors(samples.tensors, 0 * samples.weights), 2)
