"""Wan at level branches: a clip's tokens, text read by cross-attention, rows in float32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import strategies as st
from torch import Tensor

import harmonica_rt as hrt

from .adapter_cases import STEPS, Case, as_loaded, full

WIDTH = 24
CONFIG = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 3, "text_dim": 6}
CONFIG |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32}
IMAGE = {"image_dim": 5, "added_kv_proj_dim": WIDTH}


def given(
    config: Any, randn: Callable[..., Tensor], batch: int, text: int, size: tuple[int, int, int]
) -> tuple[Tensor, dict[str, Any]]:
    arguments = {"encoder_hidden_states": randn(batch, text, config.text_dim)}
    if config.image_dim is not None:  # the model's attention takes the last 512 states for text
        arguments["encoder_hidden_states"] = randn(batch, 512, config.text_dim)
        both = 1 if config.pos_embed_seq_len is None else 2
        arguments["encoder_hidden_states_image"] = randn(both * batch, 7, config.image_dim)
    return randn(STEPS, batch, config.in_channels, *size), arguments


def with_another_norm() -> WanTransformer3DModel:
    model = WAN.make()
    model.blocks[1].norm3 = torch.nn.LayerNorm(WIDTH, elementwise_affine=False)
    return model


ENDS, NORM, CALL, TERM = 4, 2, 2, 1

WAN = Case(
    model=WanTransformer3DModel,
    config=CONFIG,
    width=WIDTH,
    given=given,
    size=(3, 4, 6),
    sizes=st.tuples(st.integers(1, 4), st.sampled_from([2, 6]), st.sampled_from([2, 4])),
    layout=[("blocks", 3, ("attn", "cross_attn", "ffn"))],
    launches=(ENDS + 3 * 3 * (NORM + CALL + TERM) + NORM, ENDS + 3 * 3 * TERM + NORM),
    kinds={
        "text to video": {},
        "image to video": IMAGE,
        "first and last frame": IMAGE | {"pos_embed_seq_len": 14},
        "2.2, image to video": {"in_channels": 9},
        "no norm before cross-attention": {"cross_attn_norm": False},
        "patches over frames": {"patch_size": (3, 2, 1)},
        "out_channels left out": {"out_channels": None},
    },
    variants=({"cross_attn_norm": False}, {}),
    half=IMAGE,
    dtypes=(torch.bfloat16, torch.float16),
    counted={"text": {}, "text and an image": IMAGE},
    halved=1.9,
    lora=("to_q", "to_out.0", "ffn.net.2", "time_proj"),
    refused_models={"a norm": (with_another_norm, r"blocks\.1\.norm3: expected a plain FP32LayerNorm")},
    refused_calls={
        "a timestep a token": (
            {"timestep": torch.ones(2, 18)},
            r"timestep: expected one a sample, \[2\].*got one a token, \[2, 18\].*'blocks'",
        ),
        "timestep": ({"timestep": torch.ones(3)}, r"timestep: expected a tensor of shape \[2\]"),
        "attention_kwargs": (
            {"attention_kwargs": {"scale": 0.5}},
            r"attention_kwargs: expected none at level 'branches'.*'blocks'",
        ),
        "a picture": (
            {"hidden_states": torch.ones(2, 4, 4, 6)},
            r"hidden_states: expected \[batch, 4, frames, height, width\], got \[2, 4, 4, 6\]",
        ),
        "size": (
            {"hidden_states": torch.ones(2, 4, 3, 4, 5)},
            r"multiples of the patch, \(1, 2, 2\), got \(3, 4, 5\)",
        ),
        "an image": (
            {"encoder_hidden_states_image": torch.ones(2, 7, 5)},
            "encoder_hidden_states_image: expected None",
        ),
        "text": (
            {"encoder_hidden_states": torch.ones(1, 5, 6)},
            r"encoder_hidden_states: expected a tensor \[2, tokens, 6\]",
        ),
    },
)


def test_only_what_diffusers_keeps_in_float32_may_be_of_another_dtype() -> None:
    model = as_loaded(WAN.make(), torch.bfloat16)
    hrt.compile(model, full(model), backend="eager")
    model.proj_out.float()
    with pytest.raises(ValueError, match=r"expected parameters of one dtype on one device.*bfloat16.*float32"):
        hrt.compile(model, full(model), backend="eager")
    model = as_loaded(WAN.make(), torch.bfloat16)
    model.blocks[1].norm2.half()
    with pytest.raises(ValueError, match=r"expected parameters of one dtype on one device.*bfloat16.*float16"):
        hrt.compile(model, full(model), backend="eager")
    model = WAN.make()
    model.blocks[1].norm2.to("meta")
    with pytest.raises(ValueError, match=r"expected parameters of one dtype on one device.*cpu.*meta"):
        hrt.compile(model, full(model), backend="eager")
