"""Stable Diffusion 3 at level branches: two segments, of which the last block reads the first and leaves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from hypothesis import strategies as st
from torch import Tensor

from .adapter_cases import STEPS, Case

WIDTH = 16
CONFIG = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 3}
CONFIG |= {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": WIDTH}
CONFIG |= {"joint_attention_dim": 6, "pooled_projection_dim": 5, "pos_embed_max_size": 8}


def given(
    config: Any, randn: Callable[..., Tensor], batch: int, text: int, size: tuple[int, int]
) -> tuple[Tensor, dict[str, Any]]:
    arguments = {
        "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
    }
    return randn(STEPS, batch, config.in_channels, *size), arguments


# A segment each, but for the head's norm and what the last block gives
ENDS, NORM, CALL, TERM = 8, 2 + 1, 1 + 2, 2

SD3 = Case(
    model=SD3Transformer2DModel,
    config=CONFIG,
    width=WIDTH,
    given=given,
    size=(8, 6),
    sizes=st.tuples(st.sampled_from([2, 8]), st.sampled_from([6, 14])),
    layout=[("transformer_blocks", 3, ("attn", "mlp"))],
    launches=(ENDS + 3 * 2 * (NORM + CALL + TERM) - 3 + NORM - 1, ENDS + 3 * 2 * TERM - 2 + NORM - 1),
    kinds={"3 medium": {}, "3.5 large": {"qk_norm": "rms_norm"}, "one block": {"num_layers": 1}},
    half={"qk_norm": "rms_norm"},
    dtypes=(torch.bfloat16, torch.float16),
    lora=("to_q", "add_k_proj", "to_out.0", "net.2", "norm1.linear"),
    refused_models={
        "two attentions": (
            lambda: SD3.make(dual_attention_layers=(1,)),
            r"transformer_blocks\.1: expected one attention, got two of one",
        )
    },
    refused_calls={
        "skipped layers": ({"skip_layers": [1]}, r"skip_layers: expected none at level 'branches'.*'blocks'"),
        "control": (
            {"block_controlnet_hidden_states": [torch.ones(2, 12, 16)]},
            "block_controlnet_hidden_states: expected none",
        ),
        "text": (
            {"encoder_hidden_states": torch.ones(1, 5, 6)},
            r"encoder_hidden_states: expected a tensor \[2, tokens, 6\]",
        ),
        "pooled text": (
            {"pooled_projections": torch.ones(2, 4)},
            r"pooled_projections: expected a tensor of shape \[2, 5\]",
        ),
        "size": ({"hidden_states": torch.ones(2, 3, 8, 5)}, r"multiples of the patch, 2, got 8x5"),
    },
)
