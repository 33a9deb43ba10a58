"""A frozen model's forward, branch by branch, for training: differentiable in whatever stands in for a branch.

The same adapters describe the model as in the runtime; there is no second definition of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harmonica_rt.models import Adapter, UnsupportedModelError, adapt
from harmonica_rt.models.base import Shape
from harmonica_rt.models.branch import Branch, Norm, over_tokens
from harmonica_rt.models.stages import Held

Evaluate = Callable[[], Tensor]
StandIn = Callable[[int, Evaluate], Tensor]  # (entry, evaluate its branch) -> its output before the gate
TrunkStandIn = Callable[[Tensor, Evaluate], Tensor]  # (stream before, evaluate all branches) -> stream after


SAMPLED = ("DiTTransformer2DModel", "PixArtTransformer2DModel")  # whose pipelines' loop is here too


def adapt_to_learn(model: nn.Module) -> Adapter:
    """The adapter of a model that can be learned on. Raises UnsupportedModelError naming those."""
    adapter = adapt(model)
    if adapter.model_class not in SAMPLED:
        raise UnsupportedModelError(f"learning: expected a model of {' or '.join(SAMPLED)}, got {adapter.model_class}")
    return adapter


class Denoiser:
    """A model as a function of (sample, modulation rows, what stands in for each branch).

    Args:
        adapter, branches, head: of a supported diffusers model in eval mode, as its adapter binds it.
        checkpointing: recompute a branch's activations in the backward pass instead of keeping them.
    """

    def __init__(self, adapter: Adapter, branches: list[Branch], head: Norm, checkpointing: bool = False) -> None:
        self.adapter, self.branches, self.head, self.checkpointing = adapter, branches, head, checkpointing

    @classmethod
    def of(cls, model: nn.Module, checkpointing: bool = False) -> Denoiser:
        """Of a model whose pipeline's loop is here too; its parameters get no gradient."""
        adapter = adapt_to_learn(model)
        model.requires_grad_(False)
        return cls(adapter, *adapter.bind(), checkpointing)

    @property
    def entries(self) -> int:
        """L B, branches of all layers."""
        return len(self.branches)

    def modulation(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Modulation rows of all steps, [steps, batch, rows, width]."""
        size = (len(timesteps), len(conditioning[0]), self.adapter.rows, self.adapter.width)
        rows = torch.empty(size, dtype=self.adapter.rows_dtype or dtype, device=timesteps.device)
        with torch.no_grad():
            self.adapter.modulate(timesteps, conditioning, rows)
        return rows

    def encode(self, conditioning: tuple[Tensor, ...], sample: Tensor) -> Held:
        """What stages read of a run for such samples, the same at all its steps."""
        context = self.adapter.context_tokens(conditioning)
        held = self.adapter.hold(Shape(tuple(sample.shape), sample.dtype, sample.device, context))
        with torch.no_grad():
            self.adapter.encode(conditioning, held)
        return held

    def __call__(
        self,
        sample: Tensor,
        rows: Tensor,
        stand_in: StandIn,
        held: Held | None = None,
        trunk: TrunkStandIn | None = None,
        split: int = 0,
    ) -> Tensor:
        """The model's output.

        Args:
            sample: [batch, channels, height, width].
            rows: modulation rows of this step, [batch, rows, width].
            stand_in: called for each entry in order. It may evaluate the branch, or not.
            held: as `encode` gives it; None for a model whose stages read nothing of a run.
            trunk: what stands in for all branches together; they are evaluated unless given.
            split: tokens of the stream's first segment, 0 where there is one.
        """
        x = self.adapter.embed(sample, held).to(sample.dtype)  # positions may be kept in fp32

        def run() -> Tensor:
            h = x
            for entry, branch in enumerate(self.branches):

                def evaluate(h: Tensor = h, branch: Branch = branch) -> Tensor:
                    if self.checkpointing and torch.is_grad_enabled():
                        return checkpoint(_branch, h, rows, held, branch, split, use_reentrant=False)
                    return _branch(h, rows, held, branch, split)

                output = stand_in(entry, evaluate)
                gate = None if branch.gate is None else over_tokens(rows, branch.gate, h, split)
                h = h + output if gate is None else torch.addcmul(h.to(rows.dtype), output, gate).to(h.dtype)
            return h

        h = run() if trunk is None else trunk(x, run)
        return self.adapter.finish(self.head.apply(h, rows, split), sample.shape)


def compute(entry: int, evaluate: Evaluate) -> Tensor:
    """The stand-in that is none: every branch is evaluated."""
    return evaluate()


def _branch(x: Tensor, rows: Tensor, held: Held | None, branch: Branch, split: int) -> Tensor:
    return branch.compute(x if branch.norm is None else branch.norm.apply(x, rows, split), held)
