"""One capture from a data loader of any length, in memory or in memory-mapped files."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from kronecker_probe.errors import (
    InvalidInputError,
    KroneckerProbeError,
    MemoryBudgetError,
    RunDirectoryError,
    UnknownNameError,
    UnsupportedError,
    unknown_name,
)
from kronecker_probe.gradients.capture import Request, capture_batch, check_model
from kronecker_probe.gradients.coverage import Capture
from kronecker_probe.gradients.losses import LossFunction
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.gradients.samples.checks import check_count
from kronecker_probe.linalg.memory import available_bytes
from kronecker_probe.table.codes import Reason, ReasonCode

# Steps of the seed from one batch to the next, so that seeds of neighbouring runs never meet.
_SEED_STEP = 1_000_003


def capture_loader(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int = 0,
    spill_to: str | Path | None = None,
    max_batches: int | None = None,
    **options: Any,
) -> Capture:
    """Capture every batch of a loader; one set of samples with weights over all N examples.

    The result is that of ``kp.capture`` on all examples at once. Each batch is moved to the model's
    device and read once, so a generator will do. What a loss normalizes within a batch (by
    class weights, or by the labels that are not ignored) it normalizes within each batch here.
    The loss and the accuracy are means over the examples.

    With ``spill_to`` the samples go to memory-mapped files as they come, on the CPU: any length in
    bounded memory. The files vanish with the samples; on POSIX systems their names are gone at
    once, so that a killed process leaves nothing behind.

    Args:
        model: As for ``kp.capture``, like ``loss_fn``.
        loss_fn: A mean or a sum over examples.
        loader: Yields (inputs, targets). Batches of other sizes are welcome; other numbers of
            shared positions or columns are padded with zeros, in memory only.
        seed: Of the sampled labels; batch k takes seed + 1,000,003 k (k = 0 as ``kp.capture``).
        spill_to: Directory for the files, which is made if it is not there; None: in memory.
        max_batches: Stop after so many.
        **options: The other options of ``kp.capture``.

    Returns:
        A parameter is measured if every batch measures it; else the reason names the batch.

    Raises:
        InvalidInputError: No batches, or one that is malformed; the message says which.
        UnknownNameError: An option that ``kp.capture`` does not have.
        MemoryBudgetError: The next batch would not fit in memory.
        UnsupportedError: Batches of different positions or columns with ``spill_to``.
        RunDirectoryError: The directory cannot be written, or the disk is full.
    """
    known = [field.name for field in dataclasses.fields(Request)]
    for name in options:
        if name not in known:
            raise unknown_name("option of a capture", name, [*known, "spill_to", "max_batches"])
    request = Request(seed=seed, **options)
    check_model(model, loss_fn)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    held: _Memory | _Files = _Memory(device) if spill_to is None else _Files(Path(spill_to))
    whole = _Whole(held)
    try:
        for index, batch in enumerate(_batches(loader, max_batches)):
            held.require(index)
            seeded = dataclasses.replace(request, seed=(request.seed + index * _SEED_STEP) % 2**63)
            with _named(index):
                part = capture_batch(model, loss_fn, _to(batch, device), seeded)
            whole.add(index, part)
        return whole.capture()
    finally:
        held.close()


@contextlib.contextmanager
def _named(index: int) -> Iterator[None]:
    """Errors say which batch they come from; wrong options are of none."""
    try:
        yield
    except UnknownNameError:
        raise
    except KroneckerProbeError as error:
        raise type(error)(f"Batch {index} of the loader: {error}") from error
    except Exception as error:  # of the model or the loss itself
        error.add_note(f"In batch {index} of the loader.")
        raise


class _Whole:
    """What all batches together measured, in the making."""

    def __init__(self, held: _Memory | _Files) -> None:
        self.held = held
        self.parts: list[Capture] = []  # without their samples
        self.sizes: list[int] = []
        self.names: list[str] = []
        self.skipped: dict[str, str] = {}

    def add(self, index: int, part: Capture) -> None:
        """One more batch: a parameter must be measured in each of them."""
        self.names = self.names if self.parts else list(part)
        for name in [name for name in self.names if name not in part]:
            why = part.skipped.get(name, "not measured")
            code = getattr(why, "code", ReasonCode.NOT_MEASURABLE)
            self.skipped.setdefault(name, Reason(f"in batch {index}: {why}", code))
        kept = {n: s for n, s in part.items() if n in self.names and n not in self.skipped}
        self.held.add(index, kept)
        self.sizes.append(next(iter(part.values())).n_examples)
        self.parts.append(dataclasses.replace(part, samples={}))

    def capture(self) -> Capture:
        """The first batch's capture with the samples, the loss and the accuracy of all."""
        if not self.parts:
            raise InvalidInputError(
                "The loader yielded no batches; give data, or a new generator if it was used up."
            )
        names = [name for name in self.names if name not in self.skipped]
        if not names:
            reasons = "; ".join(f"{name} {reason}" for name, reason in self.skipped.items())
            raise InvalidInputError(f"No parameter is measured in every batch: {reasons}.")
        total = sum(self.sizes)
        samples = self.held.samples(names, [size / total for size in self.sizes])
        fallback = {name: reason for part in self.parts for name, reason in part.fallback.items()}
        losses = [part.loss for part in self.parts]
        accuracies = [part.accuracy for part in self.parts if part.accuracy is not None]
        first = self.parts[0]
        return dataclasses.replace(
            first,
            samples=samples,
            skipped={**first.skipped, **self.skipped},
            fallback={name: reason for name, reason in fallback.items() if name in samples},
            loss=math.fsum(losses) if first.reduction == "sum" else _mean(losses, self.sizes),
            accuracy=_mean(accuracies, self.sizes) if len(accuracies) == len(self.parts) else None,
        )


