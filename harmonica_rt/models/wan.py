"""Wan as diffusers builds it: blocks of self-attention over a clip's tokens, cross-attention to text, feed-forward."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn

from ..layout import Group
from .base import Adapter, DiffusersModule, Inputs, Macs, Shape
from .branch import Branch, Norm
from .parts import expect_dtype, expect_parts, expect_shape, expect_tokens, read_sample, refuse
from .refusals import expect_exactly, expect_plain_norm
from .stages import Call, Held

# Rows of a block: those of its modulation table, and behind them the weight and bias that norm2 may have
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_FFN, SCALE_FFN, GATE_FFN, BIAS_CROSS, WEIGHT_CROSS = range(8)
CLIP = 21, 60, 104  # latents of the pipeline's 81 frames of 480 x 832 pixels
TEXT_TOKENS, IMAGE_TOKENS = 512, 257  # the model's attention has the first written in


class WanAdapter(Adapter):
    """Adapter of ``WanTransformer3DModel``: 2.1 and 2.2, text and image to video. The stream is a clip's tokens."""

    model_class = "WanTransformer3DModel"
    automatic = False  # attention and feed-forward are the model's own calls: level blocks keeps far less
    branches = ("attn", "cross_attn", "ffn")
    rows_dtype = torch.float32
    float32_parts = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    end_launches = 4  # patch embedding, tokens in rows; output projection, unpatchify

    def __init__(self, model: DiffusersModule) -> None:
        self.model, self.config = model, model.config
        self.blocks, self.patch = model.blocks, tuple(self.config.patch_size)
        self.layers = len(self.blocks)
        self.width = self.config.num_attention_heads * self.config.attention_head_dim
        self.in_channels = self.config.in_channels
        self.out_channels = self.config.out_channels or self.in_channels
        self.image_dim = self.config.image_dim  # None for a model that reads text alone
        self.block_rows = 8 if self.config.cross_attn_norm else 6
        self.rows = self.block_rows * self.layers + 2
        expect_parts(model, {"": WanTransformer3DModel, "rope": WanRotaryPosEmbed})
        expect_plain_norm(model.norm_out, "norm_out", FP32LayerNorm)
        for name, block in self.blocks.named_children():
            expect_exactly(block, WanTransformerBlock, f"blocks.{name}")
            expect_plain_norm(block.norm1, f"blocks.{name}.norm1", FP32LayerNorm)
            expect_plain_norm(block.norm3, f"blocks.{name}.norm3", FP32LayerNorm)
            cross = FP32LayerNorm if self.config.cross_attn_norm else nn.Identity
            expect_exactly(block.norm2, cross, f"blocks.{name}.norm2")

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group("blocks", self.layers, self.branches),)

    # ---- branches

    def layer(self, number: int, join: bool) -> list[Branch]:
        block, row, d = self.blocks[number], self.block_rows * number, self.width
        hidden = block.ffn.net[0].proj.out_features

        def attend(y: Tensor, held: Held) -> Tensor:
            return block.attn1(y, None, None, (held["cos"], held["sin"]))

        def read(y: Tensor, held: Held) -> Tensor:
            return block.attn2(y, held["text"], None, None)

        attn = Call(attend, (block.attn1,), lambda b, n, _: b * n * (4 * d * d + 2 * n * d))
        cross = Call(read, (block.attn2,), lambda b, n, text: b * 2 * d * ((n + text) * d + n * text))
        ffn = Call(lambda y, _: block.ffn(y), (block.ffn,), lambda b, n, _: b * n * 2 * d * hidden)
        affine = self.config.cross_attn_norm
        return [
            Branch((attn,), Norm(row + SHIFT_ATTN, row + SCALE_ATTN, block.norm1.eps), row + GATE_ATTN),
            Branch((cross,), Norm(row + BIAS_CROSS, row + WEIGHT_CROSS, block.norm2.eps) if affine else None, None),
            Branch((ffn,), Norm(row + SHIFT_FFN, row + SCALE_FFN, block.norm3.eps), row + GATE_FFN),
        ]

    def head_norm(self) -> Norm:
        return Norm(self.rows - 2, self.rows - 1, self.model.norm_out.eps)

    # ---- modulation and text

    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        embedder, stream = self.model.condition_embedder, conditioning[0].dtype
        times, dtype = embedder.timesteps_proj(timesteps), next(embedder.time_embedder.parameters()).dtype
        if dtype.is_floating_point:  # packed weights are made what they multiply
            times = times.to(dtype)
        embedded = embedder.time_embedder(times).to(stream)
        shared = embedder.time_proj(embedder.act_fn(embedded)).unflatten(1, (6, -1)).float()
        for number, block in enumerate(self.blocks):
            rows = out.narrow(2, self.block_rows * number, self.block_rows)
            rows[:, :, :6] = (block.scale_shift_table + shared).unsqueeze(1)
            rows[:, :, 1:6:3] += 1
            if self.config.cross_attn_norm:
                rows[:, :, BIAS_CROSS], rows[:, :, WEIGHT_CROSS] = block.norm2.bias, block.norm2.weight
        shift, scale = (self.model.scale_shift_table + embedded.unsqueeze(1)).unsqueeze(1).unbind(2)
        out[:, :, -2], out[:, :, -1] = shift, 1 + scale

    def context_tokens(self, conditioning: tuple[Tensor, ...]) -> int:
        batch = len(conditioning[0])  # of first and last frame each is one in the batch of the images
        return sum(len(states) * states.shape[1] for states in conditioning) // batch

    def hold(self, shape: Shape) -> Held:
        cos, sin = self.model.rope(torch.empty(shape.sample, device="meta"))  # of the clip's shape alone
        text = torch.empty(shape.batch, shape.context, self.width, dtype=shape.dtype, device=shape.device)
        return Held(text=text, cos=cos, sin=sin)

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:
        (text, *image), embedder = conditioning, self.model.condition_embedder
        states = [*map(embedder.image_embedder, image), embedder.text_embedder(text)]
        held["text"].copy_(torch.cat(states, dim=1))

    # ---- both ends

    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        refuse(arguments, ("attention_kwargs",), "level 'blocks' takes it")
        sample, timestep = read_sample(arguments, self.in_channels, "frames, height, width"), arguments["timestep"]
        batch = len(sample)
        if getattr(timestep, "ndim", 0) == 2:
            raise ValueError(
                f"timestep: expected one a sample, [{batch}], at level 'branches', got one a token, "
                f"{list(timestep.shape)}, as Wan 2.2 TI2V has it; level 'blocks' takes it"
            )
        timestep = expect_shape("timestep", timestep, (batch,))
        text, image = arguments["encoder_hidden_states"], arguments["encoder_hidden_states_image"]
        states, features = [expect_tokens("encoder_hidden_states", text, self.config.text_dim, batch)], self.image_dim
        if image is not None:
            if features is None:
                raise ValueError("encoder_hidden_states_image: expected None without image_dim, got a tensor")
            images = batch if self.config.pos_embed_seq_len is None else 2 * batch
            states.append(expect_tokens("encoder_hidden_states_image", image, features, images))
            expect_dtype(sample, encoder_hidden_states_image=image)
        expect_dtype(sample, encoder_hidden_states=text)
        return Inputs(sample, timestep, tuple(states), arguments["return_dict"])

    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        return dict(zip(("encoder_hidden_states", "encoder_hidden_states_image"), conditioning))

    def stream(self, shape: Shape) -> tuple[int, int]:
        grid, most = self._grid(shape.sample[2:]), self.model.rope.max_seq_len
        if max(grid) > most:
            raise ValueError(f"expected at most {most} patches a side (rope_max_seq_len), got {grid}")
        return 0, math.prod(grid)

    def embed(self, sample: Tensor, held: Held | None = None, out: Tensor | None = None) -> Tensor:
        tokens = self.model.patch_embedding(sample).flatten(2).transpose(1, 2)
        return tokens.contiguous() if out is None else out.copy_(tokens)

    def finish(self, y: Tensor, sample: tuple[int, ...]) -> Tensor:
        patches = self.model.proj_out(y).view(len(y), *self._grid(sample[2:]), *self.patch, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(self.output_shape(sample))

    def output(self, sample: Tensor) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=sample)

    def _grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Patches of a clip of `size` frames, height, width."""
        if any(length % patch for length, patch in zip(size, self.patch)):
            raise ValueError(f"expected frames, height and width in multiples of the patch, {self.patch}, got {size}")
        return tuple(length // patch for length, patch in zip(size, self.patch))

    # ---- counting

    def macs(self, height: int | None, width: int | None, batch: int, context: int | None = None) -> Macs:
        """`height` and `width` of the latents, of as many frames as the pipeline takes."""
        size = CLIP if height is None or width is None else (CLIP[0], height, width)
        if context is None:
            context = TEXT_TOKENS + (0 if self.image_dim is None else IMAGE_TOKENS)
        return self._count(size, batch, context)

    def macs_of(self, shape: Shape) -> Macs:
        return self._count(shape.sample[2:], shape.batch, shape.context)

    def _count(self, size: tuple[int, ...], batch: int, context: int) -> Macs:
        d, tokens, config = self.width, math.prod(self._grid(size)), self.config
        image = 0 if self.image_dim is None else max(0, context - TEXT_TOKENS)
        ends = tokens * d * math.prod(self.patch) * (self.in_channels + self.out_channels)
        time = d * (config.freq_dim + d + 6 * d)
        states = (context - image) * d * (config.text_dim + d)
        if image:
            states += image * self.image_dim * (self.image_dim + d)
        return Macs(self.branch_macs(batch, tokens, context), batch * (ends + time + states))
