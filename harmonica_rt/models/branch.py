"""A branch, one residual function of a block: its norm and gate as modulation rows, and the stages between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .stages import Held, Stage, walk

# The number of a modulation row: of the whole stream, or of its two segments, text and image
Row = int | tuple[int, int]


@dataclass(frozen=True, slots=True)
class Norm:
    """y = norm(x) * scale + shift, the norm a layer or rms norm without weights. Scale holds 1 + scale."""

    shift: Row
    scale: Row
    eps: float
    kind: Literal["layer", "rms"] = "layer"

    def apply(self, x: Tensor, rows: Tensor, split: int = 0) -> Tensor:
        """A new y; differentiable.

        Args:
            rows: modulation rows of a step, [batch, rows, width].
            split: tokens of the first segment.
        """
        scale, shift = (over_tokens(rows, row, x, split) for row in (self.scale, self.shift))
        norm = F.layer_norm if self.kind == "layer" else F.rms_norm
        return torch.addcmul(shift, norm(x.to(rows.dtype), x.shape[-1:], eps=self.eps), scale).to(x.dtype)


def over_tokens(rows: Tensor, row: Row, x: Tensor, split: int) -> Tensor:
    """Row `row` of [batch, rows, width] as tokens of x take it: [batch, 1 or tokens, width]."""
    if isinstance(row, int):
        return rows.narrow(1, row, 1)
    lengths = (split, x.shape[1] - split)
    return torch.cat([rows.narrow(1, one, 1).expand(-1, length, -1) for one, length in zip(row, lengths)], dim=1)


def by_segment(row: Row | None, segments: int) -> tuple[int | None, ...]:
    """A row for each segment."""
    return row if isinstance(row, tuple) else (row,) * segments


@dataclass(frozen=True, eq=False, slots=True)
class Branch:
    """A residual function before its gate: `stages` on y. x += gate * stages(y).

    Without a norm, y is x; without a gate, the gate is 1.
    """

    stages: tuple[Stage, ...]
    norm: Norm | None
    gate: Row | None

    def compute(self, y: Tensor, held: Held | None) -> Tensor:
        """[batch, tokens, width] -> a new one; differentiable."""
        for stage in self.stages:
            y = stage.compute(y, held)
        return y

    def macs(self, batch: int, tokens: int, width: int, context: int) -> int:
        """Multiply-accumulates; `context` tokens are read by cross-attention."""
        return sum(stage.macs(batch, tokens, columns, context) for stage, columns in walk(self.stages, width))
