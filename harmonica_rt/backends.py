"""How each backend turns instructions into calls on a plan's buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .buffers import Buffers
from .compiled_calls import NotCompiledError, compiled_call
from .kernels.gap_torch import chunks, compiled_gap, gap_eager
from .kernels.gelu import compiled_gelu
from .kernels.inductor import CompilerMissing, missing_triton
from .models.branch import Branch, Norm, Row, by_segment
from .models.stages import Call, Gelu, Held, Linear, Stage, scratch_columns
from .program import STREAM, Gap, Term

GapCall = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> (x moved on, y)
BranchCall = Callable[[Tensor, Tensor], None]  # (out, y): the branch of y goes into out


class EagerOps:
    """Plain torch ops, in place where there are such. The backend every other is tested against.

    Args:
        branches: the model's, in the order they run.
        head: what prepares y for the model's head.
    """

    reads_step: ClassVar[bool] = False  # whether kernels look the step up on the device
    bakes = False  # whether all that the model's own calls do, but for tensors' values, is part of what runs

    def __init__(self, branches: Sequence[Branch], head: Norm, buffers: Buffers) -> None:
        self.branches, self.buffers = branches, buffers
        self.uncompiled: dict[int, str] = {}  # branches of the model's own calls that run as they are, and why
        self.norms = [*(branch.norm for branch in branches), head]
        self.stages = [self._stages(number, branch) for number, branch in enumerate(branches)]

    def prepare(self, gap: Gap) -> None:
        """Compile what a Gap runs, where a backend compiles."""

    def gap(self, gap: Gap, step: int) -> GapCall:
        slots, gates, weights = self._terms(gap)
        norm, made = self.norms[gap.norm], [self._at(gate, step) for gate in gates]
        rows = None if norm is None else (self._at(norm.shift, step), self._at(norm.scale, step), norm.eps)
        kind = "layer" if norm is None else norm.kind
        add = partial(
            gap_eager, slots=slots, gates=made, weights=weights, norm=rows, split=self.buffers.split, kind=kind
        )
        return add if gap.start == STREAM else partial(_started, self._start(gap), add)

    def branch(self, entry: int) -> BranchCall:
        """The calls of a branch, the last one writing into a slot."""
        stages, held = self.stages[entry], self.buffers.held
        calls: list[Callable[[Tensor], Tensor]] = []
        for stage, columns in zip(stages, scratch_columns(stages)):
            if columns:
                calls.append(partial(stage.into, held=held, out=self.buffers.scratch_of(columns)))
            else:
                calls.append(partial(stage.compute, held=held))
        return partial(_run_stages, calls, partial(stages[-1].into, held=held))

    def gap_launches(self, gap: Gap) -> int:
        norm, terms = self.norms[gap.norm], sum(1 + self._apart(self.gate(term)) for term in gap.terms)
        terms += gap.start != STREAM
        if norm is None:
            return terms
        wider = self.buffers.rows.dtype != self.buffers.x.dtype
        return terms + 2 + (self._apart(norm.shift) or self._apart(norm.scale)) + wider

    def branch_launches(self, entry: int) -> int:
        stages = self.stages[entry]
        return sum(stage.launches for stage in stages) + stages[-1].copies

    def gate(self, term: Term) -> Row | None:
        """The modulation row that multiplies a term; None for 1."""
        if term.channel is not None:
            return self.buffers.channel_row(term.channel)
        return None if term.entry is None else self.branches[term.entry].gate

    def _stages(self, number: int, branch: Branch) -> tuple[Stage, ...]:
        """A branch's, as they run here."""
        return branch.stages

    def _start(self, gap: Gap) -> Tensor | None:
        """What a Gap that does not start from the stream starts from; None for 0."""
        return None if gap.start is None else self.buffers.slots.select(0, gap.start)

    def _terms(self, gap: Gap) -> tuple[list[Tensor], list[Row | None], list[float]]:
        slots = [self.buffers.slots.select(0, term.slot) for term in gap.terms]
        return slots, [self.gate(term) for term in gap.terms], [term.weight for term in gap.terms]

    def _apart(self, row: Row | None) -> bool:
        """Whether the segments have rows of their own."""
        return isinstance(row, tuple) and row[0] != row[1] and self.buffers.split > 0

    def _at(self, row: Row | None, step: int) -> Tensor | tuple[Tensor, Tensor] | None:
        """A modulation row of `step`, [batch, 1, width], or of both segments; without text all is the second."""
        if isinstance(row, tuple) and self._apart(row):
            return self.buffers.row(row[0], step), self.buffers.row(row[1], step)
        return None if row is None else self.buffers.row(row[1] if isinstance(row, tuple) else row, step)


