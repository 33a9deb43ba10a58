"""Small pipelines whose denoiser is ``pipe.unet``: two UNets, and UniDiffuser's U-ViT."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniDiffuserModel,
    UniDiffuserPipeline,
    UniDiffuserTextDecoder,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from .parts import (
    LARGE,
    NO_TEXT,
    NO_TEXT_2,
    POOLED,
    SIZE,
    TEXT,
    Made,
    cutoff,
    filled,
    one_batch,
    pooled,
    quiet,
    text,
    tiny_vae,
)


def unet(**more: Any) -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT,
        norm_num_groups=4,
        attention_head_dim=4,
        **more,
    )
    return filled(model)


def sd() -> DiffusionPipeline:
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return quiet(StableDiffusionPipeline(vae=None, unet=unet(), scheduler=scheduler, **NO_TEXT, **unchecked))


def sdxl() -> DiffusionPipeline:
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + POOLED}
    model = unet(addition_embed_type="text_time", **sizes)
    scheduler = EulerDiscreteScheduler()
    return quiet(StableDiffusionXLPipeline(None, unet=model, scheduler=scheduler, add_watermarker=False, **NO_TEXT_2))


def unidiffuser() -> UniDiffuserPipeline:
    model = UniDiffuserModel(
        text_dim=8,
        clip_img_dim=POOLED,
        num_text_tokens=5,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        use_data_type_embedding=True,
    )
    small = {"intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokens = {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
    words = CLIPTextConfig(hidden_size=TEXT, max_position_embeddings=5, pad_token_id=1, **small, **tokens)
    pictures = CLIPVisionConfig(hidden_size=8, image_size=8, patch_size=4, projection_dim=POOLED, **small)
    decoder = {"prefix_inner_dim": TEXT, "prefix_hidden_dim": 8, "n_positions": 8, "n_embd": 8, "n_layer": 1}
    pipe = UniDiffuserPipeline(
        vae=tiny_vae(4),
        text_encoder=CLIPTextModel(words).eval(),
        image_encoder=CLIPVisionModelWithProjection(pictures).eval(),
        clip_image_processor=None,
        clip_tokenizer=None,
        text_decoder=filled(UniDiffuserTextDecoder(prefix_length=5, vocab_size=8, n_head=2, **decoder)),
        text_tokenizer=None,
        unet=filled(model),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_text_to_image_mode()
    return quiet(pipe)


def unidiffuser_joint() -> UniDiffuserPipeline:
    """Text is left as latents."""
    pipe = unidiffuser()
    pipe.set_joint_mode()
    pipe.decode_text_latents = lambda latents, device: latents
    return pipe


_UNET = {"denoiser": lambda step: "unet"}
_LISTS = ("transformer_in_blocks", "transformer_mid_block", "transformer_out_blocks")
_U_VIT = {**_UNET, "streams": {f"transformer.{name}": ("hidden_states",) for name in _LISTS}, "skips": True}

UNETS = {
    "sd": Made(sd, lambda: text(**LARGE), one_batch, **_UNET),
    "sd, guidance cut off": Made(sd, lambda: text(**cutoff(SDCFGCutoffCallback), **LARGE), one_batch, kept=1, **_UNET),
    "sdxl, guidance cut off": Made(
        sdxl, lambda: pooled(**cutoff(SDXLCFGCutoffCallback), **LARGE), one_batch, kept=1, **_UNET
    ),
    "sdxl": Made(sdxl, lambda: pooled(**LARGE), one_batch, **_UNET),
    "unidiffuser": Made(unidiffuser, lambda: text(**SIZE), lambda step: ("cond", "without text"), **_U_VIT),
    "unidiffuser, joint": Made(
        unidiffuser_joint, lambda: SIZE, lambda step: ("cond", "without image", "without text"), **_U_VIT
    ),
}
