"""The Gap kernel against the same ops in eager mode and under torch.compile, and against the card's copy bandwidth.

Many launches in one graph are timed, so that it is the kernels' time and not what launching them takes. Operands are
used in turn from several copies that together exceed the last-level cache, unless the shape says "in cache".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.measure.timing import interleave
from harmonica_rt.measuring import Timing

from .machine import Machine
from .record import Case, Log

STAGE = "gap"
OURS, EAGER, COMPILED = "harmonica_rt gap", "torch, eager", "torch.compile"
SHAPES = {  # batch, tokens, width; bytes that operands are to exceed
    "DiT-XL/2 256, batch 1": (2, 256, 1152, 0),
    "DiT-XL/2 256, batch 8": (16, 256, 1152, 2**28),
    "DiT-XL/2 512, batch 1": (2, 1024, 1152, 2**28),
    "PixArt 1024, batch 1": (2, 4096, 1152, 2**28),
}
TERMS = (1, 0, 3, 8, 56)
DRY = {"tiny": (2, 5, 24, 0)}
COPIES = 32  # at most
LAUNCHES = 20  # at least, of a graph


def cases(machine: Machine, rounds: int = 7) -> list[Case]:
    shapes, terms = (DRY, TERMS[:2]) if machine.dry else (SHAPES, TERMS)
    return [
        Case(STAGE, f"{name}, {n} terms", 1.5 + 0.1 * n, partial(measure, machine, name, shape, n, rounds))
        for n in terms
        for name, shape in shapes.items()
    ]


def measure(machine: Machine, name: str, shape: tuple[int, int, int, int], terms: int, rounds: int, log: Log) -> None:
    dtype = torch.float32 if machine.dry else torch.bfloat16
    *size, exceed = shape
    sets, moved = [], 0
    compiled = torch.compile(plain, dynamic=False)
    while len(sets) < 1 or (len(sets) * moved < exceed and len(sets) < COPIES):
        made, moved = candidates(*size, terms, dtype, machine.device, compiled)
        sets.append(made)
    turns = max(1, LAUNCHES // len(sets))
    device: dict[str, list[float]] = {}
    runs: dict[str, Callable[[], None]] = {}
    for kind in (OURS, EAGER, COMPILED):

        def every(kind: str = kind) -> Callable[[], None]:
            one_of_each = [made[kind] for made in sets]
            for run in one_of_each:
                run()  # compiles outside of a capture
            return machine.repeated(lambda: [run() for run in one_of_each], turns)

        run = log.attempt(kind, every)
        if run is not None:
            device[kind] = []
            runs[kind] = machine.clocked(run, device[kind])
    interleave(runs, rounds, warmup=3)
    for kind, seconds in device.items():
        timing = Timing(tuple(each / (turns * len(sets)) for each in seconds[-rounds:]))
        log.figure(
            name=kind,
            shape=name,
            terms=terms,
            dtype=str(dtype).removeprefix("torch."),
            us=1e6 * timing.median,
            us_p20=1e6 * timing.percentile(20),
            us_p80=1e6 * timing.percentile(80),
            gbps=moved / timing.median / 1e9,
            bytes=moved,
            in_cache=not exceed,
        )
    if OURS in device and not machine.dry:
        log.figure(shape=name, terms=terms, copy_gbps=copy_gbps(machine, moved, exceed, rounds))


def copy_gbps(machine: Machine, moved: int, exceed: int, rounds: int) -> float:
    """What a plain copy of as many bytes reaches, measured the same way."""
    half = moved // 2 // 512 * 512  # both on boundaries, or the copy is not vectorised
    pairs = [
        torch.empty(2, half, dtype=torch.uint8, device=machine.device).fill_(1)
        for _ in range(max(1, min(COPIES, -(-exceed // moved))))
    ]
    turns, seconds = max(1, LAUNCHES // len(pairs)), []
    run = machine.repeated(lambda: [pair[0].copy_(pair[1]) for pair in pairs], turns)
    interleave({"": machine.clocked(run, seconds)}, rounds, warmup=3)
    return moved * turns * len(pairs) / Timing(tuple(seconds[-rounds:])).median / 1e9


def plain(x: Tensor, values: list[Tensor], gates: list[Tensor], shift: Tensor, scale: Tensor) -> list[Tensor]:
    for value, gate in zip(values, gates):
        x = x + 1e-3 * gate * value
    return [x, torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift]


def candidates(
    batch: int,
    tokens: int,
    width: int,
    terms: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: Callable[..., list[Tensor]],
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """Callables that do one Gap with layer norm each way and return y, and the bytes it moves."""
    from harmonica_rt.kernels.gap import bytes_moved, gap

    arena = torch.randn(max(terms, 1), batch, tokens, width, dtype=dtype, device=device)
    rows = torch.randn(1, batch, terms + 2, width, dtype=dtype, device=device)
    x, y = torch.randn(2, batch, tokens, width, dtype=dtype, device=device)
    entries = [[k, 2 + k, 2 + k] for k in range(terms)]
    table = torch.tensor(entries, dtype=torch.int32, device=device).view(-1, 3)
    weights = torch.full((terms,), 1e-3, device=device)
    step = torch.zeros(1, dtype=torch.int32, device=device)
    gates = [rows[0][:, 2 + k, None] for k in range(terms)]
    values = list(arena)[:terms]
    shift, scale = rows[0][:, 0, None], rows[0][:, 1, None]

    def ours() -> Tensor:
        gap(x, y, arena, rows, step, table, weights, "layer", (0, 0), (1, 1), 1e-6)
        return y

    made: dict[str, Callable[[], Tensor]] = {
        OURS: ours,
        EAGER: lambda: plain(x, values, gates, shift, scale)[1],
        COMPILED: lambda: compiled(x, values, gates, shift, scale)[1],
    }
    return made, bytes_moved(x, rows, table, "layer", (0, 0), (1, 1))
