"""The memory that a program runs in at one shape: what a plan owns, and backends and graphs work on."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from .models.base import Adapter, Shape
from .models.branch import Row
from .program import Program

MODULATION_BYTES = 256 * 2**20  # modulation rows are computed ahead for as many steps as fit in this


class Buffers:
    """Tensors of one shape, at the same addresses for as long as the plan lives.

    Args:
        scratch: columns of the widest intermediate result.

    Attributes:
        stream: shape of x, (batch, tokens, width).
        split: tokens of its first segment, text; 0 where there is one segment.
        x: the stream.
        slots: [slots, batch, tokens, width], what reused branches and the reused trunk stand on.
        outputs: [outputs, batch, out channels, height, width], what reused outputs stand on.
        rows: [window, batch, rows, width], the modulation rows of `window` steps: the adapter's, and behind them a gate
            times its weights per channel for each term that has such, and for each segment.
        adapter_rows: how many of them are the adapter's.
        channels: [steps, terms, width], those weights.
        output_channels: [terms, out channels], weights per channel of reused outputs.
        held: what stages read of the run.
        step: int32 [1], which of the rows the call under way uses, for kernels that look it up on the device.
        scratch: flat, for results between a branch's stages.
    """

    def __init__(self, adapter: Adapter, program: Program, shape: Shape, scratch: int) -> None:
        self.shape = shape
        self.segments = adapter.segments
        (self.split, tokens), width = adapter.stream(shape), adapter.width
        self.stream = (shape.batch, tokens, width)
        empty = partial(torch.empty, dtype=shape.dtype, device=shape.device)
        self.channels = _table(program.channels, width, "channels", torch.float32, shape.device)
        self.output_channels = _table(
            program.output_channels, adapter.out_channels, "output_channels", shape.dtype, shape.device
        )
        self.adapter_rows = adapter.rows
        count = adapter.rows + (0 if self.channels is None else self.segments * self.channels.shape[1])
        dtype = adapter.rows_dtype or shape.dtype
        row_bytes = shape.batch * count * width * dtype.itemsize
        self.window = max(1, min(len(program.steps), MODULATION_BYTES // row_bytes))
        self.rows = torch.empty(self.window, shape.batch, count, width, dtype=dtype, device=shape.device)
        self.step = torch.zeros(1, dtype=torch.int32, device=shape.device)
        self.held = adapter.hold(shape)
        self.x = empty(self.stream)
        # Zeros: a term that adds nothing to a segment is a product with 0 where kernels have no other way
        self.slots = torch.zeros((program.slots, *self.stream), dtype=shape.dtype, device=shape.device)
        self.outputs = empty((program.outputs, *adapter.output_shape(shape.sample)))
        self.scratch = empty(shape.batch * tokens * scratch)

    def select(self, step: int) -> None:
        """Have kernels that look it up use the modulation rows of `step`."""
        self.step.fill_(step % self.window)

    def row(self, row: int, step: int) -> Tensor:
        """A modulation row of `step`, [batch, 1, width]."""
        return self.rows.select(0, step % self.window).narrow(1, row, 1)

    def channel_row(self, channel: int) -> Row:
        """Number of the modulation row that holds a gate times its weights per channel, or of a segment's each."""
        first = self.adapter_rows + self.segments * channel
        return first if self.segments == 1 else (first, first + 1)

    def scratch_of(self, columns: int) -> Tensor:
        """[batch, tokens, columns], where any other such lies too."""
        batch, tokens, _ = self.stream
        return self.scratch.narrow(0, 0, batch * tokens * columns).view(batch, tokens, columns)


def _table(rows: np.ndarray | None, width: int, name: str, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Weights per channel on the device. Raises ValueError if they are not as wide as what they are for."""
    if rows is None:
        return None
    if rows.shape[-1] != width:
        raise ValueError(f"{name}: expected {width} channels, the model's, got a schedule with {rows.shape[-1]}")
    return torch.from_numpy(rows).to(device, dtype)
