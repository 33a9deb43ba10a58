"""Small text-to-video pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from .parts import (
    NO_TEXT,
    NO_TEXT_2,
    POOLED,
    TEXT,
    Made,
    filled,
    in_turn,
    masked,
    noise,
    one_batch,
    pooled,
    quiet,
    shifting,
    text,
)

IMAGE = 10  # width of an image's states
CLIP = {"height": 32, "width": 32, "num_frames": 9}
VIDEO = ("hidden_states",)
VIDEO_TEXT = ("hidden_states", "encoder_hidden_states")


def wan_transformer(seed: int, **config: int) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=config.pop("in_channels", 4),
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        **config,
    )
    return filled(model, seed)


def wan_2_1() -> DiffusionPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return quiet(WanPipeline(vae=None, scheduler=scheduler, transformer=wan_transformer(0), **NO_TEXT))


def wan_image_to_video() -> DiffusionPipeline:
    """Latents, a mask of 4 frames a latent's, and the first frame's latents; the image read beside the text."""
    transformer = wan_transformer(0, in_channels=12, image_dim=IMAGE, added_kv_proj_dim=24)
    vae = filled(AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    parts = wan_2_1().components | {"transformer": transformer, "vae": vae}
    parts |= {"image_encoder": None, "image_processor": None}
    pipe = WanImageToVideoPipeline(**parts)
    pipe.encode_image = lambda image, device: noise(1, 7, IMAGE, seed=4)  # the pipeline takes no states beside an image
    return quiet(pipe)


def wan_2_2() -> DiffusionPipeline:
    """The second denoiser from step 3 on."""
    parts = wan_2_1().components | {"transformer_2": wan_transformer(1), "boundary_ratio": 0.8}
    return quiet(WanPipeline(**parts))


def ltx() -> DiffusionPipeline:
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=TEXT,
    )
    return quiet(LTXPipeline(scheduler=shifting(), vae=None, transformer=filled(model), **NO_TEXT))


def hunyuan() -> DiffusionPipeline:
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=True,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return quiet(HunyuanVideoPipeline(transformer=filled(model), vae=None, scheduler=scheduler, **NO_TEXT_2))


def cogvideox() -> DiffusionPipeline:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=TEXT,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=5,
    )
    scheduler = CogVideoXDDIMScheduler()
    return quiet(CogVideoXPipeline(vae=None, transformer=filled(model), scheduler=scheduler, **NO_TEXT))


VIDEOS = {
    "wan 2.1": Made(wan_2_1, lambda: text(**CLIP), in_turn, named=True, streams={"blocks": VIDEO}),
    "wan 2.1, image to video": Made(
        wan_image_to_video,
        lambda: {
            "image": torch.zeros(1, 3, 32, 32),
            "prompt_embeds": noise(1, 512, TEXT),
            "negative_prompt_embeds": noise(1, 512, TEXT, seed=2),
            **CLIP,
        },
        in_turn,
        named=True,
        streams={"blocks": VIDEO},
    ),
    "wan 2.2": Made(
        wan_2_2,
        lambda: text(guidance_scale_2=3.0, **CLIP),
        in_turn,
        named=True,
        denoiser=lambda step: "transformer" if step < 3 else "transformer_2",
        streams={"blocks": VIDEO},
    ),
    "ltx": Made(
        ltx,
        lambda: masked(height=64, width=64, num_frames=9),
        one_batch,
        named=True,
        streams={"transformer_blocks": VIDEO},
    ),
    "hunyuan": Made(
        hunyuan,
        lambda: masked() | pooled(true_cfg_scale=3.0, **CLIP),
        in_turn,
        named=True,
        streams={"transformer_blocks": VIDEO_TEXT, "single_transformer_blocks": VIDEO_TEXT},
    ),
    "cogvideox": Made(
        cogvideox, lambda: text(**CLIP), one_batch, named=True, streams={"transformer_blocks": VIDEO_TEXT}
    ),
}
