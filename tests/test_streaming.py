"""Captures from loaders against one-shot captures, in memory and through files."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kronecker_probe as kp
from kronecker_probe.errors import (
    InvalidInputError,
    MemoryBudgetError,
    NonFiniteError,
    RunDirectoryError,
    UnknownNameError,
    UnsupportedError,
)
from kronecker_probe.gradients import loader as streaming

# The same float64 sums in another order.
EXACT = 1e-12

Pair = tuple[Tensor, Tensor]


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return model, torch.randn(23, 5, dtype=torch.float64), torch.randint(4, (23,))


def conv() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    return model, torch.randn(11, 2, 4, 4, dtype=torch.float64), torch.randint(3, (11,))


def per_token() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def sequences(*lengths: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(3, length, 3, generator=generator, dtype=torch.float64),
            torch.randint(4, (3, length), generator=generator),
        )
        for length in lengths
    ]


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.movedim(-1, 1), targets)


def loader(inputs: Tensor, targets: Tensor, size: int = 5) -> DataLoader[Pair]:
    return DataLoader(TensorDataset(inputs, targets), batch_size=size)


def same_moment(one: kp.GradientSamples, other: kp.GradientSamples) -> None:
    H, K = kp.SecondMoment(one), kp.SecondMoment(other)
    difference = H.norm() ** 2 - 2 * H.inner(K) + K.norm() ** 2
    assert abs(difference) <= EXACT * H.norm() ** 2
    assert torch.allclose(H.left_factor.matrix, K.left_factor.matrix, rtol=EXACT, atol=EXACT)
    assert torch.allclose(H.right_factor.matrix, K.right_factor.matrix, rtol=EXACT, atol=EXACT)
    x = torch.randn(one.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(H.apply(x), K.apply(x), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("target", ["ggn", "empirical-fisher"])
@pytest.mark.parametrize("make", [mlp, conv])
def test_a_loader_equals_one_shot(make, target: str, spill: bool, tmp_path: Path):
    model, inputs, targets = make()
    loss = nn.CrossEntropyLoss()
    once = kp.capture(model, loss, (inputs, targets), target=target)
    found = kp.capture_loader(
        model, loss, loader(inputs, targets), target=target, spill_to=tmp_path if spill else None
    )
    assert list(found) == list(once)
    assert found.loss == pytest.approx(once.loss, rel=EXACT)
    assert found.accuracy == pytest.approx(once.accuracy, rel=EXACT)
    assert (found.target, dict(found.skipped)) == (target, dict(once.skipped))
    for name in once:
        assert found[name].n_examples == len(targets)
        assert torch.equal(found[name].weights, once[name].weights)
        same_moment(found[name], once[name])


def test_a_sum_stays_a_sum():
    model, inputs, targets = mlp()
    loss = nn.CrossEntropyLoss(reduction="sum")
    once = kp.capture(model, loss, (inputs, targets))
    found = kp.capture_loader(model, loss, loader(inputs, targets))
    assert found.loss == pytest.approx(once.loss, rel=EXACT)
    for name in once:
        same_moment(found[name], once[name])


def test_regression_has_no_accuracy():
    model, inputs, _ = mlp()
    found = kp.capture_loader(model, nn.MSELoss(), [(inputs, torch.zeros(23, 4).double())])
    assert found.accuracy is None


def test_sampled_labels_differ_from_batch_to_batch_and_come_back():
    model, inputs, targets = mlp()
    pair = inputs, targets
    loss = nn.CrossEntropyLoss()
    found = kp.capture_loader(model, loss, [pair, pair], target="fisher", seed=3, label_draws=2)
    again = kp.capture_loader(model, loss, [pair, pair], target="fisher", seed=3, label_draws=2)
    once = kp.capture(model, loss, pair, target="fisher", seed=3, label_draws=2)
    for name in once:
        d = found[name].output_grads
        assert torch.equal(d, again[name].output_grads)
        assert torch.equal(d[:23], once[name].output_grads)
        assert not torch.equal(d[23:], d[:23])
        # K label draws weigh 1/(N K)
        assert found[name].weights.tolist() == pytest.approx([1 / (46 * 2)] * 46)


def test_sequences_of_different_lengths_are_padded_without_effect():
    model, batches = per_token(), sequences(2, 4, 3)
    found = kp.capture_loader(model, token_loss, batches, target="ggn", layers="*.weight")
    parts = [kp.capture(model, token_loss, batch, target="ggn") for batch in batches]
    for name in found:
        assert (found[name].n_positions, found[name].n_columns) == (4, 16)
        H = sum(kp.SecondMoment(part[name]).to_dense() for part in parts) / 3
        assert torch.allclose(kp.SecondMoment(found[name]).to_dense(), H, rtol=EXACT, atol=EXACT)


def test_files_are_those_of_memory_to_the_bit(tmp_path: Path):
    model, inputs, targets = mlp()
    model, inputs = model.bfloat16(), inputs.bfloat16()
    batches = list(loader(inputs, targets))
    in_memory = kp.capture_loader(model, nn.CrossEntropyLoss(), batches)
    in_files = kp.capture_loader(
        model, nn.CrossEntropyLoss(), batches, spill_to=tmp_path / "new" / "folder"
    )
    for name, one in in_memory.items():
        for held, mapped in zip(one.tensors, in_files[name].tensors, strict=True):
            assert held.dtype == mapped.dtype
            assert torch.equal(held, mapped)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere open files keep their names")
def test_nothing_is_left_in_the_directory(tmp_path: Path):
    model, inputs, targets = mlp()
    found = kp.capture_loader(
        model, nn.CrossEntropyLoss(), loader(inputs, targets), spill_to=tmp_path
    )
    assert list(tmp_path.iterdir()) == []
    assert kp.SecondMoment(found["0.weight"]).trace() > 0  # and yet readable
    broken = [(inputs, targets), (inputs, targets[:3])]
    with pytest.raises(InvalidInputError, match="Batch 1"):
        kp.capture_loader(model, nn.CrossEntropyLoss(), broken, spill_to=tmp_path)
    assert list(tmp_path.iterdir()) == []


BOUNDED = """
    import resource, sys, torch
    from torch import nn
    import kronecker_probe as kp
    from kronecker_probe.gradients import streaming

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(800, 900), nn.ReLU(), nn.Linear(900, 4))
    data = lambda: ((torch.randn(200, 800), torch.randint(4, (200,))) for _ in range(250))
    run = lambda **more: kp.capture_loader(
        model, nn.CrossEntropyLoss(), data(), target="empirical-fisher", layers="*.weight", **more
    )
    kp.SecondMoment(run(max_batches=1)["2.weight"], "parameter").trace()  # imports, pools
    used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status")
                if line.startswith("VmData"))
    limit = used + (320 << 20)  # private memory; file pages do not count
    # (a chunk of the kernels takes 32 MB, and several are alive at once)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    found = run(spill_to=sys.argv[1])
    held = sum(one.nbytes for one in found.values())
    assert held > 1.5 * (320 << 20), held
    print(found["0.weight"].n_examples, kp.SecondMoment(found["2.weight"], "parameter").trace())
    try:
        run()
    except RuntimeError as error:
        print("memory ran out")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_files_need_memory_for_one_batch_only(tmp_path: Path):
    """Under a limit of 320 MB above the start, 500 MB of samples are captured and read."""
    code = textwrap.dedent(BOUNDED)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("50000 ")
    assert "memory ran out" in done.stdout


