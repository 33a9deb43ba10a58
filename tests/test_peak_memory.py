"""Peaks begin anew, and see what is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harmonica_rt.peak_memory import PeakMemory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of what is resident are Linux's")
def test_peak_memory() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = memory.bytes()
    torch.ones(100 * 2**20, dtype=torch.uint8)
    assert 80 * 2**20 < memory.bytes() - before < 140 * 2**20
    memory.start()
    assert memory.bytes() - before < 40 * 2**20
