"""Runs a ForwardProgram: the model's own forward, its groups of blocks or the whole of it replaced where reused."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from .compiled_blocks import CompiledBlocks
from .counting import CountMacs, uncountable
from .cuda_graphs import Recorder
from .entry import Blank, Entry, ForwardChanged, Sum, Values, expect_tensors, is_stream
from .forward_graphs import ForwardGraphs
from .interception import intercepted
from .kernels.combine_torch import combine_eager
from .kernels.inductor import missing_triton
from .loop import LoopGraph, loop_key
from .models import UnsupportedModelError
from .program import ForwardProgram, ForwardStep, Keep, ReuseOutput
from .streams import Streams

# What the output may change by when kept streams stand for the groups that just made them
SAME = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_STREAM = object()  # stands in a tree for a stream


class ForwardPlan:
    """A program bound to a model's blocks and to buffers for one shape of call.

    Attributes:
        groups: name and blocks of every entry.
        macs: multiply-accumulates of one forward, those of each entry within it; None where they cannot be counted.
        uncounted: why not.
        graphs: captured steps, if the plan replays them.
        compiled: the model's blocks, compiled, if the plan runs these.
        learned: whether it is known what the groups are, and that they can be reused; the first call tells.
        seconds: time that took.
    """

    def __init__(
        self,
        model: nn.Module,
        program: ForwardProgram,
        groups: list[tuple[str, list[nn.Module]]],
        shape: Any,
        compiled: CompiledBlocks | None = None,
    ) -> None:
        self.program, self.groups, self.shape, self.seconds = program, groups, shape, 0.0
        self.compiled = compiled
        self.macs: tuple[int, dict[int, int]] | None = None
        self.uncounted: str | None = None
        self._model, self.streams = weakref.ref(model), Streams(shape.device)
        reused = [entry for entry, slots in enumerate(program.slots) if slots]
        self.entries = {entry: Entry(groups[entry][0], program.carries[entry]) for entry in reused}
        owners = {block: entry for entry in reused for block in groups[entry][1]}
        self._blocks, self._owners = list(owners), list(owners.values())
        tables = (program.channels, program.output_channels)
        self._channels, self._output_channels = (
            None if table is None else torch.from_numpy(table).to(shape.device) for table in tables
        )
        self._outputs: tuple[Values, TreeSpec, list[Any]] | None = None
        self.learned = False
        self.graphs: ForwardGraphs | None = None
        self._combine: Sum = combine_eager

    @property
    def backend(self) -> str:
        if self.compiled is not None:
            return "inductor"
        return "eager" if self.graphs is None else "cudagraph"

    def capture(self, recorder: Recorder) -> None:
        """Have steps captured where they first come, and replayed from then on; sums are one launch each."""
        if missing_triton() is None:
            from .kernels.combine import combine  # imports triton

            self._combine = combine
        owner = weakref.proxy(self)  # the plan owns its graphs
        self.graphs = ForwardGraphs(
            lambda step, args, kwargs: owner.launch(step, (args, kwargs)),
            self._model(),
            len(self.program.steps),
            recorder,
        )

    def run(self, step: int, arguments: Arguments) -> Any:
        """The model's output at `step`.

        Args:
            arguments: args and kwargs of the model's own forward.

        Raises:
            CaptureFailed: the step can only be launched; `graphs` are to be dropped and the call made again.
        """
        self.streams.enter()
        return self._run(step, arguments, self.graphs)

    def _run(self, step: int, arguments: Arguments, graphs: ForwardGraphs | None) -> Any:
        instructions = self.program.steps[step]
        if isinstance(instructions, ReuseOutput):
            return self._reuse_output(instructions)
        if not self.learned:
            output = self.learn(arguments)
            self._keep_learned(instructions)
        elif graphs is None:
            output = self.launch(instructions, arguments)
        else:
            output = graphs.run(instructions, *arguments)
        if instructions.keep is not None:
            self._keep_output(instructions.keep, output)
        return output

    def loop(
        self, arguments: Arguments, timesteps: Tensor, scheduler: Any, guidance_scale: float, images: int
    ) -> LoopGraph:
        """The captured trajectory of a plan that has graphs, made if there is none.

        Args:
            arguments: of its first call: the sample, and the rest by name, the timestep's as `timestep`.

        Raises:
            CaptureFailed: a step or the sampler's updates cannot be captured.
        """
        self.streams.enter()
        (sample,), conditioning = arguments
        conditioning = {name: value for name, value in conditioning.items() if name != "timestep"}

        def make(static: tuple[dict[str, Any], Tensor]) -> LoopGraph:
            rest, times = static

            def denoise(step: int, x: Tensor) -> Tensor:
                now = times.narrow(0, step, 1).expand(len(x))
                kwargs = tree_map(lambda leaf: leaf, rest)  # models take from the dicts they are given
                return self._run(step, ((x,), {"timestep": now, **kwargs}), None)[0]

            noise = torch.zeros((images, *sample.shape[1:]), dtype=sample.dtype, device=sample.device)
            return LoopGraph(denoise, self.streams, self.graphs.recorder, scheduler, guidance_scale, noise)

        key = (tuple(sample.shape), sample.dtype, *loop_key(scheduler, guidance_scale))
        return self.graphs.loop(key, (conditioning, timesteps), lambda: self._run(0, arguments, None), make)

    def launch(self, step: ForwardStep, arguments: Arguments) -> Any:
        """`run`, once the plan has learned what its groups are: nothing here depends on data, so it may be captured."""
        if self.compiled is None:
            return self.forward(arguments, lambda number, *call: self._do(step, number, *call))
        with self.compiled.compiling():
            return self.forward(arguments, lambda number, *call: self._do(step, number, *call), self.compiled)

    def _do(
        self,
        step: ForwardStep,
        number: int | None,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if number is None:
            return run(*args, **kwargs)
        entry, what = self.entries[number], step.entries[number]
        if isinstance(what, Keep):
            return entry.compute(what.slot, run, args, kwargs)
        return entry.reuse(what, args, kwargs, self._channels, self._combine)

    def forward(self, arguments: Arguments, handle: Callable[..., Any], compiled: CompiledBlocks | None = None) -> Any:
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
                output = self._model()(*args, **kwargs)
            for entry in self.entries.values():
                entry.finish()
        finally:
            for entry in self.entries.values():
                entry.done = 0
        return output

    # ---- the first call

    def learn(self, arguments: Arguments) -> Any:
        """The model's output, having found out which blocks each group calls and what of it is kept.

        Then groups are reused on the same input, each set of them that the program reuses, all that should not matter
        being NaN: an output that is not the same depends on more than the streams after the groups. Values that were
        still held when their group was over are skip connections, those returned before another group's call are read
        there: both are kept beside its streams; if that does not help, the model cannot be reused so.
        """
        started = time.perf_counter()
        spare = copied_tensors(arguments) if self.entries else arguments  # models write into what they are given
        try:
            output, between = self._observe(arguments)
            if self.entries:
                on = self.shape.device
                with torch.random.fork_rng([on] if on.type == "cuda" else []):
                    self._check(output, between, spare)
        except BaseException:  # the next call learns anew
            for entry in self.entries.values():
                entry.forget(set())
            raise
        self.learned = True
        self.seconds = time.perf_counter() - started
        return output

    def observe(self, arguments: Arguments) -> None:
        """`learn`, and nothing of it kept."""
        self.learn(arguments)
        for entry in self.entries.values():
            entry.latest, entry.x = {}, []

    def _check(self, output: Any, between: dict[int, set[tuple[int, int]]], spare: Arguments) -> None:
        """Raise UnsupportedModelError unless groups can stand for their blocks, `between` kept too if need be."""
        leaves, spec = tree_flatten(output)
        expect_tensors("the model's output", leaves)
        if not any(map(is_stream, leaves)):
            raise UnsupportedModelError(f"expected tensors in the model's output, got {spec}")
        if self._is_same(output, spare):
            return
        for number, entry in self.entries.items():
            entry.forget(between[number])
        self._observe(copied_tensors(spare))
        if not self._is_same(output, spare):
            names = ", ".join(entry.name for entry in self.entries.values())
            raise UnsupportedModelError(
                f"expected an output that depends on nothing but the streams after {names}, got another one when "
                "these were put in place of the blocks: level 'output' takes this model"
            )

    def _observe(self, arguments: Arguments) -> tuple[Any, dict[int, set[tuple[int, int]]]]:
        """Learn from each call of a forward: its output, and what of each entry others may read."""
        args, kwargs = arguments
        between: dict[int, set[tuple[int, int]]] = {number: set() for number in self.entries}
        held: dict[int, set[tuple[int, int]]] = {}
        calls: list[int] = []
        self.uncounted = uncountable(self._model())
        counter = CountMacs() if self.uncounted is None else None
        macs = dict.fromkeys(self.entries, 0)

        def handle(number: int, *call: Any) -> Any:
            if calls and calls[-1] != number:
                left = self.entries[calls[-1]]
                held[calls[-1]] = left.held()
                between[calls[-1]] |= left.returned()
            calls.append(number)
            before = 0 if counter is None else counter.macs
            result = self.entries[number].learn(*call)
            macs[number] += 0 if counter is None else counter.macs - before
            held[number] = self.entries[number].held()
            return result

        counting = contextlib.nullcontext() if counter is None else counter
        with counting, intercepted(self._blocks, lambda number, *call: handle(self._owners[number], *call)):
            output = self._model()(*args, **kwargs)
        for entry in self.entries.values():
            if not entry.calls:
                raise UnsupportedModelError(
                    f"expected the model's forward to call the blocks of {entry.name}, got no call of any: level "
                    "'output' takes this model"
                )
        self.macs = None if counter is None else (counter.macs, macs)
        return output, {number: between[number] | held[number] for number in self.entries}

    def _is_same(self, output: Any, arguments: Arguments) -> bool:
        scratch: dict[Blank, Tensor] = {}
        for number, entry in self.entries.items():
            entry.settle(self.program.slots[number], scratch)
        for t in scratch.values():
            t.fill_(torch.nan)
        same = all(self._is_same_reusing(numbers, output, copied_tensors(arguments)) for numbers in self._sets())
        for t in scratch.values():
            t.zero_()
        return same

    def _sets(self) -> list[frozenset[int]]:
        """Entries to reuse together in a check: all sets that occur, or each alone if that is fewer.

        What nothing outside a group reads if it alone is reused, nothing reads in any set.
        """
        steps = [step for step in self.program.steps if isinstance(step, ForwardStep)]
        sets = {frozenset(k for k in self.entries if not isinstance(step.entries[k], Keep)) for step in steps}
        return min(sorted(sets - {frozenset()}, key=sorted), [frozenset([k]) for k in self.entries], key=len)

    def _is_same_reusing(self, numbers: frozenset[int], output: Any, arguments: Arguments) -> bool:
        """Whether the output, and what goes into groups with a carry, stay with groups `numbers` reused."""
        pairs: list[tuple[Any, Any]] = []

        def handle(number: int, run: Any, *call: Any) -> Any:
            entry = self.entries[number]
            if entry.carries and entry.done == 0:
                pairs.extend((a, b.clone()) for a, b in zip(entry.x, entry.before(*call)))
            return entry.reuse(None, *call) if number in numbers else entry.compute(None, run, *call)

        try:
            reused = self.forward(arguments, handle)
        except (UnsupportedModelError, ForwardChanged):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                "expected a forward that needs nothing of its blocks but what they return, got "
                f"{type(error).__name__}: {error}; level 'output' takes this model"
            ) from error
        pairs += zip(tree_flatten(output)[0], tree_flatten(reused)[0], strict=True)
        return all(_close(a, b) for a, b in pairs if is_stream(a))

    def _keep_learned(self, step: ForwardStep) -> None:
        for number, entry in self.entries.items():
            if (slot := step.entries[number].slot) is not None:
                entry.values.keep(slot, [entry.latest[key] for key in entry.kept])
                if entry.carries:
                    entry.befores.keep(slot, entry.x)
            entry.latest, entry.x = {}, []

    # ---- the model's output as a value

    def _keep_output(self, slot: int, output: Any) -> None:
        leaves, spec = tree_flatten(output)
        streams = [t for t in leaves if is_stream(t)]
        expect_tensors("the model's output", leaves)
        if not streams:
            raise UnsupportedModelError(f"output: expected tensors in the model's output, got {spec}")
        if self._outputs is not None and (spec, len(streams)) != (self._outputs[1], len(self._outputs[0].slots[0])):
            raise ForwardChanged(f"output: expected {self._outputs[1]} as at the first call, got {spec}")
        values = Values("output", self.program.outputs, streams) if self._outputs is None else self._outputs[0]
        self._outputs = (values, spec, [_STREAM if is_stream(t) else t for t in leaves])
        values.keep(slot, streams)

    def _reuse_output(self, instructions: ReuseOutput) -> Any:
        values, spec, rest = self._outputs
        streams = iter(values.combined(instructions.terms, self._output_channels, self._combine, self.shape.listed))
        return tree_unflatten([next(streams) if leaf is _STREAM else leaf for leaf in rest], spec)

    # ---- the rest

    def half(self, number: int, batch: int, shape: Any) -> ForwardPlan:
        """The same for half `number` of its batch, with the values it holds."""
        own = ForwardPlan(self._model(), self.program, self.groups, shape, self.compiled)
        scratch: dict[Blank, Tensor] = {}
        own.entries = {k: entry.half(number, batch, scratch) for k, entry in self.entries.items()}
        if self._outputs is not None:
            own._outputs = self._half_outputs(number, batch)
        if self.macs is not None:
            own.macs = (self.macs[0] // 2, {k: macs // 2 for k, macs in self.macs[1].items()})
        own.uncounted, own.learned = self.uncounted, self.learned
        return own

    def _half_outputs(self, number: int, batch: int) -> tuple[Values, TreeSpec, list[Any]]:
        """Half of each list over the batch; where there is none, of each tensor."""
        values, spec, rest = self._outputs

        def half(part: Any) -> Any:
            return part[number * batch // 2 : (number + 1) * batch // 2] if over_batch(part) else part

        def over_batch(part: Any) -> bool:
            return isinstance(part, list) and len(part) == batch

        leaves = tree_unflatten([*range(len(rest))], spec)
        kept, kept_spec = tree_flatten(tree_map(half, leaves, is_leaf=over_batch))
        if len(kept) == len(rest):
            return values.half(number, batch), spec, rest
        streams = [leaf for leaf, part in enumerate(rest) if part is _STREAM]
        only = values.only([stream for stream, leaf in enumerate(streams) if leaf in kept])
        return only, kept_spec, [rest[leaf] for leaf in kept]

    def release(self) -> None:
        """Free the graphs' memory now; a plan without graphs goes with its last reference."""
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None
        self.streams.leave()

    @property
    def slot_bytes(self) -> int:
        kept = [v for entry in self.entries.values() for v in (entry.values, entry.befores) if v is not None]
        return sum(values.bytes for values in kept) + (0 if self._outputs is None else self._outputs[0].bytes)

    @property
    def model_bytes(self) -> int:
        model = self._model()
        return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())

    @property
    def counted(self) -> tuple[tuple[int, ...], int] | None:
        """Multiply-accumulates of each step of the program, and of one that computes everything."""
        if self.macs is None:
            return None
        full, entries = self.macs
        reused = [
            sum(macs for k, macs in entries.items() if not isinstance(step.entries[k], Keep))
            if isinstance(step, ForwardStep)
            else full
            for step in self.program.steps
        ]
        return tuple(full - macs for macs in reused), full


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    wide = torch.promote_types(a.dtype, torch.float32)
    share = SAME.get(a.dtype, SAME[torch.float32])
    a, b = a.to(wide), b.to(wide)
    finite = a[a.isfinite()].abs()
    tolerance = share * finite.max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def copied_tensors(arguments: Arguments) -> Arguments:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)
