"""A plan's buffers on CUDA streams: its calls may come on any, and follow one another."""

from __future__ import annotations

import torch


class Streams:
    """Orders work on buffers that calls share and callers do not see.

    A caller who moves from one stream to another without waiting is right about the tensors he has, and would have two
    calls write into the same buffers. Without CUDA there is nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.needed = device.type == "cuda" and torch.cuda.is_initialized()
        self.first = self.last = torch.cuda.current_stream(device) if self.needed else None

    def enter(self) -> None:
        """Before work on the buffers: the current stream waits for the one that worked on them last."""
        if self.last is not None and (current := torch.cuda.current_stream(self.device)) != self.last:
            current.wait_stream(self.last)
            self.last = current

    def leave(self) -> None:
        """Before the buffers are given up: their memory goes to whoever asks next on the stream they were made on."""
        if self.first is not None and self.last is not None and self.last != self.first:
            self.first.wait_stream(self.last)
            self.last = self.first
