"""Flux at level branches: joint attention over [text, image] segments, then blocks of one stream of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from hypothesis import strategies as st
from torch import Tensor

from .adapter_cases import STEPS, Case

CONFIG = {"patch_size": 1, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8}
CONFIG |= {"num_attention_heads": 2, "joint_attention_dim": 6, "pooled_projection_dim": 5, "axes_dims_rope": (2, 2, 4)}


def given(config: Any, randn: Callable[..., Tensor], batch: int, text: int, rows: int) -> tuple[Tensor, dict[str, Any]]:
    tokens = 4 * rows
    image_ids = torch.zeros(tokens, 3)
    image_ids[:, 1], image_ids[:, 2] = torch.arange(tokens) // 4, torch.arange(tokens) % 4
    arguments = {
        "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(text, 3),
    }
    if config.guidance_embeds:
        arguments["guidance"] = torch.full_like(arguments["pooled_projections"][:, 0], 3.5)
    return randn(STEPS, batch, tokens, config.in_channels), arguments


# The head's norm has rows alike for both segments, but a term of a pair of gates is two launches
ENDS, HEAD, SINGLE = 3, 3, 1 + 1 + 2 + 1
JOINT = 2 * (1 + 2) + 2 * (2 + 1) + 2 * 2  # two calls, each copied a segment; norms and terms over both segments

FLUX = Case(
    model=FluxTransformer2DModel,
    config=CONFIG,
    width=16,
    given=given,
    size=3,
    sizes=st.integers(1, 4),
    layout=[("transformer_blocks", 2, ("attn", "mlp")), ("single_transformer_blocks", 2, ("block",))],
    launches=(ENDS + 2 * JOINT + 2 * SINGLE + HEAD - 1, ENDS + 2 * 4 + 2 + HEAD - 1),
    batch=1,
    kinds={
        "schnell": {},
        "dev": {"guidance_embeds": True},
        "single blocks alone": {"num_layers": 0},
        "joint blocks alone": {"num_single_layers": 0},
        "Fill": {"in_channels": 12, "out_channels": 8},
    },
    variants=({}, {"guidance_embeds": True}),
    half={"guidance_embeds": True},
    counted={"dev": {"guidance_embeds": True}},
    lora=("to_q", "to_out.0", "proj_mlp"),
    per_thousand=True,
    trunk=True,
    refused_models={"float16": (lambda: FLUX.make().half(), "got float16")},
    refused_calls={
        "control": (
            {"controlnet_block_samples": [torch.zeros(2, 12, 16)]},
            r"controlnet_block_samples: expected none at level 'branches'.*'blocks'",
        ),
        "guidance": ({"guidance": torch.ones(2)}, "guidance: expected None"),
        "positions": ({"txt_ids": torch.zeros(9, 3)}, r"txt_ids: expected a tensor of shape \[3, 3\]"),
    },
)
