"""GELU: eager and compiled against float64, far into both tails."""

from __future__ import annotations

import pytest
import torch

from harmonica_rt.kernels.gelu import compiled_gelu, gelu_reference
from harmonica_rt.models.stages import Gelu

from ..conftest import needs_compiler

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("kind", ["eager", pytest.param("compiled", marks=needs_compiler)])
def test_against_float64(kind: str, approximate: str, dtype: torch.dtype) -> None:
    tails = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 5, -5, 12, -12, 300, -300, 6e4, -6e4])
    h = torch.cat([torch.randn(63 * 60 - len(tails)) * 3, tails]).view(63, 60).to(dtype)
    before, expected = h.double(), gelu_reference(h, approximate)
    if kind == "eager":
        Gelu(approximate).into(h, None, out=h)
    else:
        compiled_gelu(approximate, (63, 60), dtype, h.device, torch.get_num_threads())(h)
    assert h.isfinite().all()
    error = (h.double() - expected).abs() / before.abs().clamp_min(1)
    assert error.max() <= TOLERANCE[dtype]
