"""Runs a Program on tensors of one shape: owns the buffers, turns instructions into calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import OPS, GapCall, linear
from .cuda_graphs import StepGraphs
from .loop import LoopGraph
from .models.base import Adapter, Branch, CrossAttention, Gelu, Linear, Norm, SelfAttention
from .program import Program, ReuseOutput, Term
from .streams import Streams

LOOPS = 4  # captured trajectories a plan keeps: each is a graph of all steps, for one sampler and guidance
MODULATION_BYTES = 256 * 2**20  # modulation rows are computed ahead for as many steps as fit in this

Built = tuple[list[tuple[GapCall, Callable[[Tensor], None]]], GapCall]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan is made for."""

    batch: int
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device
    context: int = 0  # tokens that cross-attention reads

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        context = f", {self.context} context tokens" if self.context else ""
        return f"batch {self.batch}, {self.height}x{self.width}{context}, {dtype} on {self.device}"


class Plan:
    """A program bound to a model's weights and to buffers for one shape.

    Attributes:
        slots: [slots, batch, tokens, width], what reused branches stand on.
        outputs: [outputs, batch, out channels, height, width], what reused outputs stand on.
        rows: [window, batch, rows, width], the modulation rows of `window` steps: the adapter's, and behind them a gate
            times its weights per channel for each term that has such.
        channels: [steps, terms, width], those weights.
        context: [contexts, 2, batch, context tokens, width], keys and values that cross-attention reads; and
        context_bias: [batch, 1, 1, context tokens], what it adds to the scores.
        step: int32 [1], which of them the call under way uses, for kernels that look it up on the device.
        graphs: captured steps, if the plan replays them.
        loops: captured trajectories, by sampler, guidance and timesteps.
        measured: seconds a run takes replayed and launched plainly, once both have been measured.
        seconds: time it took to build, compilation included.
    """

    def __init__(
        self, adapter: Adapter, branches: list[Branch], head: Norm, program: Program, shape: Shape, backend: str
    ) -> None:
        started = time.perf_counter()
        self.adapter, self.branches, self.head = adapter, branches, head
        self.program, self.shape, self.backend = program, shape, backend
        tokens, width = adapter.tokens(shape.height, shape.width), adapter.width
        self.stream = (shape.batch, tokens, width)
        empty = partial(torch.empty, dtype=shape.dtype, device=shape.device)
        self.channels = _table(program.channels, width, "channels", torch.float32, shape.device)
        self.output_channels = _table(
            program.output_channels, adapter.out_channels, "output_channels", shape.dtype, shape.device
        )
        count = adapter.rows + (0 if self.channels is None else self.channels.shape[1])
        row_bytes = shape.batch * count * width * shape.dtype.itemsize
        self.window = max(1, min(len(program.steps), MODULATION_BYTES // row_bytes))
        self.rows = empty(self.window, shape.batch, count, width)
        self.step = torch.zeros(1, dtype=torch.int32, device=shape.device)
        self.context = empty(adapter.contexts, 2, shape.batch, shape.context, width)
        self.context_bias = empty(shape.batch, 1, 1, shape.context)
        self.streams = Streams(shape.device)
        self.x = empty(self.stream)
        self.slots = empty(program.slots, *self.stream)
        size = (shape.batch, adapter.out_channels, shape.height, shape.width)
        self.outputs = empty(program.outputs, *size)
        self.scratch = empty(shape.batch * tokens * max(_widest(branch) for branch in branches))
        self.timesteps: Tensor | None = None  # of the rows, as they were filled last
        self.graphs: StepGraphs | None = None
        self.loops: dict[tuple[Any, ...], LoopGraph] = {}
        self.measured: tuple[float, float] | None = None
        self._steps: list[Built | None] = [None] * len(program.steps)
        self.ops = OPS[backend](self)
        self._computes = [self._compute(branch) for branch in branches]
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
            self.step.fill_(step % self.window)

    def launch(self, step: int, sample: Tensor) -> Tensor:
        """`run`, once the step is selected: no host data goes to the device here, so this may be captured."""
        instructions = self.program.steps[step]
        if isinstance(instructions, ReuseOutput):
            return self._reuse_output(instructions)
        body, last = self.calls(step)
        x, done = self.x, 0
        try:
            self.adapter.embed(sample, x)
            for gap, compute in body:
                x, y = gap(x)
                compute(y)
                done += 1
            _, y = last(x)
            output = self.adapter.finish(y, self.shape.height, self.shape.width)
            if instructions.keep is not None:
                self.outputs.select(0, instructions.keep).copy_(output)
            return output
        except Exception as error:
            error.add_note(f"at step {step}, instruction {done}: {[*instructions.body, instructions.last][done]}")
            raise

    def _reuse_output(self, instructions: ReuseOutput) -> Tensor:
        total = torch.zeros(self.outputs.shape[1:], dtype=self.outputs.dtype, device=self.outputs.device)
        for term in instructions.terms:
            output = self.outputs.select(0, term.slot)
            if term.channel is None:
                total.add_(output, alpha=term.weight)
            else:
                total.addcmul_(output, self.output_channels.select(0, term.channel).view(-1, 1, 1))
        return total

    def modulate(self, step: int, timesteps: Tensor, conditioning: tuple[Tensor, ...]) -> None:
        """Fill the modulation rows of `step` and of the steps after it, one for each of `timesteps`.

        With graphs all rows of the window are filled, whose launches are then one: those of other steps as before if
        the conditioning is, and else with values that nothing reads.
        """
        self.streams.enter()
        at, count = step % self.window, len(timesteps)
        if self.graphs is None:
            self._modulate(step, self.rows.narrow(0, at, count), timesteps, *conditioning)
            return
        if self.timesteps is None or self.timesteps.dtype != timesteps.dtype:
            self.timesteps = timesteps.narrow(0, 0, 1).expand(self.window).clone()
        self.timesteps.narrow(0, at, count).copy_(timesteps)
        first = step - at
        launch = partial(self._modulate, first, self.rows)
        key = first if self.channels is not None else None
        self.graphs.inputs.run("modulation rows", key, launch, (self.timesteps, *conditioning))

    def _modulate(self, step: int, rows: Tensor, timesteps: Tensor, *conditioning: Tensor) -> None:
        self.adapter.modulate(timesteps, conditioning, rows.narrow(2, 0, self.adapter.rows))
        if self.channels is not None:
            for ahead in range(min(len(rows), len(self.program.steps) - step)):
                self._fold(step + ahead, rows.select(0, ahead))

    def _fold(self, step: int, rows: Tensor) -> None:
        """Multiply gates by the weights per channel of `step`: a Gap then has one row a term, as without them."""
        for gap in self.program.steps[step].gaps:
            for term in gap.terms:
                if term.channel is not None:
                    weights = self.channels.select(0, step).select(0, term.channel).to(rows.dtype)
                    gate = self.branches[term.entry].gate
                    out = rows.select(1, self.adapter.rows + term.channel)
                    out.copy_(weights if gate is None else rows.select(1, gate) * weights)

    def gate(self, term: Term) -> int | None:
        """The modulation row that multiplies a term; None for 1."""
        return self.branches[term.entry].gate if term.channel is None else self.adapter.rows + term.channel

    def encode(self, conditioning: tuple[Tensor, ...]) -> None:
        """Fill what cross-attention reads in the run that begins."""
        self.streams.enter()
        if self.graphs is None or not self.adapter.contexts:
            self._encode(*conditioning)
        else:
            self.graphs.inputs.run("text", None, self._encode, conditioning)

    def _encode(self, *conditioning: Tensor) -> None:
        self.adapter.encode(conditioning, self.context, self.context_bias)

    def loop(self, key: tuple[Any, ...], make: Callable[[], LoopGraph]) -> LoopGraph:
        """The captured trajectory of `key`, made if there is none. The least recently used go first."""
        self.loops[key] = self.loops.pop(key, None) or make()
        while len(self.loops) > LOOPS:
            self.loops.pop(next(iter(self.loops))).release()
        return self.loops[key]

    def release(self) -> None:
        """Free the graphs' memory now; a plan without graphs goes with its last reference."""
        for loop in self.loops.values():
            loop.release()
        self.loops.clear()
        if self.graphs is not None:
            self.graphs.release()
        self.streams.leave()

    @property
    def slot_bytes(self) -> int:
        return self.slots.numel() * self.slots.element_size()

    @property
    def modulation_bytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()

    # ---- instructions -> calls

    def calls(self, step: int) -> Built:
        """The calls of `step`. The first time they are made, which brings host data to the device."""
        if (built := self._steps[step]) is not None:
            return built
        instructions = self.program.steps[step]
        body = []
        for gap, compute in instructions.body:
            out = self.slots.select(0, compute.slot).view(-1, self.stream[-1])
            body.append((self.ops.gap(gap, step), partial(self._computes[compute.entry], out)))
        built = (body, self.ops.gap(instructions.last, step))
        self._steps[step] = built
        return built

    def norm(self, entry: int) -> Norm | None:
        """What prepares y for branch `entry`, or for the head; None where y is x."""
        return self.head if entry == self.program.entries else self.branches[entry].norm

    def row(self, row: int, step: int) -> Tensor:
        """A modulation row of `step`, [batch, 1, width]."""
        return self.rows.select(0, step % self.window).narrow(1, row, 1)

    def _compute(self, branch: Branch) -> Callable[[Tensor, Tensor], None]:
        """(out [batch * tokens, width], y) -> None, the branch's last GEMM writing into out."""
        batch, tokens, _ = self.stream
        calls: list[Callable[..., Tensor]] = []
        for stage, following in zip(branch.stages, [*branch.stages[1:], None]):
            match stage:
                case Linear() if following is None:
                    calls.append(partial(linear, stage))
                case Linear():
                    columns = len(stage.weight)
                    out = self.scratch.narrow(0, 0, batch * tokens * columns).view(-1, columns)
                    if isinstance(following, Gelu):
                        calls.append(self.ops.linear_gelu(stage, following, out))
                    else:
                        calls.append(partial(linear, stage, out))
                case SelfAttention():
                    calls.append(partial(_attention, stage.heads, batch, tokens))
                case CrossAttention():
                    keys, values = _heads(self.context.select(0, stage.context), stage.heads)
                    calls.append(partial(_cross_attention, keys, values, self.context_bias, batch, tokens))
        return partial(_run_stages, calls)


def _table(rows: np.ndarray | None, width: int, name: str, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Weights per channel on the device. Raises ValueError if they are not as wide as what they are for."""
    if rows is None:
        return None
    if rows.shape[-1] != width:
        raise ValueError(f"{name}: expected {width} channels, the model's, got a schedule with {rows.shape[-1]}")
    return torch.from_numpy(rows).to(device, dtype)


def _widest(branch: Branch) -> int:
    """Columns of the widest intermediate result: every Linear but the last writes into scratch."""
    return max((len(stage.weight) for stage in branch.stages[:-1] if isinstance(stage, Linear)), default=0)


def _run_stages(calls: list[Callable[..., Tensor]], out: Tensor, y: Tensor) -> None:
    h = y
    for call in calls[:-1]:
        h = call(h)
    calls[-1](out, h)


def _attention(heads: int, batch: int, tokens: int, qkv: Tensor) -> Tensor:
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    h = F.scaled_dot_product_attention(q, k, v)
    return h.transpose(1, 2).reshape(batch * tokens, -1)


def _heads(h: Tensor, heads: int) -> Tensor:
    """[..., tokens, width] -> [..., heads, tokens, head width], a view."""
    return h.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _cross_attention(keys: Tensor, values: Tensor, bias: Tensor, batch: int, tokens: int, h: Tensor) -> Tensor:
    q = _heads(h.view(batch, tokens, -1), keys.shape[-3])
    h = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
    return h.transpose(1, 2).reshape(batch * tokens, -1)
