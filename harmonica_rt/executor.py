"""Runs a Program on tensors of one shape: turns instructions into calls, which may be captured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backends import OPS, BranchCall, GapCall
from .buffers import Buffers
from .cuda_graphs import InputGraphs, Recorder, StepGraphs
from .loop import LoopGraph, Loops, loop_key
from .models.base import Adapter, Shape
from .models.branch import Branch, Norm, by_segment
from .models.stages import scratch_columns
from .program import Program, ReuseOutput, Step
from .streams import Streams

Built = tuple[list[tuple[GapCall, Callable[[Tensor], None]]], GapCall]


class Plan:
    """A program bound to a model's weights and to buffers for one shape.

    Attributes:
        graphs: captured steps, if the plan replays them.
        loops: captured trajectories.
        measured: seconds a run takes replayed and launched plainly, once both have been measured.
        seconds: time it took to build, compilation and the capture of steps included.
    """

    def __init__(
        self, adapter: Adapter, branches: list[Branch], head: Norm, program: Program, shape: Shape, backend: str
    ) -> None:
        started = time.perf_counter()
        self.adapter, self.branches = adapter, branches
        self.program, self.shape, self.backend = program, shape, backend
        widest = max((columns for branch in branches for columns in scratch_columns(branch.stages)), default=0)
        self.buffers = Buffers(adapter, program, shape, widest)
        self.streams = Streams(shape.device)
        self.graphs: StepGraphs | None = None
        self.inputs: InputGraphs | None = None
        self.timesteps: Tensor | None = None  # of the rows, as they were filled last
        self.loops = Loops()
        self.measured: tuple[float, float] | None = None
        self._steps: list[Built | None] = [None] * len(program.steps)
        self.ops = OPS[backend](branches, head, self.buffers)
        for gap in dict.fromkeys(gap for step in program.steps for gap in step.gaps):
            self.ops.prepare(gap)  # now: no step of a run compiles anything
        self._computes: list[BranchCall] = [self.ops.branch(entry) for entry in range(len(branches))]
        self.seconds = time.perf_counter() - started

    def run(self, step: int, sample: Tensor) -> Tensor:
        """The model's output at `step`, a new tensor. Modulation rows and earlier slots must be filled."""
        self.streams.enter()
        return self.run_plainly(step, sample) if self.graphs is None else self.graphs.run(step, sample)

    def run_plainly(self, step: int, sample: Tensor) -> Tensor:
        """`run` by launches, even if there are graphs."""
        self.select(step)
        return self.launch(step, sample)

    def select(self, step: int) -> None:
        """Have kernels use the modulation rows of `step`."""
        if self.ops.reads_step:
            self.buffers.select(step)

    def launch(self, step: int, sample: Tensor) -> Tensor:
        """`run`, once the step is selected: no host data goes to the device here, so this may be captured."""
        instructions = self.program.steps[step]
        if isinstance(instructions, ReuseOutput):
            return self._reuse_output(instructions)
        body, last = self.calls(step)
        x, done = self.buffers.x, 0
        try:
            if instructions.embeds:
                into = x if instructions.before is None else self.buffers.slots.select(0, instructions.before)
                self.adapter.embed(sample, self.buffers.held, into)
            for gap, compute in body:
                x, y = gap(x)
                compute(y)
                done += 1
            x, y = last(x)
            if instructions.after is not None:
                self.buffers.slots.select(0, instructions.after).copy_(x)
            output = self.adapter.finish(y, self.shape.sample)
            if instructions.keep is not None:
                self.buffers.outputs.select(0, instructions.keep).copy_(output)
            return output
        except Exception as error:
            error.add_note(f"at step {step}, instruction {done}: {[*instructions.body, instructions.last][done]}")
            raise

    def _reuse_output(self, instructions: ReuseOutput) -> Tensor:
        outputs, channels = self.buffers.outputs, self.buffers.output_channels
        total = torch.zeros(outputs.shape[1:], dtype=outputs.dtype, device=outputs.device)
        for term in instructions.terms:
            output = outputs.select(0, term.slot)
            if term.channel is None:
                total.add_(output, alpha=term.weight)
            else:
                assert channels is not None, "weights per channel are of a table"
                size = [1] * output.ndim
                size[self.adapter.channel_dim] = -1
                total.addcmul_(output, channels.select(0, term.channel).view(size))
        return total

    def modulate(self, step: int, timesteps: Tensor, conditioning: tuple[Tensor, ...]) -> None:
        """Fill the modulation rows of `step` and of the steps after it, one for each of `timesteps`.

        With graphs all rows of the window are filled, whose launches are then one: those of other steps as before if
        the conditioning is, and else with values that nothing reads.
        """
        self.streams.enter()
        rows, at, count = self.buffers.rows, step % self.window, len(timesteps)
        if self.inputs is None:
            self._modulate(step, rows.narrow(0, at, count), timesteps, *conditioning)
            return
        if self.timesteps is None or self.timesteps.dtype != timesteps.dtype:
            self.timesteps = timesteps.narrow(0, 0, 1).expand(self.window).clone()
        self.timesteps.narrow(0, at, count).copy_(timesteps)
        first = step - at
        key = first if self.buffers.channels is not None else None
        launch = partial(self._modulate, first, rows)
        self.inputs.run("modulation rows", key, launch, (self.timesteps, *conditioning))

    def _modulate(self, step: int, rows: Tensor, timesteps: Tensor, *conditioning: Tensor) -> None:
        self.adapter.modulate(timesteps, conditioning, rows.narrow(2, 0, self.adapter.rows))
        if self.buffers.channels is not None:
            for ahead in range(min(len(rows), len(self.program.steps) - step)):
                self._fold(step + ahead, rows.select(0, ahead), self.buffers.channels.select(0, step + ahead))

    def _fold(self, step: int, rows: Tensor, channels: Tensor) -> None:
        """Multiply gates by `channels`, `step`'s weights per channel: a Gap then has one row a term, as without."""
        for gap in self.program.steps[step].gaps:
            for term in gap.terms:
                if term.channel is not None:
                    weights = channels.select(0, term.channel).to(rows.dtype)
                    gate = None if term.entry is None else self.branches[term.entry].gate
                    gates = by_segment(gate, self.buffers.segments)
                    into = by_segment(self.buffers.channel_row(term.channel), self.buffers.segments)
                    for own, row in zip(gates, into):
                        assert row is not None
                        rows.select(1, row).copy_(weights if own is None else rows.select(1, own) * weights)

    def encode(self, conditioning: tuple[Tensor, ...]) -> None:
        """Fill what cross-attention reads in the run that begins."""
        self.streams.enter()
        if self.inputs is None or self.buffers.held.nothing:
            self._encode(*conditioning)
        else:
            self.inputs.run("text", None, self._encode, conditioning)

    def _encode(self, *conditioning: Tensor) -> None:
        self.adapter.encode(conditioning, self.buffers.held)

    # ---- graphs

    def capture(self, recorder: Recorder) -> None:
        """Have `run` replay graphs from now on. Raises CaptureFailed, and then the plan launches plainly."""
        started, shape = time.perf_counter(), self.shape
        sample = torch.zeros(shape.sample, dtype=shape.dtype, device=shape.device)
        self.graphs = StepGraphs(self.program.steps, self.launches, self.buffers.select, sample, recorder)
        self.inputs = InputGraphs(recorder)
        self.seconds += time.perf_counter() - started

    def launches(self, step: int) -> Callable[[Tensor], Tensor]:
        """`launch` of `step`, with all host data that it needs on the device."""
        if not isinstance(self.program.steps[step], ReuseOutput):
            self.calls(step)
        return partial(self.launch, step)

    def measure(self, rounds: int = 3) -> bool:
        """Time whole runs replayed and launched plainly, in turn, for `measured`. Is replay the faster?"""
        assert self.graphs is not None, "nothing is captured"
        self.measured = self.graphs.measure(self.run_plainly, rounds)
        replayed, launched = self.measured
        return replayed <= launched

    def loop(self, scheduler: Any, guidance_scale: float, images: int) -> LoopGraph:
        """The captured trajectory of a plan that has graphs, made if there is none.

        Raises:
            CaptureFailed: the sampler's updates cannot be captured.
        """
        assert self.graphs is not None, "nothing is captured"
        size, recorder = (images, *self.shape.sample[1:]), self.graphs.recorder

        def make() -> LoopGraph:
            noise = torch.zeros(size, dtype=self.shape.dtype, device=self.shape.device)
            return LoopGraph(self.run_plainly, self.streams, recorder, scheduler, guidance_scale, noise)

        return self.loops.get(loop_key(scheduler, guidance_scale), make)

    def release_graphs(self) -> None:
        """Free the memory of the captured steps, and launch plainly from now on."""
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None
        if self.inputs is not None:
            self.inputs.free()
            self.inputs = None

    def release(self) -> None:
        """Free the graphs' memory now; a plan without graphs goes with its last reference."""
        self.loops.release()
        self.release_graphs()
        self.streams.leave()

    @property
    def slot_bytes(self) -> int:
        return self.buffers.slots.nbytes

    @property
    def window(self) -> int:
        """Steps that modulation rows are held for."""
        return self.buffers.window

    @property
    def modulation_bytes(self) -> int:
        return self.buffers.rows.nbytes

    # ---- instructions -> calls

    def calls(self, step: int) -> Built:
        """The calls of `step`. The first time they are made, which brings host data to the device."""
        if (built := self._steps[step]) is not None:
            return built
        instructions = self.program.steps[step]
        assert isinstance(instructions, Step), "reuse of the output runs nothing"
        body: list[tuple[GapCall, Callable[[Tensor], None]]] = []
        for gap, compute in instructions.body:
            out = self.buffers.slots.select(0, compute.slot)
            body.append((self.ops.gap(gap, step), partial(self._computes[compute.entry], out)))
        made = (body, self.ops.gap(instructions.last, step))
        self._steps[step] = made
        return made
