"""Joint attention over [text, image], the model's own calls: what Flux, Qwen-Image and SD3 have alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .base import Adapter, DiffusersModule, Macs, Shape
from .branch import Branch, Norm
from .parts import GATE_ATTN, GATE_MLP, SCALE_ATTN, SCALE_MLP, SHIFT_ATTN, SHIFT_MLP
from .refusals import UnsupportedModelError, expect_plain_norm
from .stages import Call, Held


class JointAdapter(Adapter):
    """A model whose stream is [text, image]. The first tensor of its conditioning is text's states."""

    automatic = False  # attention and feed-forward are the model's own calls: level blocks keeps far less
    segments = 2

    def head_norm(self) -> Norm:
        return Norm(self.rows - 2, self.rows - 1, self.model.norm_out.norm.eps)

    def context_tokens(self, conditioning: tuple[Tensor, ...]) -> int:
        return conditioning[0].shape[1]

    def hold(self, shape: Shape) -> Held:
        return Held(text=torch.empty(shape.batch, shape.context, self.width, dtype=shape.dtype, device=shape.device))

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:
        held["text"].copy_(self.model.context_embedder(conditioning[0]))


def expect_unclipped(model: DiffusersModule) -> None:
    """Its blocks clip their streams in float16, which no row of a program does."""
    if model.dtype == torch.float16:
        raise UnsupportedModelError("expected float32 or bfloat16, got float16: the model clips its streams then")


def expect_plain_norms(model: DiffusersModule) -> None:
    """Every LayerNorm but those of attention without weight and bias."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and ".attn." not in name:
            expect_plain_norm(module, name)


class PackedAdapter(JointAdapter):
    """One whose pipeline packs 2x2 latents to a token, [batch, tokens, channels], and calls it with t / 1000.

    Attributes:
        embedder: what makes tokens of a sample, by its name in the model.
        default_tokens: of image and text, at the pipeline's default size.
    """

    channel_dim = 2
    end_launches = 3  # text and image into the stream; the output projection
    embedder: ClassVar[str]
    default_tokens: ClassVar[tuple[int, int]]

    def timesteps(self, sampler: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(sampler, device=like.device).to(like.dtype) / 1000

    def stream(self, shape: Shape) -> tuple[int, int]:
        return shape.context, shape.context + shape.sample[1]

    def embed(self, sample: Tensor, held: Held | None = None, out: Tensor | None = None) -> Tensor:
        assert held is not None, "the text is held"
        return torch.cat([held["text"], getattr(self.model, self.embedder)(sample)], dim=1, out=out)

    def finish(self, y: Tensor, sample: tuple[int, ...]) -> Tensor:
        return self.model.proj_out(y[:, y.shape[1] - sample[1] :])

    def output(self, sample: Tensor) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(sample=sample)

    def macs(self, height: int | None, width: int | None, batch: int, context: int | None = None) -> Macs:
        """`height` and `width` of the latents."""
        image, text = self.default_tokens
        tokens = image if height is None or width is None else height * width // 4
        return self.count(tokens, batch, text if context is None else context)

    def macs_of(self, shape: Shape) -> Macs:
        return self.count(shape.sample[1], shape.batch, shape.context)

    @abstractmethod
    def count(self, tokens: int, batch: int, context: int) -> Macs:
        """`macs` for so many tokens of image and of text."""


def cut(y: Tensor, held: Held) -> tuple[Tensor, Tensor]:
    """Both segments, text and image."""
    split = held["text"].shape[1]
    return y[:, :split], y[:, split:]


def joint_block(
    attn: DiffusersModule,
    mlps: tuple[DiffusersModule, DiffusersModule],
    rows: Sequence[tuple[int, int]],
    eps: tuple[float, float],
    width: int,
    read: Callable[[Held], dict[str, Any]] = lambda held: {},
) -> list[Branch]:
    """Branches of a block of joint attention and a feed-forward for each segment, the model's own calls.

    Args:
        attn: gives image, then text.
        mlps: text's and image's; theirs have one hidden width.
        rows: of text and image, in the order of `SHIFT_ATTN` to `GATE_MLP`.
        eps: of the norms before both branches.
        read: what is held -> what else `attn` takes.
    """
    hidden = mlps[1].net[0].proj.out_features

    def attend(y: Tensor, held: Held) -> tuple[Tensor, Tensor]:
        text, image = cut(y, held)
        image, text = attn(hidden_states=image, encoder_hidden_states=text, **read(held))
        return text, image

    def feed(y: Tensor, held: Held) -> tuple[Tensor, Tensor]:
        text, image = cut(y, held)
        return mlps[0](text), mlps[1](image)

    attention = Call(attend, (attn,), lambda b, n, _: b * n * (4 * width * width + 2 * n * width), copies=2)
    mlp = Call(feed, mlps, lambda b, n, _: b * n * 2 * width * hidden, copies=2)
    return [
        Branch((attention,), Norm(rows[SHIFT_ATTN], rows[SCALE_ATTN], eps[0]), rows[GATE_ATTN]),
        Branch((mlp,), Norm(rows[SHIFT_MLP], rows[SCALE_MLP], eps[1]), rows[GATE_MLP]),
    ]


def fill_rows(layers: Iterable[DiffusersModule], embedded: Tensor, out: Tensor) -> None:
    """What modulation layers put out, shift, scale and gate by turns, one layer behind the other; scale as 1 + scale.

    Args:
        embedded: [n * batch, width], what the layers take.
        out: [n, batch, rows, width], which may have more of them.
    """
    start = 0
    for layer in layers:
        rows = layer(embedded).view(*out.shape[:2], -1, out.shape[3])
        own = out.narrow(2, start, rows.shape[2])
        own.copy_(rows)
        own[:, :, 1::3] += 1
        start += rows.shape[2]


def fill_pair(layer: DiffusersModule, embedded: Tensor, out: Tensor) -> None:
    """What the layer of an ``AdaLayerNormContinuous`` puts out, scale and shift -> shift and 1 + scale."""
    scale, shift = layer(embedded).view(out.shape).unbind(2)
    out[:, :, 0], out[:, :, 1] = shift, 1 + scale
