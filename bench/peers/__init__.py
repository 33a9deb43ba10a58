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
    "uniform": ours.UNIFORM,
    "output": ours.OUTPUT,
    "fewer": fewer_steps.PEER,
    "samplers": samplers.PEER,
    "compile": compiled.PEER,
    "taylorseer": taylorseer.PEER,
    "first-block": first_block.PEER,
    "mag-cache": mag_cache.PEER,
    "sea-cache": sea_cache.PEER,
    "pyramid": pyramid.PEER,
    "faster-cache": faster_cache.PEER,
    "cache-dit": cache_dit.PEER,
    "smooth-cache": smooth_cache.PEER,
}

__all__ = ["PEERS", "Peer"]
