"""The blocks of any denoiser: the lists of modules that are its direct children."""

from __future__ import annotations

from torch import nn

NOT_A_TRUNK = ("down_blocks", "up_blocks")  # a UNet's: what is between them is in no list


def block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The blocks of each list, by the list's name. Empty where there is none, as in a UNet.

    A ModuleDict in a list stands for what it holds. Lists of projections, which have no parts, are no blocks.
    """
    if hasattr(model, "_orig_mod"):  # torch.compile of the whole: its forward runs no block of its own
        return {}
    found = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and name not in NOT_A_TRUNK:
            blocks = [part for block in child for part in _parts(block)]
            if blocks and all(sum(1 for _ in block.children()) > 1 for block in blocks):
                found[name] = blocks
    return {} if any(hasattr(model, name) for name in NOT_A_TRUNK) else found


def _parts(block: nn.Module) -> list[nn.Module]:
    return list(block.values()) if isinstance(block, nn.ModuleDict) else [block]
