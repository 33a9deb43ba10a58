"""Runs a ForwardProgram: the model's own forward, its groups of blocks or the whole of it replaced where reused."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .interception import intercepted
from .kernels.combine import combine
from .models import UnsupportedModelError
from .program import Combine, ForwardProgram, Keep, ReuseOutput

# What the output may change by when kept streams stand for the groups that just made them
SAME = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
Forward = Callable[[], Any]
_STREAM = object()  # stands in a tree for a stream


@dataclass(slots=True)
class _Result:
    """What a block returned: a tree of tensors and constants."""

    spec: TreeSpec
    leaves: list[Any]  # a stand-in's: scratch for tensors that nothing reads
    alive: list[weakref.ref[Tensor] | None] = field(default_factory=list)


class _Values:
    """The values of an entry, or of the model's output: streams in static buffers, one set a slot."""

    def __init__(self, name: str, slots: int, like: Sequence[Tensor]) -> None:
        self.name = name
        self.slots = [[torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like] for _ in range(slots)]

    def keep(self, slot: int, streams: Sequence[Tensor], first: int = 0) -> None:
        """Copy `streams` into `slot`, from its stream number `first` on."""
        for buffer, stream in zip(self.slots[slot][first:], streams):
            if _kind(buffer) != _kind(stream):
                raise ValueError(
                    f"{self.name}: expected a stream {_kind(buffer)} as at the first call, got {_kind(stream)}"
                )
            buffer.copy_(stream)

    def stream(self, number: int, terms: Sequence[tuple[int, float]]) -> tuple[list[Tensor], list[float]]:
        return [self.slots[slot][number] for slot, _ in terms], [weight for _, weight in terms]

    def combined(self, terms: Sequence[tuple[int, float]]) -> list[Tensor]:
        count = range(len(self.slots[0]))
        return [combine(*self.stream(i, terms)) if terms else torch.zeros_like(self.slots[0][i]) for i in count]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for streams in self.slots for t in streams)


