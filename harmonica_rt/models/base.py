"""What an adapter tells about its model: branches as stages, norms and gates as modulation rows, MACs.

The executor runs any model described in these words and knows no model class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .stages import Held, Stage, walk

if TYPE_CHECKING:
    from ..schedule import Schedule


@dataclass(frozen=True, slots=True)
class Norm:
    """y = layer_norm(x) * scale + shift. Shift and scale are numbers of modulation rows; scale holds 1 + scale."""

    shift: int
    scale: int
    eps: float


@dataclass(frozen=True, eq=False, slots=True)
class Branch:
    """A residual function before its gate: `stages` on y. x += gate * stages(y).

    `gate` is the number of a modulation row. Without a norm, y is x; without a gate, the gate is 1.
    """

    stages: tuple[Stage, ...]
    norm: Norm | None
    gate: int | None

    def compute(self, y: Tensor, held: Held | None) -> Tensor:
        """[batch, tokens, width] -> a new one; differentiable."""
        for stage in self.stages:
            y = stage.compute(y, held)
        return y

    def macs(self, batch: int, tokens: int, width: int, context: int) -> int:
        """Multiply-accumulates; `context` tokens are read by cross-attention."""
        return sum(stage.macs(batch, tokens, columns, context) for stage, columns in walk(self.stages, width))


@dataclass(frozen=True, slots=True)
class Inputs:
    """A forward call's arguments, read.

    Attributes:
        sample: [batch, channels, height, width].
        timestep: [batch], the same for all.
        conditioning: what else the output depends on; tensors whose first dimension is the batch.
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
        around: what of `fixed` is in one block.
    """

    branches: tuple[int, ...]
    fixed: int
    around: int = 0


class Adapter(ABC):
    """One supported model. Constructing it checks the model and changes nothing.

    Attributes:
        model_class: diffusers class name.
        branches: names of a layer's branches, in the order they run.
        end_launches: ops that `embed` and `finish` launch, views not counted.
        layers: number of transformer blocks, L.
        width: channels of the token stream.
        in_channels: channels of a sample.
        out_channels: channels of the output, learned variances included.
        rows: modulation rows of a step: the shifts, scales and gates of all branches and of the head's norm.
        contexts: sets of keys and values that cross-attention reads.
    """

    model_class: ClassVar[str]
    branches: ClassVar[tuple[str, ...]]
    end_launches: ClassVar[int]
    model: nn.Module
    layers: int
    width: int
    in_channels: int
    out_channels: int
    rows: int
    contexts: int = 0

    @abstractmethod
    def layer(self, number: int, join: bool) -> list[Branch]:
        """The B branches of a layer in the order they run, on the model's own weights.

        Args:
            join: query, key and value weights are made neighbours in memory (the model's parameters become views of one
                storage), so that they run as one GEMM and still follow `load_state_dict`. Otherwise what would be
                joined is on the meta device, for counts.
        """

    @abstractmethod
    def head_norm(self) -> Norm:
        """What prepares y for `finish`."""

    def bind(self) -> tuple[list[Branch], Norm]:
        """The L * B branches in the order they run, their weights joined, and the head's norm."""
        return [branch for i in range(self.layers) for branch in self.layer(i, join=True)], self.head_norm()

    @abstractmethod
    def modulate(self, timesteps: Tensor, conditioning: tuple[Tensor, ...], out: Tensor) -> None:
        """Fill the modulation rows of n steps at once.

        Args:
            timesteps: [n].
            conditioning: as in `Inputs`.
            out: [n, batch, rows, width].
        """

    def context_tokens(self, conditioning: tuple[Tensor, ...]) -> int:
        """Tokens that cross-attention reads, 0 without it."""
        return 0

    def hold(self, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> Held:
        """What stages read of a run, still empty. `context`: tokens that cross-attention reads."""
        return Held(
            torch.empty(self.contexts, 2, batch, context, self.width, dtype=dtype, device=device),
            torch.empty(batch, 1, 1, context, dtype=dtype, device=device),
        )

    def encode(self, conditioning: tuple[Tensor, ...], held: Held) -> None:  # noqa: B027
        """Fill what stages read, the same at all steps of a run. Nothing to do without cross-attention.

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
    def tokens(self, height: int, width: int) -> int:
        """Length of the token stream for such a sample. Raises ValueError if it does not fit the patches."""

    @abstractmethod
    def embed(self, sample: Tensor, out: Tensor | None = None) -> Tensor:
        """[batch, channels, height, width] -> `out` [batch, tokens, width]; differentiable where there is no `out`."""

    @abstractmethod
    def finish(self, y: Tensor, height: int, width: int) -> Tensor:
        """The head, after its norm: [batch, tokens, width] -> a new [batch, out channels, height, width]."""

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

    def branch_macs(self, batch: int, tokens: int, context: int = 0) -> tuple[int, ...]:
        """Those of a layer's branches as their stages count them; zeros for a model without layers."""
        if not self.layers:
            return (0,) * len(self.branches)
        return tuple(branch.macs(batch, tokens, self.width, context) for branch in self.layer(0, join=False))

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise ValueError unless `schedule` is for such a model."""
        for what, expected, got in [
            ("model", self.model_class, schedule.model),
            ("layers", self.layers, schedule.layers),
            ("branches", self.branches, schedule.branches),
        ]:
            if expected != got:
                raise ValueError(f"schedule does not fit the model: {what} expected {expected}, got {got}")


class UnsupportedModelError(TypeError):
    """The model is of a class, or built in a way, that no adapter can express."""


def join_rows(parameters: list[nn.Parameter]) -> Tensor:
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


def expect_exactly(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    """A subclass or wrapper (quantised, LoRA, parallel) computes something else than `kind`: refuse it by name."""
    if type(module) is not kind:
        raise UnsupportedModelError(
            f"{name}: expected a plain {kind.__name__}, got {type(module).__module__}.{type(module).__name__}; "
            "merge or remove what replaced it before compiling"
        )
    for parameter in module.parameters(recurse=False):
        if is_traceable_wrapper_subclass(parameter):
            raise UnsupportedModelError(f"{name}: expected plain tensors, got {type(parameter.data).__name__}")


def expect_plain_norm(module: nn.Module, name: str) -> None:
    """A LayerNorm without weight and bias, as the blocks' modulation needs it."""
    expect_exactly(module, nn.LayerNorm, name)
    if module.weight is not None:
        raise UnsupportedModelError(f"{name}: expected a LayerNorm without weight and bias, got an affine one")
