"""Peaks begin anew, and see what is allocated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: in one that has freed much already, new tensors may be given what is resident
CODE = """
import torch
from harmonica_rt.peak_memory import PeakMemory

memory = PeakMemory(torch.device("cpu"))
memory.start()
before = memory.bytes()
torch.ones(100 * 2**20, dtype=torch.uint8)
grown = memory.bytes() - before
memory.start()
print(grown // 2**20, (memory.bytes() - before) // 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of what is resident are Linux's")
def test_peak_memory() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    grown, after = map(int, done.stdout.split())
    assert 80 < grown < 140 and after < 40