def test_what_would_not_fit_is_refused_with_bytes_and_remedy(monkeypatch: pytest.MonkeyPatch):
    model, inputs, targets = mlp()
    once = kp.capture(model, nn.CrossEntropyLoss(), (inputs[:5], targets[:5]))
    one_batch = sum(samples.nbytes for samples in once.values())
    calls: list[int] = []

    def falling(device: torch.device) -> float:
        calls.append(1)
        return 4.5 * one_batch - len(calls) * one_batch

    monkeypatch.setattr(streaming, "available_bytes", falling)
    with pytest.raises(MemoryBudgetError, match=r"2 batches hold .* GB.*spill_to.*max_batches=2"):
        kp.capture_loader(model, nn.CrossEntropyLoss(), loader(inputs, targets))


def test_a_generator_is_read_once_and_no_further_than_asked():
    model, inputs, targets = mlp()
    taken = []

    def generate() -> Iterator[Pair]:
        for index in range(5):
            taken.append(index)
            yield inputs[:4], targets[:4]

    batches = generate()
    found = kp.capture_loader(model, nn.CrossEntropyLoss(), batches, max_batches=2)
    assert found["0.weight"].n_examples == 8
    assert taken == [0, 1]
    rest = kp.capture_loader(model, nn.CrossEntropyLoss(), batches)
    assert rest["0.weight"].n_examples == 12
    with pytest.raises(InvalidInputError, match=r"no batches.*used up"):
        kp.capture_loader(model, nn.CrossEntropyLoss(), batches)


