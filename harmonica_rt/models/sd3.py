"""Stable Diffusion 3 (Esser et al., 2403.03206) as diffusers builds it: joint attention over text and image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from .base import DiffusersModule, Inputs, Macs, Shape
from .branch import Branch
from .joint import JointAdapter, expect_plain_norms, fill_pair, fill_rows, joint_block
from .parts import (
    PatchAdapter,
    Patches,
    expect_dtype,
    expect_parts,
    expect_shape,
    expect_tokens,
    macs_a_row,
    read_sample,
    refuse,
)
from .refusals import UnsupportedModelError
from .stages import Held

UNREAD = ("joint_attention_kwargs", "block_controlnet_hidden_states", "skip_layers")
ROWS, TEXT_TOKENS = 12, 333  # of a block: image's six and text's, the last one's being two; of CLIP and T5


class SD3Adapter(JointAdapter, PatchAdapter):
    """Adapter of ``SD3Transformer2DModel``: 3 medium, 3.5 large. The stream is [text, image]."""

    model_class = "SD3Transformer2DModel"
    branches = ("attn", "mlp")
    end_launches = 8  # patches, positions cut and added, both segments as one; image alone, projected, unpatchify

    def __init__(self, model: DiffusersModule) -> None:
        self.model, self.config, self.blocks = model, model.config, model.transformer_blocks
        self.layers, self.width = len(self.blocks), model.inner_dim
        self.in_channels, self.out_channels = self.config.in_channels, model.out_channels
        self.rows = ROWS * self.layers - 4 + 2
        expect_parts(model, {"": SD3Transformer2DModel, "norm_out": AdaLayerNormContinuous})
        self.patches, self.head = Patches(model), model.proj_out
        for number, block in enumerate(self.blocks):
            name = f"transformer_blocks.{number}"
            if getattr(block, "attn2", None) is not None:
                raise UnsupportedModelError(f"{name}: expected one attention, got two of one norm (SD3.5 medium)")
            context = AdaLayerNormContinuous if number == self.layers - 1 else AdaLayerNormZero
            expect_parts(block, {"": JointTransformerBlock, "norm1": AdaLayerNormZero, "norm1_context": context}, name)
        expect_plain_norms(model)

    # ---- branches

    def layer(self, number: int, join: bool) -> list[Branch]:
        block, row = self.blocks[number], ROWS * number
        eps = block.norm1.norm.eps, block.norm2.eps
        rows = [(row + 6 + which, row + which) for which in range(6)]
        if not block.context_pre_only:
            return joint_block(block.attn, (block.ff_context, block.ff), rows, eps, self.width)
        # Nothing reads the text after this attention: its rows end there, and what is added to it is of no account
        rows[2:] = [(image, image) for _, image in rows[2:]]
        return joint_block(block.attn, (nn.Identity(), block.ff), rows, eps, self.width)

    # ---- modulation

    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        (_, pooled), (count, batch) = conditioning, out.shape[:2]
        times = timesteps.repeat_interleave(batch)
        embedded = F.silu(self.model.time_text_embed(times, pooled.repeat(count, 1)))
        layers = [norm.linear for block in self.blocks for norm in (block.norm1, block.norm1_context)]
        fill_rows(layers[:-1], embedded, out)
        fill_pair(layers[-1], embedded, out[:, :, -4:-2])
        fill_pair(self.model.norm_out.linear, embedded, out[:, :, -2:])

    # ---- both ends

    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        refuse(arguments, UNREAD, "level 'blocks' takes it")
        sample, text = read_sample(arguments, self.in_channels), arguments["encoder_hidden_states"]
        batch, pooled = len(sample), arguments["pooled_projections"]
        text = expect_tokens("encoder_hidden_states", text, self.config.joint_attention_dim, batch)
        pooled = expect_shape("pooled_projections", pooled, (batch, self.config.pooled_projection_dim))
        expect_dtype(sample, encoder_hidden_states=text, pooled_projections=pooled)
        timestep = expect_shape("timestep", arguments["timestep"], (batch,))
        return Inputs(sample, timestep, (text, pooled), arguments["return_dict"])

    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        return dict(zip(("encoder_hidden_states", "pooled_projections"), conditioning))

    def stream(self, shape: Shape) -> tuple[int, int]:
        return shape.context, shape.context + self.tokens(*shape.sample[2:])

    def embed(self, sample: Tensor, held: Held | None = None, out: Tensor | None = None) -> Tensor:
        assert held is not None, "the text is held"
        image = self.patches.embed(sample, None).to(sample.dtype)  # positions may be kept in fp32
        return torch.cat([held["text"], image], dim=1, out=out)

    def finish(self, y: Tensor, sample: tuple[int, ...]) -> Tensor:
        return super().finish(y[:, y.shape[1] - self.tokens(*sample[2:]) :], sample)

    # ---- counting

    def macs(self, height: int | None, width: int | None, batch: int, context: int | None = None) -> Macs:
        text, d = TEXT_TOKENS if context is None else context, self.width
        image, hidden = self.tokens(height, width), self.blocks[0].ff.net[0].proj.out_features
        ends = image * d * self.patches.size**2 * (self.in_channels + self.out_channels)
        rows = macs_a_row(self.model.time_text_embed) + self.rows * d * d
        attn, mlp = self.branch_macs(batch, text + image, text)
        unread = batch * text * d / self.layers  # the last block projects no text, and feeds none forward
        fixed = batch * (ends + rows + text * d * self.config.joint_attention_dim)
        return Macs((attn - unread * d, mlp - unread * 2 * hidden), fixed)
