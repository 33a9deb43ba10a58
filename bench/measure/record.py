"""What a forward launches: the FLOPs and bytes of each op, as it is dispatched, on the meta device too."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .gpu_time import Launch


class Record(TorchDispatchMode):
    """What a model's forward launches: FLOPs and bytes of every op that is neither a view nor an allocation.

    Attributes:
        launches: in order.
        tensors: of each launch, those it reads and those it writes.
        given: storages that were there before.
        active: the one that is recording.
    """

    active: ClassVar[Record | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.tensors: list[tuple[list[Tensor], list[Tensor]]] = []
        self.given: set[int] = set()
        self._made: dict[int, Tensor] = {}  # which also keeps a storage's number from being another's later

    def __enter__(self) -> Record:
        Record.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Record.active = None
        super().__exit__(*error)

    def add(self, flops: float, reads: list[Tensor], writes: list[Tensor]) -> None:
        self.launches.append(Launch(flops, sum(map(touched, (*reads, *writes)))))
        self.tensors.append((reads, writes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        taken, results = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        self.given.update(storage_of(t) for t in taken if storage_of(t) not in self._made)
        self._made |= {storage_of(t): t for t in results if storage_of(t) not in self.given}
        if func.is_view or name.startswith("empty") or name in ("_unsafe_view", "detach"):
            return out
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        if name == "harmonica_rt::gap":  # of slots and rows it reads a few
            x, y, arena, rows, _, table = args[:6]
            reads = [x, arena.narrow(0, 0, len(table)), rows.select(0, 0).narrow(1, 0, len(table) + 2)]
            self.add(0, reads, [x, y] if len(table) else [y])
            return out
        given = [(i, t) for i, a in enumerate(args) for t in tree_leaves(a) if isinstance(t, Tensor)]
        reads = [t for i, t in given if i or name not in OVERWRITES]
        reads += [t for key, t in kwargs.items() if isinstance(t, Tensor) and key != "out"]
        self.add(flops, reads, results)
        return out


OVERWRITES = ("copy_", "fill_", "zero_")  # their first argument without reading it


def touched(t: Tensor) -> int:
    """Bytes of `t` in memory; what is expanded lies there once."""
    return t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride()) if stride)


def storage_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Flash attention as one op with its FLOPs and bytes: on the meta device torch would take the unfused form."""
    batch, heads, tokens, width = query.shape
    out = torch.empty(batch, tokens, heads, width, dtype=query.dtype, device=query.device).transpose(1, 2)
    if (record := Record.active) is not None:
        record.add(4 * batch * heads * tokens * key.shape[2] * width, [query, key, value], [out])
    return out
