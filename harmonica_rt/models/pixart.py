"""PixArt-alpha (2310.00426) and -Sigma (2403.04692) as diffusers builds them: adaLN-single blocks that read text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings, PixArtAlphaTextProjection
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from .base import DiffusersModule, Inputs, Macs
from .branch import Branch, Norm
from .parts import (
    FEED_FORWARD,
    PatchAdapter,
    Patches,
    check_attention,
    describe,
    expect_parts,
    expect_shape,
    feed_forward,
    linear,
    parameter_uses,
    read_sample,
    scale_from,
    self_attention,
)
from .refusals import UnsupportedModelError, expect_exactly, expect_plain_norm
from .stages import CrossAttention, Held

BLOCK_PARTS: dict[str, type[nn.Module]] = {
    "": BasicTransformerBlock,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
}
MODEL_PARTS: dict[str, type[nn.Module]] = {
    "": PixArtTransformer2DModel,
    "adaln_single": AdaLayerNormSingle,
    "adaln_single.emb": PixArtAlphaCombinedTimestepSizeEmbeddings,
    "adaln_single.linear": nn.Linear,
    "proj_out": nn.Linear,
}
# Rows of a block, in the order its table holds them
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)
DROPPED = -10000.0  # a masked token's score, as diffusers has it
TEXT_TOKENS = 120  # PixArt-alpha's pipeline; Sigma's takes 300


class PixArtAdapter(PatchAdapter):
    """Adapter of ``PixArtTransformer2DModel``.

    Modulation depends on the timestep, and on resolution and aspect ratio where the model takes them; keys and values
    of the text are the same at all steps.
    """

    model_class = "PixArtTransformer2DModel"
    branches = ("attn", "cross_attn", "mlp")
    end_launches = 4  # patch embedding, positions; output projection, unpatchify

    def __init__(self, model: DiffusersModule) -> None:
        self.model = model
        self.config = model.config
        self.blocks = model.transformer_blocks
        self.layers = self.contexts = len(self.blocks)
        self.width = model.inner_dim
        self.in_channels, self.out_channels = self.config.in_channels, model.out_channels
        self.rows = 6 * self.layers + 2
        expect_parts(model, MODEL_PARTS)
        self.sized = model.adaln_single.emb.use_additional_conditions
        self.patches, self.head = Patches(model), model.proj_out
        expect_plain_norm(model.norm_out, "norm_out")
        if model.caption_projection is not None:
            expect_exactly(model.caption_projection, PixArtAlphaTextProjection, "caption_projection")
        if self.config.attention_type != "default":
            raise UnsupportedModelError(f"attention_type: expected 'default', got {self.config.attention_type!r}")
        uses = parameter_uses(model)
        for i, block in enumerate(self.blocks):
            name = f"transformer_blocks.{i}"
            expect_parts(block, BLOCK_PARTS, name)
            for attention in ("attn1", "attn2"):
                check_attention(getattr(block, attention), f"{name}.{attention}", uses)
            expect_parts(block.ff, FEED_FORWARD, f"{name}.ff")

    # ---- weights

    def layer(self, number: int, join: bool) -> list[Branch]:
        block, first = self.blocks[number], 6 * number
        cross = block.attn2
        attn_norm = Norm(first + SHIFT_ATTN, first + SCALE_ATTN, block.norm1.eps)
        mlp_norm = Norm(first + SHIFT_MLP, first + SCALE_MLP, block.norm2.eps)
        reading = (linear(cross.to_q), CrossAttention(cross.heads, context=number), linear(cross.to_out[0]))
        return [
            Branch(self_attention(block.attn1, join), attn_norm, first + GATE_ATTN),
            Branch(reading, norm=None, gate=None),
            Branch(feed_forward(block.ff), mlp_norm, first + GATE_MLP),
        ]

    def head_norm(self) -> Norm:
        return Norm(self.rows - 2, self.rows - 1, self.model.norm_out.eps)

    # ---- modulation and text

    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        single, batch = self.model.adaln_single, out.shape[1]
        time = single.emb.timestep_embedder(single.emb.time_proj(timesteps).to(out.dtype)).unsqueeze(1)
        sizes, _ = self._split(conditioning)
        embedded = time  # [n, batch or 1, D]
        if sizes:
            resolution, aspect_ratio = sizes
            embedded = time + self._embed_size(resolution, aspect_ratio, out.dtype)
        rows = single.linear(F.silu(embedded)).unflatten(-1, (6, self.width)).expand(-1, batch, -1, -1)
        for i, block in enumerate(self.blocks):
            own = out.narrow(2, 6 * i, 6)
            torch.add(rows, block.scale_shift_table, out=own)
            scale_from(block.norm1, own.select(2, SHIFT_ATTN), own.select(2, SCALE_ATTN))
            scale_from(block.norm2, own.select(2, SHIFT_MLP), own.select(2, SCALE_MLP))
        head = out.narrow(2, self.rows - 2, 2)
        torch.add(embedded.unsqueeze(2).expand(-1, batch, -1, -1), self.model.scale_shift_table, out=head)
        head.select(2, 1).add_(1)

    def _embed_size(self, resolution: Tensor, aspect_ratio: Tensor, dtype: torch.dtype) -> Tensor:
        """[batch, 2] and [batch, 1] -> [batch, D]."""
        emb = self.model.adaln_single.emb
        parts = [
            embedder(emb.additional_condition_proj(value.flatten()).to(dtype)).reshape(len(value), -1)
            for embedder, value in ((emb.resolution_embedder, resolution), (emb.aspect_ratio_embedder, aspect_ratio))
        ]
        return torch.cat(parts, dim=1)

    def context_tokens(self, conditioning: tuple[Tensor, ...]) -> int:
        return self._split(conditioning)[1][0].shape[1]

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:
        _, (text, *mask) = self._split(conditioning)
        bias = held["bias"]
        if self.model.caption_projection is not None:
            text = self.model.caption_projection(text)
        for block, (keys, values) in zip(self.blocks, held["context"].unbind()):
            keys.copy_(block.attn2.to_k(text))
            values.copy_(block.attn2.to_v(text))
        if not mask:
            bias.zero_()
        elif mask[0].ndim == 2:
            bias.copy_(((1 - mask[0].to(bias.dtype)) * DROPPED)[:, None, None])
        else:
            bias.copy_(mask[0].unsqueeze(1))

    # ---- both ends

    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        sample = read_sample(arguments, self.in_channels)
        batch, text, mask = len(sample), arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
        timestep = expect_shape("timestep", arguments["timestep"], (batch,))
        features = self.config.caption_channels or self.config.cross_attention_dim
        if not isinstance(text, Tensor) or text.ndim != 3 or len(text) != batch or text.shape[2] != features:
            raise ValueError(f"encoder_hidden_states: expected [{batch}, tokens, {features}], got {describe(text)}")
        if text.dtype != sample.dtype:
            raise ValueError(f"encoder_hidden_states: expected the sample's dtype, {sample.dtype}, got {text.dtype}")
        if arguments["attention_mask"] is not None:
            raise ValueError("attention_mask (of self-attention): expected None, got one; text has its own mask")
        tokens = text.shape[1]
        masks = () if mask is None else (mask,)
        for mask in masks:
            expect_shape("encoder_attention_mask", mask, (batch, tokens), (batch, 1, tokens))
        conditioning = (*self._sizes(arguments["added_cond_kwargs"], batch), text, *masks)
        return Inputs(sample, timestep, conditioning, arguments["return_dict"])

    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        sizes, (text, *mask) = self._split(conditioning)
        return {
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask[0] if mask else None,
            "added_cond_kwargs": dict(zip(("resolution", "aspect_ratio"), sizes)) if sizes else None,
        }

    def _split(self, conditioning: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Resolution and aspect ratio, if the model takes them; text and its mask, if there is one."""
        sizes = 2 if self.sized else 0
        return conditioning[:sizes], conditioning[sizes:]

    def _sizes(self, added: dict[str, Tensor] | None, batch: int) -> tuple[Tensor, ...]:
        if not self.sized:
            return ()
        return tuple(
            expect_shape(f"added_cond_kwargs[{name!r}]", (added or {}).get(name), (batch, numbers))
            for name, numbers in (("resolution", 2), ("aspect_ratio", 1))
        )

    # ---- counting

    def macs(self, height: int | None, width: int | None, batch: int, context: int | None = None) -> Macs:
        n, d, text = self.tokens(height, width), self.width, TEXT_TOKENS if context is None else context
        features = self.config.cross_attention_dim
        attn, cross, mlp = self.branch_macs(batch, n, text)
        cross += batch * text * 2 * features * d  # its own forward makes keys and values at every step
        emb = self.model.adaln_single.emb
        time = emb.timestep_embedder.linear_1.in_features * d + d * d + 6 * d * d
        if self.sized:
            time += sum(
                count * (e.linear_1.in_features * e.linear_1.out_features + e.linear_2.weight.numel())
                for count, e in ((2, emb.resolution_embedder), (1, emb.aspect_ratio_embedder))
            )
        caption = self.model.caption_projection
        captions = 0 if caption is None else text * (caption.linear_1.weight.numel() + caption.linear_2.weight.numel())
        ends = n * d * self.patches.size**2 * (self.in_channels + self.out_channels)
        return Macs((attn, cross, mlp), batch * (time + captions + ends))
