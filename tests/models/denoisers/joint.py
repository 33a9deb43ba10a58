"""Denoisers of images with an image and a text stream through their blocks."""

from __future__ import annotations

import torch
from torch import nn

from tests.models.denoisers.making import Family, clock, given, grid, keep, noise

JOINT = Family()


def ids(axes: int, text: int = 5, rows: int = 3, columns: int = 3) -> dict:
    """Positions of image and text tokens over `axes` axes; rows and columns are the second and third axis."""
    image = torch.zeros(rows * columns, axes)
    image[:, 1:3] = grid(rows, columns)
    return {"img_ids": image, "txt_ids": torch.zeros(text, axes)}


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
}


def flux_call(step: int) -> dict:
    """What Flux and the models made after it share: packed latents and t/1000."""
    return {
        "hidden_states": noise(step, 2, 9, 4),
        "encoder_hidden_states": given(2, 5, 16),
        "timestep": clock(step, 2) / 1000,
        **ids(3),
    }


@JOINT.add("FluxTransformer2DModel", **FLUX, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
def flux(model: nn.Module, step: int) -> dict:
    return flux_call(step) | {"pooled_projections": given(2, 8, seed=1), "guidance": torch.full((2,), 3.5)}


@JOINT.add("Flux2Transformer2DModel", **FLUX, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4))
def flux2(model: nn.Module, step: int) -> dict:
    positions = {name: value.expand(2, -1, -1) for name, value in ids(4).items()}
    return flux_call(step) | positions | {"guidance": torch.full((2,), 4.0)}


@JOINT.add(
    "Flux3Transformer2DModel",
    note="image and text blocks apart, in a ModuleDict of lists and a list, before the joint ones",
    **{name: value for name, value in FLUX.items() if name != "patch_size"},
    cond_in_channels=4,
    timestep_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
def flux3(model: nn.Module, step: int) -> dict:
    return flux_call(step) | ids(4)


@JOINT.add(
    "ChromaTransformer2DModel",
    **FLUX,
    axes_dims_rope=(4, 4, 8),
    approximator_num_channels=8,
    approximator_hidden_dim=16,
    approximator_layers=2,
)
def chroma(model: nn.Module, step: int) -> dict:
    mask = torch.cat([keep(3, 5, tokens=5), torch.ones(2, 9, dtype=torch.long)], 1).bool()
    return flux_call(step) | {"attention_mask": mask}


@JOINT.add("BriaTransformer2DModel", **FLUX, pooled_projection_dim=None, axes_dims_rope=(0, 8, 8))
def bria(model: nn.Module, step: int) -> dict:
    return flux_call(step) | {"timestep": clock(step, 2)}


@JOINT.add(
    "BriaFiboTransformer2DModel",
    note="each block replaces half of the text stream by another text layer",
    **FLUX | {"joint_attention_dim": 32},
    text_encoder_dim=16,
    pooled_projection_dim=None,
    axes_dims_rope=(0, 8, 8),
)
def bria_fibo(model: nn.Module, step: int) -> dict:
    text = {
        "encoder_hidden_states": given(2, 5, 32),
        "text_encoder_layers": [given(2, 5, 16, seed=1 + layer) for layer in range(4)],
    }
    return flux_call(step) | text | {"timestep": clock(step, 2)}


@JOINT.add("LongCatImageTransformer2DModel", **FLUX, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8))
def longcat_image(model: nn.Module, step: int) -> dict:
    return flux_call(step)


@JOINT.add("OvisImageTransformer2DModel", **FLUX, out_channels=4, axes_dims_rope=(4, 4, 8))
def ovis_image(model: nn.Module, step: int) -> dict:
    return flux_call(step)


@JOINT.add(
    "AuraFlowTransformer2DModel",
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_mmdit_layers=2,
    num_single_dit_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    caption_projection_dim=16,
    joint_attention_dim=12,
    pos_embed_max_size=16,
)
def aura_flow(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "encoder_hidden_states": given(2, 5, 12),
        "timestep": clock(step, 2) / 1000,
    }


@JOINT.add(
    "SD3Transformer2DModel",
    note="two attentions in the first block, the last is context_pre_only",
    sample_size=8,
    in_channels=4,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=2,
    caption_projection_dim=16,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    out_channels=4,
    pos_embed_max_size=8,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
def sd3(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "encoder_hidden_states": given(2, 5, 12),
        "pooled_projections": given(2, 10, seed=1),
        "timestep": clock(step, 2),
    }


@JOINT.add(
    "QwenImageTransformer2DModel",
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    axes_dims_rope=(8, 4, 4),
)
def qwen_image(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 9, 16),
        "encoder_hidden_states": given(2, 5, 16),
        "encoder_hidden_states_mask": keep(3, 5, tokens=5),
        "timestep": clock(step, 2) / 1000,
        "img_shapes": [[(1, 3, 3)]] * 2,
    }


