"""Qwen-Image (Wu et al., 2508.02324) as diffusers builds it: joint attention over text and image."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel, QwenImageTransformerBlock
from torch import Tensor

from .base import DiffusersModule, Inputs, Macs, Shape
from .branch import Branch
from .joint import PackedAdapter, expect_plain_norms, expect_unclipped, fill_pair, fill_rows, joint_block
from .parts import expect_dtype, expect_parts, expect_shape, expect_tokens, expect_with, macs_a_row, refuse
from .refusals import UnsupportedModelError
from .stages import Held

UNREAD = ("attention_kwargs", "controlnet_block_samples")
ROWS = 12  # of a block: image's six and text's


class QwenAdapter(PackedAdapter):
    """Adapter of ``QwenImageTransformer2DModel``: text to image, edit, layered. The stream is [text, image]."""

    model_class = "QwenImageTransformer2DModel"
    branches = ("attn", "mlp")
    embedder = "img_in"
    default_tokens = 4096, 128  # 1024 x 1024 pixels; text is as long as the prompt

    def __init__(self, model: DiffusersModule) -> None:
        self.model, self.config, self.blocks = model, model.config, model.transformer_blocks
        self.layers, self.width, self.rows = len(self.blocks), model.inner_dim, ROWS * len(self.blocks) + 2
        self.in_channels, self.out_channels = self.config.in_channels, self.config.patch_size**2 * model.out_channels
        expect_unclipped(model)
        if model.zero_cond_t:
            raise UnsupportedModelError("zero_cond_t: expected False, got True: image tokens then differ in modulation")
        expect_parts(model, {"": QwenImageTransformer2DModel, "norm_out": AdaLayerNormContinuous})
        for name, block in self.blocks.named_children():
            expect_parts(block, {"": QwenImageTransformerBlock, "attn": Attention}, f"transformer_blocks.{name}")
        expect_plain_norms(model)
        self._positions = lru_cache(16)(self._make_positions)

    # ---- branches

    def layer(self, number: int, join: bool) -> list[Branch]:
        block, row = self.blocks[number], ROWS * number
        rows = [(row + 6 + which, row + which) for which in range(6)]
        mlps, eps = (block.txt_mlp, block.img_mlp), (block.img_norm1.eps, block.img_norm2.eps)

        def read(held: Held) -> dict[str, Any]:
            table, text = torch.view_as_complex(held["rotary"]), held["text"].shape[1]
            return {"image_rotary_emb": (table[text:], table[:text])}

        return joint_block(block.attn, mlps, rows, eps, self.width, read)

    # ---- modulation and text

    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        (_, _, _, *added), (count, batch) = conditioning, out.shape[:2]
        times = timesteps.repeat_interleave(batch).to(out.dtype)
        embedded = F.silu(self.model.time_text_embed(times, out, *(each.repeat(count) for each in added)))
        fill_rows([mod[1] for block in self.blocks for mod in (block.img_mod, block.txt_mod)], embedded, out)
        fill_pair(self.model.norm_out.linear, embedded, out[:, :, -2:])

    def hold(self, shape: Shape) -> Held:
        rotary = torch.empty(self.stream(shape)[1], sum(self.config.axes_dims_rope) // 2, 2, device=shape.device)
        return Held(**super().hold(shape).tensors, rotary=rotary)

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:
        text, rotary, *_ = conditioning
        held["text"].copy_(self.model.txt_in(self.model.txt_norm(text)))
        held["rotary"].copy_(rotary)

    # ---- both ends

    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        one = "prompts of one length have none, nor has one prompt a call (harmonica learn: --batch 4 --accumulate 4)"
        refuse(arguments, ("encoder_hidden_states_mask",), f"level 'blocks' takes it; {one}")
        refuse(arguments, UNREAD, "level 'blocks' takes it")
        refuse(arguments, ("guidance",), "diffusers' own forward fails with it")
        sample = expect_tokens("hidden_states", arguments["hidden_states"], self.in_channels)
        batch, states = len(sample), arguments["encoder_hidden_states"]
        text = expect_tokens("encoder_hidden_states", states, self.config.joint_attention_dim, batch)
        expect_dtype(sample, encoder_hidden_states=text)
        timestep = expect_shape("timestep", arguments["timestep"], (batch,))
        embeds, added = self.config.use_additional_t_cond, arguments["additional_t_cond"]
        added = expect_with("use_additional_t_cond", embeds, "additional_t_cond", added, (batch,))
        positions = self._positions(_images(arguments["img_shapes"], sample.shape[1]), text.shape[1], sample.device)
        return Inputs(sample, timestep, (text, *positions, *added), arguments["return_dict"])

    def _make_positions(self, images: tuple[Any, ...], text: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables of text, then image, [tokens, pairs, 2], and the sizes they are of."""
        image, words = self.model.pos_embed([list(images)], max_txt_seq_len=text, device=device)
        return torch.view_as_real(torch.cat([words, image])), torch.tensor(images, device=device)

    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        text, _, sizes, *added = conditioning
        shapes = [[tuple(size) for size in sizes.tolist()]] * len(text)
        return {"encoder_hidden_states": text, "img_shapes": shapes, **dict(zip(["additional_t_cond"], added))}

    # ---- counting

    def count(self, tokens: int, batch: int, context: int) -> Macs:
        d, time = self.width, macs_a_row(self.model.time_text_embed.timestep_embedder)
        ends = tokens * d * (self.in_channels + self.out_channels) + context * d * self.config.joint_attention_dim
        return Macs(self.branch_macs(batch, tokens + context), batch * (ends + time + self.rows * d * d))


def _images(shapes: Any, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Frames, height and width of each image of a sample, from ``img_shapes``."""
    first = shapes[0] if isinstance(shapes, list) and shapes else shapes
    try:
        images = tuple(map(tuple, first if isinstance(first, list) else [first]))
        alike = all(each == first for each in shapes) and {len(size) for size in images} == {3}
        fits = alike and sum(map(math.prod, images)) == tokens
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"img_shapes: expected images of {tokens} tokens, alike in all samples, got {shapes}")
    return images
