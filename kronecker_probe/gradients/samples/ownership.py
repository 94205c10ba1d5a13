"""Samples that hold memory of their own, and not that of the model they were measured on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kronecker_probe.gradients.samples.base import GradientSamples


def owned(samples: Mapping[str, GradientSamples]) -> dict[str, GradientSamples]:
    """The samples, with copies of all tensors whose storage is held elsewhere as well.

    A layer may read a buffer, a parameter, or a tensor that is kept in an attribute, in a cache
    or by a hook; whatever writes into it later would change the samples. Activations that only
    the samples are left to hold stay uncopied, and samples share memory as before.

    Args:
        samples: Whose graph is gone, so that it holds no activations.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    holders: dict[int, dict[int, Tensor]] = {}
    for one in samples.values():
        for tensor in one.tensors:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            # a view keeps the tensor that it is a view of, which is a holder too
            both = {id(t): t for t in (tensor, tensor._base) if t is not None}
            holders.setdefault(storage._cdata, {}).update(both)
    # the Python object of the storage is one more
    foreign = {key for key in storages if _use_count(key) > len(holders[key]) + 1}
    copies: dict[tuple[object, ...], Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in foreign:
            return tensor
        place = (key, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        if place not in copies:
            copies[place] = tensor.clone(memory_format=torch.contiguous_format)
        return copies[place]

    return {
        name: one.with_tensors([own(tensor) for tensor in one.tensors], one.weights)
        for name, one in samples.items()
    }


def _use_count(storage: int) -> int:
    """How many hold a storage, given by its address."""
    return torch._C._storage_Use_Count(storage)