class Sometimes(nn.Module):
    """The second layer is skipped where the first input is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + self.second(x) if float(x[0, 0]) > 0 else y


def test_a_parameter_that_one_batch_does_not_measure_is_skipped_with_the_reason(tmp_path: Path):
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    loss = nn.CrossEntropyLoss()
    for batches in ([(x, y), (-x, y), (x, y)], [(-x, y), (x, y)]):
        for spill in (None, tmp_path):
            found = kp.capture_loader(Sometimes(), loss, batches, layers="*.weight", spill_to=spill)
            assert list(found) == ["first.weight"]
            assert "unused" in found.skipped["second.weight"]
    found = kp.capture_loader(Sometimes(), loss, [(x, y), (-x, y)], layers="*.weight")
    assert "in batch 1" in found.skipped["second.weight"]


class OneOrOther(Sometimes):
    def forward(self, x: Tensor) -> Tensor:
        return (self.first if float(x[0, 0]) > 0 else self.second)(x)


def test_no_parameter_is_left():
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(InvalidInputError, match=r"in every batch: first.weight in batch 1: unused"):
        kp.capture_loader(OneOrOther(), nn.CrossEntropyLoss(), [(x, y), (-x, y)], layers="*.weight")


def test_bad_loaders(tmp_path: Path):
    model, inputs, targets = mlp()
    loss = nn.CrossEntropyLoss()
    good = inputs, targets
    nan = inputs * torch.nan, targets
    for data, error, said in [
        ([], InvalidInputError, "yielded no batches"),
        (3, InvalidInputError, "The data are a int"),
        ([good, inputs], InvalidInputError, "Batch 1 of the loader: .* Tensor"),
        ([good, (inputs,)], InvalidInputError, "Batch 1 of the loader.*tuple of 1 parts"),
        (iter([(inputs, targets, targets)]), InvalidInputError, "Batch 0.*tuple of 3 parts"),
        ([good, (inputs, targets[:3])], InvalidInputError, "Batch 1 of the loader"),
        ([good, (inputs[:0], targets[:0])], InvalidInputError, "Batch 1 of the loader.*empty"),
        ([good, nan], NonFiniteError, "Batch 1 of the loader"),
        ({"inputs": inputs}, InvalidInputError, "Batch 0 of the loader"),
    ]:
        for spill in (None, tmp_path) if not isinstance(data, Iterator) else (None,):
            with pytest.raises(error, match=said):
                kp.capture_loader(model, loss, data, spill_to=spill)
    for most in (0, -1, 1.5, True):
        with pytest.raises(InvalidInputError, match="max_batches"):
            kp.capture_loader(model, loss, [good], max_batches=most)
    with pytest.raises(UnknownNameError, match=r"^Unknown target"):
        kp.capture_loader(model, loss, [good], target="gnn")
    with pytest.raises(UnknownNameError, match=r"option of a capture 'layer'.*mean 'layers'"):
        kp.capture_loader(model, loss, [good], layer="*")


def test_files_need_one_shape(tmp_path: Path):
    with pytest.raises(UnsupportedError, match=r"Batch 1 .*'0.weight'.*pad the sequences"):
        kp.capture_loader(per_token(), token_loss, sequences(2, 4), spill_to=tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    model, inputs, targets = mlp()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"file.*another spill_to"):
        kp.capture_loader(
            model, nn.CrossEntropyLoss(), [(inputs, targets)], spill_to=tmp_path / "file"
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, inputs, targets = mlp()
    opened = open
    monkeypatch.setattr(
        streaming, "open", lambda path, mode: opened("/dev/full", mode), raising=False
    )
    with pytest.raises(RunDirectoryError, match=r"No space left on device.*Free space"):
        kp.capture_loader(model, nn.CrossEntropyLoss(), loader(inputs, targets), spill_to=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_model_itself_names_its_batch() -> None:
    model = torch.nn.Linear(3, 2)
    good = torch.randn(4, 3), torch.randint(2, (4,))
    with pytest.raises(RuntimeError) as caught:
        kp.capture(model, torch.nn.functional.cross_entropy, [good, (good[0].double(), good[1])])
    assert any("batch 1" in note for note in caught.value.__notes__)
