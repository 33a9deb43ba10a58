"""Denoisers that are UNets: no list of blocks that one stream goes through."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.denoisers.making import Family, clock, given, keep, noise

UNETS = Family()


def unet_call(step: int) -> dict:
    """What the UNets of images with text share."""
    return {
        "sample": noise(step, 2, 4, 8, 8),
        "timestep": clock(step).long(),
        "encoder_hidden_states": given(2, 5, 8),
    }


@UNETS.add(
    "UNet1DModel",
    block_out_channels=(8, 8, 16),
    in_channels=4,
    out_channels=4,
    time_embedding_type="positional",
    use_timestep_embedding=True,
    flip_sin_to_cos=False,
    freq_shift=1.0,
    out_block_type="OutConv1DBlock",
    mid_block_type="MidResTemporalBlock1D",
    down_block_types=("DownResnetBlock1D",) * 3,
    up_block_types=("UpResnetBlock1D",) * 2,
    act_fn="swish",
)
def unet_1d(model: nn.Module, step: int) -> dict:
    return {"sample": noise(step, 2, 4, 16), "timestep": clock(step, 2).long()}


@UNETS.add(
    "UNet2DModel",
    block_out_channels=(4, 8),
    norm_num_groups=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    layers_per_block=1,
    sample_size=8,
)
def unet_2d(model: nn.Module, step: int) -> dict:
    return {"sample": noise(step, 2, 3, 8, 8), "timestep": clock(step).long()}


UNET = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "sample_size": 8,
}


@UNETS.add(
    "UNet2DConditionModel",
    note="as SDXL calls it",
    **UNET,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=34,
)
def unet_2d_condition(model: nn.Module, step: int) -> dict:
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
    return unet_call(step) | {"added_cond_kwargs": {"text_embeds": given(2, 10, seed=1), "time_ids": sizes}}


@UNETS.add(
    "UNet3DConditionModel",
    **UNET,
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
)
def unet_3d_condition(model: nn.Module, step: int) -> dict:
    return unet_call(step) | {"sample": noise(step, 2, 4, 2, 8, 8)}


@UNETS.add(
    "UNetMotionModel",
    **{name: value for name, value in UNET.items() if name != "attention_head_dim"},
    num_attention_heads=2,
    motion_num_attention_heads=2,
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
)
def unet_motion(model: nn.Module, step: int) -> dict:
    return unet_call(step) | {
        "sample": noise(step, 2, 4, 2, 8, 8),
        "encoder_hidden_states": given(2, 5, 8).repeat_interleave(2, 0),
    }


@UNETS.add(
    "UNetSpatioTemporalConditionModel",
    block_out_channels=(32, 64),
    in_channels=8,
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    cross_attention_dim=8,
    num_attention_heads=2,
    layers_per_block=1,
    sample_size=8,
    projection_class_embeddings_input_dim=12,
    addition_time_embed_dim=4,
)
def unet_spatio_temporal(model: nn.Module, step: int) -> dict:
    return {
        "sample": noise(step, 2, 2, 8, 8, 8),
        "timestep": 0.25 * (clock(step) / 1000).log(),
        "encoder_hidden_states": given(2, 1, 8),
        "added_time_ids": torch.tensor([[6.0, 127, 0.02]]).expand(2, -1),
    }


@UNETS.add(
    "I2VGenXLUNet",
    **UNET,
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
)
def i2vgen_xl(model: nn.Module, step: int) -> dict:
    return unet_call(step) | {
        "sample": noise(step, 2, 4, 2, 8, 8),
        "fps": torch.tensor([16, 16]),
        "image_latents": given(2, 4, 2, 8, 8, seed=1),
        "image_embeddings": given(2, 8, seed=2),
    }


@UNETS.add(
    "Kandinsky3UNet",
    time_embedding_dim=8,
    groups=2,
    attention_head_dim=4,
    layers_per_block=2,
    block_out_channels=(8, 16),
    cross_attention_dim=8,
    encoder_hid_dim=8,
)
def kandinsky3(model: nn.Module, step: int) -> dict:
    return unet_call(step) | {"encoder_attention_mask": keep(3, 5, tokens=5).bool()}


@UNETS.add(
    "DreamLiteUNetModel",
    **UNET | {"block_out_channels": (16, 32)},
    down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
    up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    ff_mult=2,
)
def dreamlite(model: nn.Module, step: int) -> dict:
    return unet_call(step) | {
        "timestep": clock(step, 2),
        "encoder_attention_mask": keep(3, 5, tokens=5),
        "added_cond_kwargs": {"time_ids": torch.full((2, 6), 64.0)},
    }


@UNETS.add(
    "StableCascadeUNet",
    note="as the prior; its lists hold lists of levels of different width",
    in_channels=4,
    out_channels=4,
    timestep_ratio_embedding_dim=8,
    conditioning_dim=16,
    block_out_channels=(16, 16),
    num_attention_heads=(2, 2),
    down_num_layers_per_block=(1, 2),
    up_num_layers_per_block=(2, 1),
    switch_level=(False,),
    clip_image_in_channels=12,
    clip_text_in_channels=8,
    clip_text_pooled_in_channels=8,
)
def stable_cascade(model: nn.Module, step: int) -> dict:
    return {
        "sample": noise(step, 2, 4, 8, 8),
        "timestep_ratio": clock(step, 2) / 1000,
        "clip_text_pooled": given(2, 1, 8),
        "clip_text": given(2, 5, 8, seed=1),
        "clip_img": given(2, 1, 12, seed=2),
    }
