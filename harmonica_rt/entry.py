"""A group of blocks within the model's own forward: what it returns, what of it is kept, what stands in for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .kept_streams import Blank, ForwardChanged, Sum, Values, expect_tensors, is_stream, kind_of, weighted_sum
from .kernels.combine_torch import combine_eager
from .models.refusals import NoCarryError, UnsupportedModelError
from .program import Combine


@dataclass(slots=True)
class _Result:
    """What a block returned: a tree of tensors and constants."""

    spec: TreeSpec
    leaves: list[Any]  # a `Blank` for each stream
    alive: list[weakref.ref[Tensor] | None] = field(default_factory=list)


class Entry:
    """A group of blocks.

    `learn` watches its calls in one forward; `settle` makes buffers for what they returned; then `compute` and `reuse`
    are its calls, and `finish` ends each forward.

    Attributes:
        calls: results of its blocks' calls within one forward, in turn.
        kept: the streams, as (call, leaf).
        sources: for each stream the leaf of the first call's arguments that it continues; needed by a carry alone.
        alike: how many calls, from the first on, take and return trees of one kind.
        chain: of these, leaf of what a call returned -> leaf of the next call's arguments that is the same tensor.
        values, befores: the streams after and before it.
        latest, x: the same of the forward that was learned from.
        given: streams among the arguments of the first call, by position or name.
        done: calls made in the forward under way.
    """

    def __init__(self, name: str, carries: bool) -> None:
        self.name, self.carries = name, carries
        self.calls: list[_Result] = []
        self.kept: list[tuple[int, int]] = []
        self.sources: list[int] = []
        self.alike = 0
        self.chain: dict[int, int] = {}
        self.latest: dict[tuple[int, int], Tensor] = {}
        self.values: Values | None = None
        self.befores: Values | None = None
        self.scratch: dict[Blank, Tensor] = {}
        self._kind: TreeSpec | None = None  # of the first call's arguments
        self.given: dict[int | str, Blank] = {}
        self.done = 0
        self.x: list[Any] = []

    # ---- learning what the group is

    def learn(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, (arguments, kind) = len(self.calls), tree_flatten((args, kwargs))
        if number == 0:
            self.given = _given(args, kwargs)
            self.x = [t.clone() if is_stream(t) else t for t in arguments] if self.carries else []
            self._kind = kind
        if 0 < number == self.alike and kind == self._kind:
            before = {id(t): leaf for leaf, ref in enumerate(self.calls[-1].alive) if ref and (t := ref()) is not None}
            self.chain |= {before[id(t)]: i for i, t in enumerate(arguments) if id(t) in before}
        result = run(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        self.alike += number == self.alike and kind == self._kind and (number == 0 or spec == self.calls[0].spec)
        expect_tensors(f"a block of {self.name}", leaves)
        alive = [weakref.ref(t) if is_stream(t) else None for t in leaves]
        blanks = [Blank(t.shape, t.dtype, t.device) if is_stream(t) else t for t in leaves]
        self.calls.append(_Result(spec, blanks, alive))
        self.latest = {key: t for key, t in self.latest.items() if key in self.kept}
        self.latest |= {(number, leaf): t.clone() for leaf, t in enumerate(leaves) if is_stream(t)}
        return result

    def held(self) -> set[tuple[int, int]]:
        """Streams of earlier calls that something still holds: candidates for skip connections past the group."""
        return {
            (call, leaf)
            for call, result in enumerate(self.calls[:-1])
            for leaf, ref in enumerate(result.alive)
            if ref is not None and ref() is not None
        }

    def returned(self) -> set[tuple[int, int]]:
        """Streams of the last call."""
        return {(len(self.calls) - 1, leaf) for leaf, t in enumerate(self.calls[-1].leaves) if isinstance(t, Blank)}

    def forget(self, keep: set[tuple[int, int]]) -> None:
        """Learn anew, keeping also the streams `keep`."""
        self.calls, self.latest, self.x, self.kept, self.alike = [], {}, [], sorted(keep), 0

    def settle(self, slots: int, scratch: dict[Blank, Tensor]) -> None:
        """Buffers for what `learn` has seen; `scratch` is shared by all entries, one tensor a kind."""
        if not self.returned():
            raise UnsupportedModelError(
                f"expected tensors from the last block of {self.name}, got {self.calls[-1].spec}: level 'output' takes "
                "this model"
            )
        self.kept = sorted({*self.kept, *self.returned()})
        streams = [self.latest[key] for key in self.kept]
        self.values = Values(self.name, slots, streams)
        if self.carries:
            self.sources = [self._source(*key, stream) for key, stream in zip(self.kept, streams)]
            self.x = [self.x[i] for i in self.sources]
            self.befores = Values(self.name, slots, self.x)
        self._share(scratch)

    def _share(self, scratch: dict[Blank, Tensor]) -> None:
        self.scratch = scratch
        for result in self.calls:
            result.alive = []
            for blank in result.leaves:
                if isinstance(blank, Blank) and blank not in scratch:
                    scratch[blank] = torch.zeros(blank.shape, dtype=blank.dtype, device=blank.device)

    def _source(self, call: int, leaf: int, stream: Tensor) -> int:
        """The argument of the first block that `stream` continues.

        The one in whose place the next block gets it; if none does as it is, of those of its shape the nearest: what a
        block adds may be nearer (learned positions).
        """
        alike = [i for i, t in enumerate(self.x) if is_stream(t) and kind_of(t) == kind_of(stream)]
        if call < self.alike and self.chain.get(leaf) in alike:
            return self.chain[leaf]
        if not alike:
            got = ", ".join(sorted({kind_of(t) for t in self.x if is_stream(t)})) or "none"
            raise NoCarryError(
                f"carry: expected among the arguments of {self.name}'s first block a stream {kind_of(stream)} as it "
                f"returns, got {got}; a carry of 0 needs none"
            )
        return min(alike, key=lambda i: (self.x[i].float() - stream.float()).norm().item())

    def keep(self, slot: int, values: list[Tensor], befores: list[Tensor]) -> None:
        """The streams after the group, and where it carries those before it."""
        self._settled(self.values).keep(slot, values)
        if self.carries:
            self._settled(self.befores).keep(slot, befores)

    def _settled(self, values: Values | None) -> Values:
        assert values is not None, f"{self.name} has no buffers yet"
        return values

    def half(self, number: int, batch: int, scratch: dict[Blank, Tensor]) -> Entry:
        """The same for one half of a batch, with the values it holds."""
        own = Entry(self.name, self.carries)
        own.kept, own.sources = self.kept, self.sources
        own.given = {name: blank.half(batch) for name, blank in self.given.items()}
        own.values = self._settled(self.values).half(number, batch)
        own.befores = None if self.befores is None else self.befores.half(number, batch)
        for result in self.calls:
            leaves = [leaf.half(batch) if isinstance(leaf, Blank) else leaf for leaf in result.leaves]
            own.calls.append(_Result(result.spec, leaves))
        own._share(scratch)
        return own

    # ---- running

    def compute(self, slot: int | None, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self._next()
        if number == 0 and slot is not None and self.carries:
            self._settled(self.befores).keep(slot, self.before(args, kwargs))
        result = run(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        was = self.calls[number]
        if spec != was.spec:
            raise ForwardChanged(
                f"{self.name}: expected {was.spec} of its call {number} as at the first call, got {spec}"
            )
        if number == len(self.calls) - 1:  # what it returns beside streams stays as it is now
            was.leaves = [old if isinstance(old, Blank) else new for old, new in zip(was.leaves, leaves)]
        if slot is not None:
            for stream, (call, leaf) in enumerate(self.kept):
                if call == number:
                    self._settled(self.values).keep(slot, [leaves[leaf]], stream)
        return result

    def reuse(
        self,
        combination: Combine | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        channels: Tensor | None = None,
        combine: Sum = combine_eager,
    ) -> Any:
        """What stands in for the next call; without a combination the values that were just learned.

        Args:
            channels: rows of weights per channel, [rows, width].
            combine: adds up, as `combine_eager` does.
        """
        if self.done == 0 and combination is not None and combination.carries:
            self.x = self.before(args, kwargs)

        def stream(number: int) -> Tensor:
            if combination is None:
                return self.latest[self.kept[number]].clone()
            return self._combine(number, combination, channels, combine)

        return self.stand_in(args, kwargs, stream)

    def stand_in(self, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Callable[[int], Tensor]) -> Any:
        """What the next call returns, the streams that are kept of it being `stream`(number)."""
        number = self._next()
        if number == 0:
            self._check_given(_given(args, kwargs))
        result = self.calls[number]
        leaves = [self.scratch[leaf] if isinstance(leaf, Blank) else leaf for leaf in result.leaves]
        for which, (call, leaf) in enumerate(self.kept):
            if call == number:
                leaves[leaf] = stream(which)
        return tree_unflatten(leaves, result.spec)

    def _combine(self, stream: int, combination: Combine, channels: Tensor | None, combine: Sum) -> Tensor:
        like, sources = self._settled(self.values).slots[0][stream], {"value": self.values, "before": self.befores}
        values = [
            self.x[stream] if t.of == "now" else self._settled(sources[t.of]).slots[t.slot][stream]
            for t in combination.terms
        ]
        return weighted_sum(combination.terms, values, like, channels, self.name, combine)

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The streams before the group, among its first call's arguments."""
        leaves = tree_flatten((args, kwargs))[0]
        return [leaves[i] for i in self.sources]

    def _check_given(self, given: dict[int | str, Blank]) -> None:
        """Arguments may come and go, but what is kept is as long as the streams were."""
        for name in given.keys() & self.given.keys():
            if given[name] != self.given[name]:
                raise ValueError(
                    f"{self.name}: expected {self.given[name]} as {name} of its first block as at the first call, got "
                    f"{given[name]}; level 'output' takes such calls"
                )

    def _next(self) -> int:
        if self.done == len(self.calls):
            raise ForwardChanged(
                f"{self.name}: expected {self.done} calls of its blocks as at the first call, got more: level 'output' "
                "takes such calls, or a cache_context of their own"
            )
        self.done += 1
        return self.done - 1

    def finish(self) -> None:
        if self.done != len(self.calls):
            raise ForwardChanged(
                f"{self.name}: expected {len(self.calls)} calls of its blocks as at the first call, got {self.done}: "
                "level 'output' takes such calls, or a cache_context of their own"
            )


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Blank]:
    """The streams that are arguments themselves, by position or name."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {name: Blank(t.shape, t.dtype, t.device) for name, t in arguments if is_stream(t) and t.ndim >= 3}
