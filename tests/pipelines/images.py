"""Small text-to-image pipelines with transformers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from PIL import Image

from ..conftest import make_pixart
from .parts import (
    LARGE,
    NO_TEXT,
    NO_TEXT_2,
    NO_TEXT_3,
    POOLED,
    SIZE,
    TEXT,
    Made,
    cutoff,
    filled,
    in_turn,
    left_half,
    masked,
    noise,
    one_batch,
    picture,
    pooled,
    quiet,
    shifting,
    text,
    tiny_vae,
)

TEXT_IMAGE = ("encoder_hidden_states", "hidden_states")
IMAGE = ("hidden_states",)
STRENGTH = 0.6  # of 6 steps the first two are left out
_FLUX = {"patch_size": 1, "in_channels": 4, "attention_head_dim": 16, "num_attention_heads": 2}
_FLUX |= {"joint_attention_dim": TEXT, "axes_dims_rope": [4, 4, 8]}
_FLUX_1 = _FLUX | {"pooled_projection_dim": POOLED, "guidance_embeds": True}


def flux(kind: type = FluxPipeline, **more: Any) -> DiffusionPipeline:
    model = filled(FluxTransformer2DModel(num_layers=2, num_single_layers=2, **_FLUX_1))
    return quiet(kind(scheduler=shifting(), vae=tiny_vae(1), transformer=model, **NO_TEXT_2, **more))


def flux_controlled() -> DiffusionPipeline:
    controlnet = filled(FluxControlNetModel(num_layers=1, num_single_layers=1, **_FLUX_1), seed=1)
    return flux(FluxControlNetPipeline, controlnet=controlnet)


def flux_2(kind: type = Flux2Pipeline) -> DiffusionPipeline:
    config = _FLUX | {"axes_dims_rope": [4, 4, 4, 4], "timestep_guidance_channels": 16}
    config |= {"guidance_embeds": kind is Flux2Pipeline}
    model = filled(Flux2Transformer2DModel(num_layers=2, num_single_layers=2, **config))
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = filled(AutoencoderKLFlux2(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, **blocks))
    return quiet(kind(scheduler=shifting(), vae=vae, transformer=model, **NO_TEXT))


def sd3(kind: type = StableDiffusion3Pipeline, channels: int = 4, dual: tuple[int, ...] = (0,)) -> DiffusionPipeline:
    """Its first block has dual attention, its last no text stream."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=5,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(kind(transformer=filled(model), scheduler=scheduler, vae=tiny_vae(channels), **NO_TEXT_3))


def with_skipped(step: int) -> tuple[str, ...]:
    return ("cond_uncond", "skipped") if 1 <= step <= 4 else ("cond_uncond",)


def qwen(kind: type = QwenImagePipeline, **more: Any) -> DiffusionPipeline:
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return quiet(kind(scheduler=shifting(), vae=filled(vae), transformer=filled(model), **NO_TEXT, **more))


def small_picture() -> AbstractContextManager[Any]:
    """The pipeline brings what it edits to a megapixel; here to 32 x 32."""
    name = f"{QwenImageEditPipeline.__module__}.calculate_dimensions"
    return mock.patch(name, return_value=(32, 32, None))


def z_image() -> DiffusionPipeline:
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(ZImagePipeline(scheduler=scheduler, vae=None, transformer=filled(model), **NO_TEXT))


def lists_of_text(**more: Any) -> dict[str, Any]:
    return {"prompt_embeds": [noise(5, TEXT)], "negative_prompt_embeds": [noise(3, TEXT, seed=2)], **LARGE, **more}


def sana() -> DiffusionPipeline:
    model = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
        sample_size=8,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return quiet(SanaPipeline(vae=None, transformer=filled(model), scheduler=scheduler, **NO_TEXT))


def chroma() -> DiffusionPipeline:
    sizes = {"approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 16}
    model = filled(ChromaTransformer2DModel(num_layers=2, num_single_layers=2, **_FLUX, **sizes))
    return quiet(ChromaPipeline(scheduler=shifting(), vae=None, transformer=model, **NO_TEXT))


def lumina_2() -> DiffusionPipeline:
    model = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 32, 32),
        cap_feat_dim=TEXT,
    )
    return quiet(Lumina2Pipeline(transformer=filled(model), scheduler=shifting(), vae=None, **NO_TEXT))


def pixart() -> DiffusionPipeline:
    model = make_pixart(patch_size=2)
    return quiet(PixArtSigmaPipeline(vae=None, transformer=model, scheduler=DPMSolverMultistepScheduler(), **NO_TEXT))


