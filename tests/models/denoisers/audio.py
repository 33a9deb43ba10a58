"""Denoisers of sound and of molecules."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.denoisers.making import Family, clock, given, keep, noise

AUDIO = Family()


@AUDIO.add(
    "AceStepTransformer1DModel",
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    in_channels=12,
    audio_acoustic_hidden_dim=4,
    patch_size=2,
    sliding_window=4,
)
def ace_step(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 8, 4),
        "timestep": clock(step, 2) / 1000,
        "timestep_r": clock(step, 2) / 1000,
        "encoder_hidden_states": given(2, 5, 32),
        "context_latents": given(2, 8, 8, seed=1),
    }


@AUDIO.add(
    "LongCatAudioDiTTransformer", dit_dim=32, dit_depth=3, dit_heads=2, dit_text_dim=16, latent_dim=4, text_conv=False
)
def longcat_audio(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 9, 4),
        "encoder_hidden_states": given(2, 5, 16),
        "encoder_attention_mask": keep(3, 5, tokens=5).bool(),
        "attention_mask": torch.ones(2, 9, dtype=torch.bool),
        "timestep": 1 - clock(step, 2) / 1000,
    }


@AUDIO.add(
    "MiniMaxMusic3Transformer1DModel",
    in_channels=4,
    condition_dim=8,
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    ff_inner_dim=32,
    rotary_dim=4,
    fourier_embedding_dim=8,
)
def minimax_music3(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 12),
        "encoder_hidden_states": given(2, 12, 8),
        "timestep": clock(step, 2) / 1000,
    }


@AUDIO.add(
    "StableAudioDiTModel",
    sample_size=9,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    num_key_value_attention_heads=2,
    cross_attention_dim=16,
    time_proj_dim=8,
    global_states_input_dim=8,
    cross_attention_input_dim=8,
)
def stable_audio(model: nn.Module, step: int) -> dict:
    angles = given(10, 4, seed=2)
    return {
        "hidden_states": noise(step, 2, 4, 9),
        "timestep": clock(step, 1) / 1000,
        "encoder_hidden_states": given(2, 5, 8),
        "global_hidden_states": given(2, 1, 8, seed=1),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


@AUDIO.add(
    "StableAudio3DiTModel",
    io_channels=4,
    embed_dim=32,
    depth=3,
    num_heads=4,
    cond_token_dim=8,
    global_cond_dim=8,
    local_add_cond_dim=5,
    timestep_features_dim=16,
    ff_mult=2,
    num_memory_tokens=3,
)
def stable_audio3(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 9),
        "timestep": clock(step, 2) / 1000,
        "encoder_hidden_states": given(2, 5, 8),
        "global_hidden_states": given(2, 8, seed=1),
    }


@AUDIO.add(
    "T5FilmDecoder",
    note="called by position or keyword, with encodings as a list of pairs; returns a tensor (spectrogram diffusion)",
    input_dims=4,
    targets_length=9,
    d_model=32,
    num_layers=3,
    num_heads=2,
    d_kv=8,
    d_ff=32,
)
def spectrogram(model: nn.Module, step: int) -> dict:
    return {
        "encodings_and_masks": [
            (given(2, 5, 32), keep(3, 5, tokens=5)),
            (given(2, 4, 32, seed=1), keep(4, 4, tokens=4)),
        ],
        "decoder_input_tokens": noise(step, 2, 9, 4),
        "decoder_noise_time": clock(step, 2) / 1000,
    }


@AUDIO.add(
    "RFD4ProteinaTransformer",
    note="two noisy inputs with a time each; pairs of tokens are updated between the blocks",
    nlayers=3,
    token_dim=32,
    nheads=2,
    dim_cond=16,
    pair_repr_dim=8,
    latent_dim=4,
    token_type_emb_dim=4,
    cath_emb_dim=4,
    t_emb_dim=8,
    seq_sep_dim=8,
    xt_pair_dist_dim=6,
    feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
    feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
    feats_pair_repr=("xt_bb_ca_pair_dists",),
    tri_mult_c=8,
    num_sequence_classes=9,
)
def proteina(model: nn.Module, step: int) -> dict:
    inside = keep(6, 9, tokens=9).bool()
    return {
        "bb_ca": noise(step, 2, 9, 3),
        "local_latents": noise(step, 2, 9, 4, seed=1),
        "bb_ca_time": 1 - clock(step, 2) / 1000,
        "local_latents_time": (1 - clock(step, 2) / 1000) ** 2,
        "padding_mask": inside,
        "token_type": torch.arange(18).reshape(2, 9) % 7,
        "conditioning": {"is_in_context_conditioning": ~inside, "supports_local_latent": inside},
    }
