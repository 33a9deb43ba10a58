"""Denoisers of video with a video and a text stream through their blocks, or of video by frames and time apart."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.denoisers.making import Family, clock, given, grid, keep, noise

JOINT_VIDEO = Family()

COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 5,
}


def cogvideo_call(step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 2, 4, 8, 8),
        "encoder_hidden_states": given(2, 5, 12),
        "timestep": clock(step, 2).long(),
    }


@JOINT_VIDEO.add("CogVideoXTransformer3DModel", **COGVIDEO)
def cogvideox(model: nn.Module, step: int) -> dict:
    return cogvideo_call(step)


@JOINT_VIDEO.add(
    "ConsisIDTransformer3DModel",
    note="face features are added behind every second block",
    **COGVIDEO | {"num_layers": 4},
    cross_attn_interval=2,
    is_train_face=True,
    cross_attn_dim_head=4,
    cross_attn_num_heads=2,
    LFE_id_dim=4,
    LFE_vit_dim=4,
    LFE_depth=5,
    LFE_dim_head=8,
    LFE_num_heads=2,
    LFE_num_id_token=1,
    LFE_num_querie=2,
    LFE_output_dim=10,
    LFE_ff_mult=1,
    LFE_num_scale=1,
)
def consisid(model: nn.Module, step: int) -> dict:
    return cogvideo_call(step) | {"id_cond": given(2, 4, seed=1), "id_vit_hidden": [given(2, 2, 4, seed=2)]}


@JOINT_VIDEO.add(
    "LatteTransformer3DModel",
    note="blocks over frames and blocks over time take turns, from two lists",
    sample_size=8,
    num_layers=3,
    patch_size=2,
    attention_head_dim=8,
    num_attention_heads=2,
    caption_channels=8,
    in_channels=4,
    cross_attention_dim=16,
    out_channels=8,
    attention_bias=True,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    video_length=2,
)
def latte(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 2, 8, 8),
        "encoder_hidden_states": given(2, 5, 8),
        "timestep": clock(step, 2).long(),
        "enable_temporal_attentions": True,
    }


@JOINT_VIDEO.add(
    "AllegroTransformer3DModel",
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    cross_attention_dim=24,
    sample_width=8,
    sample_height=8,
    sample_frames=2,
    caption_channels=8,
)
def allegro(model: nn.Module, step: int) -> dict:
    angles = given(3, 4, 4, seed=1)
    rotary = tuple(zip(angles.cos(), angles.sin()))
    return {
        "hidden_states": noise(step, 2, 4, 2, 8, 8),
        "attention_mask": torch.ones(2, 2, 8, 8),
        "encoder_hidden_states": given(2, 5, 8),
        "encoder_attention_mask": keep(3, 5, tokens=5),
        "timestep": clock(step, 2).long(),
        "image_rotary_emb": (rotary, tuple(grid(2, 4, 4).long().T[:, None])),
    }


@JOINT_VIDEO.add(
    "EasyAnimateTransformer3DModel",
    attention_head_dim=16,
    num_attention_heads=2,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    mmdit_layers=2,
    num_layers=3,
    sample_height=60,
    sample_width=90,
    text_embed_dim=12,
    time_embed_dim=8,
)
def easy_animate(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 2, 8, 8),
        "timestep": clock(step, 2),
        "encoder_hidden_states": given(2, 5, 12),
    }


@JOINT_VIDEO.add(
    "MochiTransformer3DModel",
    note="the last block is context_pre_only",
    patch_size=2,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    pooled_projection_dim=12,
    in_channels=4,
    text_embed_dim=16,
    time_embed_dim=4,
    max_sequence_length=8,
)
def mochi(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 2, 8, 8),
        "encoder_hidden_states": given(2, 5, 16),
        "timestep": clock(step, 2),
        "encoder_attention_mask": keep(3, 5, tokens=5).bool(),
    }


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "rope_axes_dim": (2, 2, 4),
}


def hunyuan_call(step: int, batch: int = 2) -> dict:
    lengths = (3, 5)[-batch:]
    return {
        "hidden_states": noise(step, batch, 4, 2, 4, 4),
        "timestep": clock(step, batch).long(),
        "encoder_hidden_states": given(batch, 5, 12),
        "encoder_attention_mask": keep(*lengths, tokens=5),
    }


@JOINT_VIDEO.add(
    "HunyuanVideoTransformer3DModel",
    **HUNYUAN,
    num_single_layers=2,
    patch_size=2,
    guidance_embeds=True,
    pooled_projection_dim=8,
)
def hunyuan_video(model: nn.Module, step: int) -> dict:
    return hunyuan_call(step) | {"pooled_projections": given(2, 8, seed=1), "guidance": torch.full((2,), 6000.0)}


@JOINT_VIDEO.add(
    "HunyuanVideoFramepackTransformer3DModel",
    note="tokens of the past come before the video's",
    **HUNYUAN,
    num_single_layers=2,
    patch_size=2,
    guidance_embeds=True,
    pooled_projection_dim=8,
    has_image_proj=True,
    image_proj_dim=12,
    has_clean_x_embedder=True,
)
def framepack(model: nn.Module, step: int) -> dict:
    return hunyuan_call(step, batch=1) | {
        "pooled_projections": given(1, 8, seed=1),
        "guidance": torch.full((1,), 6000.0),
        "image_embeds": given(1, 3, 12, seed=2),
        "indices_latents": torch.arange(8, 10),
        "latents_clean": given(1, 4, 2, 4, 4, seed=3),
        "indices_latents_clean": torch.tensor([0, 10]),
        "latents_history_2x": given(1, 4, 2, 4, 4, seed=4),
        "indices_latents_history_2x": torch.arange(6, 8),
        "latents_history_4x": given(1, 4, 4, 4, 4, seed=5),
        "indices_latents_history_4x": torch.arange(2, 6),
    }


@JOINT_VIDEO.add(
    "HunyuanVideo15Transformer3DModel",
    **HUNYUAN,
    patch_size=1,
    text_embed_2_dim=10,
    image_embed_dim=12,
    target_size=16,
)
def hunyuan_video15(model: nn.Module, step: int) -> dict:
    return hunyuan_call(step) | {
        "timestep": clock(step, 2),
        "encoder_hidden_states_2": given(2, 4, 10, seed=1),
        "encoder_attention_mask_2": keep(2, 4, tokens=4),
        "image_embeds": torch.zeros(2, 3, 12),
    }


KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 12,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 2,
    "num_visual_blocks": 3,
    "axes_dims": (4, 6, 6),
    "visual_cond": True,
}


@JOINT_VIDEO.add("Kandinsky5Transformer3DModel", note="text blocks first, then video blocks", **KANDINSKY)
def kandinsky5(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": torch.cat([noise(step, 1, 2, 8, 8, 4), given(1, 2, 8, 8, 5, seed=2)], -1),
        "encoder_hidden_states": given(1, 5, 12),
        "timestep": clock(step, 1),
        "pooled_projections": given(1, 8, seed=1),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(5),
        "scale_factor": (1.0, 2.0, 2.0),
    }


@JOINT_VIDEO.add(
    "Kandinsky6Transformer3DModel", note="video and audio, both denoised", **KANDINSKY, in_audio_dim=3, out_audio_dim=3
)
def kandinsky6(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": torch.cat([noise(step, 1, 2, 8, 8, 4), given(1, 2, 8, 8, 5, seed=2)], -1),
        "audio_hidden_states": noise(step, 1, 7, 3, seed=1),
        "encoder_hidden_states": given(1, 5, 12),
        "pooled_projections": given(1, 8, seed=1),
        "timestep": clock(step, 1),
        "encoder_attention_mask": keep(4, tokens=5).bool(),
    }


@JOINT_VIDEO.add(
    "Kandinsky6SRTransformer3DModel",
    note="sparse attention over tiles of 8 x 8",
    in_visual_dim=4,
    out_visual_dim=4,
    time_dim=16,
    model_dim=32,
    ff_dim=32,
    num_visual_blocks=3,
    axes_dims=(4, 6, 6),
)
def kandinsky6_sr(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": torch.cat([noise(step, 1, 2, 8, 8, 4), given(1, 2, 8, 8, 5)], -1),
        "timestep": clock(step, 1),
    }


@JOINT_VIDEO.add(
    "MotifVideoTransformer3DModel",
    note="some of the single blocks are decoder blocks that run on the video alone",
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_single_layers=4,
    num_decoder_layers=2,
    patch_size=1,
    text_embed_dim=16,
    rope_axes_dim=(4, 4, 4),
    enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
)
def motif_video(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": torch.cat([noise(step, 2, 4, 2, 4, 4), given(2, 5, 2, 4, 4, seed=1)], 1),
        "timestep": clock(step, 2),
        "encoder_hidden_states": given(2, 5, 16),
        "encoder_attention_mask": keep(3, 5, tokens=5).bool(),
    }


@JOINT_VIDEO.add(
    "MiniMaxH3Transformer3DModel",
    note="one packed sequence of text, audio and video; video and audio are denoised",
    num_attention_heads=2,
    attention_head_dim=16,
    hidden_size=24,
    num_layers=3,
    num_refiner_layers=2,
    ffn_dim=32,
    in_channels=4,
    audio_in_channels=6,
    text_dim=8,
    freq_dim=8,
    time_embed_hidden_dim=24,
    time_embed_dim=16,
    rope_freq_dim=2,
)
def minimax_h3(model: nn.Module, step: int) -> dict:
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 18)
    tags = torch.tensor([1] * 4 + [2] * 6 + [0] * 8)
    positions = torch.arange(18.0)[:, None].repeat(1, 3)
    positions[video] = grid(2, 2, 2) + 10
    return {
        "hidden_states": noise(step, 2, 8, 16),
        "audio_hidden_states": noise(step, 2, 6, 6, seed=1),
        "encoder_hidden_states": given(2, 4, 8),
        "timestep": torch.stack([clock(step), clock(step) / 2, clock(step) / 4]) / 1000,  # of video, audio, text: 3, as
        "timestep_indices": tags.where(tags == 0, 3 - tags),  # many as there are pictures could be taken for theirs
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }
