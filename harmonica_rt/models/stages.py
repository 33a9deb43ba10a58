"""What a branch is made of: one class a stage, which says all of itself.

Stages take and give h [batch, tokens, columns]. A branch's first one takes y, its last one gives what its slot holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Held:
    """What stages read besides h, the same at all steps of a run: static buffers of a plan, or tensors of a learner.

    Args:
        tensors: by the names that the adapter gives them. Those of cross-attention are ``context`` [contexts, 2, batch,
            context tokens, width], keys and values, and ``bias`` [batch, 1, 1, context tokens], added to its scores.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self._views: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def nothing(self) -> bool:
        return not any(tensor.numel() for tensor in self.tensors.values())

    def keys_values(self, number: int, heads: int) -> tuple[Tensor, ...]:
        """Both of set `number`, [batch, heads, context tokens, head width]: views, made once."""
        if (number, heads) not in self._views:
            self._views[number, heads] = split_heads(self["context"].select(0, number), heads).unbind()
        return self._views[number, heads]


class Stage(ABC):
    """One step of a branch.

    Attributes:
        launches: of `compute`.
        copies: how many `into` launches more.
        weights: numbers that it reads besides h and what is held.
    """

    launches: ClassVar[int] = 1
    copies: int = 1

    @property
    def weights(self) -> int:
        return 0

    @abstractmethod
    def compute(self, h: Tensor, held: Held | None) -> Tensor:
        """A new tensor; differentiable. `held` may be None for stages that read nothing of it."""

    def into(self, h: Tensor, held: Held | None, out: Tensor) -> Tensor:
        """`compute` without gradients, the result in `out`."""
        return out.copy_(self.compute(h, held))

    def scratch(self, before: int) -> int:
        """Columns of the plan's scratch that the result goes into, given those h takes there; 0 for none."""
        return 0

    @abstractmethod
    def columns(self, before: int) -> int:
        """Columns of the result, given h's."""

    @abstractmethod
    def macs(self, batch: int, tokens: int, columns: int, context: int) -> int:
        """Multiply-accumulates. `columns`: h's; `context`: tokens that cross-attention reads."""


@dataclass(frozen=True, eq=False)
class Linear(Stage):
    """h @ weight.T + bias."""

    weight: Tensor
    bias: Tensor | None
    copies = 0

    @property
    def weights(self) -> int:
        return self.weight.numel()

    def compute(self, h: Tensor, held: Held | None) -> Tensor:
        return F.linear(h, self.weight, self.bias)

    def into(self, h: Tensor, held: Held | None, out: Tensor) -> Tensor:
        h, weight, rows = self.operands(h, out)
        if self.bias is None:
            torch.mm(h, weight, out=rows)
        else:
            torch.addmm(self.bias, h, weight, out=rows)
        return out

    def operands(self, h: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h, the weight and `out` as one GEMM takes them, views."""
        columns, before = self.weight.shape
        return h.view(-1, before), self.weight.t(), out.view(-1, columns)

    def scratch(self, before: int) -> int:
        return 0 if before else len(self.weight)  # a GEMM must not write over what it reads

    def columns(self, before: int) -> int:
        return len(self.weight)

    def macs(self, batch: int, tokens: int, columns: int, context: int) -> int:
        return batch * tokens * self.weight.numel()


@dataclass(frozen=True)
class Gelu(Stage):
    """`approximate` as in torch.nn.functional.gelu."""

    approximate: str
    copies = 0

    def compute(self, h: Tensor, held: Held | None) -> Tensor:
        return F.gelu(h, approximate=self.approximate)

    def into(self, h: Tensor, held: Held | None, out: Tensor) -> Tensor:
        """`out` may be where h lies."""
        return torch.ops.aten.gelu.out(h, approximate=self.approximate, out=out)

    def scratch(self, before: int) -> int:
        return before  # in place

    def columns(self, before: int) -> int:
        return before

    def macs(self, batch: int, tokens: int, columns: int, context: int) -> int:
        return 0


@dataclass(frozen=True)
class SelfAttention(Stage):
    """h [batch, tokens, 3 D] holds query, key, value of all heads side by side; the result is [batch, tokens, D]."""

    heads: int

    def compute(self, h: Tensor, held: Held | None) -> Tensor:
        batch, tokens, _ = h.shape
        q, k, v = h.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        return join_heads(F.scaled_dot_product_attention(q, k, v))

    def columns(self, before: int) -> int:
        return before // 3

    def macs(self, batch: int, tokens: int, columns: int, context: int) -> int:
        return 2 * batch * tokens * tokens * (columns // 3)


@dataclass(frozen=True)
class CrossAttention(Stage):
    """h [batch, tokens, D] holds queries; keys and values are the run's own, set number `context`. Gives what h is."""

    heads: int
    context: int

    def compute(self, h: Tensor, held: Held | None) -> Tensor:
        assert held is not None, "cross-attention reads what is held"
        keys, values = held.keys_values(self.context, self.heads)
        q = split_heads(h, self.heads)
        return join_heads(F.scaled_dot_product_attention(q, keys, values, attn_mask=held["bias"]))

    def columns(self, before: int) -> int:
        return before

    def macs(self, batch: int, tokens: int, columns: int, context: int) -> int:
        return 2 * batch * tokens * context * columns


@dataclass(frozen=True, eq=False)
class Call(Stage):
    """The model's own submodules, whatever is in them: LoRA layers, quantised weights, an attention backend.

    What they launch is theirs: it counts as one.

    Attributes:
        run: (y, held) -> the result, or its two segments, text and image, a tensor each. Calls `modules`.
        modules: those that hold the weights.
        counted: multiply-accumulates, of (batch, tokens, context).
        copies: one a segment.
    """

    run: Callable[[Tensor, Any], Tensor | tuple[Tensor, Tensor]]
    modules: tuple[nn.Module, ...]
    counted: Callable[[int, int, int], int]
    copies: int = 1

    @property
    def weights(self) -> int:
        return sum(p.numel() for module in self.modules for p in module.parameters())

    def compute(self, h: Tensor, held: Held | None) -> Tensor:
        result = self.run(h, held)
        return result if isinstance(result, Tensor) else torch.cat(result, dim=1)

    def into(self, h: Tensor, held: Held | None, out: Tensor) -> Tensor:
        result = self.run(h, held)
        parts, start = (result,) if isinstance(result, Tensor) else result, 0
        for part in parts:
            out.narrow(1, start, part.shape[1]).copy_(part)
            start += part.shape[1]
        return out

    def columns(self, before: int) -> int:
        return before

    def macs(self, batch: int, tokens: int, columns: int, context: int) -> int:
        return self.counted(batch, tokens, context)


def walk(stages: Sequence[Stage], width: int) -> Iterator[tuple[Stage, int]]:
    """Each stage with the columns of what it takes, the first one's being `width`."""
    for stage in stages:
        yield stage, width
        width = stage.columns(width)


def scratch_columns(stages: Sequence[Stage]) -> list[int]:
    """What each stage but the last takes of the plan's scratch: the last one's result goes into a slot."""
    taken: list[int] = []
    for stage in stages[:-1]:
        taken.append(stage.scratch(taken[-1] if taken else 0))
    return taken


def split_heads(h: Tensor, heads: int) -> Tensor:
    """[..., tokens, width] -> [..., heads, tokens, head width], a view."""
    return h.unflatten(-1, (heads, -1)).transpose(-3, -2)


def join_heads(h: Tensor) -> Tensor:
    """[batch, heads, tokens, head width] -> [batch, tokens, width]."""
    return h.transpose(1, 2).flatten(2)
