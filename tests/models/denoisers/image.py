"""Denoisers of images whose blocks take image tokens and read the text beside them."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.denoisers.making import Family, clock, given, keep, noise

IMAGE = Family()


@IMAGE.add(
    "DiTTransformer2DModel",
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    in_channels=2,
    out_channels=4,
    sample_size=8,
    num_embeds_ada_norm=5,
)
def dit(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 2, 8, 8),
        "timestep": clock(step, 2).long(),
        "class_labels": torch.tensor([3, 5]),
    }


@IMAGE.add(
    "PixArtTransformer2DModel",
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    in_channels=2,
    out_channels=4,
    sample_size=8,
    caption_channels=10,
    cross_attention_dim=24,
    use_additional_conditions=False,
)
def pixart(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 2, 8, 8),
        "timestep": clock(step, 2).long(),
        "encoder_hidden_states": given(2, 5, 10),
        "encoder_attention_mask": keep(3, 5, tokens=5),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@IMAGE.add(
    "Transformer2DModel",
    note="as VQ diffusion calls it: tokens in, log-probabilities out",
    std=0.5,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    num_vector_embeds=12,
    sample_size=4,
    cross_attention_dim=10,
    attention_bias=True,
    norm_type="ada_norm",
    num_embeds_ada_norm=1000,
)
def vq_diffusion(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 16).mul(9).long().remainder(12),
        "encoder_hidden_states": given(2, 5, 10),
        "timestep": clock(step).long(),
    }


@IMAGE.add(
    "UVit2DModel",
    note="masked tokens in, logits out; no timestep (aMUSEd); its long list is between two convolutional blocks",
    hidden_size=32,
    cond_embed_dim=32,
    micro_cond_encode_dim=2,
    micro_cond_embed_dim=10,
    encoder_hidden_size=32,
    vocab_size=32,
    codebook_size=24,
    in_channels=32,
    block_out_channels=32,
    num_res_blocks=1,
    downsample=True,
    upsample=True,
    block_num_heads=2,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    sample_size=8,
)
def amused(model: nn.Module, step: int) -> dict:
    return {
        "input_ids": noise(step, 2, 8, 8).mul(9).long().remainder(24),
        "encoder_hidden_states": given(2, 5, 32),
        "pooled_text_emb": given(2, 32, seed=1),
        "micro_conds": torch.tensor([[512.0, 512, 0, 0, 6]]).expand(2, -1),
    }


@IMAGE.add(
    "PriorTransformer",
    std=0.5,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    embedding_dim=12,
    num_embeddings=5,
    additional_embeddings=4,
)
def prior(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 12),
        "timestep": clock(step).long(),
        "proj_embedding": given(2, 12),
        "encoder_hidden_states": given(2, 5, 12, seed=1),
        "attention_mask": keep(3, 5, tokens=5).bool(),
    }


@IMAGE.add(
    "HunyuanDiT2DModel",
    note="long skips: the second half's blocks read the first half's",
    sample_size=8,
    patch_size=2,
    in_channels=4,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=2,
    cross_attention_dim=8,
    cross_attention_dim_t5=8,
    pooled_projection_dim=4,
    hidden_size=16,
    text_len=4,
    text_len_t5=4,
    activation_fn="gelu-approximate",
)
def hunyuan_dit(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "timestep": clock(step, 2),
        "encoder_hidden_states": given(2, 4, 8),
        "text_embedding_mask": keep(3, 4, tokens=4),
        "encoder_hidden_states_t5": given(2, 4, 8, seed=1),
        "text_embedding_mask_t5": keep(4, 2, tokens=4),
        "image_meta_size": torch.tensor([[1024.0, 1024, 64, 64, 0, 0]] * 2),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (given(16, 8, seed=2).cos(), given(16, 8, seed=2).sin()),
    }


@IMAGE.add(
    "SanaTransformer2DModel",
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=8,
    sample_size=8,
    guidance_embeds=True,
)
def sana(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "encoder_hidden_states": given(2, 5, 8),
        "encoder_attention_mask": keep(3, 5, tokens=5),
        "guidance": torch.full((2,), 0.45),
        "timestep": clock(step, 2) / 1000,
    }


@IMAGE.add(
    "LuminaNextDiT2DModel",
    sample_size=8,
    in_channels=4,
    hidden_size=24,
    num_layers=3,
    num_attention_heads=3,
    num_kv_heads=1,
    multiple_of=16,
    learn_sigma=False,
    cross_attention_dim=16,
)
def lumina_next(model: nn.Module, step: int) -> dict:
    angles = given(8, 8, 4, seed=1)
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "timestep": 1 - clock(step, 2) / 1000,
        "encoder_hidden_states": given(2, 5, 16),
        "encoder_mask": keep(3, 5, tokens=5),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


@IMAGE.add(
    "Lumina2Transformer2DModel",
    sample_size=8,
    in_channels=4,
    hidden_size=24,
    num_layers=3,
    num_refiner_layers=2,
    num_attention_heads=3,
    num_kv_heads=1,
    multiple_of=2,
    axes_dim_rope=(4, 2, 2),
    axes_lens=(64, 32, 32),
    cap_feat_dim=16,
)
def lumina2(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "timestep": 1 - clock(step, 2) / 1000,
        "encoder_hidden_states": given(2, 6, 16),
        "encoder_attention_mask": keep(4, 6, tokens=6).bool(),
    }


@IMAGE.add(
    "ZImageTransformer2DModel",
    note="lists of samples in and out",
    in_channels=4,
    dim=32,
    n_layers=3,
    n_refiner_layers=2,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=16,
    axes_dims=[8, 4, 4],
    axes_lens=[256, 32, 32],
)
def z_image(model: nn.Module, step: int) -> dict:
    return {
        "x": list(noise(step, 2, 4, 1, 8, 8)),
        "t": (1000 - clock(step, 2)) / 1000,
        "cap_feats": [given(5, 16), given(7, 16, seed=1)],
    }


@IMAGE.add(
    "BriaFibo2Transformer2DModel",
    in_channels=4,
    dim=32,
    n_layers=4,
    n_refiner_layers=2,
    n_heads=2,
    cap_feat_dim=16,
    injection_layer_ids=(1, 2),
    perceiver_num_layers=2,
    min_num_gist_tokens=4,
    max_num_gist_tokens=8,
    gist_step=2,
    gist_min_text_len=4,
    gist_max_text_len=16,
    axes_dims=(8, 4, 4),
    axes_lens=(64, 32, 32),
)
def bria_fibo2(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "timestep": clock(step, 2) / 1000,
        "encoder_hidden_states": given(2, 3, 9, 16),
        "encoder_attention_mask": keep(5, 9, tokens=9).bool(),
    }


@IMAGE.add(
    "PRXTransformer2DModel",
    in_channels=4,
    patch_size=2,
    context_in_dim=16,
    hidden_size=32,
    num_heads=2,
    depth=3,
    axes_dim=[8, 8],
)
def prx(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "timestep": clock(step, 2) / 1000,
        "encoder_hidden_states": given(2, 5, 16),
        "attention_mask": keep(3, 5, tokens=5).bool(),
    }


@IMAGE.add(
    "ErnieImageTransformer2DModel",
    hidden_size=32,
    num_attention_heads=2,
    num_layers=3,
    ffn_hidden_size=32,
    in_channels=4,
    out_channels=4,
    patch_size=1,
    text_in_dim=16,
    rope_axes_dim=(8, 4, 4),
)
def ernie_image(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 4, 4),
        "timestep": clock(step, 2),
        "text_bth": given(2, 5, 16),
        "text_lens": torch.tensor([3, 5]),
    }


@IMAGE.add(
    "OmniGenTransformer2DModel",
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=32,
    num_layers=3,
    pad_token_id=0,
    vocab_size=50,
    in_channels=4,
    time_step_dim=4,
    rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
)
def omnigen(model: nn.Module, step: int) -> dict:
    tokens = 6 + 1 + 16
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "timestep": 1 - clock(step, 2) / 1000,
        "input_ids": torch.arange(12).reshape(2, 6),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(2, tokens, tokens),
        "position_ids": torch.arange(tokens).expand(2, -1),
    }


@IMAGE.add(
    "Ideogram4Transformer2DModel",
    in_channels=16,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    intermediate_size=32,
    adaln_dim=16,
    llm_features_dim=24,
    rope_theta=10_000,
    mrope_section=(2, 1, 1),
)
def ideogram4(model: nn.Module, step: int) -> dict:
    from diffusers.models.transformers import transformer_ideogram4 as source

    text, image = 4, 9
    positions = torch.zeros(1, text + image, 3, dtype=torch.long)
    positions[0, :text] = torch.arange(text)[:, None]
    positions[0, text:, 1:] = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    positions[0, text:] += source.IMAGE_POSITION_OFFSET
    indicator = torch.full((1, text + image), source.OUTPUT_IMAGE_INDICATOR)
    indicator[:, :text] = source.LLM_TOKEN_INDICATOR
    return {
        "hidden_states": torch.cat([torch.zeros(1, text, 16), noise(step, 1, image, 16)], 1),
        "encoder_hidden_states": torch.cat([given(1, text, 24), torch.zeros(1, image, 24)], 1),
        "timestep": 1 - clock(step, 1) / 1000,
        "position_ids": positions,
        "segment_ids": torch.ones(1, text + image, dtype=torch.long),
        "indicator": indicator,
    }


@IMAGE.add(
    "Krea2Transformer2DModel",
    in_channels=16,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    timestep_embed_dim=8,
    text_hidden_dim=16,
    num_text_layers=3,
    text_num_attention_heads=2,
    text_num_key_value_heads=1,
    text_intermediate_size=16,
    num_layerwise_text_blocks=2,
    num_refiner_text_blocks=2,
    axes_dims_rope=(4, 2, 2),
)
def krea2(model: nn.Module, step: int) -> dict:
    positions = torch.zeros(4 + 9, 3)
    positions[4:, 1:] = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    return {
        "hidden_states": noise(step, 1, 9, 16),
        "encoder_hidden_states": given(1, 4, 3, 16),
        "timestep": clock(step, 1) / 1000,
        "position_ids": positions,
        "encoder_attention_mask": keep(3, tokens=4).bool(),
    }
