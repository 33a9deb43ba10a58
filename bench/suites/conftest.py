"""One thread, and the backends this machine has."""

from __future__ import annotations

import pytest
import torch

from harmonica_rt.kernels.inductor import missing_compiler

torch.set_num_threads(1)

needs_compiler = pytest.mark.skipif(missing_compiler("cpu") is not None, reason=str(missing_compiler("cpu")))


def inductor(*parameters: str) -> object:
    """A case of the inductor backend: `parameters`, then its name."""
    return pytest.param(*parameters, "inductor", marks=needs_compiler)
