"""How each backend turns instructions into calls. What they share is in the executor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .kernels.gap_torch import CHUNKS, chunks, compiled_gap, gap_eager
from .kernels.gelu import compiled_gelu, gelu_eager
from .kernels.inductor import CompilerMissing, missing_triton
from .models.base import Branch, Gelu, Linear
from .program import Gap

if TYPE_CHECKING:
    from .executor import Plan

GapCall = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> (x moved on, y)
StageCall = Callable[[Tensor], Tensor]


class EagerOps:
    """Plain torch ops, in place where there are such. The backend every other is tested against."""

    reads_step: ClassVar[bool] = False  # whether kernels look the step up on the device

    def __init__(self, plan: Plan) -> None:
        self.plan = weakref.proxy(plan)  # the plan owns this

    def gap(self, gap: Gap, step: int) -> GapCall:
        slots, gates, weights = self._terms(gap, step)
        return partial(gap_eager, slots=slots, gates=gates, weights=weights, norm=self._norm(gap, step))

    def linear_gelu(self, stage: Linear, gelu: Gelu, out: Tensor) -> StageCall:
        return partial(_linear_then, stage, out, partial(gelu_eager, approximate=gelu.approximate))

    def gap_launches(self, gap: Gap) -> int:
        return len(gap.terms) + (0 if self.plan.norm(gap.norm) is None else 2)

    def branch_launches(self, branch: Branch) -> int:
        return len(branch.stages)

    def _terms(self, gap: Gap, step: int) -> tuple[list[Tensor], list[Tensor | None], list[float]]:
        plan = self.plan
        slots = [plan.slots.select(0, term.slot) for term in gap.terms]
        rows = [plan.gate(term) for term in gap.terms]
        gates = [None if row is None else plan.row(row, step) for row in rows]
        return slots, gates, [term.weight for term in gap.terms]

    def _norm(self, gap: Gap, step: int) -> tuple[Tensor, Tensor, float] | None:
        norm = self.plan.norm(gap.norm)
        if norm is None:
            return None
        return self.plan.row(norm.shift, step), self.plan.row(norm.scale, step), norm.eps


class InductorOps(EagerOps):
    """Pointwise work compiled by TorchInductor; GEMMs and attention stay torch's own calls, which it would make too."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        batch, rows, width = plan.rows.shape[1:]
        row = (batch, 1, width), (rows * width, width, 1)  # a modulation row's strides, as kernels are compiled for
        self._one = torch.empty_strided(*row, dtype=plan.shape.dtype, device=plan.shape.device).fill_(1)
        bare = any(branch.norm is None for branch in plan.branches)
        for terms in (0, *CHUNKS):  # all variants now: no later step or schedule of this shape compiles anything
            self._variant(terms, norm=True)
            if terms > 1 or (terms and bare):
                self._variant(terms, norm=False)

    def gap(self, gap: Gap, step: int) -> GapCall:
        slots, gates, weights = self._terms(gap, step)
        gates, norm = [self._one if gate is None else gate for gate in gates], self._norm(gap, step)
        calls, start, sizes = [], 0, chunks(len(slots))
        for n, terms in enumerate(sizes):
            normed, part = norm is not None and n == len(sizes) - 1, slice(start, start + terms)
            start += terms
            if not terms and not normed:
                continue
            *rows, eps = norm if normed else (0.0,)
            scalars = torch.tensor([*weights[part], eps], dtype=torch.float32, device=self.plan.shape.device)
            calls.append((self._variant(terms, norm=normed), [scalars, *slots[part], *gates[part], *rows]))
        return partial(_gap_compiled, calls, bool(slots), norm is not None)

    def linear_gelu(self, stage: Linear, gelu: Gelu, out: Tensor) -> StageCall:
        shape, threads = self.plan.shape, torch.get_num_threads()
        compiled = compiled_gelu(gelu.approximate, tuple(out.shape), shape.dtype, shape.device, threads)
        return partial(_linear_then, stage, out, compiled)

    def gap_launches(self, gap: Gap) -> int:
        bare = not gap.terms and self.plan.norm(gap.norm) is None
        return 0 if bare else len(chunks(len(gap.terms)))

    def _variant(self, terms: int, norm: bool) -> Callable[..., list[Tensor]]:
        plan, shape = self.plan, self.plan.shape
        threads = torch.get_num_threads()
        return compiled_gap(terms, norm, plan.stream, plan.rows.shape[2], shape.dtype, shape.device, threads)


class CudaGraphOps(EagerOps):
    """Launches that can be captured: the Triton Gap, and GEMMs that end in the activation.

    Which modulation rows hold is read from `plan.step` on the device, so that steps alike share one graph.
    """

    reads_step = True

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        if reason := missing_triton():
            raise CompilerMissing(f"backend cudagraph: {reason}")
        from .kernels.gap import gap  # imports triton

        self._op, self._y = gap, torch.empty_like(plan.x)
        self._tables: dict[Gap, tuple[Tensor, Tensor]] = {}

    def gap(self, gap: Gap, step: int) -> GapCall:
        plan, norm = self.plan, self.plan.norm(gap.norm)
        if gap not in self._tables:
            gates = [-1 if (gate := plan.gate(term)) is None else gate for term in gap.terms]
            entries = [[term.slot, gate, gate] for term, gate in zip(gap.terms, gates)]
            on = plan.shape.device
            table = torch.tensor(entries, dtype=torch.int32, device=on).view(-1, 3)
            weights = torch.tensor([term.weight for term in gap.terms], dtype=torch.float32, device=on)
            self._tables[gap] = table, weights
        operands = (self._y, plan.slots, plan.rows, plan.step, *self._tables[gap])
        if norm is None:
            return partial(_gap_op_bare, self._op if gap.terms else None, operands, ("none", (-1, -1), (-1, -1), 0.0))
        return partial(_gap_op, self._op, operands, ("layer", (norm.shift,) * 2, (norm.scale,) * 2, norm.eps))

    def linear_gelu(self, stage: Linear, gelu: Gelu, out: Tensor) -> StageCall:
        if self._fuses(gelu):
            return partial(_linear_gelu_fused, stage, out)
        return super().linear_gelu(stage, gelu, out)

    def gap_launches(self, gap: Gap) -> int:
        return 0 if not gap.terms and self.plan.norm(gap.norm) is None else 1

    def branch_launches(self, branch: Branch) -> int:
        return len(branch.stages) - sum(isinstance(stage, Gelu) and self._fuses(stage) for stage in branch.stages)

    def _fuses(self, gelu: Gelu) -> bool:
        # cublasLt's epilogue is the tanh approximation; torch's CPU version of the call is the exact function
        return gelu.approximate == "tanh" and self.plan.shape.device.type == "cuda"


OPS: dict[str, type[EagerOps]] = {"eager": EagerOps, "inductor": InductorOps, "cudagraph": CudaGraphOps}


def linear(stage: Linear, out: Tensor, h: Tensor) -> Tensor:
    h, weight = h.view(-1, stage.weight.shape[1]), stage.weight.t()
    return torch.mm(h, weight, out=out) if stage.bias is None else torch.addmm(stage.bias, h, weight, out=out)


def _linear_then(stage: Linear, out: Tensor, activation: Callable[[Tensor], object], h: Tensor) -> Tensor:
    activation(linear(stage, out, h))
    return out


def _linear_gelu_fused(stage: Linear, out: Tensor, h: Tensor) -> Tensor:
    h = h.view(-1, stage.weight.shape[1])
    return torch.ops.aten._addmm_activation.out(stage.bias, h, stage.weight.t(), use_gelu=True, out=out)


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
