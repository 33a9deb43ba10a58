"""Does every backend compute what diffusers computes, on this card, in every dtype, whatever happens between calls?

`error` is the largest difference over the largest value expected, at the end of a run or over its calls, against
diffusers in the same dtype (a full run) or reuse at module level on the diffusers model (with a schedule). It must stay
below the tolerance that the dtype allows. `own` and `ours`, both against diffusers in fp32, tell whose rounding it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from bench.measure.latency import GATE, WrongResult
from bench.models.pipelines import PixelPipeline

from .machine import Machine
from .record import Case, Log
from .workload import Size, Workload, relative_error

STAGE = "correct"
BACKENDS = ("eager", "cudagraph", "inductor")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
FULL = (
    Size("DiT, 2 layers", "dit-s-2", layers=2, side=16),
    Size("PixArt, 2 layers", "pixart-alpha-256", layers=2, side=16),
    Size("DiT-S/2", "dit-s-2"),
)
DRY = (Size("DiT, 1 layer", "dit-s-2", layers=1, side=4), Size("PixArt, 1 layer", "pixart-alpha-256", layers=1, side=4))
STEPS = 8


def cases(machine: Machine) -> list[Case]:
    """What says most first: whether it runs at all, then what it is used for, then the rest."""
    sizes = DRY if machine.dry else FULL
    small = sizes[0]
    events = Case(STAGE, f"{small.name}, between replays", 3, partial(between_replays, machine, small))
    first = [(small, torch.float32), (small, torch.bfloat16)]
    rest = [(size, dtype) for dtype in DTYPES for size in sizes if (size, dtype) not in first]
    made = [_case(machine, size, dtype, (size, dtype) == first[0]) for size, dtype in (*first, *rest)]
    levels = [
        Case(STAGE, f"{size.name}, levels blocks and output", 3, partial(levels_agree, machine, size))
        for size in sizes[:2]
    ]
    return [*made[:2], events, *levels, *made[2:]]


def _case(machine: Machine, size: Size, dtype: torch.dtype, first: bool) -> Case:
    backends = BACKENDS[:2] if machine.dry and not first else BACKENDS  # each shape and dtype compiles anew
    return Case(STAGE, f"{size.name}, {_short(dtype)}", 10, partial(backends_agree, machine, size, dtype, backends))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _work(machine: Machine, size: Size, dtype: torch.dtype, batch: int = 1) -> Workload:
    return Workload(machine, size, batch, dtype, 4 if machine.dry else STEPS)


def check(log: Log, name: str, error: float, tolerance: float, **figures: Any) -> None:
    """Write the figure, then raise WrongResult if it is above the tolerance."""
    log.figure(name=name, error=error, tolerance=tolerance, passed=error <= tolerance, **figures)
    if not error <= tolerance:  # NaN fails too
        raise WrongResult(f"{name}: relative error {error:.1e}, expected at most {tolerance:.0e}")


def backends_agree(machine: Machine, size: Size, dtype: torch.dtype, backends: tuple[str, ...], log: Log) -> None:
    conv, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # fp32 means fp32
    try:
        work = _work(machine, size, dtype)
        truth = _work(machine, size, torch.float32)
        truth.model.load_state_dict(work.model.state_dict())  # the same weights, rounded
        exact, full = truth.sample(truth.pipeline), work.sample(work.pipeline)
        schedule = work.schedule("uniform:2")
        wanted = {"full": full, "uniform:2": _module_level(work, schedule)}
        known = {"full": exact, "uniform:2": _module_level(truth, schedule)}
        with machine.graphs():
            for backend in backends:
                for text in wanted:
                    log.attempt(
                        f"{backend}, {text}",
                        partial(_backend_agrees, log, work, backend, text, wanted[text], known[text]),
                    )
    finally:
        torch.backends.cudnn.allow_tf32 = conv


def _backend_agrees(log: Log, work: Workload, backend: str, text: str, wanted: Tensor, exact: Tensor) -> None:
    fast = work.compiled(work.schedule(text), backend)
    try:
        result = work.sample(fast)
        rounding = {"own": relative_error(wanted, exact), "ours": relative_error(result, exact)}
        check(log, f"{backend}, {text}", relative_error(result, wanted), GATE[work.dtype], **rounding)
    finally:
        hrt.uncompile(fast)


def _module_level(work: Workload, schedule: hrt.Schedule) -> Tensor:
    reuse = ModuleReuse(work.model, schedule)
    try:
        return work.sample(work.around(reuse))
    finally:
        reuse.remove()


def levels_agree(machine: Machine, size: Size, log: Log) -> None:
    """The model's own forward with blocks or all of it reused, as graphs and launched plainly."""
    work = _work(machine, size, torch.float32 if machine.dry else torch.bfloat16)
    sampler = type(work.pipeline.scheduler).__name__
    with machine.graphs():
        for level in ("blocks", "output"):
            schedule = hrt.Schedule.uniform(work.model, work.steps, 2, level=level, sampler=sampler)
            log.attempt(level, partial(_level_agrees, log, work, level, schedule))


def _level_agrees(log: Log, work: Workload, level: str, schedule: hrt.Schedule) -> None:
    eager = hrt.compile(work.around(work.model), schedule, backend="eager")
    wanted = work.sample(eager)
    hrt.uncompile(eager)
    fast = hrt.compile(work.around(work.model), schedule, backend="cudagraph")
    try:
        first = work.sample(fast)
        again = work.sample(fast)
        check(log, f"{level}, replays and plain launches", relative_error(first, wanted), GATE[work.dtype])
        check(log, f"{level}, two runs", relative_error(again, first), GATE[work.dtype])
    finally:
        hrt.uncompile(fast)


