"""A model's own forward, each call of its blocks handed to whoever decides what becomes of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .chains import Chains, kind_of_block
from .compiled_blocks import CompiledBlocks
from .entry import Entry
from .interception import intercepted
from .layout import TRUNK
from .models.blocks import block_lists

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class SteeredForward:
    """Runs `model`; blocks of `entries` do not run by themselves.

    Args:
        model: kept alive by others; `reference` is what is held of it.
        entries: groups that may be reused, by number.
        blocks: of each.
    """

    def __init__(
        self, model: nn.Module, entries: Mapping[int, Entry], blocks: Mapping[int, Sequence[nn.Module]]
    ) -> None:
        self.reference, self.entries = weakref.ref(model), entries
        owners = {block: number for number, own in blocks.items() for block in own}
        self._blocks, self._owners = list(owners), list(owners.values())

    @property
    def model(self) -> nn.Module:
        """Raises ReferenceError once it is gone."""
        if (model := self.reference()) is None:
            raise ReferenceError("expected a model that is still there, got one that nothing holds any more")
        return model

    def __call__(self, arguments: Arguments, handle: Callable[..., Any], compiled: CompiledBlocks | None = None) -> Any:
        """The model's output, its blocks' calls going to `handle`(entry, what runs it, its arguments).

        Args:
            compiled: runs all blocks, those of no entry too.
        """
        args, kwargs = arguments
        blocks = self._blocks if compiled is None else list(dict.fromkeys([*self._blocks, *compiled.blocks.values()]))

        def call(number: int, run: Callable[..., Any], *arguments: Any) -> Any:
            run = run if compiled is None else compiled.of(blocks[number], run)
            return handle(self._owners[number] if number < len(self._owners) else None, run, *arguments)

        try:
            with intercepted(blocks, call):
                output = self.model(*args, **kwargs)
            for entry in self.entries.values():
                entry.finish()
        finally:
            for entry in self.entries.values():
                entry.done = 0
        return output

    def watched(self, arguments: Arguments, handle: Callable[..., Any]) -> Any:
        """The model's output, with no word on whether each entry made as many calls as before.

        Entries are told in which place blocks such as theirs hand their streams on, also to blocks of no entry.
        """
        args, kwargs = arguments
        others = (block for own in block_lists(self.model).values() for block in own)
        chains, blocks = Chains(), list(dict.fromkeys([*self._blocks, *others]))
        kinds = [kind_of_block(block) for block in blocks]

        def watch(number: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            spec = chains.enter(kinds[number], args, kwargs)
            owned = number < len(self._owners)
            result = handle(self._owners[number], run, args, kwargs) if owned else run(*args, **kwargs)
            chains.leave(kinds[number], spec, result)
            return result

        with intercepted(blocks, watch):
            output = self.model(*args, **kwargs)
        for number, entry in self.entries.items():
            if entry.name != TRUNK:  # whose own calls are chained as far as they are of one list
                entry.chain = {**chains.by_kind[kinds[self._owners.index(number)]], **entry.chain}
        return output


def copied_tensors(arguments: Arguments) -> Arguments:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)
