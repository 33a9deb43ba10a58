"""Runs a Program on tensors of one shape: owns the buffers, turns instructions into calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.gap_torch import CHUNKS, chunks, compiled_gap, gap_eager
from .kernels.gelu import compiled_gelu, gelu_eager
from .models.base import Adapter, Branch, Gelu, Linear, Norm, SelfAttention
from .program import Gap, Program

BACKENDS = ("eager", "inductor")
MODULATION_BYTES = 256 * 2**20  # modulation rows are computed ahead for as many steps as fit in this

GapCall = Callable[[Tensor], tuple[Tensor, Tensor]]
Built = tuple[list[tuple[GapCall, Callable[[Tensor], None]]], GapCall]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan is made for."""

    batch: int
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"batch {self.batch}, {self.height}x{self.width}, {dtype} on {self.device}"


class Plan:
    """A program bound to a model's weights and to buffers for one shape.

    Attributes:
        slots: [slots, batch, tokens, width], what reused branches stand on.
        rows: [window, batch, rows, width], the modulation rows of `window` steps.
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
        row_bytes = shape.batch * adapter.rows * width * shape.dtype.itemsize
        self.window = max(1, min(len(program.steps), MODULATION_BYTES // row_bytes))
        self.rows = empty(self.window, shape.batch, adapter.rows, width)
        self.x = empty(self.stream)
        self.slots = empty(program.slots, *self.stream)
        self.scratch = empty(shape.batch * tokens * max(_widest(branch) for branch in branches))
        self._computes = [self._compute(branch) for branch in branches]
        self._steps: list[Built | None] = [None] * len(program.steps)
        if backend == "inductor":  # all variants now: no step and no later schedule of this shape compiles anything
            for terms in (0, *CHUNKS):
                self._variant(terms, norm=True)
                if terms > 1:
                    self._variant(terms, norm=False)
        self.seconds = time.perf_counter() - started

    def run(self, step: int, sample: Tensor) -> Tensor:
        """The model's output at `step`, a new tensor. Modulation rows and earlier slots must be filled."""
        body, last = self._steps[step] or self._build(step)
        x = self.x
        self.adapter.embed(sample, x)
        for gap, compute in body:
            x, y = gap(x)
            compute(y)
        _, y = last(x)
        return self.adapter.finish(y, self.shape.height, self.shape.width)

    def modulate(self, step: int, timesteps: Tensor, conditioning: tuple[Tensor, ...]) -> None:
        """Fill the modulation rows of `step` and of the steps after it, one for each of `timesteps`."""
        start = step % self.window
        self.adapter.modulate(timesteps, conditioning, self.rows[start : start + len(timesteps)])

    @property
    def slot_bytes(self) -> int:
        return self.slots.numel() * self.slots.element_size()

    @property
    def modulation_bytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()

    # ---- instructions -> calls

    def _build(self, step: int) -> Built:
        instructions = self.program.steps[step]
        body = []
        for gap, compute in instructions.body:
            out = self.slots[compute.slot].view(-1, self.stream[-1])
            body.append((self._gap(gap, step), partial(self._computes[compute.entry], out)))
        built = (body, self._gap(instructions.last, step))
        self._steps[step] = built
        return built

    def _row(self, row: int, step: int) -> Tensor:
        return self.rows[step % self.window, :, row].unsqueeze(1)

    def _gap(self, gap: Gap, step: int) -> GapCall:
        norm = self.head if gap.norm == self.program.entries else self.branches[gap.norm].norm
        shift, scale = self._row(norm.shift, step), self._row(norm.scale, step)
        slots = [self.slots[term.slot] for term in gap.terms]
        gates = [self._row(self.branches[term.entry].gate, step) for term in gap.terms]
        weights = [term.weight for term in gap.terms]
        if self.backend == "eager":
            return partial(gap_eager, slots=slots, gates=gates, weights=weights, norm=(shift, scale, norm.eps))
        calls, start, sizes = [], 0, chunks(len(slots))
        for n, terms in enumerate(sizes):
            last, part = n == len(sizes) - 1, slice(start, start + terms)
            start += terms
            scalars = torch.tensor([*weights[part], norm.eps], dtype=torch.float32, device=self.shape.device)
            operands = [scalars, *slots[part], *gates[part], *([shift, scale] if last else [])]
            calls.append((self._variant(terms, norm=last), operands))
        return partial(_gap_compiled, calls, bool(slots))

    def _variant(self, terms: int, norm: bool) -> Callable[..., list[Tensor]]:
        shape, rows = self.shape, self.adapter.rows
        return compiled_gap(terms, norm, self.stream, rows, shape.dtype, shape.device, torch.get_num_threads())

    def _compute(self, branch: Branch) -> Callable[[Tensor, Tensor], None]:
        """(out [batch * tokens, width], y) -> None, the branch's last GEMM writing into out."""
        batch, tokens, _ = self.stream
        calls: list[Callable[[Tensor, Tensor], Tensor]] = []
        for i, stage in enumerate(branch.stages):
            match stage:
                case Linear() if i == len(branch.stages) - 1:
                    calls.append(partial(_linear, stage))
                case Linear():
                    columns = len(stage.weight)
                    out = self.scratch[: batch * tokens * columns].view(-1, columns)
                    calls.append(partial(_linear, stage, out))
                case Gelu():
                    size = (batch * tokens, len(branch.stages[i - 1].weight))
                    calls.append(self._gelu(stage, size))
                case SelfAttention():
                    calls.append(partial(_attention, stage.heads, batch, tokens))
        return partial(_run_stages, calls)

    def _gelu(self, stage: Gelu, size: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
        if self.backend == "eager":
            function = partial(gelu_eager, approximate=stage.approximate)
        else:
            function = compiled_gelu(
                stage.approximate, size, self.shape.dtype, self.shape.device, torch.get_num_threads()
            )
        return partial(_in_place, function)


def _widest(branch: Branch) -> int:
    """Columns of the widest intermediate result: every Linear but the last writes into scratch."""
    return max((len(stage.weight) for stage in branch.stages[:-1] if isinstance(stage, Linear)), default=0)


def _gap_compiled(
    calls: list[tuple[Callable[..., list[Tensor]], list[Tensor]]], moves: bool, x: Tensor
) -> tuple[Tensor, Tensor]:
    for add, operands in calls[:-1]:
        (x,) = add(x, *operands)
    norm, operands = calls[-1]
    if moves:
        x, y = norm(x, *operands)
    else:
        (y,) = norm(x, *operands)
    return x, y


def _run_stages(calls: list[Callable[..., Tensor]], out: Tensor, y: Tensor) -> None:
    h = y
    for call in calls[:-1]:
        h = call(h)
    calls[-1](out, h)


def _linear(stage: Linear, out: Tensor, h: Tensor) -> Tensor:
    h, weight = h.view(-1, stage.weight.shape[1]), stage.weight.t()
    return torch.mm(h, weight, out=out) if stage.bias is None else torch.addmm(stage.bias, h, weight, out=out)


def _attention(heads: int, batch: int, tokens: int, qkv: Tensor) -> Tensor:
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    h = F.scaled_dot_product_attention(q, k, v)
    return h.transpose(1, 2).reshape(batch * tokens, -1)


def _in_place(function: Callable[[Tensor], object], h: Tensor) -> Tensor:
    function(h)
    return h
