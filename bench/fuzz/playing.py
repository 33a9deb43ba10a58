"""Plays a case on the runtime and on the oracle, call by call."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import harmonica_rt as hrt
from tests.emulator import Emulator

from . import changes
from .case import Case, Change, Recompile, Run
from .models import NOT_HALVED
from .oracle import Reuse, Unclear, tensors
from .rounding import allowed, error, reach
from .schedules import build, clock_of
from .subject import Subject

CONTEXTS = ("cond", "uncond")
# What the documentation says is refused, as a type and what is said
REFUSALS = {
    "carry": (hrt.UnsupportedModelError, r"carry: expected among the arguments of .*'s first block a stream"),
    "read between": (hrt.UnsupportedModelError, r"depends on nothing but the streams after"),
    "layers of LoRA": (hrt.UnsupportedModelError, r"expected a plain (Linear|GELU|.*), got peft\."),
    "half of a batch": (ValueError, r"the run under way has samples of .*, got .*: call reset\(\) to change"),
    "captured": (RuntimeError, r"operation not permitted while capturing"),
    "half precision": (ValueError, r"expected parameters (in float32|of one dtype)"),
}


class Wrong(AssertionError):
    """The runtime's values are not the oracle's, or it raised what it should not."""


class Interrupted(Exception):
    """What a case raises inside of a call."""


class OracleFailed(RuntimeError):
    """The campaign itself is at fault."""


@dataclass
class Tally:
    """What was played: runs, denoiser calls compared, the worst relative error, and how the case was refused if so."""

    runs: int = 0
    calls: int = 0
    worst: float = 0.0
    refused: str | None = None
    events: Counter[str] = field(default_factory=Counter)


def check(case: Case) -> None:
    """Raise `Wrong` unless the runtime is right."""
    torch.set_num_threads(1)
    play(case, Subject(case.model, case.dtype))
    print("right")


def play(case: Case, subject: Subject) -> Tally:
    """
    Args:
        subject: of the case's model and dtype, with the weights it begins with.

    Raises:
        Wrong: and says where.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return _Play(case, subject).play()


