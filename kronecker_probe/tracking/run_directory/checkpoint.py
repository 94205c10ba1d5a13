"""Checkpoints that execute no code when opened: one safetensors file, JSON in its header."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.tracking.run_directory.files import shown, write_atomically

_TENSOR, _COMPLEX, _TUPLE, _ITEMS = "__tensor__", "__complex__", "__tuple__", "__items__"
# what every supported version of safetensors holds; complex tensors go in as pairs of reals
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and JSON scalars, whole or not at all.

    The keys of dicts are strings or integers. Tensors are stored under their path in the tree,
    for example "model.0.weight", and a checksum of their contents beside them.

    Args:
        path: The file.
        state: For example ``{"model": model.state_dict(), "optimizer": ..., "step": 20}``.

    Raises:
        InvalidInputError: A leaf or a key that is none of these.
        RunDirectoryError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, "", tensors))
    metadata = {"tree": tree, "checksum": _checksum(tree, tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata), inside=path.parent)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; tensors come back on the CPU.

    Raises:
        InvalidInputError: The file is missing, damaged, or was not written here.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise InvalidInputError(
            f"There is no checkpoint {shown(path)}: it {what}; give an existing file."
        )

    def refuse(why: object, error: Exception | None = None) -> NoReturn:
        raise InvalidInputError(f"Cannot read the checkpoint {shown(path)}: {why}.") from error

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        refuse(error, error)
    if not {"tree", "checksum"} <= metadata.keys():
        refuse("it is none of kronecker-probe (no tree in its header)")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            refuse(f"tensor {name!r} is of {tensor.dtype}")
    # safetensors checks only lengths: a flipped bit would come back as another weight
    if metadata["checksum"] != _checksum(metadata["tree"], tensors):
        refuse("its checksum does not match")
    try:
        state = _decode(json.loads(metadata["tree"]), tensors)
    except RecursionError as error:
        refuse("its values are nested too deep", error)
    except ValueError as error:
        refuse(f"its tree is damaged ({error})", error)
    if not isinstance(state, dict):
        refuse(f"its tree is a {type(state).__name__}, not a dict")
    return state


def _checksum(tree: str, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.is_complex():
            return {_COMPLEX: _put(torch.view_as_real(value.resolve_conj()), name, tensors)}
        return {_TENSOR: _put(value, name, tensors)}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise InvalidInputError(
                    f"Cannot store the key {key!r} of {name or 'the state'} in a checkpoint; "
                    "keys are strings or integers."
                )
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


def _put(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    """Add a tensor under its path, or under a longer name where another one has that path."""
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
        raise InvalidInputError(
            f"Cannot store {name!r}, {tensor.dtype}, {tensor.layout}, in a checkpoint; "
            "convert it to a dense tensor of another dtype."
        )
    while name in tensors or name in ("", "__metadata__"):  # the last is safetensors' own
        name += "'"
    # a copy of its own: safetensors refuses shared storage, which tied weights have
    tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return name


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that :func:`_encode` wrote.

    Raises:
        ValueError: It cannot have written this.
    """
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"an entry with the keys {sorted(value)}")
    ((kind, held),) = value.items()
    if kind in (_TENSOR, _COMPLEX):
        if not isinstance(held, str) or held not in tensors:
            raise ValueError(f"there is no tensor {held!r}")
        tensor = tensors[held]
        return tensor if kind == _TENSOR else _as_complex(held, tensor)
    if kind not in (_TUPLE, _ITEMS) or not isinstance(held, list):
        raise ValueError(f"an entry {kind!r} of a {type(held).__name__}")
    if kind == _TUPLE:
        return tuple(_decode(item, tensors) for item in held)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in held):
        raise ValueError("a dict that is no list of pairs")
    keys = [key for key, _ in held]
    # 1 and True are one key
    if not all(type(key) in (str, int) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError(f"a dict with the keys {keys}")
    return {key: _decode(item, tensors) for key, item in held}


def _as_complex(name: str, tensor: Tensor) -> Tensor:
    try:
        return torch.view_as_complex(tensor)
    except RuntimeError as error:
        raise ValueError(f"tensor {name!r}, {tensor.dtype}, is no pair of reals") from error
