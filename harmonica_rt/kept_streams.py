"""Streams of a model's forward, the tensors that go through it: kept in static buffers, added up, halved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .models import UnsupportedModelError
from .program import Addend

Sum = Callable[[list[Tensor], list[float], list[int], Tensor | None, int], Tensor]


class ForwardChanged(ValueError):
    """The model's forward does other things with its blocks than in the call it was learned from."""


@dataclass(frozen=True, slots=True)
class Blank:
    """A tensor that a stand-in returns in place of a block's and that nothing reads."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"

    def half(self, batch: int) -> Blank:
        return Blank(_half_shape(self.shape, batch), self.dtype, self.device)


class Values:
    """The values of an entry, or of the model's output: streams in static buffers, one set a slot."""

    def __init__(self, name: str, slots: int, like: Sequence[Tensor]) -> None:
        self.name = name
        self.slots = [[torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like] for _ in range(slots)]

    def keep(self, slot: int, streams: Sequence[Tensor], first: int = 0) -> None:
        """Copy `streams` into `slot`, from its stream number `first` on."""
        for buffer, stream in zip(self.slots[slot][first:], streams):
            if kind_of(buffer) != kind_of(stream):
                raise ForwardChanged(
                    f"{self.name}: expected a stream {kind_of(buffer)} as at the first call, got {kind_of(stream)}: "
                    "call reset() to change"
                )
            buffer.copy_(stream)

    def combined(self, terms: Sequence[Addend], channels: Tensor | None, combine: Sum, listed: bool) -> list[Tensor]:
        """The sum over `terms` of each stream; channels of pictures are their second axis, the first if `listed`."""
        return [
            weighted_sum(
                terms,
                [self.slots[term.slot][number] for term in terms],
                like,
                channels,
                self.name,
                combine,
                axis=-1 if like.ndim < 4 else 0 if listed else 1,
            )
            for number, like in enumerate(self.slots[0])
        ]

    def half(self, number: int, batch: int) -> Values:
        """Those of one half of a batch."""
        own = Values(self.name, 0, [])
        own.slots = [[half_of(t, number, batch).clone() for t in streams] for streams in self.slots]
        return own

    def only(self, numbers: Sequence[int]) -> Values:
        """Those of some of its streams."""
        own = Values(self.name, 0, [])
        own.slots = [[streams[number] for number in numbers] for streams in self.slots]
        return own

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for streams in self.slots for t in streams)


def is_stream(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def expect_tensors(what: str, leaves: Sequence[Any]) -> None:
    """Nothing that could hide a tensor."""
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise UnsupportedModelError(
                f"expected tensors in lists, tuples and dicts from {what}, got {type(leaf).__module__}."
                f"{type(leaf).__name__}: what it holds cannot be seen"
            )


def kind_of(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def half_of(t: Tensor, number: int, batch: int) -> Tensor:
    """Half `number` of a tensor over a `batch`; others are whole."""
    return t.chunk(2)[number] if t.ndim and len(t) == batch else t


def _half_shape(shape: torch.Size, batch: int) -> torch.Size:
    return torch.Size((batch // 2, *shape[1:])) if shape and shape[0] == batch else shape


def weighted_sum(
    terms: Sequence[Addend],
    values: list[Tensor],
    like: Tensor,
    channels: Tensor | None,
    name: str,
    combine: Sum,
    axis: int = -1,
) -> Tensor:
    """The sum of `values`; weights per channel are along `axis`.

    Raises:
        ValueError: there are not as many channels.
    """
    if not terms:
        return torch.zeros_like(like)
    rows, inner = [-1 if term.channel is None else term.channel for term in terms], 1
    if max(rows) >= 0:
        assert channels is not None, "weights per channel are of a table"
        count = channels.shape[1]
        axis = like.ndim + axis if axis < 0 else axis
        if like.shape[axis] != count:
            raise ValueError(f"weights per channel: expected {name} of {count} channels, got {kind_of(like)}")
        inner = like.shape[axis + 1 :].numel()
    return combine([v.contiguous() for v in values], [t.weight for t in terms], rows, channels, inner)
