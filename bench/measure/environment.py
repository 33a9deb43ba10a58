"""What machine a figure was taken on, with what."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from harmonica_rt.measuring import processor


def environment() -> dict[str, Any]:
    """Machine, versions and commit: a figure means nothing without them."""
    import diffusers

    root = Path(__file__).parent.parent
    packed = root / "COMMIT"  # where bench/ was packed up without its repository
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit.stdout.strip() or (packed.read_text().strip() if packed.exists() else "unknown"),
    }
