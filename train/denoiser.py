"""A frozen model's forward, branch by branch, for training: differentiable in whatever stands in for a branch.

The same adapters describe the model as in the runtime; there is no second definition of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harmonica_rt.models import adapt
from harmonica_rt.models.base import Branch, CrossAttention, Gelu, Linear, Norm, SelfAttention

Evaluate = Callable[[], Tensor]
Context = tuple[Tensor, Tensor]  # keys and values that cross-attention reads, and the bias of its scores
StandIn = Callable[[int, Evaluate], Tensor]  # (entry, evaluate its branch) -> its output before the gate


class Denoiser:
    """A model as a function of (sample, modulation rows, what stands in for each branch).

    Args:
        model: a supported diffusers model in eval mode; its parameters get no gradient.
        checkpointing: recompute a branch's activations in the backward pass instead of keeping them.
    """

    def __init__(self, model: nn.Module, checkpointing: bool = False) -> None:
        self.adapter = adapt(model)
        self.branches, self.head = self.adapter.bind()
        self.checkpointing = checkpointing
        model.requires_grad_(False)

    @property
    def entries(self) -> int:
        """L B, branches of all layers."""
        return len(self.branches)

    def modulation(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Modulation rows of all steps, [steps, batch, rows, width]."""
        rows = torch.empty(len(timesteps), len(conditioning[0]), self.adapter.rows, self.adapter.width, dtype=dtype).to(
            timesteps.device
        )
        with torch.no_grad():
            self.adapter.modulate(timesteps, conditioning, rows)
        return rows

    def encode(self, conditioning: tuple[Tensor, ...], dtype: torch.dtype) -> Context:
        """What cross-attention reads at all steps of a run."""
        batch, tokens = len(conditioning[0]), self.adapter.context_tokens(conditioning)
        on = {"dtype": dtype, "device": conditioning[0].device}
        context = torch.empty(self.adapter.contexts, 2, batch, tokens, self.adapter.width, **on)
        bias = torch.empty(batch, 1, 1, tokens, **on)
        with torch.no_grad():
            self.adapter.encode(conditioning, context, bias)
        return context, bias

    def __call__(self, sample: Tensor, rows: Tensor, stand_in: StandIn, context: Context | None = None) -> Tensor:
        """The model's output.

        Args:
            sample: [batch, channels, height, width].
            rows: modulation rows of this step, [batch, rows, width].
            stand_in: called for each entry in order. It may evaluate the branch, or not.
            context: as `encode` gives it; None for a model without cross-attention.
        """
        x = self.adapter.embed(sample).to(sample.dtype)  # positions may be kept in fp32
        for entry, branch in enumerate(self.branches):

            def evaluate(x: Tensor = x, branch=branch) -> Tensor:
                if self.checkpointing and torch.is_grad_enabled():
                    return checkpoint(_branch, x, rows, context, branch, use_reentrant=False)
                return _branch(x, rows, context, branch)

            output = stand_in(entry, evaluate)
            x = x + output if branch.gate is None else torch.addcmul(x, output, _row(rows, branch.gate))
        return self.adapter.finish(_norm(x, rows, self.head), *sample.shape[2:])


def compute(entry: int, evaluate: Evaluate) -> Tensor:
    """The stand-in that is none: every branch is evaluated."""
    return evaluate()


def _row(rows: Tensor, row: int) -> Tensor:
    return rows.narrow(1, row, 1)


def _norm(x: Tensor, rows: Tensor, norm: Norm) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    return torch.addcmul(_row(rows, norm.shift), normed, _row(rows, norm.scale))


def _branch(x: Tensor, rows: Tensor, context: Context | None, branch: Branch) -> Tensor:
    h = x if branch.norm is None else _norm(x, rows, branch.norm)
    for stage in branch.stages:
        match stage:
            case Linear():
                h = F.linear(h, stage.weight, stage.bias)
            case Gelu():
                h = F.gelu(h, approximate=stage.approximate)
            case SelfAttention():
                batch, tokens, _ = h.shape
                q, k, v = h.view(batch, tokens, 3, stage.heads, -1).permute(2, 0, 3, 1, 4).unbind()
                h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
            case CrossAttention():
                k, v = context[0][stage.context].unflatten(-1, (stage.heads, -1)).transpose(-3, -2)
                q = h.unflatten(-1, (stage.heads, -1)).transpose(1, 2)
                h = F.scaled_dot_product_attention(q, k, v, attn_mask=context[1]).transpose(1, 2).flatten(2)
    return h
