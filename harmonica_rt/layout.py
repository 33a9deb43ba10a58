"""What a schedule decides about: a model's entries, in named groups, at one of three levels. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVELS = ("branches", "blocks", "output")
TRUNK = "trunk"  # the one group that is all blocks of all lists
BLOCKS = "blocks"  # what is computed or reused of a group at level blocks, and of the trunk


class Group(NamedTuple):
    """A run of alike entries, `layers` x `branches`.

    At level branches the blocks of one list of the model, `name`, and the residual functions of each; behind them may
    stand the whole trunk, `WHOLE`. At level blocks the `layers` groups of consecutive blocks that the list `name` is
    split into, with one branch, ``"blocks"``, or the whole trunk.
    """

    name: str
    layers: int
    branches: tuple[str, ...]

    @property
    def entries(self) -> int:
        return self.layers * len(self.branches)


WHOLE = Group(TRUNK, 1, (BLOCKS,))  # its entry is the stream after the last block


class Panel(NamedTuple):
    """One branch of one group, as files, text and pictures show it; `entries` are its flat numbers, a layer each."""

    title: str
    entries: np.ndarray


def count_entries(groups: Sequence[Group]) -> int:
    return sum(group.entries for group in groups)


def shape_of_entries(groups: Sequence[Group]) -> tuple[int, ...]:
    """[L, B] of one group, [entries] of none or several."""
    return (groups[0].layers, len(groups[0].branches)) if len(groups) == 1 else (count_entries(groups),)


def trunk_beside(groups: Sequence[Group]) -> bool:
    """Whether the last entry is the trunk that all others lie in."""
    return len(groups) > 1 and groups[-1] == WHOLE


def left_alone(compute: np.ndarray, output: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
    """Entries that a step neither computes nor reuses, bool shaped as `compute`.

    Args:
        compute: bool [T, ...].
        output: bool [T], steps that reuse the model's output, which leave all entries alone. Those that reuse the trunk
            leave all others alone.
    """
    alone = np.zeros(compute.shape, dtype=bool)
    alone[output] = True
    if trunk_beside(groups):
        alone[:, :-1] |= ~compute[:, -1:]
    return alone


def panels(groups: Sequence[Group]) -> Iterator[Panel]:
    """In reading order: a group's branches, each with all its layers."""
    start = 0
    for group in groups:
        kinds = len(group.branches)
        for b, branch in enumerate(group.branches):
            title = branch if len(groups) == 1 and branch != BLOCKS else group.name
            title = f"{group.name}.{branch}" if len(groups) > 1 and kinds > 1 else title
            yield Panel(title, start + b + kinds * np.arange(group.layers))
        start += group.entries


def reading_order(groups: Sequence[Group]) -> np.ndarray:
    """Flat numbers of all entries as `panels` goes through them."""
    return np.concatenate([panel.entries for panel in panels(groups)] or [np.zeros(0, dtype=int)])


def split_evenly(blocks: int, groups: int) -> list[range]:
    """`blocks` consecutive blocks in `groups` runs whose lengths differ by at most one, longer ones first."""
    return [range(part[0], part[-1] + 1) for part in np.array_split(np.arange(blocks), min(groups, blocks))]


def check_groups(level: Any, groups: Any) -> tuple[str, tuple[Group, ...]]:
    """A schedule's level and groups, or TypeError, ValueError."""
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {LEVELS}, got {level!r}")
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise TypeError(f"groups: expected a sequence of (name, layers, branches), got {type(groups).__name__}")
    checked = tuple(_check_group(group) for group in groups)
    if len({group.name for group in checked}) != len(checked):
        raise ValueError(f"groups: expected distinct names, got {tuple(group.name for group in checked)}")
    if (level == "output") != (not checked):
        expected = "no groups" if level == "output" else "at least one group"
        raise ValueError(f"groups: expected {expected} at level {level}, got {len(checked)}")
    if any(group.name == TRUNK for group in checked):
        alone, place = ([WHOLE], "alone") if level == "blocks" else ([*checked[:-1], WHOLE], "behind others")
        if list(checked) != alone or (level == "branches" and len(checked) == 1):
            raise ValueError(f"groups: expected {tuple(WHOLE)} {place}, got {tuple(map(tuple, checked))}")
    for group in checked:
        if level == "blocks" and group.branches != (BLOCKS,):
            raise ValueError(f"groups: expected branches ('{BLOCKS}',) at level blocks, got {group.branches}")
    return level, checked


def _check_group(group: Any) -> Group:
    if not isinstance(group, Sequence) or isinstance(group, str) or len(group) != 3:
        raise TypeError(f"groups: expected (name, layers, branches), got {group!r}")
    name, layers, branches = group
    if not isinstance(name, str) or not name:
        raise TypeError(f"groups: expected a name, got {name!r}")
    if isinstance(layers, bool) or not isinstance(layers, (int, np.integer)) or layers < 1:
        raise ValueError(f"groups: expected a positive number of layers of {name}, got {layers!r}")
    return Group(name, int(layers), check_branches(branches))


def check_branches(branches: Any) -> tuple[str, ...]:
    named = isinstance(branches, Sequence) and not isinstance(branches, str)
    if not named or not branches or not all(isinstance(b, str) and b for b in branches):
        raise TypeError(f"branches: expected a sequence of names, got {branches!r}")
    if len(set(branches)) != len(branches):
        raise ValueError(f"branches: expected distinct names, got {tuple(branches)}")
    return tuple(branches)
