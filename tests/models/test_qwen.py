"""Qwen-Image at level branches: joint attention over [text, image], rotary tables of one or several images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from hypothesis import strategies as st
from torch import Tensor

from .adapter_cases import STEPS, Case

CONFIG = {"in_channels": 8, "out_channels": 3, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2}
CONFIG |= {"joint_attention_dim": 6, "axes_dims_rope": (4, 2, 2)}
Sizes = list[tuple[int, int, int]]


def given(
    config: Any, randn: Callable[..., Tensor], batch: int, text: int, images: Sizes
) -> tuple[Tensor, dict[str, Any]]:
    """`images`: frames, height and width of each in a sample, as editing has several."""
    arguments = {
        "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
        "img_shapes": [list(images) for _ in range(batch)],
    }
    if config.use_additional_t_cond:
        arguments["additional_t_cond"] = torch.arange(batch) % 2
    return randn(STEPS, batch, sum(map(math.prod, images)), config.in_channels), arguments


LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}
# A segment each: norms, calls with their copies, terms; the head's norm has rows alike for both
ENDS, NORM, CALL, TERM = 3, 2 + 1, 1 + 2, 2

QWEN = Case(
    model=QwenImageTransformer2DModel,
    config=CONFIG,
    width=16,
    given=given,
    size=[(1, 3, 4)],
    sizes=st.lists(st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3),
    layout=[("transformer_blocks", 3, ("attn", "mlp"))],
    launches=(ENDS + 3 * 2 * (NORM + CALL + TERM) + NORM - 1, ENDS + 3 * 2 * TERM + NORM - 1),
    batch=1,
    kinds={"as published": {}, "layered": LAYERED, "one block": {"num_layers": 1}, "out as in": {"out_channels": None}},
    variants=(LAYERED, {}),
    lora=("to_q", "add_k_proj", "to_out.0", "net.2", "img_mod.1", "img_in"),
    per_thousand=True,
    trunk=True,
    refused_models={
        "float16": (lambda: QWEN.make().half(), "got float16"),
        "zero_cond_t": (lambda: QWEN.make(zero_cond_t=True), "zero_cond_t: expected False, got True"),
    },
    refused_calls={
        "mask": (
            {"encoder_hidden_states_mask": torch.ones(2, 3)},
            r"encoder_hidden_states_mask: expected none at level 'branches', got \[2, 3\].*'blocks'",
        ),
        "control": ({"controlnet_block_samples": [torch.ones(2, 12, 16)]}, "controlnet_block_samples: expected none"),
        "attention_kwargs": ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs: expected none"),
        "guidance": ({"guidance": torch.ones(2)}, "guidance: expected none"),
        "another time": (
            {"additional_t_cond": torch.ones(2)},
            "additional_t_cond: expected None with use_additional_t_cond=False",
        ),
        "size": ({"img_shapes": [[(1, 3, 3)]] * 2}, r"img_shapes: expected images of 12 tokens, .* got .*\(1, 3, 3\)"),
        "no size": ({"img_shapes": None}, "img_shapes: expected images of 12 tokens, .* got None"),
        "empty": ({"img_shapes": []}, r"img_shapes: expected images of 12 tokens, .* got \[\]"),
        "sizes apart": ({"img_shapes": [[(1, 3, 4)], [(1, 4, 3)]]}, "img_shapes: .* alike in all samples"),
        "text": (
            {"encoder_hidden_states": torch.ones(1, 5, 6)},
            r"encoder_hidden_states: expected a tensor \[2, tokens, 6\]",
        ),
    },
)