class _Play:
    def __init__(self, case: Case, subject: Subject) -> None:
        self.case, self.subject, self.tally = case, subject, Tally()
        self.clock = clock_of(case)
        self.midway = False
        self.short: tuple[int, ...] | None = None  # what the run before called with, if it ended at its first step

    def play(self) -> Tally:
        case = self.case
        try:
            self.schedules = [build(case, plan, self.subject) for plan in case.plans]
            self.second = None if case.second is None else build(case, case.second, self.subject)
        except AssertionError as error:
            raise Wrong(f"{error}") from error
        try:
            self.compile()
            for event in case.events:
                self.happen(event)
        except (Wrong, OracleFailed):
            raise
        except Unclear:
            self.tally.refused = "unclear what a carry is of"
        except Exception as error:
            self.tally.refused = self.reason(error)
        return self.tally

    def reason(self, error: Exception) -> str:
        for name, (kind, said) in REFUSALS.items():
            if isinstance(error, kind) and re.search(said, str(error)):
                return name
        raise Wrong(f"raised {type(error).__name__}: {error}") from error

    def compile(self) -> None:
        one = self.schedules[0] if len(self.schedules) == 1 else dict(zip(CONTEXTS, self.schedules))
        self.fast = self.compiled(one)
        self.beside = None if self.second is None else self.compiled(self.second)

    def compiled(self, schedule: Any) -> Any:
        fast = hrt.compile(self.subject.model, schedule, backend=self.case.backend)
        if self.case.backend == "cudagraph":
            fast._recorder = lambda device: Emulator()
        return fast

    def happen(self, event: Any) -> None:
        if isinstance(event, Run):
            self.run(event)
        elif isinstance(event, Change):
            self.tally.events[event.kind] += 1
            changes.apply(event, self.subject, self.fast)
        elif isinstance(event, Recompile):
            self.tally.events["compiled again"] += 1
            for fast in (self.fast, self.beside):
                if fast is not None and hrt.uncompile(fast) is not self.subject.model:
                    raise Wrong("uncompile: expected the model")
            kwargs = lambda: self.subject.call(1, 0, self.clock)  # noqa: E731
            ours = [*tensors(self.subject.model(**kwargs()))]
            theirs = [*tensors(self.subject.twin(**kwargs()))]
            if (off := error(ours, theirs)) > allowed(self.subject.dtype):
                raise Wrong(f"uncompiled: relative error {off:.1e}")
            self.compile()

    # ---- a run

    def run(self, run: Run) -> None:
        steps = self.case.plans[0].steps
        stop = steps if run.stop is None else run.stop
        two = len(self.case.plans) == 2
        names: list[str | None] = [*CONTEXTS] if two or (run.contexts == 2 and run.named) else [None] * run.contexts
        if run.named and not two and run.contexts == 1:
            names = ["cond"]
        self.midway = run.start > 0 and not self.case.listed
        if self.midway and names == [None, None]:
            names = [*CONTEXTS]
        halved = self.subject.batched and (self.case.level == "output" or self.subject.kind not in NOT_HALVED)
        halving = run.half if halved and run.batch % 2 == 0 else None
        self.count(run, stop < steps, two)
        calls = run.seed, run.batch, run.shape
        same, self.short = self.short == calls, calls if stop == run.start + 1 else None
        for fast in (self.fast, self.beside) if run.beside is not None else (self.fast,):
            if not self.subject.timed or run.start or same:  # the same once more could be another context
                fast.reset()
        schedules = [self.schedules[i if two else 0] for i in range(len(names))]
        followed = [_Followed(self, self.fast, name, schedule, run) for name, schedule in zip(names, schedules)]
        if run.beside is not None:
            followed.append(_Followed(self, self.beside, None, self.second, run, run.beside))
        for step in range(run.start, stop):
            half = halving[1] if halving is not None and step >= halving[0] else None
            if run.refused == step > run.start and self.subject.batched:
                self.refused(run, step, names[0])
            for number, each in enumerate(followed):
                options = {"batch": run.batch if self.subject.batched else None, "shape": run.shape}
                if each.fast is self.fast:
                    options |= {"context": number, "half": half}
                    if run.fails is not None and run.fails[0] == step:
                        return self.failing(run, step, names[0], options)
                    if half is not None and step == halving[0] > run.start:
                        each.narrow(step, options)
                each.call(step, options)
        return None

    def count(self, run: Run, short: bool, two: bool) -> None:
        self.tally.runs += 1 + (run.beside is not None)
        for name, happens in {
            "whole": not (short or run.start or run.fails or run.half),
            "cut short": short and not run.fails,
            "midway": run.start > 0,
            "contexts": two or run.contexts == 2,
            "schedules of their own": two,
            "half": run.half is not None,
            "exception": run.fails is not None,
            "refused call": run.refused is not None,
            "interleaved": run.beside is not None,
            "another shape": run.shape > 0 or run.batch != 2,
        }.items():
            self.tally.events[name] += happens

    def oracle(self, schedule: Any, start: int) -> Reuse:
        carries = schedule.carry.any() or schedule.channels is not None
        try:
            sources = self.subject.sources(schedule) if carries and schedule.groups else {}
            return Reuse(self.subject.twin, self.subject.lists(schedule.level), schedule, sources, start)
        except Exception as error:
            raise OracleFailed(f"{type(error).__name__}: {error}") from error

    def arguments(self, step: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
        return self.subject.call(seed, step, self.clock, **options)

    @contextlib.contextmanager
    def context(self, fast: Any, name: str | None, step: int) -> Iterator[None]:
        """A run that enters midway says so where its timesteps do not."""
        told = {"step_index": step} if self.midway else {}
        if name is None and not told:
            yield
        else:
            with fast.cache_context("all" if name is None else name, **told):
                yield

    def refused(self, run: Run, step: int, name: str | None) -> None:
        """A call of another batch, which ends nothing."""
        call = self.arguments(step, run.seed, {"batch": run.batch + 1, "shape": run.shape})
        try:
            with self.context(self.fast, name, step):
                self.fast(**call)
        except ValueError as error:
            if not re.search(REFUSALS["half of a batch"][1], str(error)):
                raise
        else:
            raise Wrong(f"step {step}: expected a call of another batch to be refused, got values")

    def failing(self, run: Run, step: int, name: str | None, options: dict[str, Any]) -> None:
        with self.context(self.fast, name, step):
            try:
                with _RaiseAfter(run.fails[1]):
                    self.fast(**self.arguments(step, run.seed, options))
            except Exception as error:
                if not _is_caused(error):
                    raise


class _Followed:
    """One context of a run, the oracle beside it.

    Attributes:
        log: what the oracle did, to do it again: (step, options), or with True where it went on with half a batch.
    """

    def __init__(
        self, play: _Play, fast: Any, name: str | None, schedule: Any, run: Run, seed: int | None = None
    ) -> None:
        self.play, self.fast, self.name, self.schedule, self.run = play, fast, name, schedule, run
        self.seed = run.seed if seed is None else seed
        self.oracle = play.oracle(schedule, run.start)
        self.log: list[tuple[int, dict[str, Any], bool]] = []

    def narrow(self, step: int, options: dict[str, Any]) -> None:
        self.log.append((step, options, True))
        self.follow(self.oracle, self.log[-1:])

    def call(self, step: int, options: dict[str, Any]) -> None:
        play, subject = self.play, self.play.subject
        self.log.append((step, options, False))
        with play.context(self.fast, self.name, step):
            ours = [t.clone() for t in tensors(self.fast(**play.arguments(step, self.seed, options)))]
        theirs = self.follow(self.oracle, self.log[-1:])
        play.tally.calls += 1
        off = error(ours, theirs)
        channels = self.schedule.channels is not None or self.schedule.output_channels is not None
        kinds = {subject.dtype, *(t.dtype for t in theirs if t.is_floating_point())}  # some return float32 always
        compiled = play.case.backend == "inductor"
        if off > max(allowed(kind, channels, compiled) for kind in kinds):
            limit = reach(
                subject.dtype,
                subject.twin,
                lambda: self.follow(play.oracle(self.schedule, self.run.start), self.log),
                theirs,
            )
            if not off <= limit:
                where = "".join(
                    f", {each}" for each in (self.name, "beside" if self.fast is not play.fast else "") if each
                )
                raise Wrong(f"step {step}{where}: relative error {off:.1e}, of rounding at most {limit:.1e}")
        play.tally.worst = max(play.tally.worst, off)

    def follow(self, oracle: Reuse, log: list[tuple[int, dict[str, Any], bool]]) -> list[Tensor]:
        """The oracle's output at the last call of a log."""
        out: list[Tensor] = []
        try:
            for step, options, narrows in log:
                arguments = self.play.arguments(step, self.seed, options)
                if narrows:
                    oracle.narrow(arguments, options["half"])
                else:
                    out = oracle.call(step, arguments)
        except Unclear:
            raise
        except Exception as error:
            raise OracleFailed(f"{type(error).__name__}: {error}") from error
        return out


class _RaiseAfter(TorchDispatchMode):
    def __init__(self, operations: int) -> None:
        super().__init__()
        self.left = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return func(*args, **(kwargs or {}))


def _is_caused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, Interrupted):
            return True
        error = error.__cause__ or error.__context__
    return False
