"""The instructions a schedule is lowered to. Plain data: no tensors, no model.

A `Program` runs branches one by one (level branches); a `ForwardProgram` steers the model's own forward (levels blocks
and output).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Term:
    """One addend of a Gap: weight * gate(entry, this step) * slot."""

    slot: int
    weight: float
    entry: int


@dataclass(frozen=True, slots=True)
class Gap:
    """x += sum of `terms`; then y = modulate(norm(x)) for branch `norm` (past the last: the model's head)."""

    terms: tuple[Term, ...]
    norm: int


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
    """

    body: tuple[tuple[Gap, Compute], ...]
    last: Gap
    keep: int | None = None

    @property
    def gaps(self) -> tuple[Gap, ...]:
        return (*(gap for gap, _ in self.body), self.last)


@dataclass(frozen=True, slots=True)
class ReuseOutput:
    """One denoiser call that runs nothing of the model: the sum of weight * kept output over `terms`."""

    terms: tuple[tuple[int, float], ...]
    body: ClassVar[tuple[()]] = ()
    gaps: ClassVar[tuple[()]] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """A lowered schedule. Entry e is branch e % B of layer e // B; `entries` (= L B) stands for the model's head."""

    steps: tuple[Step | ReuseOutput, ...]
    entries: int
    slots: int
    outputs: int = 0  # slots for the model's outputs

    @property
    def computed(self) -> int:
        return sum(len(step.body) for step in self.steps)

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
    """The entry is reused: the sum of weight * value over `terms`, plus carry * (x - the same over `inputs`).

    x is the stream before the entry, and `inputs` are the streams before it that are kept beside its values.
    """

    terms: tuple[tuple[int, float], ...]
    carry: float = 0.0
    inputs: tuple[tuple[int, float], ...] = ()


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
    """

    steps: tuple[ForwardStep | ReuseOutput, ...]
    slots: tuple[int, ...]
    carries: tuple[bool, ...]
    outputs: int = 0

    @property
    def computed(self) -> int:
        return sum(isinstance(e, Keep) for step in self.steps if isinstance(step, ForwardStep) for e in step.entries)

    @property
    def distinct_steps(self) -> int:
        """Steps that differ in instructions or slots."""
        return len(set(self.steps))
