"""A plan's first forward: what each group of blocks returns, and whether that can stand for the blocks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .counting import CountMacs, uncountable
from .kept_streams import Blank, ForwardChanged, expect_tensors, is_stream
from .models import UnsupportedModelError
from .program import ForwardProgram, ForwardStep, Keep
from .steered_forward import Arguments, SteeredForward, copied_tensors

# What the output may change by when kept streams stand for the groups that just made them
SAME = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class FirstForward:
    """Finds out which blocks each group calls and what of it is kept; `run` settles the entries of `forward`.

    Groups are then reused on the same input, each set of them that the program reuses, all that should not matter being
    NaN: an output that is not the same depends on more than the streams after the groups. Values that were still held
    when their group was over are skip connections, those returned before another group's call are read there: both are
    kept beside its streams; if that does not help, the model cannot be reused so.

    Attributes:
        macs: multiply-accumulates of one forward, those of each entry within it; None where they cannot be counted.
        uncounted: why not.
    """

    def __init__(self, forward: SteeredForward, program: ForwardProgram, device: torch.device) -> None:
        self.forward, self.program, self.device, self.entries = forward, program, device, forward.entries
        self.macs: tuple[int, dict[int, int]] | None = None
        self.uncounted: str | None = None

    def run(self, arguments: Arguments) -> Any:
        """The model's output. Raises UnsupportedModelError where groups cannot be reused."""
        spare = copied_tensors(arguments) if self.entries else arguments  # models write into what they are given
        try:
            output, between = self._observe(arguments)
            if self.entries:
                with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                    self._check(output, between, spare)
        except BaseException:  # the next call learns anew
            for entry in self.entries.values():
                entry.forget(set())
            raise
        return output

    def _check(self, output: Any, between: dict[int, set[tuple[int, int]]], spare: Arguments) -> None:
        """Raise UnsupportedModelError unless groups can stand for their blocks, `between` kept too if need be."""
        leaves, spec = tree_flatten(output)
        expect_tensors("the model's output", leaves)
        if not any(map(is_stream, leaves)):
            raise UnsupportedModelError(f"expected tensors in the model's output, got {spec}")
        if self._is_same(output, spare):
            return
        for number, entry in self.entries.items():
            entry.forget(between[number])
        self._observe(copied_tensors(spare))
        if not self._is_same(output, spare):
            names = ", ".join(entry.name for entry in self.entries.values())
            raise UnsupportedModelError(
                f"expected an output that depends on nothing but the streams after {names}, got another one when "
                "these were put in place of the blocks: level 'output' takes this model"
            )

    def _observe(self, arguments: Arguments) -> tuple[Any, dict[int, set[tuple[int, int]]]]:
        """Learn from each call of a forward: its output, and what of each entry others may read."""
        between: dict[int, set[tuple[int, int]]] = {number: set() for number in self.entries}
        held: dict[int, set[tuple[int, int]]] = {}
        calls: list[int] = []
        self.uncounted = uncountable(self.forward.model)
        counter = CountMacs() if self.uncounted is None else None
        macs = dict.fromkeys(self.entries, 0)

        def handle(number: int, *call: Any) -> Any:
            if calls and calls[-1] != number:
                left = self.entries[calls[-1]]
                held[calls[-1]] = left.held()
                between[calls[-1]] |= left.returned()
            calls.append(number)
            before = 0 if counter is None else counter.macs
            result = self.entries[number].learn(*call)
            macs[number] += 0 if counter is None else counter.macs - before
            held[number] = self.entries[number].held()
            return result

        counting = contextlib.nullcontext() if counter is None else counter
        with counting:
            output = self.forward.watched(arguments, handle)
        for entry in self.entries.values():
            if not entry.calls:
                raise UnsupportedModelError(
                    f"expected the model's forward to call the blocks of {entry.name}, got no call of any: level "
                    "'output' takes this model"
                )
        self.macs = None if counter is None else (counter.macs, macs)
        return output, {number: between[number] | held[number] for number in self.entries}

    def _is_same(self, output: Any, arguments: Arguments) -> bool:
        scratch: dict[Blank, Tensor] = {}
        for number, entry in self.entries.items():
            entry.settle(self.program.slots[number], scratch)
        for t in scratch.values():
            t.fill_(torch.nan)
        same = all(self._is_same_reusing(numbers, output, copied_tensors(arguments)) for numbers in self._sets())
        for t in scratch.values():
            t.zero_()
        return same

    def _sets(self) -> list[frozenset[int]]:
        """Entries to reuse together in a check: all sets that occur, or each alone if that is fewer.

        What nothing outside a group reads if it alone is reused, nothing reads in any set.
        """
        steps = [step for step in self.program.steps if isinstance(step, ForwardStep)]
        sets = {frozenset(k for k in self.entries if not isinstance(step.entries[k], Keep)) for step in steps}
        return min(sorted(sets - {frozenset()}, key=sorted), [frozenset([k]) for k in self.entries], key=len)

    def _is_same_reusing(self, numbers: frozenset[int], output: Any, arguments: Arguments) -> bool:
        """Whether what is used stays with groups `numbers` reused: the output, what others keep, what is carried."""
        pairs: list[tuple[Any, Any]] = []

        def handle(number: int, run: Any, *call: Any) -> Any:
            entry = self.entries[number]
            if entry.carries and entry.done == 0:
                pairs.extend((a, b.clone()) for a, b in zip(entry.x, entry.before(*call)))
            if number in numbers:
                return entry.reuse(None, *call)
            made, result = entry.done, entry.compute(None, run, *call)
            leaves = tree_flatten(result)[0]
            pairs.extend((entry.latest[key], leaves[key[1]].clone()) for key in entry.kept if key[0] == made)
            return result

        try:
            reused = self.forward(arguments, handle)
        except (UnsupportedModelError, ForwardChanged):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                "expected a forward that needs nothing of its blocks but what they return, got "
                f"{type(error).__name__}: {error}; level 'output' takes this model"
            ) from error
        pairs += zip(tree_flatten(output)[0], tree_flatten(reused)[0], strict=True)
        return all(_close(a, b) for a, b in pairs if is_stream(a))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    wide = torch.promote_types(a.dtype, torch.float32)
    share = SAME.get(a.dtype, SAME[torch.float32])
    a, b = a.to(wide), b.to(wide)
    finite = a[a.isfinite()].abs()
    tolerance = share * finite.max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)
