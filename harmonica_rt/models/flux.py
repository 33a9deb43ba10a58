"""Flux as diffusers builds it: blocks of joint attention over text and image, then blocks of one stream of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from ..layout import Group
from .base import Adapter, Branch, Inputs, Macs, Norm, Shape, UnsupportedModelError, expect_plain_norm
from .parts import expect_parts, expect_shape, expect_tokens, refuse
from .stages import Call, Held

MODEL_PARTS = {"": FluxTransformer2DModel, "norm_out": AdaLayerNormContinuous}
JOINT_PARTS = {"": FluxTransformerBlock, "norm1": AdaLayerNormZero, "norm1_context": AdaLayerNormZero}
JOINT_PARTS |= {"attn": FluxAttention}
SINGLE_PARTS = {"": FluxSingleTransformerBlock, "norm": AdaLayerNormZeroSingle, "attn": FluxAttention}
UNREAD = ("joint_attention_kwargs", "controlnet_block_samples", "controlnet_single_block_samples")
# Rows of a joint block, for each segment in the order its modulation layer puts them out; of a single block
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)
JOINT, SINGLE = 12, 3
TEXT_TOKENS, IMAGE_TOKENS = 512, 4096  # of the pipeline's 1024 x 1024 pixels


class FluxAdapter(Adapter):
    """Adapter of ``FluxTransformer2DModel``: dev, schnell, Kontext, Fill. The stream is [text, image]."""

    model_class = "FluxTransformer2DModel"
    automatic = False  # attention and feed-forward are the model's own calls: level blocks keeps far less
    branches = ("attn", "mlp", "block")
    segments = 2
    channel_dim = 2
    end_launches = 3  # text and image into the stream; the output projection

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config
        self.joint, self.single = model.transformer_blocks, model.single_transformer_blocks
        self.layers = len(self.joint) + len(self.single)
        self.width = model.inner_dim
        self.in_channels, self.out_channels = self.config.in_channels, model.out_channels
        self.rows = JOINT * len(self.joint) + SINGLE * len(self.single) + 2
        if model.dtype == torch.float16:
            raise UnsupportedModelError("expected float32 or bfloat16, got float16: the model clips its streams then")
        expect_parts(model, MODEL_PARTS)
        for name, block in self.joint.named_children():
            expect_parts(block, JOINT_PARTS, f"transformer_blocks.{name}")
        for name, block in self.single.named_children():
            expect_parts(block, SINGLE_PARTS, f"single_transformer_blocks.{name}")
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                expect_plain_norm(module, name)
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
        hidden = block.ff.net[0].proj.out_features

        def pair(which: int) -> tuple[int, int]:
            return row + 6 + which, row + which

        def attend(y: Tensor, held: Held) -> tuple[Tensor, Tensor]:
            text, image = cut(y, held)
            rotary = held["cos"], held["sin"]
            image, text = block.attn(hidden_states=image, encoder_hidden_states=text, image_rotary_emb=rotary)
            return text, image

        def feed(y: Tensor, held: Held) -> tuple[Tensor, Tensor]:
            text, image = cut(y, held)
            return block.ff_context(text), block.ff(image)

        attn = Call(attend, (block.attn,), lambda b, n, _: b * n * (4 * d * d + 2 * n * d), copies=2)
        mlp = Call(feed, (block.ff, block.ff_context), lambda b, n, _: b * n * 2 * d * hidden, copies=2)
        norms = (
            Norm(pair(SHIFT_ATTN), pair(SCALE_ATTN), block.norm1.norm.eps),
            Norm(pair(SHIFT_MLP), pair(SCALE_MLP), block.norm2.eps),
        )
        return [Branch((attn,), norms[0], pair(GATE_ATTN)), Branch((mlp,), norms[1], pair(GATE_MLP))]

    def head_norm(self) -> Norm:
        return Norm(self.rows - 2, self.rows - 1, self.model.norm_out.norm.eps)

    # ---- modulation and text

    def timesteps(self, sampler: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(sampler, device=like.device).to(like.dtype) / 1000

    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        _, pooled, _, _, *guidance = conditioning
        count, batch = out.shape[:2]
        times = [timesteps.repeat_interleave(batch), *(g.repeat(count) for g in guidance)]
        embedded = self.model.time_text_embed(*(t.to(out.dtype) * 1000 for t in times), pooled.repeat(count, 1))
        embedded = F.silu(embedded)
        layers = [layer for block in self.joint for layer in (block.norm1.linear, block.norm1_context.linear)]
        layers += [block.norm.linear for block in self.single]
        start = 0
        for layer in layers:
            rows = layer(embedded).view(count, batch, -1, self.width)
            own = out.narrow(2, start, rows.shape[2])
            own.copy_(rows)
            own[:, :, 1::3] += 1  # shift, scale, gate, and so on
            start += rows.shape[2]
        scale, shift = self.model.norm_out.linear(embedded).view(count, batch, 2, self.width).unbind(2)
        out[:, :, -2], out[:, :, -1] = shift, 1 + scale

    def context_tokens(self, conditioning: tuple[Tensor, ...]) -> int:
        return conditioning[0].shape[1]

    def hold(self, shape: Shape) -> Held:
        tokens = self.stream(shape)[1]
        table = torch.empty(2, tokens, sum(self.config.axes_dims_rope), device=shape.device)
        text = torch.empty(shape.batch, shape.context, self.width, dtype=shape.dtype, device=shape.device)
        return Held(text=text, cos=table[0], sin=table[1])

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:
        text, _, text_ids, image_ids, *_ = conditioning
        held["text"].copy_(self.model.context_embedder(text))
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
        timestep = expect_shape("timestep", arguments["timestep"], (batch,))
        ids = []
        for name, tokens in (("txt_ids", text.shape[1]), ("img_ids", sample.shape[1])):
            value = arguments[name][0] if getattr(arguments[name], "ndim", 0) == 3 else arguments[name]
            ids.append(expect_shape(name, value, (tokens, len(self.config.axes_dims_rope))))
        guidance, embeds = arguments["guidance"], self.config.guidance_embeds
        if (guidance is not None) != embeds:
            raise ValueError(f"guidance: expected {'a tensor' if embeds else 'None'} with guidance_embeds={embeds}")
        guidance = (expect_shape("guidance", guidance, (batch,)),) if embeds else ()
        return Inputs(sample, timestep, (text, pooled, *ids, *guidance), arguments["return_dict"])

    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        names = ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids", "guidance")
        return dict(zip(names, conditioning))

    def stream(self, shape: Shape) -> tuple[int, int]:
        return shape.context, shape.context + shape.sample[1]

    def embed(self, sample: Tensor, held: Held | None = None, out: Tensor | None = None) -> Tensor:
        text, image = held["text"], self.model.x_embedder(sample)
        return torch.cat([text, image], dim=1) if out is None else torch.cat([text, image], dim=1, out=out)

    def finish(self, y: Tensor, sample: tuple[int, ...]) -> Tensor:
        return self.model.proj_out(y[:, y.shape[1] - sample[1] :])

    def output(self, sample: Tensor) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=sample)

    # ---- counting

    def macs(self, height: int | None, width: int | None, batch: int, context: int | None = None) -> Macs:
        """`height` and `width` of the latents, which the pipeline packs 2x2."""
        tokens = IMAGE_TOKENS if height is None or width is None else height * width // 4
        return self._count(tokens, batch, TEXT_TOKENS if context is None else context)

    def macs_of(self, shape: Shape) -> Macs:
        return self._count(shape.sample[1], shape.batch, shape.context)

    def _count(self, tokens: int, batch: int, context: int) -> Macs:
        d, total = self.width, tokens + context
        kinds = [self.layer(number, join=False) for number in (0, len(self.joint)) if number < self.layers]
        branches = [branch.macs(batch, total, d, context) for layer in kinds for branch in layer]
        embedder = sum(p.numel() for p in self.model.time_text_embed.parameters() if p.ndim == 2)
        ends = tokens * d * (self.in_channels + self.out_channels) + context * d * self.config.joint_attention_dim
        return Macs(tuple(branches), batch * (ends + embedder + self.rows * d * d))


def cut(y: Tensor, held: Held) -> tuple[Tensor, Tensor]:
    """Both segments, text and image."""
    split = held["text"].shape[1]
    return y[:, :split], y[:, split:]
