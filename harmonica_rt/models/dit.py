"""DiT (Peebles and Xie, 2212.09748) as diffusers builds it: adaLN-Zero blocks of self-attention and an MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from .base import DiffusersModule, Inputs, Macs
from .branch import Branch, Norm
from .parts import (
    FEED_FORWARD,
    GATE_ATTN,
    GATE_MLP,
    SCALE_ATTN,
    SCALE_MLP,
    SHIFT_ATTN,
    SHIFT_MLP,
    PatchAdapter,
    Patches,
    check_attention,
    expect_parts,
    expect_shape,
    feed_forward,
    parameter_uses,
    read_sample,
    scale_from,
    self_attention,
)
from .refusals import expect_plain_norm

MODEL_PARTS: dict[str, type[nn.Module]] = {
    "": DiTTransformer2DModel,
    "proj_out_1": nn.Linear,
    "proj_out_2": nn.Linear,
}
BLOCK_PARTS: dict[str, type[nn.Module]] = {
    "": BasicTransformerBlock,
    "norm1": AdaLayerNormZero,
    "norm1.linear": nn.Linear,
    "norm1.emb": CombinedTimestepLabelEmbeddings,
    "norm3": nn.LayerNorm,
}


class DiTAdapter(PatchAdapter):
    """Adapter of ``DiTTransformer2DModel``."""

    model_class = "DiTTransformer2DModel"
    branches = ("attn", "mlp")
    end_launches = 4  # patch embedding, positions; output projection, unpatchify

    def __init__(self, model: DiffusersModule) -> None:
        self.model = model
        self.config = model.config
        self.blocks = model.transformer_blocks
        self.layers = len(self.blocks)
        self.width = model.inner_dim
        self.in_channels, self.out_channels = self.config.in_channels, model.out_channels
        self.rows = 6 * self.layers + 2
        expect_parts(model, MODEL_PARTS)
        self.patches, self.head = Patches(model), model.proj_out_2
        expect_plain_norm(model.norm_out, "norm_out")
        uses = parameter_uses(model)
        for i, block in enumerate(self.blocks):
            name = f"transformer_blocks.{i}"
            expect_parts(block, BLOCK_PARTS, name)
            expect_plain_norm(block.norm1.norm, f"{name}.norm1.norm")
            check_attention(block.attn1, f"{name}.attn1", uses)
            expect_parts(block.ff, FEED_FORWARD, f"{name}.ff")

    # ---- weights

    def layer(self, number: int, join: bool) -> list[Branch]:
        block, first = self.blocks[number], 6 * number
        attn_norm = Norm(first + SHIFT_ATTN, first + SCALE_ATTN, block.norm1.norm.eps)
        mlp_norm = Norm(first + SHIFT_MLP, first + SCALE_MLP, block.norm3.eps)
        return [
            Branch(self_attention(block.attn1, join), attn_norm, first + GATE_ATTN),
            Branch(feed_forward(block.ff), mlp_norm, first + GATE_MLP),
        ]

    def head_norm(self) -> Norm:
        return Norm(self.rows - 2, self.rows - 1, self.model.norm_out.eps)

    # ---- modulation

    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        (labels,) = conditioning
        for i, block in enumerate(self.blocks):
            embedded = F.silu(_embed_condition(block.norm1.emb, timesteps, labels, out.dtype))
            if i == 0:
                head = out.narrow(2, self.rows - 2, 2)
                _linear_into(self.model.proj_out_1, embedded, head)
                head.select(2, 1).add_(1)
            rows = out.narrow(2, 6 * i, 6)
            _linear_into(block.norm1.linear, embedded, rows)
            scale_from(block.norm1.norm, rows.select(2, SHIFT_ATTN), rows.select(2, SCALE_ATTN))
            scale_from(block.norm3, rows.select(2, SHIFT_MLP), rows.select(2, SCALE_MLP))

    # ---- both ends

    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        sample = read_sample(arguments, self.in_channels)
        timestep = expect_shape("timestep", arguments["timestep"], (len(sample),))
        labels = expect_shape("class_labels", arguments["class_labels"], (len(sample),))
        if labels.is_floating_point():
            raise TypeError(f"class_labels: expected integers, got {labels.dtype}")
        return Inputs(sample, timestep, (labels,), arguments["return_dict"])

    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"class_labels": conditioning[0]}

    # ---- counting

    def macs(self, height: int | None, width: int | None, batch: int, context: int | None = None) -> Macs:
        n, d = self.tokens(height, width), self.width
        embedder = self.blocks[0].norm1.emb.timestep_embedder
        time = embedder.linear_1.in_features * d + d * d
        pixels = self.patches.size**2
        ends = n * d * pixels * (self.config.in_channels + self.model.out_channels)
        around, head = time + 6 * d * d, time + 2 * d * d  # the head asks block 0's embedder once more
        fixed = ends + head + self.layers * around
        return Macs(self.branch_macs(batch, n), batch * fixed, batch * around)


def _embed_condition(embedder: DiffusersModule, timesteps: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Timestep and label embeddings of n steps and a batch, [n, batch, width]: n rows of one GEMM, not n * batch."""
    time = embedder.timestep_embedder(embedder.time_proj(timesteps).to(dtype))
    return time.unsqueeze(1) + embedder.class_embedder(labels).unsqueeze(0)


def _linear_into(module: nn.Linear, h: Tensor, out: Tensor) -> None:
    """`out` [n, batch, rows, width], any stride over the batch, <- module(h [n, batch, width])."""
    h, out = h.flatten(0, 1), out.flatten(0, 1).flatten(1)
    if module.bias is None:
        torch.mm(h, module.weight.t(), out=out)
    else:
        torch.addmm(module.bias, h, module.weight.t(), out=out)
