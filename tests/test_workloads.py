"""The built-in workloads, and what every workload does with its data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pydoc_data.topics import topics
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.workloads import WORKLOADS, load_workload

# name -> classes, train and test sizes, shape of an input, parameters
FLAT, IMAGE = (64,), (1, 8, 8)
DIGITS: dict[str, tuple[int, int, int, tuple[int, ...], int]] = {
    "digits-mlp": (10, 1438, 359, FLAT, 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10),
    "digits-logistic": (2, 286, 71, FLAT, 64 * 2 + 2),
    "digits-cnn": (10, 1438, 359, IMAGE, 9 * 16 + 16 + 9 * 16 * 32 + 32 + 512 * 10 + 10),
}
built_in = pytest.mark.parametrize("name", WORKLOADS)
of_digits = pytest.mark.parametrize("name", DIGITS)


def numbered(count: int) -> kp.Workload:
    """Data that carry their own number, so that a batch says which data are in it."""
    numbers = torch.arange(count)
    return kp.Workload(nn.Linear(1, 2), nn.MSELoss(), (numbers.view(-1, 1).float(), numbers))


def rows(inputs: Tensor) -> set[bytes]:
    return {row.tobytes() for row in inputs.numpy()}


# ---------------------------------------------------------------- digits


def test_every_built_in_workload_is_checked_here() -> None:
    assert set(WORKLOADS) == {*DIGITS, "pydoc-gpt"}


@of_digits
def test_shapes_types_and_ranges(name: str) -> None:
    classes, train, test, shape, size = DIGITS[name]
    workload = load_workload(name)
    assert workload.test is not None
    for (inputs, targets), count in ((workload.train, train), (workload.test, test)):
        assert inputs.shape == (count, *shape)
        assert inputs.dtype == torch.float32
        assert inputs.min() == 0.0
        assert inputs.max() == 1.0
        assert targets.shape == (count,)
        assert targets.dtype == torch.int64
        assert targets.unique().tolist() == list(range(classes))
    assert sum(p.numel() for p in workload.model.parameters()) == size
    outputs = workload.model(workload.train[0][:5])
    assert outputs.shape == (5, classes)
    assert bool(workload.loss_fn(outputs, workload.train[1][:5]).isfinite())
    assert workload.description


@of_digits
def test_the_data_are_the_digits_of_scikit_learn(name: str) -> None:
    digits = load_digits()
    classes = np.array([3, 8]) if name == "digits-logistic" else np.arange(10)
    expected = Counter(
        (row.astype(np.float32).tobytes(), int(np.searchsorted(classes, label)))
        for row, label in zip(digits.data / 16, digits.target, strict=True)
        if label in classes
    )
    workload = load_workload(name)
    assert workload.test is not None
    found = Counter(
        (row.tobytes(), int(label))
        for inputs, targets in (workload.train, workload.test)
        for row, label in zip(inputs.numpy(), targets, strict=True)
    )
    assert found == expected


@of_digits
def test_train_and_test_are_disjoint(name: str) -> None:
    workload = load_workload(name)
    assert workload.test is not None
    train, test = rows(workload.train[0]), rows(workload.test[0])
    assert len(train) == len(workload.train[0])  # no image is there twice
    assert not train & test


@built_in
def test_the_split_is_the_same_for_every_seed_and_the_model_is_not(name: str) -> None:
    first, again, other = load_workload(name, 0), load_workload(name, 0), load_workload(name, 1)
    for workload in (again, other):
        for mine, theirs in ((first.train, workload.train), (first.test, workload.test)):
            assert mine is not None
            assert theirs is not None
            assert all(map(torch.equal, mine, theirs))
    weights = [next(w.model.parameters()) for w in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_pydoc_gpt_predicts_the_next_byte_of_pythons_help_texts() -> None:
    workload = load_workload("pydoc-gpt")
    assert workload.test is not None
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    windows = []
    for inputs, targets in (workload.train, workload.test):
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        windows += [bytes(row) for row in inputs.tolist()]
    assert text.startswith(b"".join(windows))  # disjoint, in order, nothing left out but an end
    assert len(text) - len(b"".join(windows)) <= 64
    assert 0.08 < len(workload.test[0]) / len(windows) < 0.12


def test_pydoc_gpt_sees_only_the_past() -> None:
    workload = load_workload("pydoc-gpt")
    tokens = workload.train[0][:3].clone()
    before = workload.model(tokens)
    assert before.shape == (3, 64, 256)
    assert torch.allclose(
        workload.loss_fn(before, workload.train[1][:3]),
        -before.log_softmax(-1).gather(-1, workload.train[1][:3, :, None]).mean(),
    )
    tokens[:, 40] = (tokens[:, 40] + 1) % 256
    after = workload.model(tokens)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_the_generators_state_does_not_matter() -> None:
    torch.manual_seed(1)
    first = load_workload("digits-logistic", 3)
    torch.manual_seed(2)
    torch.rand(7)
    second = load_workload("digits-logistic", 3)
    assert torch.equal(first.model[0].weight, second.model[0].weight)


# ---------------------------------------------------------------- batches


@hypothesis.given(
    count=st.integers(1, 40),
    size=st.integers(1, 50),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 3),
)
def test_an_epoch_shows_every_datum_at_most_once(
    count: int, size: int, seed: int, epoch: int
) -> None:
    workload = numbered(count)
    taken = min(size, count)
    per_epoch = count // taken
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    batches = [workload.batch(step, size, seed) for step in steps]
    assert all(len(targets) == taken for _, targets in batches)
    seen = torch.cat([targets for _, targets in batches]).tolist()
    assert len(seen) == len(set(seen)) == per_epoch * taken
    assert count - len(seen) < taken  # only an incomplete batch is dropped
    for inputs, targets in batches:
        assert inputs.view(-1).tolist() == targets.tolist()  # pairs stay together


def test_epochs_come_in_another_order_each() -> None:
    workload = numbered(30)
    orders = {tuple(workload.batch(epoch, 30, 0)[1].tolist()) for epoch in range(20)}
    assert len(orders) == 20
    assert tuple(range(30)) not in orders


def test_over_many_epochs_every_datum_comes_equally_often() -> None:
    """Also those that an epoch drops: 10 data in batches of 4 leave out two, other ones each."""
    workload = numbered(10)
    counts = Counter(
        int(number) for step in range(2000) for number in workload.batch(step, 4, seed=1)[1]
    )
    # 1000 epochs, each shows a datum with probability 4/5: standard deviation 12.6
    assert all(abs(counts[number] - 800) < 5 * 12.6 for number in range(10))


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    workload = numbered(50)
    torch.manual_seed(0)
    first = [workload.batch(step, 8, 3)[1] for step in range(20)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    backwards = [workload.batch(step, 8, 3)[1] for step in reversed(range(20))]
    assert torch.equal(torch.get_rng_state(), before)  # and it takes nothing from the generator
    assert all(map(torch.equal, first, reversed(backwards)))
    other = [workload.batch(step, 8, 4)[1] for step in range(20)]
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_or_probe_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(InvalidInputError, match=f"batch size {size}"):
        numbered(5).batch(0, size)
    with pytest.raises(InvalidInputError, match=f"probe size {size}"):
        numbered(5).probe(size)


# ---------------------------------------------------------------- the probe set


@pytest.mark.parametrize("size", [1, 12, 50, 1000])
def test_the_probe_set_is_fixed_and_of_training_data(size: int) -> None:
    workload = numbered(50)
    inputs, targets = workload.probe(size, 7)
    assert inputs.view(-1).tolist() == targets.tolist()
    assert len(set(targets.tolist())) == len(targets) == min(size, 50)
    torch.rand(3)
    assert torch.equal(workload.probe(size, 7)[1], targets)
    if size > 1:
        assert not torch.equal(workload.probe(size, 8)[1], targets)


def test_a_larger_probe_set_holds_the_smaller_one() -> None:
    workload = numbered(50)
    assert torch.equal(workload.probe(30)[1][:12], workload.probe(12)[1])


# ---------------------------------------------------------------- workloads of one's own


def test_workloads_are_found_by_name_with_the_nearest_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'digits-mlp'.*digits-logistic"):
        load_workload("digit-mlp")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train": (torch.ones(3, 1), torch.ones(4))}, "Workload.train"),
        ({"train": (torch.ones(0, 1), torch.ones(0))}, "Workload.train"),
        ({"test": (torch.ones(3, 1),)}, "Workload.test"),
        ({"steps": 0}, "Workload.steps=0"),
        ({"batch_size": -1}, "Workload.batch_size=-1"),
    ],
)
def test_a_workload_that_cannot_be_trained_is_refused_by_field(
    change: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidInputError, match=told):
        dataclasses.replace(numbered(5), **change)
