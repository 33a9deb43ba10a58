"""Denoisers of video whose blocks are Wan's, LTX's or alike: one stream of video, text beside it."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import nn

from tests.models.denoisers.making import Family, clock, given, keep, noise

VIDEO = Family()

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
}
WAN_POSITIONS = {"rope_max_seq_len": 32}


def wan_call(step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 2, 8, 8),
        "timestep": clock(step, 2).long(),
        "encoder_hidden_states": given(2, 5, 16),
    }


@VIDEO.add("WanTransformer3DModel", note="a timestep a token, as Wan 2.2 TI2V passes it", **WAN, **WAN_POSITIONS)
def wan(model: nn.Module, step: int) -> dict:
    timesteps = clock(step, 2, 32).long()
    timesteps[:, :16] = 0  # the first frame is given
    return wan_call(step) | {"timestep": timesteps}


@VIDEO.add(
    "WanVACETransformer3DModel",
    note="control blocks run first; what they return is added behind some blocks",
    **WAN | {"num_layers": 4},
    **WAN_POSITIONS,
    vace_layers=[0, 2],
    vace_in_channels=12,
)
def wan_vace(model: nn.Module, step: int) -> dict:
    return wan_call(step) | {"control_hidden_states": given(2, 12, 2, 8, 8, seed=1)}


@VIDEO.add(
    "WanAnimateTransformer3DModel",
    note="face features are added behind every second block",
    **WAN | {"in_channels": 12, "num_layers": 4},
    **WAN_POSITIONS,
    latent_channels=4,
    image_dim=16,
    motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=16,
    face_encoder_hidden_dim=16,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
)
def wan_animate(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 1, 12, 3, 8, 8),
        "timestep": clock(step, 1).long(),
        "encoder_hidden_states": given(1, 5, 16),
        "encoder_hidden_states_image": given(1, 4, 16, seed=1),
        "pose_hidden_states": given(1, 4, 2, 8, 8, seed=2),
        "face_pixel_values": given(1, 3, 5, 16, 16, seed=3),
    }


@VIDEO.add(
    "WanAnimate2Transformer3DModel",
    note="lists of samples; reads keys and values that a reference pass of the same model left in a cache",
    std=0.1,
    text_len=8,
    in_dim=12,
    dim=32,
    ffn_dim=32,
    freq_dim=16,
    text_dim=16,
    out_dim=4,
    num_heads=2,
    num_layers=3,
)
def wan_animate2(model: nn.Module, step: int) -> dict:
    shared = {
        "encoder_hidden_states": [given(5, 16)],
        "encoder_hidden_states_image": given(1, 4, 1280, seed=1),
        "kv_cache": reference_cache(model, given(5, 16), given(1, 4, 1280, seed=1)),
    }
    return shared | {
        "hidden_states": [noise(step, 4, 3, 4, 4)],
        "timestep": clock(step, 1),
        "condition_latents": [given(8, 3, 4, 4, seed=2)],
        "kv_cache_mode": "cached",
        "seq_len": 12,
        "reference_grid_sizes": torch.tensor([[2, 2, 2]]),
        "origin_len": 5,
        "origin_area": [32, 32],
    }


def reference_cache(model: nn.Module, text: torch.Tensor, image: torch.Tensor) -> WanAnimate2KVCache:
    """What the pass over the driving video leaves: keys and values of every block."""
    cache = WanAnimate2KVCache(3)
    with torch.no_grad():
        model(
            hidden_states=[given(4, 2, 4, 4, seed=3)],
            timestep=torch.tensor([1.0]),
            encoder_hidden_states=[text],
            condition_latents=[given(8, 2, 4, 4, seed=4)],
            encoder_hidden_states_image=image,
            kv_cache=cache,
            kv_cache_mode="extract",
            seq_len=8,
            offset_grid_sizes=torch.tensor([[2, 2, 2]]),
        )
    return cache


@VIDEO.add("SkyReelsV2Transformer3DModel", **WAN, **WAN_POSITIONS)
def skyreels_v2(model: nn.Module, step: int) -> dict:
    return wan_call(step)


@VIDEO.add("ChronoEditTransformer3DModel", **WAN, **WAN_POSITIONS, rope_temporal_skip_len=8)
def chronoedit(model: nn.Module, step: int) -> dict:
    return wan_call(step)


@VIDEO.add(
    "HeliosTransformer3DModel",
    note="tokens of the past come before the video's",
    **WAN,
    rope_dim=(4, 4, 4),
)
def helios(model: nn.Module, step: int) -> dict:
    return wan_call(step) | {
        "indices_hidden_states": torch.arange(5, 7).expand(2, -1),
        "indices_latents_history_short": torch.arange(4, 5).expand(2, -1),
        "indices_latents_history_mid": torch.arange(2, 4).expand(2, -1),
        "indices_latents_history_long": torch.arange(0, 4).expand(2, -1),
        "latents_history_short": given(2, 4, 1, 8, 8, seed=1),
        "latents_history_mid": given(2, 4, 2, 8, 8, seed=2),
        "latents_history_long": given(2, 4, 4, 8, 8, seed=3),
    }


ANYFLOW = {**WAN, **WAN_POSITIONS, "gate_value": 0.25, "deltatime_type": "r"}


def anyflow_call(step: int, frames: int) -> dict:
    return {
        "hidden_states": noise(step, 1, frames, 4, 8, 8),
        "timestep": clock(step, 1, frames),
        "r_timestep": clock(step + 1, 1, frames),
        "encoder_hidden_states": given(1, 5, 16),
    }


@VIDEO.add("AnyFlowTransformer3DModel", note="frames before channels; the next timestep beside this one", **ANYFLOW)
def anyflow(model: nn.Module, step: int) -> dict:
    return anyflow_call(step, 2)


@VIDEO.add(
    "AnyFlowFARTransformer3DModel",
    note="chunks of frames under a block mask; without the cache of earlier chunks",
    **ANYFLOW,
    compressed_patch_size=(1, 4, 4),
    full_chunk_limit=3,
)
def anyflow_far(model: nn.Module, step: int) -> dict:
    return anyflow_call(step, 4) | {"chunk_partition": [2, 2]}


@VIDEO.add(
    "LTXVideoTransformer3DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    num_layers=3,
    caption_channels=12,
)
def ltx(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 18, 4),
        "encoder_hidden_states": given(2, 5, 12),
        "timestep": clock(step, 2),
        "encoder_attention_mask": keep(3, 5, tokens=5),
        "num_frames": 2,
        "height": 3,
        "width": 3,
        "rope_interpolation_scale": (0.32, 32, 32),
    }


LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 3,
    "caption_channels": 12,
    "rope_double_precision": False,
}


@VIDEO.add("LTX2VideoTransformer3DModel", note="video and audio streams, both denoised", **LTX2)
def ltx2(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 18, 4),
        "audio_hidden_states": noise(step, 2, 7, 4, seed=1),
        "encoder_hidden_states": given(2, 5, 12),
        "audio_encoder_hidden_states": given(2, 5, 12, seed=1),
        "timestep": clock(step, 2),
        "sigma": clock(step, 2),
        "encoder_attention_mask": keep(3, 5, tokens=5),
        "audio_encoder_attention_mask": keep(3, 5, tokens=5),
        "num_frames": 2,
        "height": 3,
        "width": 3,
        "fps": 24.0,
        "audio_num_frames": 7,
    }


@VIDEO.add(
    "SanaWMLTX2RefinerTransformer3DModel",
    note="one block of frames without earlier ones; a timestep a token, scaled by 1000",
    **LTX2,
)
def sana_wm_refiner(model: nn.Module, step: int) -> dict:
    rotary = model.build_rotary_emb_for_absolute_positions(
        batch_size=1, frame_positions=[0, 1], height=3, width=3, device=torch.device("cpu"), fps=16.0
    )
    return {
        "hidden_states": noise(step, 1, 18, 4),
        "encoder_hidden_states": given(1, 5, 12),
        "timestep": clock(step, 1, 18),
        "video_rotary_emb": rotary,
        "encoder_attention_mask": keep(4, tokens=5),
    }


@VIDEO.add(
    "SanaVideoTransformer3DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=16,
    mlp_ratio=2.5,
    sample_size=8,
    patch_size=(1, 2, 2),
    qk_norm="rms_norm_across_heads",
    rope_max_seq_len=32,
)
def sana_video(model: nn.Module, step: int) -> dict:
    return wan_call(step) | {"encoder_attention_mask": keep(3, 5, tokens=5), "timestep": clock(step, 2)}


@VIDEO.add(
    "SanaWMTransformer3DModel",
    note="camera-controlled; the second block attends by softmax, the others by a recurrence",
    std=0.1,
    in_channels=4,
    num_layers=3,
    hidden_size=32,
    num_attention_heads=2,
    softmax_every_n=2,
    linear_head_dim=16,
    chunk_plucker_channels=6,
    chunk_plucker_post_attn_blocks=3,
    caption_channels=12,
)
def sana_wm(model: nn.Module, step: int) -> dict:
    timesteps = clock(step, 1, 1, 3)
    timesteps[..., 0] = 0  # the first frame is given
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([1.0, 1, 0.5, 0.5])]).repeat(1, 3, 1)
    camera[0, :, 3] = torch.arange(3.0)  # moves along x
    return {
        "hidden_states": noise(step, 1, 4, 3, 4, 4),
        "timestep": timesteps,
        "encoder_hidden_states": given(1, 1, 5, 12),
        "mask": keep(4, tokens=5),
        "data_info": {"img_hw": torch.tensor([[128.0, 128.0]])},
        "camera_conditions": camera,
        "chunk_plucker": given(1, 6, 3, 4, 4, seed=1),
    }


@VIDEO.add(
    "CosmosTransformer3DModel",
    note="without the padding mask, which needs torchvision",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    mlp_ratio=2,
    text_embed_dim=16,
    adaln_lora_dim=4,
    max_size=(4, 16, 16),
    patch_size=(1, 2, 2),
    concat_padding_mask=False,
    extra_pos_embed_type="learnable",
)
def cosmos(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 1, 4, 2, 8, 8),
        "timestep": clock(step, 1),
        "encoder_hidden_states": given(1, 5, 16),
        "fps": 16,
    }


@VIDEO.add(
    "Cosmos3OmniTransformer",
    note="one packed sequence; text tokens of an understanding stream, noisy tokens of a generating one",
    head_dim=8,
    hidden_size=16,
    intermediate_size=32,
    latent_channel=4,
    latent_patch_size=1,
    patch_latent_dim=4,
    num_attention_heads=2,
    num_hidden_layers=3,
    num_key_value_heads=1,
    rope_axes_dim=[2, 1, 1],
    vocab_size=32,
)
def cosmos3(model: nn.Module, step: int) -> dict:
    text, vision = 3, 8
    positions = torch.zeros(3, text + vision, dtype=torch.long)
    positions[:, :text] = torch.arange(text)
    positions[:, text:] = torch.cartesian_prod(torch.arange(2) + text, torch.arange(2), torch.arange(2)).T
    where = torch.arange(text, text + vision)
    return {
        "input_ids": torch.tensor([1, 2, 3]),
        "text_indexes": torch.arange(text),
        "position_ids": positions,
        "und_len": text,
        "sequence_length": text + vision,
        "vision_tokens": [noise(step, 1, 4, 2, 2, 2)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": where,
        "vision_mse_loss_indexes": where,
        "vision_timesteps": clock(step, vision),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }
