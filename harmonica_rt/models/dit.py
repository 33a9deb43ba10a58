"""DiT (Peebles and Xie, 2212.09748) as diffusers builds it: adaLN-Zero blocks of self-attention and an MLP."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, PatchEmbed, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from .base import (
    Adapter,
    Branch,
    Gelu,
    Inputs,
    Linear,
    Macs,
    Norm,
    SelfAttention,
    UnsupportedModelError,
    expect_exactly,
    expect_plain_norm,
    join_rows,
)

# A wrapper or subclass of any of these may compute something else
BLOCK_PARTS: dict[str, type[nn.Module]] = {
    "norm1": AdaLayerNormZero,
    "norm1.linear": nn.Linear,
    "norm1.emb": CombinedTimestepLabelEmbeddings,
    "attn1": Attention,
    "attn1.to_q": nn.Linear,
    "attn1.to_k": nn.Linear,
    "attn1.to_v": nn.Linear,
    "attn1.to_out.0": nn.Linear,
    "attn1.to_out.1": nn.Dropout,
    "norm3": nn.LayerNorm,
    "ff": FeedForward,
    "ff.net.0": GELU,
    "ff.net.0.proj": nn.Linear,
    "ff.net.1": nn.Dropout,
    "ff.net.2": nn.Linear,
}
# Rows of a block, in the order its modulation layer puts them out
SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)


class DiTAdapter(Adapter):
    """Adapter of ``DiTTransformer2DModel``."""

    model_class = "DiTTransformer2DModel"
    branches = ("attn", "mlp")
    end_launches = 4  # patch embedding, positions; output projection, unpatchify

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = model.config
        self.blocks = model.transformer_blocks
        self.layers = len(self.blocks)
        self.width = model.inner_dim
        self.in_channels, self.out_channels = self.config.in_channels, model.out_channels
        self.rows = 6 * self.layers + 2
        self.patch = model.patch_size
        self._positions: dict[tuple[int, int], Tensor] = {}
        expect_exactly(model, DiTTransformer2DModel, "model")
        expect_exactly(model.pos_embed, PatchEmbed, "pos_embed")
        expect_exactly(model.pos_embed.proj, nn.Conv2d, "pos_embed.proj")
        expect_plain_norm(model.norm_out, "norm_out")
        for name in ("proj_out_1", "proj_out_2"):
            expect_exactly(getattr(model, name), nn.Linear, name)
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for i, block in enumerate(self.blocks):
            self._check_block(block, f"transformer_blocks.{i}", uses)

    @staticmethod
    def _check_block(block: nn.Module, name: str, uses: Counter[int]) -> None:
        expect_exactly(block, BasicTransformerBlock, name)
        for path, kind in BLOCK_PARTS.items():
            expect_exactly(block.get_submodule(path), kind, f"{name}.{path}")
        expect_plain_norm(block.norm1.norm, f"{name}.norm1.norm")
        attn = block.attn1
        for part in ("to_q", "to_k", "to_v"):
            if any(uses[id(p)] > 1 for p in getattr(attn, part).parameters()):
                raise UnsupportedModelError(f"{name}.attn1.{part}: expected parameters of its own, got tied ones")
        if type(attn.processor) not in (AttnProcessor, AttnProcessor2_0):
            raise UnsupportedModelError(
                f"{name}.attn1: expected diffusers' AttnProcessor or AttnProcessor2_0, "
                f"got {type(attn.processor).__name__}"
            )
        for extra in ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "residual_connection"):
            if getattr(attn, extra, None):
                raise UnsupportedModelError(f"{name}.attn1: expected no {extra}, got {getattr(attn, extra)}")
        if attn.rescale_output_factor != 1.0:
            raise UnsupportedModelError(
                f"{name}.attn1: expected rescale_output_factor 1, got {attn.rescale_output_factor}"
            )

    # ---- weights

    def bind(self) -> tuple[list[Branch], Norm]:
        self._positions.clear()
        branches = []
        for i, block in enumerate(self.blocks):
            attn = block.attn1
            projections = (attn.to_q, attn.to_k, attn.to_v)
            bias = None if attn.to_q.bias is None else join_rows([p.bias for p in projections])
            qkv = Linear(join_rows([p.weight for p in projections]), bias)
            branches.append(
                Branch(
                    (qkv, SelfAttention(attn.heads), _linear(attn.to_out[0])),
                    Norm(6 * i + SHIFT_ATTN, 6 * i + SCALE_ATTN, block.norm1.norm.eps),
                    6 * i + GATE_ATTN,
                )
            )
            gelu = block.ff.net[0]
            branches.append(
                Branch(
                    (_linear(gelu.proj), Gelu(gelu.approximate), _linear(block.ff.net[2])),
                    Norm(6 * i + SHIFT_MLP, 6 * i + SCALE_MLP, block.norm3.eps),
                    6 * i + GATE_MLP,
                )
            )
        head = Norm(self.rows - 2, self.rows - 1, self.model.norm_out.eps)
        return branches, head

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
            shift, scale = rows.select(2, SHIFT_MLP), rows.select(2, SCALE_MLP)
            rows.select(2, SCALE_ATTN).add_(1)
            scale.add_(1)
            if block.norm3.weight is not None:  # (norm * w + b) * scale + shift = norm * (w scale) + (b scale + shift)
                if block.norm3.bias is not None:
                    shift.addcmul_(scale, block.norm3.bias)
                scale.mul_(block.norm3.weight)

    # ---- both ends

    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        sample, timestep = arguments["hidden_states"], arguments["timestep"]
        labels = arguments["class_labels"]
        if arguments["cross_attention_kwargs"]:
            raise ValueError(
                f"cross_attention_kwargs: expected none, got {sorted(arguments['cross_attention_kwargs'])}"
            )
        if not isinstance(sample, Tensor) or sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"hidden_states: expected [batch, {self.config.in_channels}, height, width], got {_describe(sample)}"
            )
        if 0 in sample.shape:
            raise ValueError(f"hidden_states: expected at least one sample and pixel, got {_describe(sample)}")
        batch = len(sample)
        for name, value in (("timestep", timestep), ("class_labels", labels)):
            if not isinstance(value, Tensor) or value.shape != (batch,):
                raise ValueError(f"{name}: expected a tensor of shape [{batch}], got {_describe(value)}")
        if labels.is_floating_point():
            raise TypeError(f"class_labels: expected integers, got {labels.dtype}")
        return Inputs(sample, timestep, (labels,), arguments["return_dict"])

    def tokens(self, height: int, width: int) -> int:
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"expected height and width to be multiples of the patch, {self.patch}, got {height}x{width}"
            )
        return (height // self.patch) * (width // self.patch)

    def embed(self, sample: Tensor, out: Tensor | None = None) -> Tensor:
        patches = self.model.pos_embed.proj(sample).flatten(2).transpose(1, 2)
        positions = self._position(sample.shape[2] // self.patch, sample.shape[3] // self.patch)
        return torch.add(patches, positions, out=out)

    def _position(self, rows: int, columns: int) -> Tensor:
        embed = self.model.pos_embed
        if (rows, columns) == (embed.height, embed.width):
            return embed.pos_embed
        if (rows, columns) not in self._positions:
            table = get_2d_sincos_pos_embed(
                embed_dim=self.width,
                grid_size=(rows, columns),
                base_size=embed.base_size,
                interpolation_scale=embed.interpolation_scale,
                device=embed.pos_embed.device,
                output_type="pt",
            )
            self._positions[rows, columns] = table.float().unsqueeze(0)
        return self._positions[rows, columns]

    def finish(self, y: Tensor, height: int, width: int) -> Tensor:
        p, channels = self.patch, self.model.out_channels
        patches = self.model.proj_out_2(y).view(-1, height // p, width // p, p, p, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)

    def output(self, sample: Tensor) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=sample)

    # ---- counting

    def macs(self, height: int | None, width: int | None, batch: int) -> Macs:
        size = self.config.sample_size
        height, width = size if height is None else height, size if width is None else width
        n, d = self.tokens(height, width), self.width
        attn = n * (4 * d * d) + 2 * n * n * d
        hidden = self.blocks[0].ff.net[0].proj.out_features if self.layers else 0
        mlp = 2 * n * d * hidden
        embedders = [block.norm1.emb.timestep_embedder for block in self.blocks]
        time = sum(e.linear_1.in_features * d + d * d for e in [*embedders, embedders[0]])  # block 0's twice: the head
        pixels = self.patch**2
        ends = n * d * pixels * (self.config.in_channels + self.model.out_channels)
        modulation = self.layers * 6 * d * d + 2 * d * d
        return Macs((batch * attn, batch * mlp), batch * (time + ends + modulation))


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.data, None if module.bias is None else module.bias.data)


def _embed_condition(embedder: nn.Module, timesteps: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
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


def _describe(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
