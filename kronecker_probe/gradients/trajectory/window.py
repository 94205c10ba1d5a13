"""The gradients of a run as a target: AdaGrad's sum, or full-matrix Adam's average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import pandas as pd
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kronecker_probe.errors import InvalidInputError, NonFiniteError, UnsupportedError
from kronecker_probe.gradients.layers.base import matrix_shape
from kronecker_probe.gradients.parameters import Parameters, chosen_parameters
from kronecker_probe.gradients.samples.base import GradientSamples
from kronecker_probe.gradients.trajectory.budget import check_window, parse_bytes, plan_ranks
from kronecker_probe.gradients.trajectory.buffers import DenseRing, FactoredRing, Ring, energies
from kronecker_probe.linalg.memory import require_memory

# Share of |G|^2 that rounding leaves of an exact factorization: a hundred eps, squared.
_ROUNDINGS = 100


@dataclass
class _Track:
    """One parameter: its ring, and what was recorded of it."""

    parameter: Tensor
    shape: tuple[int, int]
    ring: Ring
    steps: int = 0
    total: float = 0.0  # Tr H_Ada over all steps
    energy: list[float] = field(default_factory=list)  # |G|^2 of each slot
    dropped: list[float] = field(default_factory=list)  # and what its form lacks


@final
class GradientWindow:
    r"""The last gradients of a run, whose second moment the optimizer's factors approximate.

    H_Ada = sum_t g_t g_t^T (AdaGrad), or with ``decay`` the average A <- beta A + (1 - beta) g g^T
    of full-matrix Adam: gradients weigh 1, or (1 - beta) beta^age. There is no bias correction:
    the weights of an average sum to 1 - beta^t, and dividing by that corrects it.

    Call :meth:`update` after ``backward()`` and before ``optimizer.step()``, or :meth:`attach`
    it to the optimizer. It reads ``.grad`` and writes nothing, so that training stays bitwise the
    same; accumulation, all-reduce, unscaling and clipping are in what it records if they came
    before. That is why factors are found from the gradient and not hooked from the layers. A
    parameter without a gradient is left alone in that step, as optimizers do: its gradients keep
    their age.

    Forms: "dense" keeps matrices. "factored" keeps thin factors of ``rank`` terms that must hold
    the gradient exactly (a batch of B examples gives an unshared layer rank B at most). "low-rank"
    keeps the ``rank`` leading singular vectors and reports the energy they drop. Both leave
    matrices whole that are not larger. "auto" is dense if ``memory`` allows, else low-rank at the
    largest rank that fits.

    Args:
        parameters: A model, an optimizer, named parameters or parameters; those that require a
            gradient are recorded, as the m x n matrices of ``kp.capture``.
        size: Gradients to keep.
        form: "auto", "dense", "low-rank" or "factored".
        decay: beta, the optimizer's second one; None for a sum.
        memory: What the window may take: bytes, or a string like "1GB" or "512MiB".
        rank: Terms of "low-rank" and "factored".
        layers: Glob, or several, of parameter names.

    Raises:
        InvalidInputError: An option out of range or without effect, or nothing to record.
        UnknownNameError: No such form, or a glob that matches nothing.
        MemoryBudgetError: The window takes more than ``memory``, or than is free; the message
            gives the bytes and a size that fits.
    """

    def __init__(
        self,
        parameters: Parameters,
        size: int = 200,
        form: str = "auto",
        decay: float | None = None,
        memory: str | int = "1GB",
        rank: int | None = None,
        layers: str | Sequence[str] = "*",
    ) -> None:
        check_window(size, form, decay, rank)
        self.size = size
        self.form = form
        self.decay = decay
        chosen = chosen_parameters(parameters, layers)
        costs = {name: (matrix_shape(p), p.dtype) for name, p in chosen.items()}
        ranks = plan_ranks(costs, size, form, rank, parse_bytes(memory), chosen.values())
        self._tracks: dict[str, _Track] = {}
        for name, parameter in chosen.items():
            shape = costs[name][0]
            if ranks[name]:
                ring: Ring = FactoredRing(size, shape, ranks[name], parameter)
            else:
                ring = DenseRing(size, shape, parameter)
            track = _Track(parameter, shape, ring)
            track.energy, track.dropped = [0.0] * size, [0.0] * size
            self._tracks[name] = track
        self.calls = 0

    @torch.no_grad()
    def update(self) -> None:
        """Record the gradients that the parameters hold now.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity; nothing was recorded. (A gradient
                scaler skips the optimizer's step then, and with it an attached window.)
            UnsupportedError: A sparse gradient, or with "factored" one of a higher rank.
        """
        active = [
            (name, track, track.parameter.grad)
            for name, track in self._tracks.items()
            if track.parameter.grad is not None
        ]
        for name, track, gradient in active:
            if gradient.layout != torch.strided:
                raise UnsupportedError(
                    f"The gradient of {name!r} is {gradient.layout}; use sparse=False in its "
                    "layer, or leave it out by layers=."
                )
            if gradient.dtype != track.parameter.dtype:
                raise UnsupportedError(
                    f"The gradient of {name!r} is {gradient.dtype} and the parameter "
                    f"{track.parameter.dtype}; leave it out by layers=."
                )
        squares = energies([gradient for _, _, gradient in active])
        for (name, _, _), energy in zip(active, squares, strict=True):
            if not math.isfinite(energy):
                raise NonFiniteError(
                    f"The gradient of {name!r} holds NaN or infinity, or its norm overflows. "
                    "Nothing was recorded: skip this step, or attach the window to the optimizer."
                )
        encoded = [
            track.ring.encode(gradient.reshape(track.shape)) for _, track, gradient in active
        ]
        if self.form == "factored":
            for (name, track, _), (_, dropped), energy in zip(
                active, encoded, squares, strict=True
            ):
                _check_exact(name, track, dropped, energy)
        keep, weight = (1.0, 1.0) if self.decay is None else (self.decay, 1 - self.decay)
        for (_, track, _), (parts, dropped), energy in zip(active, encoded, squares, strict=True):
            slot = track.steps % self.size
            track.ring.store(slot, parts)
            track.energy[slot], track.dropped[slot] = energy, dropped
            track.total = keep * track.total + weight * energy
            track.steps += 1
        self.calls += 1

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Record at every ``optimizer.step()``, just before it, what the optimizer will see.

        Returns:
            A handle; ``remove()`` detaches, and so does leaving it as a context manager.

        Raises:
            UnsupportedError: In a step with a closure, whose gradients come too late.
        """

        def hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs.get("closure") is not None or any(callable(value) for value in args[1:]):
                raise UnsupportedError(
                    "optimizer.step(closure) makes its gradients inside; call window.update() at "
                    "the end of the closure instead of attaching the window."
                )
            self.update()

        return optimizer.register_step_pre_hook(hook)

    def samples(self) -> dict[str, GradientSamples]:
        """The samples of every parameter that had a gradient, oldest first, copied.

        Returns:
            Name to samples with weights 1, or (1 - beta) beta^age, not ``independent``, with the
            :attr:`dropped_energy` of their low rank.

        Raises:
            InvalidInputError: No gradient was recorded.
            MemoryBudgetError: The copies would not fit.
        """
        held = {name: track for name, track in self._tracks.items() if track.steps}
        if not held:
            raise InvalidInputError(
                f"No gradient was recorded in {self.calls} calls of update(); call it after "
                "backward() and before zero_grad()."
            )
        found, dropped = {}, self.dropped_energy
        for name, track in held.items():
            ring = track.ring
            device = ring.tensors[0].device
            count = min(track.steps, self.size)
            require_memory(ring.nbytes * count / self.size, f"A copy of {count} gradients", device)
            found[name] = ring.samples(self._slots(track).to(device), self._weights(track, device))
            found[name].dropped_energy = dropped[name]
        return found

    def _slots(self, track: _Track) -> Tensor:
        first = max(0, track.steps - self.size)
        return torch.arange(first, track.steps) % self.size

    def _ordered(self, track: _Track, values: list[float]) -> Tensor:
        """One number per gradient in the window, oldest first, float64."""
        return torch.tensor(values, dtype=torch.float64)[self._slots(track)]

    def _weights(self, track: _Track, device: torch.device | str = "cpu") -> Tensor:
        count = min(track.steps, self.size)
        if self.decay is None:
            return torch.ones(count, dtype=torch.float64, device=device)
        age = torch.arange(count - 1, -1, -1, dtype=torch.float64, device=device)
        return (1 - self.decay) * self.decay**age

    @property
    def truncated_weight(self) -> dict[str, float]:
        """Weight of the gradients older than the window, by parameter.

        For a sum their number, t - size; for an average beta^size - beta^t, of 1 - beta^t in all.
        """
        found = {}
        for name, track in self._tracks.items():
            older = max(0, track.steps - self.size)
            if self.decay is None:
                found[name] = float(older)
            else:
                found[name] = self.decay ** (track.steps - older) - self.decay**track.steps
        return found

    @property
    def truncated_energy(self) -> dict[str, float]:
        """Share of Tr H_Ada that the gradients older than the window had, by parameter."""
        found = {}
        for name, track in self._tracks.items():
            inside = float(self._weights(track) @ self._ordered(track, track.energy))
            older = track.steps > self.size and track.total > 0
            found[name] = max(0.0, 1.0 - inside / track.total) if older else 0.0
        return found

    @property
    def dropped_energy(self) -> dict[str, float]:
        """Share of the window's Tr H_Ada that low rank leaves out, by parameter."""
        found = {}
        for name, track in self._tracks.items():
            weights = self._weights(track)
            energy = float(weights @ self._ordered(track, track.energy))
            dropped = float(weights @ self._ordered(track, track.dropped))
            found[name] = dropped / energy if energy > 0 else 0.0
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the window."""
        return sum(track.ring.nbytes for track in self._tracks.values())

    @property
    def coverage(self) -> pd.DataFrame:
        """One row per parameter: form, rank, steps seen and kept, and what is left out."""
        weight, energy, dropped = self.truncated_weight, self.truncated_energy, self.dropped_energy
        rows = [
            {"parameter": name, "shape": f"{t.shape[0]} x {t.shape[1]}",
             "form": "factors" if t.ring.rank else "dense", "rank": t.ring.rank or None,
             "steps": t.steps, "held": min(t.steps, self.size), "truncated_weight": weight[name],
             "truncated_energy": energy[name], "dropped_energy": dropped[name],
             "bytes": t.ring.nbytes}
            for name, t in self._tracks.items()
        ]  # fmt: skip
        return pd.DataFrame(rows).astype({"rank": "Int64"})

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: tensors, and JSON values."""
        parameters = {}
        for name, track in self._tracks.items():
            slots = self._slots(track)
            parameters[name] = {
                "steps": track.steps,
                "rank": track.ring.rank,
                "total": track.total,
                "energy": self._ordered(track, track.energy),
                "dropped": self._ordered(track, track.dropped),
                "tensors": [tensor[slots.to(tensor.device)] for tensor in track.ring.tensors],
            }
        return {
            "size": self.size, "decay": self.decay, "calls": self.calls, "parameters": parameters,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a window with the same parameters and options.

        Raises:
            InvalidInputError: It is of another window; nothing was changed.
        """
        self._check_state(state)
        for name, saved in state["parameters"].items():
            track = self._tracks[name]
            track.steps, track.total = int(saved["steps"]), float(saved["total"])
            slots = self._slots(track)
            for place, slot in enumerate(slots.tolist()):
                track.energy[slot] = float(saved["energy"][place])
                track.dropped[slot] = float(saved["dropped"][place])
            for tensor, rows in zip(track.ring.tensors, saved["tensors"], strict=True):
                tensor[slots.to(tensor.device)] = rows.to(tensor)
        self.calls = int(state["calls"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        for option in ("size", "decay"):
            if state.get(option) != getattr(self, option):
                raise InvalidInputError(
                    f"The saved window has {option}={state.get(option)!r}, this one "
                    f"{option}={getattr(self, option)!r}; make it with the same options."
                )
        saved = state["parameters"]
        if list(saved) != list(self._tracks):
            raise InvalidInputError(
                f"The saved window records {', '.join(saved)}, and this one "
                f"{', '.join(self._tracks)}; make it with the same parameters."
            )
        for name, track in self._tracks.items():
            shapes = [list(tensor.shape[1:]) for tensor in track.ring.tensors]
            found = [list(tensor.shape[1:]) for tensor in saved[name]["tensors"]]
            if found != shapes:
                raise InvalidInputError(
                    f"The saved window holds {name!r} as {found}, this one as {shapes}: another "
                    "shape, form, rank or memory."
                )

    def __repr__(self) -> str:
        kind = "sum" if self.decay is None else f"decay={self.decay:g}"
        return (
            f"GradientWindow({len(self._tracks)} parameters, size={self.size}, {kind}, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )


def _check_exact(name: str, track: _Track, dropped: float, energy: float) -> None:
    eps = torch.finfo(track.ring.tensors[0].dtype).eps
    if dropped > (_ROUNDINGS * eps) ** 2 * energy:
        raise UnsupportedError(
            f"The gradient of {name!r} has a rank above rank={track.ring.rank}: "
            f"{dropped / energy:.1e} of its squared norm is left over. Nothing was recorded. Raise "
            "the rank to the batch size (times the shared positions), or use form='low-rank' or "
            "'dense'."
        )
