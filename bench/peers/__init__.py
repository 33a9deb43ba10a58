"""Peers by a short name: each file is one of them."""

from __future__ import annotations

from . import (
    cache_dit,
    compiled,
    eager,
    faster_cache,
    fewer_steps,
    first_block,
    mag_cache,
    ours,
    pyramid,
    samplers,
    sea_cache,
    smooth_cache,
    taylorseer,
)
from .base import Peer

PEERS: dict[str, Peer] = {
    "eager": eager.PEER,
    "learned": ours.LEARNED,
    "converged": ours.CONVERGED,
    "uniform": ours.UNIFORM,
    "output": ours.OUTPUT,
    "fewer": fewer_steps.PEER,
    "samplers": samplers.PEER,
    "compile": compiled.WHOLE,
    "compile-blocks": compiled.BLOCKS,
    "taylorseer": taylorseer.PEER,
    "first-block": first_block.PEER,
    "mag-cache": mag_cache.PEER,
    "sea-cache": sea_cache.PEER,
    "pyramid": pyramid.PEER,
    "faster-cache": faster_cache.PEER,
    "cache-dit": cache_dit.PEER,
    "smooth-cache": smooth_cache.PEER,
}
PEERS |= {
    f"{name}-compiled": compiled.under_compile(PEERS[name], *settings)
    for name, settings in {
        "fewer": (),
        "samplers": ("dpmsolver++ 10", "unipc 10"),
        "taylorseer": ("order 1, interval 2", "order 1, interval 3"),
        "first-block": ("0.05",),
        "mag-cache": ("0.12",),
        "sea-cache": ("0.25",),
        "pyramid": ("every 2",),
        "faster-cache": ("every 2",),
        "cache-dit": ("DBCache 0.05", "mask, TaylorSeer, every 2"),
        "smooth-cache": ("0.2",),
    }.items()
}

__all__ = ["PEERS", "Peer"]
