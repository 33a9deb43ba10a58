"""Parts that diffusers' models share, checked and described once: patches, attention, feed-forward, arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .base import Adapter, DiffusersModule, Shape
from .refusals import UnsupportedModelError, expect_exactly
from .stages import Gelu, Held, Linear, SelfAttention, Stage

# A wrapper or subclass of any of these may compute something else
ATTENTION: dict[str, type[nn.Module]] = {
    "": Attention,
    "to_q": nn.Linear,
    "to_k": nn.Linear,
    "to_v": nn.Linear,
    "to_out.0": nn.Linear,
    "to_out.1": nn.Dropout,
}
FEED_FORWARD: dict[str, type[nn.Module]] = {
    "": FeedForward,
    "net.0": GELU,
    "net.0.proj": nn.Linear,
    "net.1": nn.Dropout,
    "net.2": nn.Linear,
}


def expect_parts(module: nn.Module, parts: dict[str, type[nn.Module]], name: str = "") -> None:
    """Each submodule of exactly its class; "" is `module` itself, called `name`."""
    for path, kind in parts.items():
        expect_exactly(module.get_submodule(path), kind, ".".join(filter(None, (name, path))) or "model")


class Patches:
    """A model's ``pos_embed`` and the way back: samples to tokens to samples.

    Args:
        model: with ``pos_embed`` and ``config.patch_size``; checked.
    """

    def __init__(self, model: DiffusersModule, name: str = "pos_embed") -> None:
        self.module, self.size = model.pos_embed, model.config.patch_size
        self._positions: dict[tuple[int, int], Tensor] = {}
        expect_parts(self.module, {"": PatchEmbed, "proj": nn.Conv2d}, name)
        if self.module.norm is not None:
            raise UnsupportedModelError(f"{name}: expected no norm, got {type(self.module.norm).__name__}")

    def tokens(self, height: int, width: int) -> int:
        if height % self.size or width % self.size:
            raise ValueError(
                f"expected height and width to be multiples of the patch, {self.size}, got {height}x{width}"
            )
        return (height // self.size) * (width // self.size)

    def embed(self, sample: Tensor, out: Tensor | None) -> Tensor:
        patches = self.module.proj(sample).flatten(2).transpose(1, 2)
        return torch.add(patches, self._position(sample.shape[2] // self.size, sample.shape[3] // self.size), out=out)

    def join(self, patches: Tensor, height: int, width: int, channels: int) -> Tensor:
        """[batch, tokens, patch * patch * channels] -> [batch, channels, height, width]."""
        p = self.size
        patches = patches.view(-1, height // p, width // p, p, p, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)

    def _position(self, rows: int, columns: int) -> Tensor:
        embed = self.module
        if embed.pos_embed_max_size is not None:
            return embed.cropped_pos_embed(rows * self.size, columns * self.size)
        if (rows, columns) == (embed.height, embed.width):
            return embed.pos_embed
        if (rows, columns) not in self._positions:
            table = get_2d_sincos_pos_embed(
                embed_dim=embed.pos_embed.shape[-1],
                grid_size=(rows, columns),
                base_size=embed.base_size,
                interpolation_scale=embed.interpolation_scale,
                device=embed.pos_embed.device,
                output_type="pt",
            )
            self._positions[rows, columns] = table.float().unsqueeze(0)
        return self._positions[rows, columns]


class PatchAdapter(Adapter):
    """The ends of a model that works on patches.

    Attributes:
        patches: from samples and back.
        head: the projection that follows the head's norm.
    """

    patches: Patches
    head: nn.Linear

    def tokens(self, height: int | None, width: int | None) -> int:
        """Patches of such a sample, of config.sample_size unless given. Raises ValueError if they do not fit it."""
        size = self.model.config.sample_size
        return self.patches.tokens(size if height is None else height, size if width is None else width)

    def stream(self, shape: Shape) -> tuple[int, int]:
        return 0, self.tokens(*shape.sample[2:])

    def embed(self, sample: Tensor, held: Held | None = None, out: Tensor | None = None) -> Tensor:
        return self.patches.embed(sample, out)

    def finish(self, y: Tensor, sample: tuple[int, ...]) -> Tensor:
        height, width = sample[2:]
        return self.patches.join(self.head(y), height, width, self.out_channels)

    def output(self, sample: Tensor) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=sample)


# ---- attention and feed-forward


def check_attention(attn: DiffusersModule, name: str, uses: Counter[int]) -> None:
    """`uses`: how often each parameter of the model occurs in it, by id."""
    expect_parts(attn, ATTENTION, name)
    for part in ("to_q", "to_k", "to_v"):
        if any(uses[id(p)] > 1 for p in getattr(attn, part).parameters()):
            raise UnsupportedModelError(f"{name}.{part}: expected parameters of its own, got tied ones")
    if type(attn.processor) not in (AttnProcessor, AttnProcessor2_0):
        raise UnsupportedModelError(
            f"{name}: expected diffusers' AttnProcessor or AttnProcessor2_0, got {type(attn.processor).__name__}"
        )
    for extra in ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "residual_connection"):
        if getattr(attn, extra, None):
            raise UnsupportedModelError(f"{name}: expected no {extra}, got {getattr(attn, extra)}")
    if attn.rescale_output_factor != 1.0:
        raise UnsupportedModelError(f"{name}: expected rescale_output_factor 1, got {attn.rescale_output_factor}")


def parameter_uses(model: DiffusersModule) -> Counter[int]:
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.data, None if module.bias is None else module.bias.data)


def joined(*modules: nn.Linear, join: bool) -> Linear:
    """Several layers on the same input as one; `join` as in `Adapter.layer`."""
    if not join:
        rows = sum(m.out_features for m in modules)
        return Linear(torch.empty(rows, modules[0].in_features, device="meta"), None)
    bias = None if modules[0].bias is None else join_rows([m.bias for m in modules])
    return Linear(join_rows([m.weight for m in modules]), bias)


def self_attention(attn: DiffusersModule, join: bool) -> tuple[Stage, ...]:
    return joined(attn.to_q, attn.to_k, attn.to_v, join=join), SelfAttention(attn.heads), linear(attn.to_out[0])


def feed_forward(ff: DiffusersModule) -> tuple[Stage, ...]:
    gelu = ff.net[0]
    return linear(gelu.proj), Gelu(gelu.approximate), linear(ff.net[2])


# ---- modulation

SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)  # as AdaLN-Zero layers put them out


def scale_from(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> None:
    """Rows for the model's own `norm` -> rows for one without weight and bias, scale holding 1 + scale. In place.

    (norm * w + b) * (1 + scale) + shift = norm * (w (1 + scale)) + (b (1 + scale) + shift)
    """
    scale.add_(1)
    if norm.weight is not None:
        if norm.bias is not None:
            shift.addcmul_(scale, norm.bias)
        scale.mul_(norm.weight)


# ---- counting


def macs_a_row(module: nn.Module) -> int:
    """Multiply-accumulates of the linear layers of `module`, each applied to one row."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


# ---- arguments


def read_sample(arguments: dict[str, Any], channels: int, sizes: str = "height, width") -> Tensor:
    """``hidden_states``, [batch, channels, *sizes]. Arguments no program can express are refused."""
    if arguments.get("cross_attention_kwargs"):
        raise ValueError(f"cross_attention_kwargs: expected none, got {sorted(arguments['cross_attention_kwargs'])}")
    sample = arguments["hidden_states"]
    axes = 3 + sizes.count(",")
    if not isinstance(sample, Tensor) or sample.ndim != axes or sample.shape[1] != channels:
        raise ValueError(f"hidden_states: expected [batch, {channels}, {sizes}], got {describe(sample)}")
    if 0 in sample.shape:
        raise ValueError(f"hidden_states: expected at least one sample and pixel, got {describe(sample)}")
    return sample


def expect_tokens(name: str, value: Any, channels: int, batch: int | None = None) -> Tensor:
    """[batch, tokens, channels], none of them 0; of any batch unless it is given."""
    fits = isinstance(value, Tensor) and value.ndim == 3 and value.shape[2] == channels and 0 not in value.shape
    if not fits or batch not in (None, len(value)):
        expected = f"[{'batch' if batch is None else batch}, tokens, {channels}]"
        raise ValueError(f"{name}: expected a tensor {expected}, got {describe(value)}")
    return value


def expect_dtype(sample: Tensor, **given: Tensor) -> None:
    """That of the sample: the linear layers of a model of one dtype take no other."""
    for name, value in given.items():
        if value.dtype != sample.dtype:
            raise ValueError(f"hidden_states, {name}: expected one dtype, got {sample.dtype} and {value.dtype}")


def refuse(arguments: dict[str, Any], names: Sequence[str], hint: str) -> None:
    """Raise ValueError if one of `names`, which no program can express, was given."""
    for name in names:
        if (value := arguments.get(name)) is not None and len(value):
            raise ValueError(f"{name}: expected none at level 'branches', got {describe(value)}; {hint}")


def expect_shape(name: str, value: Any, *shapes: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or value.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected a tensor of shape {expected}, got {describe(value)}")
    return value


def expect_with(option: str, given: bool, name: str, value: Any, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The tensor `name` of a model built with `option`, None without it; what there is."""
    if (value is not None) != given:
        raise ValueError(
            f"{name}: expected {'a tensor' if given else 'None'} with {option}={given}, got {describe(value)}"
        )
    return (expect_shape(name, value, shape),) if given else ()


def describe(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def join_rows(parameters: Sequence[Tensor]) -> Tensor:
    """One [sum of rows, ...] tensor over `parameters`, which become views of it unless they are neighbours already."""
    first = parameters[0]
    end, neighbours = first.storage_offset(), True
    for p in parameters:
        same_storage = p.untyped_storage()._cdata == first.untyped_storage()._cdata
        neighbours &= same_storage and p.storage_offset() == end and p.is_contiguous()
        end += p.numel()
    if not neighbours:
        joined = torch.cat([p.data for p in parameters])
        start = 0
        for p in parameters:
            p.data = joined.narrow(0, start, len(p))
            start += len(p)
    shape = (sum(len(p) for p in parameters), *first.shape[1:])
    return first.data.as_strided(shape, first.stride())
