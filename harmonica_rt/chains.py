"""Which argument of the next block what a block returns becomes: seen, where a model hands on the tensor itself."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

Kind = tuple[type, tuple[tuple[str, type], ...]]


def kind_of_block(block: nn.Module) -> Kind:
    """Its class and its parts', whatever adapters they have: blocks of a kind pass streams on in one place."""
    return type(block), tuple((name, _class(part)) for name, part in block.named_children())


def _class(part: nn.Module) -> type:
    while isinstance(base := getattr(part, "base_layer", None), nn.Module):  # of PEFT's layers
        part = base
    return type(part)


class Chains:
    """Watches the calls of a forward's blocks, kind by kind: a first or last one may do other things than the rest.

    Attributes:
        by_kind: leaf of what a block returns -> leaf of the next block's arguments that is the same tensor; from calls
            whose arguments are alike.
    """

    def __init__(self) -> None:
        self.by_kind: dict[Kind, dict[int, int]] = defaultdict(dict)
        self._last: dict[Kind, tuple[TreeSpec, list[weakref.ref[Tensor] | None]]] = {}

    def enter(self, block: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TreeSpec:
        """A block is called: the tree of its arguments, for `leave`."""
        arguments, spec = tree_flatten((args, kwargs))
        was, alive = self._last.get(block, (None, []))
        if was == spec:
            before = {id(t): leaf for leaf, ref in enumerate(alive) if ref is not None and (t := ref()) is not None}
            self.by_kind[block] |= {before[id(t)]: i for i, t in enumerate(arguments) if id(t) in before}
        return spec

    def leave(self, block: Kind, spec: TreeSpec, result: Any) -> None:
        leaves = tree_flatten(result)[0]
        self._last[block] = spec, [weakref.ref(t) if isinstance(t, Tensor) else None for t in leaves]
