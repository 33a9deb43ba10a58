"""The instructions a schedule is lowered to. Plain data: no tensors, no model.

A `Program` runs branches one by one (level branches); a `ForwardProgram` steers the model's own forward (levels blocks
and output).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

STREAM = -1  # what a Gap starts from is the stream as it is


@dataclass(frozen=True, slots=True)
class Term:
    """One addend of a Gap: weight * gate(entry, this step) * slot.

    Attributes:
        entry: the branch whose value the slot holds; None where it holds a stream, which has no gate.
        channel: number of this step's row of weights per channel that multiplies the gate; None for 1.
    """

    slot: int
    weight: float
    entry: int | None
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Addend:
    """One addend of a reused output or stream: weight * slot.

    Attributes:
        of: what the slot is of: ``"value"``, the stream before the entry when that was computed (``"before"``), or the
            stream before it now (``"now"``, which has no slot).
        channel: number of the row of weights per channel in place of `weight`, of all steps; None for none.
    """

    slot: int
    weight: float
    of: str = "value"
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """x += sum of `terms`; then y = modulate(norm(x)) for branch `norm` (past the last: the model's head).

    Attributes:
        start: what x is before: `STREAM`, a slot, or None for 0.
    """

    terms: tuple[Term, ...]
    norm: int
    start: int | None = STREAM


@dataclass(frozen=True, slots=True)
class Compute:
    """Run branch `entry` on y, writing its output straight into `slot`."""

    entry: int
    slot: int


@dataclass(frozen=True, slots=True)
class Step:
    """One denoiser call: each Gap prepares y for the Compute that follows it, `last` for the model's head.

    Attributes:
        keep: where the model's output goes for later steps to reuse; None if none does.
        before: the slot that the sample is embedded into, if not into x: what reuse of the trunk reads of this step's
            stream before the first branch, now or later.
        after: the slot that the stream after the last branch goes to for later steps to reuse the trunk.
    """

    body: tuple[tuple[Gap, Compute], ...]
    last: Gap
    keep: int | None = None
    before: int | None = None
    after: int | None = None

    @property
    def embeds(self) -> bool:
        """Whether the sample is read: not where the trunk is reused without a carry."""
        return self.before is not None or self.gaps[0].start == STREAM

    @property
    def gaps(self) -> tuple[Gap, ...]:
        return (*(gap for gap, _ in self.body), self.last)


@dataclass(frozen=True, slots=True)
class ReuseOutput:
    """One denoiser call that runs nothing of the model: the sum of weight * kept output over `terms`."""

    terms: tuple[Addend, ...]
    body: ClassVar[tuple[()]] = ()
    gaps: ClassVar[tuple[()]] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """A lowered schedule. Entry e is branch e % B of layer e // B; `entries` (= L B) stands for the model's head.

    Attributes:
        trunks: steps that reuse the trunk, or None where it is no entry.
        outputs: slots for the model's outputs.
        channels: rows of weights per channel, float32 [steps, most rows of a step, width], or None.
        output_channels: float32 [rows, channels of the output], or None.
    """

    steps: tuple[Step | ReuseOutput, ...]
    entries: int
    slots: int
    outputs: int = 0
    channels: np.ndarray | None = field(default=None, compare=False)
    output_channels: np.ndarray | None = field(default=None, compare=False)
    trunks: frozenset[int] | None = None

    @property
    def computed(self) -> int:
        """Entries computed: branches, and the trunk where it is an entry and branches run."""
        run = 0 if self.trunks is None else sum(isinstance(step, Step) for step in self.steps) - len(self.trunks)
        return run + sum(len(step.body) for step in self.steps)

    @property
    def terms(self) -> int:
        """Reused values added up, outputs not counted."""
        return sum(len(gap.terms) for step in self.steps for gap in step.gaps)

    @property
    def distinct_steps(self) -> int:
        """Steps that differ in instructions or slots: as many graphs as a capture of the run needs."""
        return len(set(self.steps))


@dataclass(frozen=True, slots=True)
class Keep:
    """The entry is computed; its value goes to `slot`, if anything reuses it."""

    slot: int | None


@dataclass(frozen=True, slots=True)
class Combine:
    """The entry is reused: the sum over `terms`."""

    terms: tuple[Addend, ...]

    @property
    def carries(self) -> bool:
        """Whether the stream before the entry is among them."""
        return any(term.of == "now" for term in self.terms)


@dataclass(frozen=True, slots=True)
class ForwardStep:
    """One call of the model's own forward.

    Attributes:
        entries: what becomes of each group of blocks.
        keep: where the model's output goes for later steps to reuse; None if none does.
    """

    entries: tuple[Keep | Combine, ...]
    keep: int | None = None


@dataclass(frozen=True, slots=True)
class ForwardProgram:
    """A lowered schedule of level blocks or output.

    Attributes:
        slots: values held of each entry.
        carries: whether the stream before each entry is held beside each value.
        outputs: slots for the model's outputs.
        channels: rows of weights per channel, float32 [rows, width], or None.
        output_channels: likewise of outputs.
    """

    steps: tuple[ForwardStep | ReuseOutput, ...]
    slots: tuple[int, ...]
    carries: tuple[bool, ...]
    outputs: int = 0
    channels: np.ndarray | None = field(default=None, compare=False)
    output_channels: np.ndarray | None = field(default=None, compare=False)

    @property
    def computed(self) -> int:
        return sum(isinstance(e, Keep) for step in self.steps if isinstance(step, ForwardStep) for e in step.entries)

    @property
    def distinct_steps(self) -> int:
        """Steps that differ in instructions or slots."""
        return len(set(self.steps))
