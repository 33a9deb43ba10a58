"""What an adapter tells about its model: its branches, what goes into them and comes out, MACs.

The executor runs any model described in these words and knows no model class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..decisions import Decisions
from ..layout import WHOLE, Group
from .branch import Branch, Norm
from .stages import Held

# A module of diffusers, which says no types: torch would have each attribute a Tensor or a Module
DiffusersModule = Any


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan is made for.

    Attributes:
        sample: of the model's sample, [batch, ...].
        context: tokens of text: those that cross-attention reads, or that are in the stream.
    """

    sample: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    context: int = 0

    @property
    def batch(self) -> int:
        return self.sample[0]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = "x".join(map(str, self.sample[2:])) if len(self.sample) > 3 else f"{self.sample[1]} tokens"
        context = f", {self.context} context tokens" if self.context else ""
        return f"batch {self.batch}, {size}{context}, {dtype} on {self.device}"


@dataclass(frozen=True, slots=True)
class Inputs:
    """A forward call's arguments, read.

    Attributes:
        sample: [batch, channels, height, width], or what else the model takes.
        timestep: [batch], the same for all.
        conditioning: what else the output depends on; tensors whose first dimension is the batch, or that are no
            sample's own.
        return_dict: as in diffusers.
    """

    sample: Tensor
    timestep: Tensor
    conditioning: tuple[Tensor, ...]
    return_dict: bool

    @property
    def samples(self) -> tuple[Tensor, ...]:
        return (self.sample,)

    @property
    def batch(self) -> int:
        return len(self.sample)

    @property
    def device(self) -> torch.device:
        return self.sample.device


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulates of one forward: one evaluation of each branch, and everything that is not a branch.

    Attributes:
        branches: of one layer's branches, group after group; of a layer in the mean where they differ.
        around: what of `fixed` is in one block.
    """

    branches: tuple[float, ...]
    fixed: int
    around: int = 0


class Adapter(ABC):
    """One supported model. Constructing it checks the model and changes nothing.

    Attributes:
        model_class: diffusers class name.
        automatic: whether builders take level branches unless another is asked for: where that is measured to pay.
        branches: names of a layer's branches, in the order they run.
        groups: the model's lists of blocks, in the order they run.
        end_launches: ops that `embed` and `finish` launch, views not counted.
        embed_launches: how many of them `embed` does.
        layers: number of transformer blocks, L.
        width: channels of the token stream.
        in_channels: channels of a sample.
        out_channels: channels of the output, learned variances included.
        rows: modulation rows of a step: the shifts, scales and gates of all branches and of the head's norm.
        rows_dtype: which the model modulates in; None for the stream's.
        float32_parts: modules and parameters, by the last part or any other of their names, that may be float32 in a
            model of another dtype: diffusers loads some so.
        segments: of the stream: 2 for text, then image.
        channel_dim: of a sample, which one its channels are.
        contexts: sets of keys and values that cross-attention reads.
    """

    automatic: ClassVar[bool] = True
    segments: ClassVar[int] = 1
    channel_dim: ClassVar[int] = 1
    rows_dtype: ClassVar[torch.dtype | None] = None
    float32_parts: ClassVar[tuple[str, ...]] = ()
    model_class: ClassVar[str]
    branches: ClassVar[tuple[str, ...]]
    end_launches: ClassVar[int]
    embed_launches: ClassVar[int] = 2
    model: DiffusersModule
    layers: int
    width: int
    in_channels: int
    out_channels: int
    rows: int
    contexts: int = 0

    @property
    def groups(self) -> tuple[Group, ...]:
        return (Group("transformer_blocks", self.layers, self.branches),)

    @abstractmethod
    def layer(self, number: int, join: bool) -> list[Branch]:
        """The branches of a layer, of those of all groups, in the order they run, on the model's own weights.

        Args:
            join: query, key and value weights are made neighbours in memory (the model's parameters become views of one
                storage), so that they run as one GEMM and still follow `load_state_dict`. Otherwise what would be
                joined is on the meta device, for counts.
        """

    @abstractmethod
    def head_norm(self) -> Norm:
        """What prepares y for `finish`."""

    def bind(self) -> tuple[list[Branch], Norm]:
        """All branches in the order they run, their weights joined, and the head's norm."""
        return [branch for i in range(self.layers) for branch in self.layer(i, join=True)], self.head_norm()

    @abstractmethod
    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        """Fill the modulation rows of n steps at once.

        Args:
            timesteps: [n], as the model takes them.
            conditioning: as in `Inputs`.
            out: [n, batch, rows, width].
        """

    def timesteps(self, sampler: Sequence[float], like: Tensor) -> Tensor:
        """What the forward is called with at a sampler's timesteps, [n], on the device and in the dtype of `like`."""
        return torch.tensor(sampler, dtype=like.dtype, device=like.device)

    def context_tokens(self, conditioning: tuple[Tensor, ...]) -> int:
        """Tokens of text, 0 without any."""
        return 0

    def hold(self, shape: Shape) -> Held:
        """What stages and `embed` read of a run, still empty."""
        empty = partial(torch.empty, dtype=shape.dtype, device=shape.device)
        return Held(
            context=empty((self.contexts, 2, shape.batch, shape.context, self.width)),
            bias=empty((shape.batch, 1, 1, shape.context)),
        )

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:  # noqa: B027
        """Fill what is held, the same at all steps of a run. Nothing to do where the stream is all there is.

        Args:
            conditioning: as in `Inputs`.
        """

    @abstractmethod
    def inputs(self, arguments: dict[str, Any]) -> Inputs:
        """Read and check a forward call's arguments. Raises TypeError or ValueError on what cannot be expressed."""

    @abstractmethod
    def arguments(self, conditioning: tuple[Tensor, ...]) -> dict[str, Any]:
        """The forward's arguments besides sample and timestep: what `inputs` reads `conditioning` from."""

    @abstractmethod
    def stream(self, shape: Shape) -> tuple[int, int]:
        """Tokens of the first of two segments, 0 where there is one, and of the whole stream.

        Raises ValueError if such a sample does not fit the model.
        """

    @abstractmethod
    def embed(self, sample: Tensor, held: Held | None = None, out: Tensor | None = None) -> Tensor:
        """A sample -> `out` [batch, tokens, width]; differentiable where there is no `out`."""

    @abstractmethod
    def finish(self, y: Tensor, sample: tuple[int, ...]) -> Tensor:
        """The head, after its norm: [batch, tokens, width] -> a new output for a sample of shape `sample`."""

    def output_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Of the output for a sample of that shape."""
        shape = list(sample)
        shape[self.channel_dim] = self.out_channels
        return tuple(shape)

    @abstractmethod
    def output(self, sample: Tensor) -> Any:
        """What the model returns with `return_dict=True`."""

    @abstractmethod
    def macs(self, height: int | None, width: int | None, batch: int, context: int | None = None) -> Macs:
        """Counted as the model's own forward does them.

        Args:
            height, width: of the sample; config.sample_size unless given.
            context: tokens that cross-attention reads; as many as the model's pipeline takes unless given.
        """

    def macs_of(self, shape: Shape) -> Macs:
        """`macs` of a call of that shape."""
        height, width = shape.sample[2:]
        return self.macs(height, width, shape.batch, shape.context or None)

    def by_entry(self, kinds: Sequence[float]) -> np.ndarray:
        """What is told of a layer's branches, group after group, for each entry."""
        parts, start = [], 0
        for group in self.groups:
            own = kinds[start : start + len(group.branches)]
            parts.append(np.tile(np.asarray(own, dtype=np.float64), group.layers))
            start += len(group.branches)
        return np.concatenate(parts)

    def branch_macs(self, batch: int, tokens: int, context: int = 0) -> tuple[int, ...]:
        """Those of a layer's branches as their stages count them; zeros for a model without layers."""
        if not self.layers:
            return (0,) * len(self.branches)
        return tuple(branch.macs(batch, tokens, self.width, context) for branch in self.layer(0, join=False))

    def check_schedule(self, schedule: Decisions) -> None:
        """Raise ValueError unless `schedule` is for such a model."""
        groups = tuple(group for group in schedule.groups if group != WHOLE)  # any model has a trunk
        for what, expected, got in [
            ("model", self.model_class, schedule.model),
            ("layers", self.layers, sum(group.layers for group in groups)),
            ("branches", _names(self.groups), _names(groups)),
            ("groups", self.groups, groups),
        ]:
            if expected != got:
                raise ValueError(f"schedule does not fit the model: {what} expected {expected}, got {got}")


def _names(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(branch for group in groups for branch in group.branches))
