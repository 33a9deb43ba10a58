"""The most memory that a stretch of work holds."""

from __future__ import annotations

import re
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Of a CUDA device what torch allocated there, elsewhere what of the process was resident.

    Attributes:
        kind: which of these, or why there is neither.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.kind = "allocated on the GPU"
        else:
            self.kind = "resident, of the process" if self._reset() else "not measured on this system"

    def start(self) -> None:
        """Peaks before now do not count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._reset()

    def bytes(self) -> int | None:
        """The peak since `start`; None where it cannot be measured."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.kind.startswith("not"):
            return None
        found = re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
        assert found, "proc(5): a process has one"
        return 1024 * int(found[1])

    @staticmethod
    def _reset() -> bool:
        try:
            CLEAR.write_text("5")  # proc(5): resets the peak of what is resident
        except OSError:
            return False
        return True
