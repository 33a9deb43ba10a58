"""Large models at the sizes that people run, without weights: on the meta device, with the arguments of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

SD35_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}


@dataclass(frozen=True)
class Case:
    """A model at the size people run: its class's configuration, and the arguments of one call.

    Attributes:
        fields: tensors among the arguments: shape, and dtype where it isn't the model's.
        constants: the other arguments.
        levels: schedules' options.
    """

    model: str
    config: dict[str, Any]
    fields: dict[str, tuple[Any, ...]]
    constants: dict[str, Any]
    levels: tuple[dict[str, Any], ...]

    def build(self) -> nn.Module:
        with torch.device("meta"):
            model = getattr(diffusers, self.model)(**self.config)
        kept = model._keep_in_fp32_modules or []
        for name, parameter in model.named_parameters():
            if not any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.to(torch.bfloat16)
        return model.eval()

    def arguments(self) -> dict[str, Any]:
        made = {}
        for name, shape in self.fields.items():
            *size, dtype = shape if isinstance(shape[-1], torch.dtype) else (*shape, torch.bfloat16)
            made[name] = torch.empty(size, dtype=dtype, device="meta")
        return {**made, **self.constants, "return_dict": False}


BLOCKS = ({"level": "blocks", "carry": 0.0}, {"level": "blocks", "carry": 1.0})
CASES = {
    "flux.1-dev": Case(  # 1024 x 1024 pixels, 512 tokens of text; guidance is embedded
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {
            "hidden_states": (1, 4096, 64),
            "encoder_hidden_states": (1, 512, 4096),
            "pooled_projections": (1, 768),
            "timestep": (1,),
            "img_ids": (4096, 3),
            "txt_ids": (512, 3),
            "guidance": (1, torch.float32),
        },
        {},
        (*BLOCKS, {"level": "branches"}),
    ),
    "qwen-image": Case(  # 1328 x 1328 pixels, 128 tokens of text; one of two calls a step
        "QwenImageTransformer2DModel",
        {},
        {"hidden_states": (1, 83 * 83, 64), "encoder_hidden_states": (1, 128, 3584), "timestep": (1,)},
        {"img_shapes": [[(1, 83, 83)]]},
        (*BLOCKS, {"level": "branches"}),
    ),
    "sd3.5-large": Case(  # 1024 x 1024 pixels, 77 + 256 tokens of text; both halves of guidance in one call
        "SD3Transformer2DModel",
        SD35_LARGE,
        {
            "hidden_states": (2, 16, 128, 128),
            "encoder_hidden_states": (2, 333, 4096),
            "pooled_projections": (2, 2048),
            "timestep": (2,),
        },
        {},
        BLOCKS,
    ),
    "wan2.1-1.3b": Case(  # as the larger one
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {"hidden_states": (1, 16, 21, 60, 104), "encoder_hidden_states": (1, 512, 4096), "timestep": (1, torch.int64)},
        {},
        BLOCKS,
    ),
    "wan2.1-14b": Case(  # 832 x 480 pixels, 81 frames, 512 tokens of text; one of two calls a step
        "WanTransformer3DModel",
        {},
        {"hidden_states": (1, 16, 21, 60, 104), "encoder_hidden_states": (1, 512, 4096), "timestep": (1, torch.int64)},
        {},
        BLOCKS,
    ),
}
