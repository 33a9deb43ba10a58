"""Runs a ForwardProgram: the model's own forward, its groups of blocks or the whole of it replaced where reused."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .compiled_blocks import CompiledBlocks
from .cuda_graphs import Recorder
from .entry import Entry
from .first_forward import FirstForward
from .forward_graphs import ForwardGraphs
from .kept_output import KeptOutput
from .kept_streams import Blank, Sum
from .kernels.combine_torch import combine_eager
from .kernels.inductor import missing_triton
from .loop import LoopGraph, loop_key
from .program import ForwardProgram, ForwardStep, Keep, ReuseOutput
from .steered_forward import Arguments, SteeredForward
from .streams import Streams


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
        self.streams = Streams(shape.device)
        reused = [entry for entry, slots in enumerate(program.slots) if slots]
        self.entries = {entry: Entry(groups[entry][0], program.carries[entry]) for entry in reused}
        self.forward = SteeredForward(model, self.entries, {entry: groups[entry][1] for entry in reused})
        tables = (program.channels, program.output_channels)
        self._channels, self._output_channels = (
            None if table is None else torch.from_numpy(table).to(shape.device) for table in tables
        )
        self._output: KeptOutput | None = None
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
        owner, forward = weakref.proxy(self), self.forward  # the plan owns its graphs
        self.graphs = ForwardGraphs(
            lambda step, args, kwargs: owner.launch(step, (args, kwargs)),
            lambda: forward.model,
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
            assert self._output is not None, "the first step computes its output"
            return self._output.combined(instructions.terms, self._output_channels, self._combine, self.shape.listed)
        if not self.learned:
            output = self.learn(arguments)
            self._keep_learned(instructions)
        elif graphs is None:
            output = self.launch(instructions, arguments)
        else:
            output = graphs.run(instructions, *arguments)
        if instructions.keep is not None:
            if self._output is None:
                self._output = KeptOutput.like(output, self.program.outputs)
            self._output.keep(instructions.keep, output)
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
        assert self.graphs is not None, "nothing is captured"
        self.streams.enter()
        recorder = self.graphs.recorder
        (sample,), conditioning = arguments
        conditioning = {name: value for name, value in conditioning.items() if name != "timestep"}

        def make(static: tuple[dict[str, Any], Tensor]) -> LoopGraph:
            rest, times = static

            def denoise(step: int, x: Tensor) -> Tensor:
                now = times.narrow(0, step, 1).expand(len(x))
                kwargs = tree_map(lambda leaf: leaf, rest)  # models take from the dicts they are given
                return self._run(step, ((x,), {"timestep": now, **kwargs}), None)[0]

            noise = torch.zeros((images, *sample.shape[1:]), dtype=sample.dtype, device=sample.device)
            return LoopGraph(denoise, self.streams, recorder, scheduler, guidance_scale, noise)

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

    # ---- the first call

    def learn(self, arguments: Arguments) -> Any:
        """The model's output, having found out what the groups are: see `FirstForward`."""
        started = time.perf_counter()
        first = FirstForward(self.forward, self.program, self.shape.device)
        output = first.run(arguments)
        self.macs, self.uncounted, self.learned = first.macs, first.uncounted, True
        self.seconds = time.perf_counter() - started
        return output

    def observe(self, arguments: Arguments) -> None:
        """`learn`, and nothing of it kept."""
        self.learn(arguments)
        for entry in self.entries.values():
            entry.latest, entry.x = {}, []

    def _keep_learned(self, step: ForwardStep) -> None:
        for number, entry in self.entries.items():
            what = step.entries[number]
            assert isinstance(what, Keep), "the first step computes everything"
            if what.slot is not None:
                entry.keep(what.slot, [entry.latest[key] for key in entry.kept], entry.x)
            entry.latest, entry.x = {}, []

    # ---- the rest

    def half(self, number: int, batch: int, shape: Any) -> ForwardPlan:
        """The same for half `number` of its batch, with the values it holds."""
        own = ForwardPlan(self.forward.model, self.program, self.groups, shape, self.compiled)
        scratch: dict[Blank, Tensor] = {}
        own.entries.update((k, entry.half(number, batch, scratch)) for k, entry in self.entries.items())
        own._output = None if self._output is None else self._output.half(number, batch)
        if self.macs is not None:
            own.macs = (self.macs[0] // 2, {k: macs // 2 for k, macs in self.macs[1].items()})
        own.uncounted, own.learned = self.uncounted, self.learned
        return own

    def release(self) -> None:
        """Free the graphs' memory now; a plan without graphs goes with its last reference."""
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None
        self.streams.leave()

    @property
    def slot_bytes(self) -> int:
        kept = [v for entry in self.entries.values() for v in (entry.values, entry.befores) if v is not None]
        return sum(values.bytes for values in kept) + (0 if self._output is None else self._output.values.bytes)

    @property
    def model_bytes(self) -> int:
        model = self.forward.reference()
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