class InductorOps(EagerOps):
    """Pointwise work compiled by TorchInductor, and the model's own calls; GEMMs and attention stay torch's, which it
    would call too.
    """

    def __init__(self, branches: Sequence[Branch], head: Norm, buffers: Buffers) -> None:
        super().__init__(branches, head, buffers)
        batch, rows, width = buffers.rows.shape[1:]
        row = (batch, 1, width), (rows * width, width, 1)  # a modulation row's strides, as kernels are compiled for
        self._zero: Tensor | None = None  # a stream of zeros, for Gaps that start from 0
        self._one = torch.empty_strided(*row, dtype=buffers.rows.dtype, device=buffers.rows.device).fill_(1)

    def prepare(self, gap: Gap) -> None:
        for terms, norm in self._launches(gap):
            self._variant(terms, norm)

    def gap(self, gap: Gap, step: int) -> GapCall:
        (slots, gates, weights), norm = self._terms(gap), self.norms[gap.norm]
        calls: list[tuple[Callable[..., list[Tensor]], list[Tensor]]] = []
        start = 0
        for terms, last in self._launches(gap):
            part = slice(start, start + terms)
            start += terms
            rows = gates[part] if last is None else [*gates[part], last.shift, last.scale]
            eps = 0.0 if last is None else last.eps
            scalars = torch.tensor([*weights[part], eps], dtype=torch.float32, device=self.buffers.shape.device)
            operands = [scalars, *slots[part], *self._rows(rows, step)]
            calls.append((self._variant(terms, last), operands))
        run = partial(_gap_compiled, calls, bool(slots), norm is not None)
        return run if gap.start == STREAM else partial(_instead, self._start(gap), run)

    def _start(self, gap: Gap) -> Tensor:
        if (start := super()._start(gap)) is None:
            self._zero = torch.zeros_like(self.buffers.x) if self._zero is None else self._zero
            start = self._zero
        return start

    def _rows(self, rows: list[Row | None], step: int) -> list[Tensor]:
        """As a compiled kernel takes them: of one segment, or of the first and then of the second."""
        pairs = [by_segment(row, 2) for row in rows]
        single = [second for _, second in pairs]
        if self.buffers.split:
            single = [first for first, _ in pairs] + single
        return [self._one if row is None else self.buffers.row(row, step) for row in single]

    def _stages(self, number: int, branch: Branch) -> tuple[Stage, ...]:
        if len(branch.stages) == 1 and isinstance(call := branch.stages[0], Call):
            return (self._compiled_call(number, call),)
        columns = (*scratch_columns(branch.stages), 0)
        return tuple(map(self._compiled, branch.stages, columns))

    def _compiled_call(self, number: int, call: Call) -> Stage:
        try:
            made = compiled_call(call, self.buffers.held, torch.empty_like(self.buffers.x))
        except NotCompiledError as error:
            self.uncompiled[number] = str(error)
            return call
        self.bakes = True
        return made

    def _compiled(self, stage: Stage, columns: int) -> Stage:
        if not (isinstance(stage, Gelu) and columns):  # in place, in scratch
            return stage
        shape, (batch, tokens, _) = self.buffers.shape, self.buffers.stream
        on = shape.dtype, shape.device, torch.get_num_threads()
        return CompiledGelu(stage.approximate, compiled_gelu(stage.approximate, (batch, tokens, columns), *on))

    def gap_launches(self, gap: Gap) -> int:
        return len(self._launches(gap))

    def _launches(self, gap: Gap) -> list[tuple[int, Norm | None]]:
        """How many terms each adds, and what the last one ends in; none where there is nothing to do."""
        sizes, norm = chunks(len(gap.terms)), self.norms[gap.norm]
        ends = [*[None] * (len(sizes) - 1), norm]
        return [(terms, end) for terms, end in zip(sizes, ends) if terms or end is not None]

    def _variant(self, terms: int, norm: Norm | None) -> Callable[..., list[Tensor]]:
        buffers, shape = self.buffers, self.buffers.shape
        on = buffers.rows.shape[2], shape.dtype, shape.device, torch.get_num_threads()
        more = buffers.split or None, buffers.rows.dtype, "layer" if norm is None else norm.kind
        return compiled_gap(terms, norm is not None, buffers.stream, *on, *more)


