"""The blocks of any denoiser: its lists of modules."""

from __future__ import annotations

from typing import Any

from torch import nn

NOT_A_TRUNK = ("down_blocks", "up_blocks")  # a UNet's: what is between them is in no list


def block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The blocks of each list that is a direct child, by its name. Empty where there is none, as in a UNet.

    Where the model itself has none, those of its children, by dotted names (UniDiffuser's U-ViT is one). A ModuleDict
    in a list stands for what it holds, a child of a block's class for a list of it (a U-ViT's middle). Lists of
    projections, which have one part or none, are no blocks.
    """
    if _is_of_peft(model):
        return block_lists(_inner(model))
    if hasattr(model, "_orig_mod") or any(hasattr(model, name) for name in NOT_A_TRUNK):
        return {}  # of a whole that torch.compile took, forward runs no block of its own
    lists = {name: _blocks(child) for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
    kinds = {type(block) for blocks in lists.values() for block in blocks}
    found = {
        name: lists.get(name) or [child]
        for name, child in model.named_children()
        if lists.get(name) or type(child) in kinds
    }
    if found:
        return found
    children = [(name, child) for name, child in model.named_children() if not isinstance(child, nn.ModuleList)]
    return {f"{name}.{inner}": blocks for name, child in children for inner, blocks in block_lists(child).items()}


def _blocks(child: nn.ModuleList) -> list[nn.Module]:
    """Of a list; none if it holds something else."""
    blocks = [part for block in child for part in _parts(block)]
    return blocks if all(_has_parts(block) for block in blocks) else []


def class_name(model: nn.Module) -> str:
    """By which schedules know `model`: that of what torch.compile or peft wrapped, not of the wrapper."""
    if _is_of_peft(model):
        return class_name(_inner(model))
    return type(getattr(model, "_orig_mod", model)).__name__


def _is_of_peft(model: nn.Module) -> bool:
    return type(model).__module__.startswith("peft.") and hasattr(model, "get_base_model")


def _inner(model: Any) -> nn.Module:
    """What peft wrapped."""
    return model.get_base_model()


def no_blocks(model: nn.Module) -> str:
    """Why `block_lists` is empty."""
    if hasattr(model, "_orig_mod"):
        return f"{class_name(model)} is compiled whole by torch.compile and calls no blocks (compile_repeated_blocks)"
    return f"{class_name(model)} has no lists of blocks"


def _parts(block: nn.Module) -> list[nn.Module]:
    return list(block.values()) if isinstance(block, nn.ModuleDict) else [block]


def _has_parts(block: nn.Module) -> bool:
    """Whether it is made of several modules, itself or what it wraps (HiDream's blocks hold one, T5's a list)."""
    children = list(block.children())
    return len(children) > 1 or (len(children) == 1 and _has_parts(children[0]))
