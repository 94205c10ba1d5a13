"""Checkpoints that execute no code when opened: one safetensors file, JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.tracking.files import write_atomically

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and JSON scalars, whole or not at all.

    Args:
        path: The file.
        state: For example ``{"model": model.state_dict(), "optimizer": ..., "step": 20}``.

    Raises:
        InvalidInputError: A leaf that is none of these.
        RunDirectoryError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors)
    data = safetensors.torch.save(tensors, metadata={"tree": json.dumps(tree)})
    write_atomically(path, data)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; tensors come back on the CPU.

    Raises:
        InvalidInputError: The file is missing, damaged, or was not written here.
    """
    if not path.is_file():
        raise InvalidInputError(f"There is no checkpoint {path}; give an existing file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"Cannot read the checkpoint {path}: {error}.") from error
    if "tree" not in metadata:
        raise InvalidInputError(
            f"{path} is no checkpoint of kronecker-probe (no tree in its header)."
        )
    state: dict[str, Any] = _decode(json.loads(metadata["tree"]), tensors)
    return state


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # a copy of its own: safetensors refuses shared storage, which tied weights have
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, dict):
        pairs = [
            [k, _encode(v, f"{name}.{k}" if name else str(k), tensors)] for k, v in value.items()
        ]
        return {_ITEMS: pairs}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InvalidInputError(
        f"Cannot store {name!r} of type {type(value).__name__} in a checkpoint."
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    return {key: _decode(item, tensors) for key, item in value[_ITEMS]}
