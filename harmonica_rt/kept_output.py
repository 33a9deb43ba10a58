"""The model's output as a value to reuse: its tree, and its streams in static buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .kept_streams import ForwardChanged, Sum, Values, expect_tensors, is_stream
from .models import UnsupportedModelError
from .program import Addend

_STREAM = object()  # stands in a tree for a stream


@dataclass(slots=True)
class KeptOutput:
    """Outputs of computed steps.

    Attributes:
        values: their streams.
        spec, rest: the tree they stand in, with what else was in the last one.
    """

    values: Values
    spec: TreeSpec
    rest: list[Any]

    @classmethod
    def like(cls, output: Any, slots: int) -> KeptOutput:
        """Buffers for outputs like this. Raises UnsupportedModelError unless it has tensors, none of them hidden."""
        leaves, spec = _checked(output)
        return cls(Values("output", slots, [t for t in leaves if is_stream(t)]), spec, [])

    def keep(self, slot: int, output: Any) -> None:
        """Copy `output` into `slot`. Raises ForwardChanged for another kind of output."""
        leaves, spec = _checked(output)
        streams = [t for t in leaves if is_stream(t)]
        if (spec, len(streams)) != (self.spec, len(self.values.slots[0])):
            raise ForwardChanged(f"output: expected {self.spec} as at the first call, got {spec}")
        self.rest = [_STREAM if is_stream(t) else t for t in leaves]
        self.values.keep(slot, streams)

    def combined(self, terms: Sequence[Addend], channels: Tensor | None, combine: Sum, listed: bool) -> Any:
        """An output whose streams are the sum over `terms`, as `Values.combined` makes it."""
        streams = iter(self.values.combined(terms, channels, combine, listed))
        return tree_unflatten([next(streams) if leaf is _STREAM else leaf for leaf in self.rest], self.spec)

    def half(self, number: int, batch: int) -> KeptOutput:
        """Half of each list over the batch; where there is none, of each tensor."""

        def half(part: Any) -> Any:
            return part[number * batch // 2 : (number + 1) * batch // 2] if over_batch(part) else part

        def over_batch(part: Any) -> bool:
            return isinstance(part, list) and len(part) == batch

        leaves = tree_unflatten([*range(len(self.rest))], self.spec)
        kept, kept_spec = tree_flatten(tree_map(half, leaves, is_leaf=over_batch))
        if len(kept) == len(self.rest):
            return KeptOutput(self.values.half(number, batch), self.spec, self.rest)
        streams = [leaf for leaf, part in enumerate(self.rest) if part is _STREAM]
        only = self.values.only([stream for stream, leaf in enumerate(streams) if leaf in kept])
        return KeptOutput(only, kept_spec, [self.rest[leaf] for leaf in kept])


def _checked(output: Any) -> tuple[list[Any], TreeSpec]:
    leaves, spec = tree_flatten(output)
    expect_tensors("the model's output", leaves)
    if not any(map(is_stream, leaves)):
        raise UnsupportedModelError(f"output: expected tensors in the model's output, got {spec}")
    return leaves, spec
