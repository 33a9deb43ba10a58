"""The models of the campaign: every denoiser class of diffusers in small, and kinds of those with an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.models.adapter_cases import STEPS, Calls, Case
from tests.models.denoisers import DENOISERS, Denoiser
from tests.models.test_flux import FLUX
from tests.models.test_ltx import LTX
from tests.models.test_qwen import QWEN
from tests.models.test_sd3 import SD3
from tests.models.test_wan import WAN


def _of(case: Case, kind: dict[str, Any]) -> Denoiser:
    def call(model: nn.Module, step: int) -> dict[str, Any]:
        calls = Calls(case, model)
        return calls.arguments(step) | {"hidden_states": Calls(case, model, seed=step).samples[step % STEPS]}

    return Denoiser(lambda: case.make(**kind), call)


KINDS = {
    f"{case.model.__name__}, {name}": _of(case, kind)
    for case in (FLUX, LTX, QWEN, SD3, WAN)
    for name, kind in case.kinds.items()
}
NAMES: dict[str, Denoiser] = {**DENOISERS, **KINDS}
NOT_AT_BRANCHES = {  # as the documentation says; other kinds of these classes are without it
    "QwenImageTransformer2DModel": "padded text",
    "WanTransformer3DModel": "timesteps a token",
}
NO_LORA = {  # levels
    "DiTTransformer2DModel": ("branches",),  # as the documentation says
    "PixArtTransformer2DModel": ("branches",),
    "UNetMotionModel": ("output",),  # it says input= to its layers, which PEFT's do not take
}
NOT_HALVED = {  # at level blocks, where half of a batch is refused by what comes
    "ErnieImageTransformer2DModel": "its blocks have tokens before the batch",
    "LatteTransformer3DModel": "its blocks see frames or tokens as their batch",
    "Lumina2Transformer2DModel": "its text is as long as the longest of the batch",
    "PriorTransformer": "its blocks' mask is over batch and heads at once",
}