@JOINT.add(
    "QwenImage21Transformer2DModel",
    note="one stream of text and image; without its prefix cache",
    in_channels=8,
    out_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    context_in_dim=16,
    axes_dims_rope=(8, 4, 4),
)
def qwen_image21(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 1, 16, 8),
        "encoder_hidden_states": given(1, 5, 16),
        "encoder_hidden_states_mask": keep(4, tokens=5).bool(),
        "timestep": clock(step, 1) / 1000,
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.cat([torch.zeros(1, 5, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)], 1),
    }


@JOINT.add(
    "NucleusMoEImageTransformer2DModel",
    note="experts in every block",
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    axes_dims_rope=(8, 4, 4),
    dense_moe_strategy="all_moe",
    num_experts=4,
    moe_intermediate_dim=16,
    capacity_factors=[4.0, 4.0, 4.0],
)
def nucleus_moe(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 9, 16),
        "encoder_hidden_states": given(2, 5, 16),
        "encoder_hidden_states_mask": keep(3, 5, tokens=5),
        "timestep": clock(step, 2) / 1000,
        "img_shapes": [(1, 3, 3)] * 2,
    }


@JOINT.add(
    "HiDreamImageTransformer2DModel",
    note="experts; each block gets a text state of its own beside the stream",
    in_channels=4,
    out_channels=4,
    patch_size=2,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    caption_channels=[8, 4],
    text_emb_dim=8,
    num_routed_experts=2,
    num_activated_experts=2,
    axes_dims_rope=(4, 2, 2),
    max_resolution=(8, 8),
    llama_layers=(0, 1, 2, 3),
    force_inference_output=True,
)
def hidream(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "timesteps": clock(step, 2),
        "encoder_hidden_states_t5": given(2, 5, 8),
        "encoder_hidden_states_llama3": given(4, 2, 5, 4, seed=1),
        "pooled_embeds": given(2, 8, seed=2),
    }


@JOINT.add(
    "HunyuanImageTransformer2DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=2,
    mlp_ratio=2.0,
    guidance_embeds=True,
    text_embed_dim=12,
    text_embed_2_dim=10,
    rope_axes_dim=(4, 4),
)
def hunyuan_image(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 4, 4),
        "timestep": clock(step, 2),
        "encoder_hidden_states": given(2, 5, 12),
        "encoder_attention_mask": keep(3, 5, tokens=5),
        "encoder_hidden_states_2": given(2, 4, 10, seed=1),
        "encoder_attention_mask_2": keep(2, 4, tokens=4),
        "guidance": torch.full((2,), 3500.0),
    }


COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 4,
}


def cogview_call(step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 8, 8),
        "encoder_hidden_states": given(2, 5, 8),
        "timestep": clock(step, 2),
        "original_size": torch.full((2, 2), 64.0),
        "target_size": torch.full((2, 2), 64.0),
        "crop_coords": torch.zeros(2, 2),
    }


@JOINT.add("CogView3PlusTransformer2DModel", **COGVIEW, pos_embed_max_size=8, sample_size=8)
def cogview3_plus(model: nn.Module, step: int) -> dict:
    return cogview_call(step)


@JOINT.add("CogView4Transformer2DModel", **COGVIEW)
def cogview4(model: nn.Module, step: int) -> dict:
    return cogview_call(step)


@JOINT.add("GlmImageTransformer2DModel", **COGVIEW, prior_vq_quantizer_codebook_size=16)
def glm_image(model: nn.Module, step: int) -> dict:
    arguments = {name: value for name, value in cogview_call(step).items() if name != "original_size"}
    prior = {
        "prior_token_id": torch.arange(32).reshape(2, 16) % 16,
        "prior_token_drop": torch.tensor([[True], [False]]).expand(2, 16),
    }
    return arguments | prior | {"timestep": clock(step, 2) - 1}


JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 3,
    "rope_dim_list": [4, 6, 6],
    "theta": 256,
}


@JOINT.add("JoyImageEditTransformer3DModel", **JOY)
def joy_image_edit(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 2, 4, 1, 6, 6),
        "encoder_hidden_states": given(2, 5, 16),
        "timestep": clock(step, 2),
    }


@JOINT.add("JoyImageEditPlusTransformer3DModel", **JOY)
def joy_image_edit_plus(model: nn.Module, step: int) -> dict:
    return {
        "hidden_states": noise(step, 1, 8, 4, 1, 2, 2),
        "encoder_hidden_states": given(1, 5, 16),
        "timestep": clock(step, 1),
        "shape_list": [[(1, 2, 2), (1, 2, 2)]],
    }