_IN_PAIRS = {"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": TEXT_IMAGE}
_IN_ONE = {"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": IMAGE}
_JOINT = {"transformer_blocks": TEXT_IMAGE}
_ONE = {"transformer_blocks": IMAGE}
_Z_IMAGE = {"noise_refiner": ("x",), "context_refiner": ("x",), "layers": ("x",)}
_LUMINA_2 = {"context_refiner": IMAGE, "noise_refiner": IMAGE, "layers": IMAGE}
_QWEN = {"true_cfg_scale": 3.0, **LARGE}
_NO_BINS = {"negative_prompt": None, "use_resolution_binning": False}

IMAGES = {
    "flux": Made(flux, lambda: pooled(**SIZE), named=True, streams=_IN_PAIRS),
    "flux, true CFG": Made(flux, lambda: pooled(true_cfg_scale=3.0, **SIZE), in_turn, named=True, streams=_IN_PAIRS),
    "flux, image to image": Made(
        lambda: flux(FluxImg2ImgPipeline),
        lambda: pooled(strength=STRENGTH, image=picture(), **SIZE),
        first=2,
        streams=_IN_PAIRS,
    ),
    "flux, inpainting": Made(
        lambda: flux(FluxInpaintPipeline),
        lambda: pooled(strength=STRENGTH, image=picture(), mask_image=left_half(), **SIZE),
        first=2,
        streams=_IN_PAIRS,
    ),
    "flux, ControlNet": Made(
        flux_controlled,
        lambda: pooled(control_image=picture(), controlnet_conditioning_scale=0.5, control_guidance_end=0.5, **SIZE),
        streams=_IN_PAIRS,
    ),
    "flux.2": Made(flux_2, lambda: {"prompt_embeds": noise(1, 5, TEXT), **SIZE}, streams=_IN_ONE),
    "flux.2 klein": Made(
        lambda: flux_2(Flux2KleinPipeline), lambda: text(**SIZE), in_turn, named=True, streams=_IN_ONE
    ),
    "sd3": Made(sd3, lambda: pooled(**SIZE), one_batch, streams=_JOINT),
    "sd3 without dual attention": Made(lambda: sd3(dual=()), lambda: pooled(**SIZE), one_batch, streams=_JOINT),
    "sd3, skipped layers": Made(
        sd3,
        lambda: pooled(skip_guidance_layers=[1], skip_layer_guidance_stop=0.8, **SIZE),
        with_skipped,
        streams=_JOINT,
    ),
    "sd3, guidance cut off": Made(
        sd3, lambda: pooled(**cutoff(SD3CFGCutoffCallback), **SIZE), one_batch, streams=_JOINT, kept=1
    ),
    "sd3, image to image": Made(
        lambda: sd3(StableDiffusion3Img2ImgPipeline),
        lambda: pooled(strength=STRENGTH, image=picture(), **SIZE),
        one_batch,
        first=2,
        streams=_JOINT,
    ),
    "sd3, inpainting": Made(
        lambda: sd3(StableDiffusion3InpaintPipeline, channels=16),
        lambda: pooled(strength=STRENGTH, image=picture(), mask_image=left_half(), **SIZE),
        one_batch,
        first=2,
        streams=_JOINT,
    ),
    "qwen": Made(qwen, lambda: masked("prompt_embeds_mask", **_QWEN), in_turn, named=True, streams=_JOINT),
    "qwen, edit": Made(
        lambda: qwen(QwenImageEditPipeline, processor=None),
        lambda: masked("prompt_embeds_mask", image=Image.new("RGB", (32, 32), "teal"), **_QWEN),
        in_turn,
        named=True,
        streams=_JOINT,
        around=small_picture,
    ),
    "z-image": Made(z_image, lists_of_text, one_batch, streams=_Z_IMAGE),
    "z-image, guidance cut off": Made(
        z_image, lambda: lists_of_text(cfg_truncation=0.2), one_batch, streams=_Z_IMAGE, kept=0
    ),
    "sana": Made(sana, lambda: masked(height=256, width=256, **_NO_BINS), one_batch, streams=_ONE),
    "chroma": Made(chroma, lambda: masked(dtype=torch.bool, **LARGE), in_turn, streams=_IN_ONE),
    "lumina2": Made(lumina_2, lambda: masked(**LARGE), in_turn, streams=_LUMINA_2),
    "lumina2, guidance cut off": Made(
        lumina_2,
        lambda: masked(cfg_trunc_ratio=0.5, **LARGE),
        lambda step: in_turn(step) if step < 3 else ("cond",),
        streams=_LUMINA_2,
    ),
    "pixart": Made(pixart, lambda: masked(width=64, height=64) | text(POOLED) | _NO_BINS, one_batch, streams=_ONE),
}
