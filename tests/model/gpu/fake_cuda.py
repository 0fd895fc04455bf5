"""A card without memory: tensors of shapes only, whose storage is counted as a card's would be."""

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
BLOCK = 512  # bytes the allocator rounds every tensor up to


class Memory(TorchDispatchMode):
    """Bytes of the card's storages: `live` now, and the most there were since `peak` was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class Answers(TorchFunctionMode):
    """What Python asks of tensors that have no values, and how it indexes them where torch was built without CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.numpy:
            return np.zeros(tuple(args[0].shape), np.int64)
        if func is Tensor.__bool__:
            return True
        if func is Tensor.to:
            return moved(*args, **(kwargs or {}))
        if func is Tensor.float:
            return moved(args[0], torch.float32)
        if func is Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.__getitem__:
            return indexed(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_.default(indexed(args[0], args[1]), args[2])
        return func(*args, **(kwargs or {}))


def moved(x: Tensor, *wanted: Any, **named: Any) -> Tensor:
    """x.to(...) by a single operator, for a device, a dtype or both."""
    given = [*wanted, *named.values()]
    device = next((torch.device(w) for w in given if isinstance(w, (str, torch.device))), x.device)
    dtype = next((w for w in given if isinstance(w, torch.dtype)), x.dtype)
    if (device.type, dtype) == (x.device.type, x.dtype):
        return x
    return torch.ops.aten._to_copy(x, dtype=dtype, device=device)


def indexed(x: Tensor, key: Any) -> Tensor:
    """x[key] by single operators, for keys of numbers, slices, None, ... and one tensor."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if ... in [k for k in keys if not isinstance(k, Tensor)]:
        at = next(i for i, k in enumerate(keys) if k is ...)
        given = sum(k is not None for k in keys) - 1
        keys[at : at + 1] = [slice(None)] * (x.dim() - given)
    dim = 0
    for k in keys:
        if isinstance(k, int):
            x = torch.ops.aten.select.int(x, dim, k)
            continue
        if k is None:
            x = x.unsqueeze(dim)
        elif isinstance(k, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, k.start, k.stop, k.step or 1)
        else:
            x = x.index_select(dim, k)
        dim += 1
    return x
