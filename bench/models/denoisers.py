"""Random denoisers of diffusers' classes, large enough that a step is work and small enough for one core.

Widths of 256 to 512, 6 to 12 blocks, 256 to 1,024 tokens; `call` gives the arguments of one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sized:
    """A denoiser's class and configuration; `arguments`(batch) are those of a call beside sample and timestep."""

    kind: str
    config: dict[str, Any]
    sample: tuple[int, ...]  # of one
    arguments: Callable[[int], dict[str, Any]]
    per_thousand: float = 1.0  # what the timesteps 999 to 0 are divided by

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(diffusers, self.kind)(**self.config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        return model.eval()

    def call(self, step: int, steps: int, batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        sample = torch.randn(batch, *self.sample, generator=generator)
        timestep = torch.full((batch,), (999.0 - 999.0 * step // steps) / self.per_thousand)
        name = "sample" if self.kind.startswith("UNet") else "hidden_states"
        return {name: sample, "timestep": timestep, "return_dict": False, **self.arguments(batch)}


def text(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(7))


def _flux(batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(batch, 64, 128),
        "pooled_projections": text(batch, 128),
        "txt_ids": torch.zeros(64, 3),
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 16, 24))).float(),
    }


def _qwen(batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text(batch, 48, 128),
        "encoder_hidden_states_mask": torch.ones(batch, 48, dtype=torch.long),
        "img_shapes": [[(1, 16, 24)]] * batch,
    }


SIZED: dict[str, Sized] = {
    "flux": Sized(
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 16, "num_layers": 3, "num_single_layers": 6, "attention_head_dim": 64,
            "num_attention_heads": 4, "joint_attention_dim": 128, "pooled_projection_dim": 128,
            "axes_dims_rope": (16, 24, 24),
        },
        (384, 16), _flux, per_thousand=1000.0,
    ),
    "sd3": Sized(
        "SD3Transformer2DModel",
        {
            "sample_size": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 8,
            "attention_head_dim": 64, "num_attention_heads": 6, "joint_attention_dim": 128,
            "caption_projection_dim": 384, "pooled_projection_dim": 128, "pos_embed_max_size": 32,
            "qk_norm": "rms_norm",
        },
        (16, 32, 32),
        lambda batch: {"encoder_hidden_states": text(batch, 77, 128), "pooled_projections": text(batch, 128)},
    ),
    "qwen-image": Sized(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16, "out_channels": 4, "num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 4,
            "joint_attention_dim": 128, "axes_dims_rope": (16, 24, 24),
        },
        (384, 16), _qwen, per_thousand=1000.0,
    ),
    "wan": Sized(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 16,
            "out_channels": 16, "text_dim": 128, "freq_dim": 64, "ffn_dim": 1024, "num_layers": 6,
            "rope_max_seq_len": 64,
        },
        (16, 3, 32, 32), lambda batch: {"encoder_hidden_states": text(batch, 64, 128)},
    ),
    "pixart": Sized(
        "PixArtTransformer2DModel",
        {
            "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 12,
            "attention_head_dim": 64, "num_attention_heads": 6, "cross_attention_dim": 384, "caption_channels": 128,
            "use_additional_conditions": False,
        },
        (4, 32, 32),
        lambda batch: {
            "encoder_hidden_states": text(batch, 64, 128),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "sd": Sized(
        "UNet2DConditionModel",
        {
            "sample_size": 32, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
            "block_out_channels": (128, 256, 512),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 128, "attention_head_dim": 8,
        },
        (4, 32, 32), lambda batch: {"encoder_hidden_states": text(batch, 77, 128)},
    ),
}  # fmt: skip