class _Entry:
    """A group of blocks: what its calls return, which of it is kept, and what stands in for it.

    Attributes:
        calls: results of its blocks' calls within one forward, in turn.
        kept: the streams, as (call, leaf).
        sources: for each stream the leaf of the first call's arguments that it continues; needed by a carry alone.
        values, befores: the streams after and before it.
    """

    def __init__(self, name: str, carries: bool) -> None:
        self.name, self.carries = name, carries
        self.calls: list[_Result] = []
        self.kept: list[tuple[int, int]] = []
        self.sources: list[int] = []
        self.latest: dict[tuple[int, int], Tensor] = {}
        self.values: _Values | None = None
        self.befores: _Values | None = None
        self.done = 0  # calls made in the forward under way
        self.x: list[Tensor] = []

    # ---- learning what the group is

    def learn(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = len(self.calls)
        if number == 0 and self.carries:
            self.x = [t.clone() if _is_stream(t) else t for t in tree_flatten((args, kwargs))[0]]
        result = run(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        alive = [weakref.ref(t) if _is_stream(t) else None for t in leaves]
        self.calls.append(_Result(spec, [_blank(t) for t in leaves], alive))
        self.latest = {key: t for key, t in self.latest.items() if key in self.kept}
        self.latest |= {(number, leaf): t.clone() for leaf, t in enumerate(leaves) if _is_stream(t)}
        return result

    def held(self) -> list[tuple[int, int]]:
        """Streams of earlier calls that something still holds: candidates for skip connections past the group."""
        return [
            (call, leaf)
            for call, result in enumerate(self.calls[:-1])
            for leaf, ref in enumerate(result.alive)
            if ref is not None and ref() is not None
        ]

    def settle(self, slots: int, scratch: dict[Any, Tensor]) -> None:
        """Buffers for what `learn` has seen."""
        last = len(self.calls) - 1
        self.kept = sorted({*self.kept, *((last, leaf) for call, leaf in self.latest if call == last)})
        streams = [self.latest[key] for key in self.kept]
        self.values = _Values(self.name, slots, streams)
        if self.carries:
            self.sources = [self._source(stream) for stream in streams]
            self.befores = _Values(self.name, slots, [self.x[i] for i in self.sources])
            self.x = [self.x[i] for i in self.sources]
        for result in self.calls:
            result.alive = []
            result.leaves = [_scratch(t, scratch) if isinstance(t, _Blank) else t for t in result.leaves]

    def _source(self, stream: Tensor) -> int:
        """The argument of the first block that `stream` continues: of those of its shape the nearest."""
        alike = [i for i, t in enumerate(self.x) if _is_stream(t) and _kind(t) == _kind(stream)]
        if not alike:
            got = ", ".join(sorted({_kind(t) for t in self.x if _is_stream(t)})) or "none"
            raise UnsupportedModelError(
                f"carry: expected among the arguments of {self.name}'s first block a stream {_kind(stream)} as it "
                f"returns, got {got}; a carry of 0 needs none"
            )
        return min(alike, key=lambda i: (self.x[i].float() - stream.float()).norm().item())

    # ---- running

    def compute(self, slot: int | None, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self._next()
        if number == 0 and slot is not None and self.carries:
            self.befores.keep(slot, self._before(args, kwargs))
        result = run(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        if spec != self.calls[number].spec:
            raise RuntimeError(f"{self.name}: expected {self.calls[number].spec} from its block {number}, got {spec}")
        if number == len(self.calls) - 1:
            self.calls[number].leaves = [
                old if isinstance(old, Tensor) and _is_stream(new) else new
                for old, new in zip(self.calls[number].leaves, leaves)
            ]
        if slot is not None:
            for stream, (call, leaf) in enumerate(self.kept):
                if call == number:
                    self.values.keep(slot, [leaves[leaf]], stream)
        return result

    def reuse(self, combination: Combine | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands in for the next call; without a combination the values that were just learned."""
        number = self._next()
        if number == 0 and combination is not None and combination.carry:
            self.x = self._before(args, kwargs)
        result = self.calls[number]
        leaves = list(result.leaves)
        for stream, (call, leaf) in enumerate(self.kept):
            if call == number:
                leaves[leaf] = (
                    self.latest[call, leaf].clone() if combination is None else self._combine(stream, combination)
                )
        return tree_unflatten(leaves, result.spec)

    def _combine(self, stream: int, combination: Combine) -> Tensor:
        values, weights = self.values.stream(stream, combination.terms)
        if combination.carry:
            before, theirs = self.befores.stream(stream, combination.inputs)
            values = [*values, self.x[stream], *before]
            weights = [*weights, combination.carry, *(-combination.carry * w for w in theirs)]
        if not values:
            return torch.zeros_like(self.values.slots[0][stream])
        return combine(values, weights)

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        leaves = tree_flatten((args, kwargs))[0]
        return [leaves[i] for i in self.sources]

    def _next(self) -> int:
        if self.done == len(self.calls):
            raise RuntimeError(f"{self.name}: expected {self.done} calls of its blocks as at the first call, got more")
        self.done += 1
        return self.done - 1

    def finish(self) -> None:
        done, self.done, self.x = self.done, 0, []
        if done != len(self.calls):
            raise RuntimeError(
                f"{self.name}: expected {len(self.calls)} calls of its blocks as at the first call, got {done}"
            )


class ForwardPlan:
    """A program bound to a model's blocks and to buffers for one shape of call.

    Attributes:
        groups: name and blocks of every entry.
        seconds: time it took to learn what the groups are and to check that they can be reused.
    """

    backend = "eager"

    def __init__(
        self, model: nn.Module, program: ForwardProgram, groups: list[tuple[str, list[nn.Module]]], shape: Any
    ) -> None:
        self.program, self.groups, self.shape, self.seconds = program, groups, shape, 0.0
        self._model = weakref.ref(model)
        reused = [entry for entry, slots in enumerate(program.slots) if slots]
        self.entries = {entry: _Entry(groups[entry][0], program.carries[entry]) for entry in reused}
        owners = {block: self.entries[entry] for entry in reused for block in groups[entry][1]}
        self.blocks, self._owners = list(owners), list(owners.values())
        self._numbers = {id(entry): number for number, entry in self.entries.items()}
        self._outputs: tuple[_Values, TreeSpec, list[Any]] | None = None
        self._learned = not self.entries

    def run(self, step: int, forward: Forward, again: Forward) -> Any:
        """The model's output at `step`.

        Args:
            forward: calls the model's own forward.
            again: likewise, on arguments of its own; run once a plan, for the check that groups can be reused.
        """
        instructions = self.program.steps[step]
        if isinstance(instructions, ReuseOutput):
            return self._reuse_output(instructions)
        if not self._learned:
            output = self._learn(forward, again)
            for number, entry in self.entries.items():
                if (slot := instructions.entries[number].slot) is not None:
                    entry.values.keep(slot, [entry.latest[key] for key in entry.kept])
                    if entry.carries:
                        entry.befores.keep(slot, entry.x)
                entry.latest, entry.x = {}, []
        else:
            output = self._forward(forward, lambda entry, *call: self._do(instructions, entry, *call))
        if instructions.keep is not None:
            self._keep_output(instructions.keep, output)
        return output

    def _do(self, instructions: Any, entry: _Entry, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        what = instructions.entries[self._numbers[id(entry)]]
        return (
            entry.compute(what.slot, run, args, kwargs) if isinstance(what, Keep) else entry.reuse(what, args, kwargs)
        )

    def _forward(self, forward: Forward, handle: Callable[..., Any]) -> Any:
        try:
            with intercepted(self.blocks, lambda number, *call: handle(self._owners[number], *call)):
                output = forward()
            for entry in self.entries.values():
                entry.finish()
        finally:
            for entry in self.entries.values():
                entry.done = 0
        return output

    # ---- the first call

    def _learn(self, forward: Forward, again: Forward) -> Any:
        """The model's output, having found out which blocks each group calls and what of it is kept.

        Then everything is reused once on the same input, all that should not matter being NaN: an output that is not
        the same depends on more than the streams after the groups. Values that were still held when their group was
        over are skip connections, kept beside its streams; if that does not help, the model cannot be reused so.
        """
        started = time.perf_counter()
        held: dict[int, list[tuple[int, int]]] = {}
        output = self._observe(forward, held)
        scratch = self._settle()
        if not self._is_same(output, again, scratch):
            for number, entry in self.entries.items():
                entry.calls, entry.latest, entry.x = [], {}, []
                entry.kept = held[number]
            self._observe(again, {})
            scratch = self._settle()
            if not self._is_same(output, again, scratch):
                names = ", ".join(entry.name for entry in self.entries.values())
                raise UnsupportedModelError(
                    f"expected an output that depends on nothing but the streams after {names}, got another one when "
                    "these were put in place of the blocks: level 'output' takes this model"
                )
        for t in scratch.values():
            t.zero_()
        self._learned = True
        self.seconds = time.perf_counter() - started
        return output

    def _observe(self, forward: Forward, held: dict[int, list[tuple[int, int]]]) -> Any:
        before: list[_Entry] = []

        def handle(entry: _Entry, *call: Any) -> Any:
            if before and before[-1] is not entry:
                held[self._numbers[id(before[-1])]] = before[-1].held()
            before.append(entry)
            result = entry.learn(*call)
            held[self._numbers[id(entry)]] = entry.held()
            return result

        with intercepted(self.blocks, lambda number, *call: handle(self._owners[number], *call)):
            output = forward()
        for entry in self.entries.values():
            if not entry.calls:
                raise UnsupportedModelError(
                    f"expected the model's forward to call the blocks of {entry.name}, got no call of any: level "
                    "'output' takes this model"
                )
        return output

    def _settle(self) -> dict[Any, Tensor]:
        scratch: dict[Any, Tensor] = {}
        for number, entry in self.entries.items():
            entry.settle(self.program.slots[number], scratch)
        for t in scratch.values():
            t.fill_(torch.nan)
        return scratch

    def _is_same(self, output: Any, again: Forward, scratch: dict[Any, Tensor]) -> bool:
        x = {number: entry.x for number, entry in self.entries.items()}
        reused = self._forward(again, lambda entry, run, args, kwargs: entry.reuse(None, args, kwargs))
        for number, entry in self.entries.items():
            entry.x = x[number]
        return all(
            _close(a, b) for a, b in zip(tree_flatten(output)[0], tree_flatten(reused)[0], strict=True) if _is_stream(a)
        )

    # ---- the model's output as a value

    def _keep_output(self, slot: int, output: Any) -> None:
        leaves, spec = tree_flatten(output)
        if self._outputs is None:
            streams = [t for t in leaves if _is_stream(t)]
            if not streams:
                raise UnsupportedModelError(f"output: expected tensors in the model's output, got {spec}")
            self._outputs = (_Values("output", self.program.outputs, streams), spec, leaves)
        values, _, _ = self._outputs
        self._outputs = (values, spec, [_STREAM if _is_stream(t) else t for t in leaves])
        values.keep(slot, [t for t in leaves if _is_stream(t)])

    def _reuse_output(self, instructions: ReuseOutput) -> Any:
        values, spec, rest = self._outputs
        streams = iter(values.combined(instructions.terms))
        return tree_unflatten([next(streams) if leaf is _STREAM else leaf for leaf in rest], spec)

    @property
    def model_bytes(self) -> int:
        model = self._model()
        return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())

    def release(self) -> None:
        """Nothing is held but buffers, which go with the last reference."""

    @property
    def slot_bytes(self) -> int:
        kept = [v for entry in self.entries.values() for v in (entry.values, entry.befores) if v is not None]
        return sum(values.bytes for values in kept) + (0 if self._outputs is None else self._outputs[0].bytes)


@dataclass(frozen=True, slots=True)
class _Blank:
    """A tensor that a stand-in returns in place of a block's and that nothing reads."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _blank(leaf: Any) -> Any:
    return _Blank(leaf.shape, leaf.dtype, leaf.device) if _is_stream(leaf) else leaf


def _scratch(blank: _Blank, made: dict[Any, Tensor]) -> Tensor:
    if blank not in made:
        made[blank] = torch.empty(blank.shape, dtype=blank.dtype, device=blank.device)
    return made[blank]


def _is_stream(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _kind(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    wide = torch.promote_types(a.dtype, torch.float32)
    tolerance = SAME[a.dtype] * a.to(wide).abs().max().item() if a.numel() else 0.0
    return torch.allclose(a.to(wide), b.to(wide), rtol=0.0, atol=tolerance, equal_nan=True)
