"""Flux as diffusers builds it: blocks of joint attention over text and image, then blocks of one stream of both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor

from ..layout import Group
from .base import DiffusersModule, Inputs, Macs, Shape
from .branch import Branch, Norm
from .joint import PackedAdapter, expect_plain_norms, expect_unclipped, fill_pair, fill_rows, joint_block
from .parts import expect_dtype, expect_parts, expect_shape, expect_tokens, expect_with, macs_a_row, refuse
from .refusals import UnsupportedModelError
from .stages import Call, Held

MODEL_PARTS = {"": FluxTransformer2DModel, "norm_out": AdaLayerNormContinuous}
JOINT_PARTS = {"": FluxTransformerBlock, "norm1": AdaLayerNormZero, "norm1_context": AdaLayerNormZero}
JOINT_PARTS |= {"attn": FluxAttention}
SINGLE_PARTS = {"": FluxSingleTransformerBlock, "norm": AdaLayerNormZeroSingle, "attn": FluxAttention}
UNREAD = ("joint_attention_kwargs", "controlnet_block_samples", "controlnet_single_block_samples")
JOINT, SINGLE = 12, 3  # rows of a block: image's six and text's, or those of both


class FluxAdapter(PackedAdapter):
    """Adapter of ``FluxTransformer2DModel``: dev, schnell, Kontext, Fill. The stream is [text, image]."""

    model_class = "FluxTransformer2DModel"
    branches = ("attn", "mlp", "block")
    embedder = "x_embedder"
    default_tokens = 4096, 512  # 1024 x 1024 pixels

    def __init__(self, model: DiffusersModule) -> None:
        self.model, self.config = model, model.config
        self.joint, self.single = model.transformer_blocks, model.single_transformer_blocks
        self.layers = len(self.joint) + len(self.single)
        self.width = model.inner_dim
        self.in_channels, self.out_channels = self.config.in_channels, model.out_channels
        self.rows = JOINT * len(self.joint) + SINGLE * len(self.single) + 2
        expect_unclipped(model)
        expect_parts(model, MODEL_PARTS)
        for name, block in self.joint.named_children():
            expect_parts(block, JOINT_PARTS, f"transformer_blocks.{name}")
        for name, block in self.single.named_children():
            expect_parts(block, SINGLE_PARTS, f"single_transformer_blocks.{name}")
        expect_plain_norms(model)
        for name, module in model.named_modules():
            if isinstance(module, FluxAttention) and type(module.processor) is not FluxAttnProcessor:
                got = type(module.processor).__name__
                raise UnsupportedModelError(f"{name}: expected FluxAttnProcessor, got {got} (an IP-adapter?)")

    @property
    def groups(self) -> tuple[Group, ...]:
        joint = Group("transformer_blocks", len(self.joint), self.branches[:2])
        single = Group("single_transformer_blocks", len(self.single), self.branches[2:])
        return tuple(group for group in (joint, single) if group.layers)

    # ---- branches

    def layer(self, number: int, join: bool) -> list[Branch]:
        count, d = len(self.joint), self.width
        if number >= count:
            block, row = self.single[number - count], JOINT * count + SINGLE * (number - count)
            hidden = block.mlp_hidden_dim

            def whole(y: Tensor, held: Held) -> Tensor:
                mlp = block.act_mlp(block.proj_mlp(y))
                attn = block.attn(hidden_states=y, image_rotary_emb=(held["cos"], held["sin"]))
                return block.proj_out(torch.cat([attn, mlp], dim=2))

            call = Call(whole, (block.attn, block.proj_mlp, block.proj_out),
                        lambda b, n, _: b * n * (4 * d * d + 2 * d * hidden + 2 * n * d))  # fmt: skip
            return [Branch((call,), Norm(row, row + 1, block.norm.norm.eps), row + 2)]
        block, row = self.joint[number], JOINT * number
        rows = [(row + 6 + which, row + which) for which in range(6)]
        mlps, eps = (block.ff_context, block.ff), (block.norm1.norm.eps, block.norm2.eps)
        return joint_block(
            block.attn, mlps, rows, eps, d, lambda held: {"image_rotary_emb": (held["cos"], held["sin"])}
        )

    # ---- modulation and text

    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        _, pooled, _, _, *guidance = conditioning
        count, batch = out.shape[:2]
        times = [timesteps.repeat_interleave(batch), *(g.repeat(count) for g in guidance)]
        embedded = self.model.time_text_embed(*(t.to(out.dtype) * 1000 for t in times), pooled.repeat(count, 1))
        embedded = F.silu(embedded)
        layers = [layer for block in self.joint for layer in (block.norm1.linear, block.norm1_context.linear)]
        layers += [block.norm.linear for block in self.single]
        fill_rows(layers, embedded, out)
        fill_pair(self.model.norm_out.linear, embedded, out[:, :, -2:])

    def hold(self, shape: Shape) -> Held:
        tokens = self.stream(shape)[1]
        table = torch.empty(2, tokens, sum(self.config.axes_dims_rope), device=shape.device)
        return Held(**super().hold(shape).tensors, cos=table[0], sin=table[1])

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:
        super().encode(conditioning, held)
        _, _, text_ids, image_ids, *_ = conditioning
        for name, table in zip(("cos", "sin"), self.model.pos_embed(torch.cat([text_ids, image_ids]))):
            held[name].copy_(table)

    # ---- both ends

    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        refuse(arguments, UNREAD, "level 'blocks' takes it")
        sample = expect_tokens("hidden_states", arguments["hidden_states"], self.in_channels)
        batch = len(sample)
        text, pooled = arguments["encoder_hidden_states"], arguments["pooled_projections"]
        text = expect_tokens("encoder_hidden_states", text, self.config.joint_attention_dim, batch)
        pooled = expect_shape("pooled_projections", pooled, (batch, self.config.pooled_projection_dim))
        expect_dtype(sample, encoder_hidden_states=text, pooled_projections=pooled)
        timestep = expect_shape("timestep", arguments["timestep"], (batch,))
        ids = []
        for name, tokens in (("txt_ids", text.shape[1]), ("img_ids", sample.shape[1])):
            value = arguments[name][0] if getattr(arguments[name], "ndim", 0) == 3 else arguments[name]
            ids.append(expect_shape(name, value, (tokens, len(self.config.axes_dims_rope))))
        embeds = self.config.guidance_embeds
        guidance = expect_with("guidance_embeds", embeds, "guidance", arguments["guidance"], (batch,))
        return Inputs(sample, timestep, (text, pooled, *ids, *guidance), arguments["return_dict"])

    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        names = ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids", "guidance")
        return dict(zip(names, conditioning))

    # ---- counting

    def count(self, tokens: int, batch: int, context: int) -> Macs:
        d, total = self.width, tokens + context
        kinds = [self.layer(number, join=False) for number in (0, len(self.joint)) if number < self.layers]
        branches = [branch.macs(batch, total, d, context) for layer in kinds for branch in layer]
        ends = tokens * d * (self.in_channels + self.out_channels) + context * d * self.config.joint_attention_dim
        return Macs(tuple(branches), batch * (ends + macs_a_row(self.model.time_text_embed) + self.rows * d * d))