# ---- what happens between replays


def between_replays(machine: Machine, size: Size, log: Log) -> None:
    dtype = torch.float32 if machine.dry else torch.bfloat16
    with machine.graphs():
        for name, question in QUESTIONS.items():
            log.attempt(name, partial(_ask, log, machine, name, question, size, dtype))


def _ask(
    log: Log, machine: Machine, name: str, question: Callable[[Workload, PixelPipeline], tuple], size: Size, dtype: Any
) -> None:
    """A fresh model for each: a fault in one must not spoil the next."""
    work = _work(machine, size, dtype)
    fast = work.compiled(work.schedule("uniform:2"), "cudagraph")
    try:
        actual, expected, tolerance = question(work, fast)
        error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
        check(log, name, error, tolerance)
    finally:
        hrt.uncompile(fast)


Answer = tuple[list[Tensor], list[Tensor], float]  # actual, expected, tolerance: 0 is bitwise


def replays_are_launches(work: Workload, fast: PixelPipeline) -> Answer:
    replayed = work.step(fast)
    (plan,) = fast.transformer._plans.values()
    with torch.no_grad():
        launched = [plan.run_plainly(step, sample) for step, sample in enumerate(work.calls()[0])]
    return launched, replayed, 0.0


def conditioned_anew(work: Workload, fast: PixelPipeline) -> Answer:
    """Modulation rows and text come from a graph of their own: other labels, then the first again."""
    first = work.step(fast)
    kept, work.wanted = work.wanted, list(reversed(work.pipeline.examples(work.batch + 1)))[: work.batch]
    other, eager = work.step(fast), _eagerly(work)
    work.wanted = kept
    return [*other, *work.step(fast)], [*eager, *first], GATE[work.dtype]


def the_loop_is_stepping(work: Workload, fast: PixelPipeline) -> Answer:
    return [work.trajectory(fast)()], [work.sample(fast)], GATE[work.dtype]


def the_loop_twice(work: Workload, fast: PixelPipeline) -> Answer:
    loop = work.trajectory(fast)
    first = loop()
    return [loop()], [first], 0.0


def two_runs(work: Workload, fast: PixelPipeline) -> Answer:
    first = work.step(fast)
    return work.step(fast), first, 0.0


def outputs_are_kept(work: Workload, fast: PixelPipeline) -> Answer:
    outputs = work.step(fast)
    copies = [output.clone() for output in outputs]
    work.step(fast)
    return outputs, copies, 0.0


def a_run_cut_short(work: Workload, fast: PixelPipeline) -> Answer:
    first = work.step(fast)
    work.step(fast, 3)
    return work.step(fast), first, 0.0


def new_weights_in_place(work: Workload, fast: PixelPipeline) -> Answer:
    work.step(fast)
    torch.manual_seed(1)
    new = {name: 0.02 * torch.randn_like(value) for name, value in work.model.state_dict().items()}
    work.model.load_state_dict(new)
    return work.step(fast), _eagerly(work), GATE[work.dtype]


def a_second_shape(work: Workload, fast: PixelPipeline) -> Answer:
    first = work.step(fast)
    other = Workload(work.machine, work.size, 2, work.dtype, work.steps)
    twice = other.step(fast)
    again = work.step(fast)
    other.model.load_state_dict(work.model.state_dict())
    return [*again, *twice], [*first, *_eagerly(other)], GATE[work.dtype]


def the_device_by_name(work: Workload, fast: PixelPipeline) -> Answer:
    """A model moved to "cuda:0", samples made on "cuda"."""
    first = work.step(fast)
    fast.transformer.to(str(work.machine.device))
    here = torch.zeros(1).to(work.machine.device.type)
    assert here.device == work.machine.device, f"expected {work.machine.device}, got {here.device}"
    return work.step(fast), first, 0.0


def on_other_streams(work: Workload, fast: PixelPipeline) -> Answer:
    """Each call on a stream of its own, nothing waited for in between."""
    first = work.step(fast)
    return work.step(fast, stream=work.machine.another_stream), first, 0.0


def eviction_while_replaying(work: Workload, fast: PixelPipeline) -> Answer:
    """Plans are dropped while the card is still at work on them; their memory goes to whoever asks next."""
    narrow = hrt.compile(work.around(work.model), fast.transformer.schedule, backend="cudagraph", plans=1)
    other = Workload(work.machine, work.size, 2, work.dtype, work.steps)
    first, outputs = work.step(narrow), []
    for _ in range(3):
        other.step(narrow)
        outputs += work.step(narrow)
    hrt.uncompile(narrow)
    return outputs, 3 * first, 0.0


def uncompiled_again(work: Workload, fast: PixelPipeline) -> Answer:
    before = work.sample(work.pipeline)
    work.sample(fast)
    hrt.uncompile(fast)
    return [work.sample(fast)], [before], 0.0


def _eagerly(work: Workload) -> list[Tensor]:
    return work.step(work.compiled(work.schedule("uniform:2"), "eager"))


QUESTIONS: dict[str, Callable[[Workload, PixelPipeline], Answer]] = {
    "replays and plain launches, bitwise": replays_are_launches,
    "conditioned anew": conditioned_anew,
    "two runs, bitwise": two_runs,
    "outputs kept across replays": outputs_are_kept,
    "loop graph and stepping": the_loop_is_stepping,
    "loop graph twice, bitwise": the_loop_twice,
    "a run cut short": a_run_cut_short,
    "new weights in place": new_weights_in_place,
    "a second shape": a_second_shape,
    "cuda:0 by name and by default": the_device_by_name,
    "each call on another stream": on_other_streams,
    "plans dropped while they replay": eviction_while_replaying,
    "uncompiled again": uncompiled_again,
}