def _batches(
    loader: Iterable[tuple[Tensor, Tensor]], most: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    if most is not None:
        check_count("max_batches", most)
    try:
        return itertools.islice(loader, most)
    except TypeError:
        raise InvalidInputError(
            f"The data are a {type(loader).__name__}; give a pair (inputs, targets), or an "
            "iterable of such pairs (a DataLoader)."
        ) from None


def _to(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """A pair on the device; anything else as it is, for capture to refuse."""
    if isinstance(batch, (tuple, list)) and all(isinstance(part, Tensor) for part in batch):
        return tuple(part.to(device) for part in batch)  # type: ignore[return-value]
    return batch


def _mean(values: list[float], sizes: list[int]) -> float:
    return math.fsum(v * size / sum(sizes) for v, size in zip(values, sizes, strict=True))


class _Memory:
    """The captured batches, stacked at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: dict[str, list[GradientSamples]] = {}
        self._last = 0

    def require(self, index: int) -> None:
        """Refuse a batch that would not fit, with room for the copy of the largest layer."""
        layers = [sum(part.nbytes for part in parts) for parts in self._parts.values()]
        needed, free = self._last + max(layers, default=0), available_bytes(self._device)
        if needed > free:
            raise MemoryBudgetError(
                f"{index} batches hold {sum(layers) / 1e9:.2f} GB; the next one needs "
                f"{needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on {self._device}. Give "
                f"spill_to=<a directory>, fewer layers, or max_batches={index}."
            )

    def add(self, index: int, samples: dict[str, GradientSamples]) -> None:
        self._last = sum(one.nbytes for one in samples.values())
        for name, one in samples.items():
            self._parts.setdefault(name, []).append(one)

    def samples(self, names: list[str], scales: list[float]) -> dict[str, GradientSamples]:
        # each layer's parts go before the next layer is stacked, so that only one exists twice
        return {name: GradientSamples.stack(self._parts.pop(name), scales) for name in names}

    def close(self) -> None:
        self._parts.clear()


class _Files:
    """One file for each tensor of each parameter, appended to batch by batch."""

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="samples-", dir=directory))
        except OSError as error:
            raise _not_written(directory, error) from error
        self._files: dict[str, list[IO[bytes]]] = {}
        self._first: dict[str, GradientSamples] = {}
        self._weights: dict[str, list[Tensor]] = {}

    def require(self, index: int) -> None:
        """Memory holds one batch at a time, for which ``kp.capture`` checks."""

    def add(self, index: int, samples: dict[str, GradientSamples]) -> None:
        try:
            for name, one in samples.items():
                if name not in self._first:
                    self._open(name, one)
                self._check(index, name, one)
                for file, tensor in zip(self._files[name], one.tensors, strict=True):
                    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                    file.write(raw.numpy().data)
                self._weights[name].append(one.weights.cpu())
        except OSError as error:
            raise _not_written(self._folder, error) from error

    def _open(self, name: str, samples: GradientSamples) -> None:
        number = len(self._files)
        self._files[name] = [
            open(self._folder / f"{number}-{place}", "wb")  # noqa: SIM115
            for place in range(len(samples.tensors))
        ]
        self._first[name] = samples.subset(slice(0, 1)).to("cpu")
        self._weights[name] = []

    def _check(self, index: int, name: str, samples: GradientSamples) -> None:
        known = self._first[name]
        seen = [_form(one) for one in (samples, known)]
        if seen[0] != seen[1]:
            raise UnsupportedError(
                f"Batch {index} of the loader gives {name!r} {seen[0]}, the first one gave "
                f"{seen[1]}. With spill_to they must agree: pad the sequences to one length, or "
                "do without spill_to."
            )

    def samples(self, names: list[str], scales: list[float]) -> dict[str, GradientSamples]:
        found: dict[str, GradientSamples] = {}
        for name in names:
            weights = [w * scale for w, scale in zip(self._weights[name], scales, strict=True)]
            count = sum(map(len, weights))
            tensors = []
            for file, held in zip(self._files[name], self._first[name].tensors, strict=True):
                try:
                    file.close()
                except OSError as error:
                    raise _not_written(self._folder, error) from error
                shape = (count, *held.shape[1:])
                size = math.prod(shape)
                tensor = torch.from_file(file.name, shared=True, size=size, dtype=held.dtype)
                tensors.append(tensor.view(shape))
            found[name] = self._first[name].with_tensors(tensors, torch.cat(weights))
        return found

    def close(self) -> None:
        """Remove the names of the files; what is mapped stays readable until it is let go."""
        for file in itertools.chain.from_iterable(self._files.values()):
            with contextlib.suppress(OSError):  # what cannot be flushed is deleted anyway
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._folder.exists():  # a system that keeps files which are in use
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)


def _form(samples: GradientSamples) -> str:
    shapes = ", ".join(f"{t.dtype} {['N', *t.shape[1:]]}" for t in samples.tensors)
    return f"{type(samples).__name__} of {shapes}".replace("'", "").replace("torch.", "")


def _not_written(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"Cannot write gradient samples to {path}: {error.strerror or error}. Free space there, "
        "or choose another spill_to."
    )
