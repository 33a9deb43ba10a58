"""The blocks of any denoiser: the lists of modules that are its direct children."""

from __future__ import annotations

from torch import nn

NOT_A_TRUNK = ("down_blocks", "up_blocks")  # a UNet's: what is between them is in no list


def block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The blocks of each list, by the list's name. Empty where there is none, as in a UNet.

    A ModuleDict in a list stands for what it holds. Lists of projections, which have one part or none, are no blocks.
    """
    if hasattr(model, "_orig_mod"):  # torch.compile of the whole: its forward runs no block of its own
        return {}
    found = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and name not in NOT_A_TRUNK:
            blocks = [part for block in child for part in _parts(block)]
            if blocks and all(_has_parts(block) for block in blocks):
                found[name] = blocks
    return {} if any(hasattr(model, name) for name in NOT_A_TRUNK) else found


def _parts(block: nn.Module) -> list[nn.Module]:
    return list(block.values()) if isinstance(block, nn.ModuleDict) else [block]


def _has_parts(block: nn.Module) -> bool:
    """Whether it is made of several modules, itself or what it wraps (HiDream's blocks hold one, T5's a list)."""
    children = list(block.children())
    return len(children) > 1 or (len(children) == 1 and _has_parts(children[0]))
