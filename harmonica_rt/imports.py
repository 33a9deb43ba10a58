"""Other methods' static plans as schedules: step masks, ECAD's and SmoothCache's files. Nothing read here runs code."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .decisions import S
from .layout import BLOCKS, Group, shape_of_entries
from .models import adapt_at_branches, layout_of, own_model
from .models.blocks import block_lists
from .reading import read_json, short

if TYPE_CHECKING:
    from torch import nn

COMPONENTS = {"attn1": "attn", "attn": "attn", "attn2": "cross_attn", "cross_attn": "cross_attn"}
COMPONENTS |= {"ff": "mlp", "mlp": "mlp"}  # what others call our branches
ECAD_BRANCHES = ("attn1", "attn2", "ff")
ECAD_LISTS = {  # of Flux: what blocks are called by, their components
    "transformer_blocks": ("", ("full_attn", "full_ff", "full_ff_context")),
    "single_transformer_blocks": ("single_", ("single_attn", "single_proj_mlp", "single_proj_out")),
}


def from_mask(
    kind: type[S], mask: Any, model: nn.Module, level: str, order: int, carry: float, fields: dict[str, Any]
) -> S:
    """`Schedule.from_mask`."""
    if isinstance(mask, str):
        digits = re.sub(r"[\s,]", "", mask)
        if not digits or set(digits) - set("01"):
            raise ValueError(f"mask: expected digits 0 and 1, one a step, got {short(mask)}")
        mask = [digit == "1" for digit in digits]
    steps = np.asarray(mask)
    if steps.ndim != 1 or not len(steps) or not np.isin(steps, (0, 1)).all():
        raise ValueError(f"mask: expected 0 or 1 for each step, got {short(mask)}")
    steps = steps.astype(bool)
    if not steps[0]:
        raise ValueError("mask: expected 1 at step 0, where nothing is cached yet, got 0")
    layout = layout_of(model, level)
    shape = shape_of_entries(layout.groups)
    compute = np.broadcast_to(steps.reshape(-1, *(1,) * len(shape)), (len(steps), *shape))
    own: dict[str, Any] = {"order": order, "note": "step mask"}
    if layout.level == "output":
        own["output"] = ~steps
    elif layout.level == "blocks":
        own["carry"] = np.where(compute, 0.0, carry)
    return kind(compute, **layout._asdict(), **own | fields)


def from_ecad(kind: type[S], path: str | os.PathLike[str], model: nn.Module, fields: dict[str, Any]) -> S:
    """`Schedule.from_ecad`."""
    plan = read_json(path, "schedule of ECAD")
    plan = plan.get("cache_schedule") if isinstance(plan, dict) else None
    plan = plan if isinstance(plan, dict) else {}
    steps = plan.get("schedule")
    if not isinstance(steps, dict) or not steps or not all(isinstance(blocks, dict) for blocks in steps.values()):
        raise ValueError(f'{path}: expected steps under "cache_schedule", "schedule" (ECAD), got {short(steps)}')
    if not all(key.isdecimal() and len(key) < 6 for key in steps) or sorted(map(int, steps)) != list(range(len(steps))):
        raise ValueError(f"{path}: expected steps 0 to {len(steps) - 1}, got {short(list(steps))}")
    rows = [blocks for _, blocks in sorted(steps.items(), key=lambda step: int(step[0]))]
    own: dict[str, Any] = {"order": 0, "note": f"ECAD, {plan.get('name')}"} | fields
    if "single_0" not in rows[0]:
        adapter = adapt_at_branches(model)
        named = {COMPONENTS[component]: component for component in ECAD_BRANCHES}
        if set(adapter.branches) != set(named):
            raise ValueError(
                f"{path}: its blocks have {', '.join(ECAD_BRANCHES)}, but {adapter.model_class} has branches "
                f"{', '.join(adapter.branches)}"
            )
        compute = _ecad(path, rows, adapter.layers, "", tuple(named[branch] for branch in adapter.branches))
        _check_blocks(path, rows, {str(layer) for layer in range(adapter.layers)})
        compute[0] = True  # ECAD computes what it has not cached, whatever the file says
        return kind(compute, model=adapter.model_class, branches=adapter.branches, **own)
    lists = block_lists(own_model(model))
    if set(lists) != set(ECAD_LISTS):
        expected = " and ".join(ECAD_LISTS)
        raise ValueError(
            f"{path}: expected a model with {expected} (Flux), got {type(own_model(model)).__name__} with "
            f"{' and '.join(lists) or 'no lists of blocks'}"
        )
    columns, known = [], set()
    for name, blocks in lists.items():
        prefix, components = ECAD_LISTS[name]
        columns.append(_ecad(path, rows, len(blocks), prefix, components).any(-1))
        known |= {f"{prefix}{block}" for block in range(len(blocks))}
    _check_blocks(path, rows, known)
    compute = np.concatenate(columns, axis=1)
    compute[0] = True
    groups = [Group(name, len(blocks), (BLOCKS,)) for name, blocks in lists.items()]
    carry = np.where(compute, 0.0, 1.0)  # what blocks add is kept, as of their components
    model_class = type(own_model(model)).__name__
    return kind(compute, model=model_class, level="blocks", groups=groups, **{"carry": carry} | own)


def _ecad(path: Any, rows: list[Any], blocks: int, prefix: str, components: tuple[str, ...]) -> np.ndarray:
    """bool [T, blocks, components], True where computed."""
    compute = np.zeros((len(rows), blocks, len(components)), dtype=bool)
    for step, row in enumerate(rows):
        for block in range(blocks):
            given = row.get(f"{prefix}{block}")
            if not isinstance(given, dict) or not set(components) <= set(given):
                raise ValueError(
                    f"{path}: step {step}, block {prefix}{block}: expected {', '.join(components)}, got {short(given)}"
                )
            if extra := [name for name, value in given.items() if name not in components and value]:
                raise ValueError(
                    f"{path}: step {step}, block {prefix}{block}: expected no more than {', '.join(components)}, "
                    f"got {extra[0]}"
                )
            values = [given[name] for name in components]
            if not all(isinstance(value, bool) for value in values):
                raise ValueError(
                    f"{path}: step {step}, block {prefix}{block}: expected true or false, got {short(values)}"
                )
            compute[step, block] = values
    return compute


def _check_blocks(path: Any, rows: list[Any], known: set[str]) -> None:
    for step, row in enumerate(rows):
        if extra := sorted(set(row) - known):
            raise ValueError(f"{path}: step {step}: expected {len(known)} blocks as the model has, got {extra[0]} too")


def from_smoothcache(kind: type[S], path: str | os.PathLike[str], model: nn.Module, fields: dict[str, Any]) -> S:
    """`Schedule.from_smoothcache`."""
    lists = read_json(path, "schedule of SmoothCache")
    if not isinstance(lists, dict) or not lists or not all(isinstance(steps, list) for steps in lists.values()):
        raise ValueError(f"{path}: expected a list of 0 and 1 for each component (SmoothCache), got {short(lists)}")
    adapter = adapt_at_branches(model)
    lengths = {name: len(steps) for name, steps in lists.items()}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise ValueError(f"{path}: expected as many steps, one or more, for each component, got {short(lengths)}")
    compute = np.ones((max(lengths.values()), adapter.layers, len(adapter.branches)), dtype=bool)
    given: set[tuple[int, int]] = set()
    for name, steps in lists.items():
        component, dash, layer = name.partition("-")
        branch = COMPONENTS.get(component)
        numbered = not dash or (layer.isdecimal() and len(layer) < 6 and int(layer) < adapter.layers)
        if branch not in adapter.branches or not numbered:
            raise ValueError(
                f"{path}: expected components of {adapter.model_class}, '<{'|'.join(adapter.branches)}>' or "
                f"'<...>-<layer, 0 to {adapter.layers - 1}>', got {short(name)}"
            )
        if any(isinstance(value, bool) or value not in (0, 1) for value in steps):
            raise ValueError(f"{path}: {name}: expected 0 or 1 for each step, got {short(steps)}")
        column = adapter.branches.index(branch)
        entries = {(row, column) for row in ([int(layer)] if dash else range(adapter.layers))}
        if given & entries:
            raise ValueError(f"{path}: expected one list for each layer's {branch}, got a second in {short(name)}")
        given |= entries
        for row, _ in entries:
            compute[:, row, column] = np.array(steps) == 1
    if not compute[0].all():
        raise ValueError(f"{path}: expected 1 at step 0 of each component, where nothing is cached yet, got 0")
    own: dict[str, Any] = {"order": 0, "note": "SmoothCache"} | fields
    return kind(compute, model=adapter.model_class, branches=adapter.branches, **own)
