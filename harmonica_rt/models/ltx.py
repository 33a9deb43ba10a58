"""LTX-Video as diffusers builds it: one stream of video, adaLN-single blocks with rms norms that read text."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle, RMSNorm
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoRotaryPosEmbed,
    LTXVideoTransformer3DModel,
    LTXVideoTransformerBlock,
)
from torch import Tensor

from .base import Adapter, DiffusersModule, Inputs, Macs, Shape
from .branch import Branch, Norm
from .parts import expect_dtype, expect_parts, expect_shape, expect_tokens, refuse, scale_from
from .refusals import expect_plain_norm
from .stages import Call, Held

MODEL_PARTS = {"": LTXVideoTransformer3DModel, "time_embed": AdaLayerNormSingle, "rope": LTXVideoRotaryPosEmbed}
BLOCK_PARTS = {"": LTXVideoTransformerBlock, "norm1": RMSNorm, "norm2": RMSNorm}
BLOCK_PARTS |= {"attn1": LTXAttention, "attn2": LTXAttention}
# Rows of a block, in the order its table holds them
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)
DROPPED = -10000.0  # a masked token's score, as diffusers has it
FRAMES, HEIGHT, WIDTH, TEXT_TOKENS = 21, 16, 22, 128  # latents of the pipeline's 161 frames of 704 x 512 pixels


class LTXAdapter(Adapter):
    """Adapter of ``LTXVideoTransformer3DModel``, called with one timestep for all tokens."""

    model_class = "LTXVideoTransformer3DModel"
    automatic = False  # attention and feed-forward are the model's own calls: level blocks keeps far less
    branches = ("attn", "cross_attn", "mlp")
    channel_dim = 2
    end_launches = 3  # the input projection and its copy into the stream; the output projection

    def __init__(self, model: DiffusersModule) -> None:
        self.model, self.config, self.blocks = model, model.config, model.transformer_blocks
        self.layers = len(self.blocks)
        expect_parts(model, MODEL_PARTS)
        expect_plain_norm(model.norm_out, "norm_out")
        for name, block in self.blocks.named_children():
            expect_parts(block, BLOCK_PARTS, f"transformer_blocks.{name}")
        self.width = model.scale_shift_table.shape[1]
        self.in_channels, self.out_channels = model.proj_in.in_features, model.proj_out.out_features
        self.rows = 6 * self.layers + 2
        self._grids: dict[tuple[Any, ...], Tensor] = {}

    # ---- branches

    def layer(self, number: int, join: bool) -> list[Branch]:
        block, first, d = self.blocks[number], 6 * number, self.width
        hidden = block.ff.net[0].proj.out_features

        def attend(y: Tensor, held: Held) -> Tensor:
            return block.attn1(y, image_rotary_emb=(held["cos"], held["sin"]))

        def read(y: Tensor, held: Held) -> Tensor:
            return block.attn2(y, encoder_hidden_states=held["text"], attention_mask=held["bias"])

        attn = Call(attend, (block.attn1,), lambda b, n, _: b * n * (4 * d * d + 2 * n * d))
        cross = Call(read, (block.attn2,), lambda b, n, c: b * 2 * d * ((n + c) * d + n * c))
        mlp = Call(lambda y, _: block.ff(y), (block.ff,), lambda b, n, _: b * n * 2 * d * hidden)
        norm = partial(Norm, kind="rms")
        return [
            Branch((attn,), norm(first + SHIFT_ATTN, first + SCALE_ATTN, block.norm1.eps), first + GATE_ATTN),
            Branch((cross,), norm=None, gate=None),
            Branch((mlp,), norm(first + SHIFT_MLP, first + SCALE_MLP, block.norm2.eps), first + GATE_MLP),
        ]

    def head_norm(self) -> Norm:
        return Norm(self.rows - 2, self.rows - 1, self.model.norm_out.eps)

    # ---- modulation and text

    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        batch = out.shape[1]
        rows, embedded = self.model.time_embed(timesteps, hidden_dtype=out.dtype)
        rows, embedded = rows.view(-1, 1, 6, self.width), embedded.view(-1, 1, 1, self.width)
        for i, block in enumerate(self.blocks):
            own = out.narrow(2, 6 * i, 6)
            torch.add(rows.expand(-1, batch, -1, -1), block.scale_shift_table, out=own)
            scale_from(block.norm1, own.select(2, SHIFT_ATTN), own.select(2, SCALE_ATTN))
            scale_from(block.norm2, own.select(2, SHIFT_MLP), own.select(2, SCALE_MLP))
        head = out.narrow(2, self.rows - 2, 2)
        torch.add(embedded.expand(-1, batch, 2, -1), self.model.scale_shift_table, out=head)
        head.select(2, 1).add_(1)

    def context_tokens(self, conditioning: tuple[Tensor, ...]) -> int:
        return conditioning[0].shape[1]

    def hold(self, shape: Shape) -> Held:
        batch, tokens, _ = shape.sample
        empty = partial(torch.empty, dtype=shape.dtype, device=shape.device)
        table = torch.empty(2, batch, tokens, self.width, device=shape.device)  # float32, as the model's
        text, bias = empty((batch, shape.context, self.width)), empty((batch, 1, shape.context))
        return Held(text=text, bias=bias, cos=table[0], sin=table[1])

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:
        text, grid, *mask = conditioning
        held["text"].copy_(self.model.caption_projection(text))
        for name, table in zip(("cos", "sin"), self.model.rope(text, video_coords=grid)):
            held[name].copy_(table)
        bias = held["bias"]
        if mask:
            bias.copy_((1 - mask[0].to(bias.dtype)).unsqueeze(1) * DROPPED)
        else:
            bias.zero_()

    # ---- both ends

    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        refuse(arguments, ("attention_kwargs",), "level 'blocks' takes it")
        sample = expect_tokens("hidden_states", arguments["hidden_states"], self.in_channels)
        text, channels = arguments["encoder_hidden_states"], self.config.caption_channels
        tokens = expect_tokens("encoder_hidden_states", text, channels).shape[1]
        expect_shape("encoder_hidden_states", text, (len(sample), tokens, channels))
        expect_dtype(sample, encoder_hidden_states=text)
        timestep = arguments["timestep"]
        if getattr(timestep, "ndim", 0) == 2:
            got = f"{list(timestep.shape)}, one a token, as image to video has it"
            raise ValueError(
                f"timestep: expected a tensor of shape [{len(sample)}], got {got}; level 'blocks' takes it"
            )
        timestep = expect_shape("timestep", timestep, (len(sample),))
        mask = arguments["encoder_attention_mask"]
        masks = () if mask is None else (expect_shape("encoder_attention_mask", mask, (len(sample), tokens)),)
        return Inputs(sample, timestep, (text, self._grid(arguments, sample), *masks), arguments["return_dict"])

    def _grid(self, arguments: dict[str, Any], sample: Tensor) -> Tensor:
        """``video_coords``, or those that frames, height, width and scale stand for: [batch, 3, tokens].

        The same tensor at all steps, since a run is encoded anew if its conditioning is.
        """
        if arguments["video_coords"] is not None:
            return expect_shape("video_coords", arguments["video_coords"], (len(sample), 3, sample.shape[1]))
        sizes = tuple(arguments[name] for name in ("num_frames", "height", "width"))
        scale = arguments["rope_interpolation_scale"]
        if not all(isinstance(size, int) for size in sizes) or math.prod(sizes) != sample.shape[1]:
            expected = f"expected those of {sample.shape[1]} tokens, or video_coords"
            raise ValueError(f"num_frames, height, width: {expected}, got {sizes}")
        if scale is None or len(scale) != 3 or not all(isinstance(each, (int, float)) for each in scale):
            raise ValueError(f"rope_interpolation_scale: expected three numbers, got {scale}")
        key = (len(sample), *sizes, *scale, sample.device)
        if key not in self._grids:
            rope = self.model.rope
            patches = (rope.patch_size_t, rope.patch_size, rope.patch_size)
            positions = [torch.arange(size, dtype=torch.float32, device=sample.device) for size in sizes]
            axes = [along * each * patch for along, each, patch in zip(positions, scale, patches)]
            self._grids[key] = torch.cartesian_prod(*axes).t().repeat(len(sample), 1, 1)
        return self._grids[key]

    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        text, grid, *mask = conditioning
        kept = mask[0] if mask else None
        return {"encoder_hidden_states": text, "encoder_attention_mask": kept, "video_coords": grid}

    def stream(self, shape: Shape) -> tuple[int, int]:
        return 0, shape.sample[1]

    def embed(self, sample: Tensor, held: Held | None = None, out: Tensor | None = None) -> Tensor:
        stream = self.model.proj_in(sample)
        return stream if out is None else out.copy_(stream)

    def finish(self, y: Tensor, sample: tuple[int, ...]) -> Tensor:
        return self.model.proj_out(y)

    def output(self, sample: Tensor) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=sample)

    # ---- counting

    def macs(self, height: int | None, width: int | None, batch: int, context: int | None = None) -> Macs:
        """`height` and `width` of the latents, of as many frames as the pipeline makes."""
        tokens = FRAMES * (HEIGHT if height is None else height) * (WIDTH if width is None else width)
        return self._count(tokens, batch, TEXT_TOKENS if context is None else context)

    def macs_of(self, shape: Shape) -> Macs:
        return self._count(shape.sample[1], shape.batch, shape.context)

    def _count(self, tokens: int, batch: int, context: int) -> Macs:
        time, caption = (
            sum(p.numel() for p in module.parameters() if p.ndim == 2)
            for module in (self.model.time_embed, self.model.caption_projection)
        )
        ends = tokens * self.width * (self.in_channels + self.out_channels)
        return Macs(self.branch_macs(batch, tokens, context), batch * (time + context * caption + ends))