class CudaGraphOps(EagerOps):
    """Launches that can be captured: the Triton Gap, and GEMMs that end in the activation.

    Which modulation rows hold is read from `buffers.step` on the device, so that steps alike share one graph.
    """

    reads_step = True
    bakes = True

    def __init__(self, branches: Sequence[Branch], head: Norm, buffers: Buffers) -> None:
        super().__init__(branches, head, buffers)
        if reason := missing_triton():
            raise CompilerMissing(f"backend cudagraph: {reason}")
        from .kernels.gap import gap  # imports triton

        self._op, self._y = gap, torch.empty_like(buffers.x)
        self._tables: dict[Gap, tuple[Tensor, Tensor]] = {}

    def gap(self, gap: Gap, step: int) -> GapCall:
        buffers, norm = self.buffers, self.norms[gap.norm]
        if gap not in self._tables:
            terms = gap.terms if gap.start in (STREAM, None) else (Term(gap.start, 1.0, None), *gap.terms)
            entries = [[term.slot, *self._numbers(self.gate(term))] for term in terms]
            on = buffers.shape.device
            table = torch.tensor(entries, dtype=torch.int32, device=on).view(-1, 3)
            weights = torch.tensor([term.weight for term in terms], dtype=torch.float32, device=on)
            self._tables[gap] = table, weights
        operands = (self._y, buffers.slots, buffers.rows, buffers.step, *self._tables[gap])
        fresh = gap.start != STREAM
        if norm is None:
            none = ("none", (-1, -1), (-1, -1), 0.0, buffers.split, fresh)
            return partial(_gap_op_bare, self._op if gap.terms or fresh else None, operands, none)
        rest = (norm.kind, self._numbers(norm.shift), self._numbers(norm.scale), norm.eps, buffers.split, fresh)
        return partial(_gap_op, self._op, operands, rest)

    @staticmethod
    def _numbers(row: Row | None) -> tuple[int, ...]:
        """As the kernel takes them, a segment each."""
        return tuple(-1 if one is None else one for one in by_segment(row, 2))

    def _stages(self, number: int, branch: Branch) -> tuple[Stage, ...]:
        # torch's CPU version of the call is the exact function
        return tuple(fused(branch.stages)) if self.buffers.shape.device.type == "cuda" else branch.stages

    def gap_launches(self, gap: Gap) -> int:
        return 0 if not gap.terms and gap.start == STREAM and self.norms[gap.norm] is None else 1


OPS: dict[str, type[EagerOps]] = {"eager": EagerOps, "inductor": InductorOps, "cudagraph": CudaGraphOps}


# ---- stages that backends put in a branch's


@dataclass(frozen=True)
class CompiledGelu(Gelu):
    """In place, by one kernel compiled for the plan's shape."""

    kernel: Callable[[Tensor], None]

    def into(self, h: Tensor, held: Held | None, out: Tensor) -> Tensor:
        self.kernel(h)
        return h


@dataclass(frozen=True, eq=False)
class LinearGelu(Linear):
    """A GEMM that ends in the tanh approximation of GELU, the one that cublasLt's epilogue has."""

    def compute(self, h: Tensor, held: Held | None) -> Tensor:
        return Gelu("tanh").compute(super().compute(h, held), held)

    def into(self, h: Tensor, held: Held | None, out: Tensor) -> Tensor:
        h, weight, rows = self.operands(h, out)
        torch.ops.aten._addmm_activation.out(self.bias, h, weight, use_gelu=True, out=rows)
        return out


def fused(stages: Iterable[Stage]) -> list[Stage]:
    """A Linear and the Gelu after it become one, where CUDA has a call for both."""
    made: list[Stage] = []
    for stage in stages:
        before = made[-1] if made else None
        if stage == Gelu("tanh") and type(before) is Linear and before.bias is not None:
            made[-1] = LinearGelu(before.weight, before.bias)
        else:
            made.append(stage)
    return made


def _run_stages(calls: list[Callable[[Tensor], Tensor]], last: Callable[..., Tensor], out: Tensor, y: Tensor) -> None:
    for call in calls:
        y = call(y)
    last(y, out=out)


# ---- calls of a Gap


def _started(start: Tensor | None, add: GapCall, x: Tensor) -> tuple[Tensor, Tensor]:
    return add(x.zero_() if start is None else x.copy_(start))


def _instead(start: Tensor, run: GapCall, x: Tensor) -> tuple[Tensor, Tensor]:
    """`run` leaves what it is given as it is, so that nothing is copied."""
    return run(start)


def _gap_compiled(
    calls: list[tuple[Callable[..., list[Tensor]], list[Tensor]]], moves: bool, norms: bool, x: Tensor
) -> tuple[Tensor, Tensor]:
    for add, operands in calls[:-1] if norms else calls:
        (x,) = add(x, *operands)
    if not norms:
        return x, x
    norm, operands = calls[-1]
    if moves:
        x, y = norm(x, *operands)
    else:
        (y,) = norm(x, *operands)
    return x, y


def _gap_op(op: Callable[..., None], operands: tuple[Tensor, ...], norm: tuple, x: Tensor) -> tuple[Tensor, Tensor]:
    op(x, *operands, *norm)
    return x, operands[0]


def _gap_op_bare(
    op: Callable[..., None] | None, operands: tuple[Tensor, ...], norm: tuple, x: Tensor
) -> tuple[Tensor, Tensor]:
    """No norm follows: y is x. Without terms there is nothing to launch."""
    if op is not None:
        op(x, *operands, *norm)
    return x, x
