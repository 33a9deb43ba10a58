"""`compare()`: what schedules do to a person's own pipeline, in time, memory and quality."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import compiling
from .comparison import Comparison
from .comparison_figures import FULL, Row
from .generating import Generation
from .measuring import processor
from .models import UnsupportedModelError
from .peak_memory import PeakMemory
from .pictures import Frames, middle, perceptual_distance, psnr_of, samples_of, ssim_of
from .pipeline_copies import another, model_offload, without_model_offload
from .report import theoretical_speedup
from .schedule import Schedule
from .schedule_specs import named_files, parse_schedule, steps_of
from .schedule_text import headline

ENOUGH = 3  # calls of each that are timed, at least
Show = Callable[[str, str, float, float | None], object]
Wanted = Schedule | Mapping[str, Any] | str | Path


def compare(
    pipe: Any,
    schedules: Wanted | Sequence[Wanted] | Mapping[str, Wanted],
    prompts: Sequence[str | int] | None = None,
    *,
    inputs: Path | None = None,
    backend: str = "auto",
    rounds: int | None = None,
    seed: int = 0,
    show: Show = lambda phase, text, share, left: None,
    **call: Any,
) -> Comparison:
    """Run `pipe` as it came and with each of `schedules`, in turns, prompt by prompt from the same noise.

    Afterwards `pipe` is as it was, also on errors. Ctrl-C ends it early with what is there.

    Args:
        pipe: a DiffusionPipeline, not compiled, whose call takes prompts or class labels.
        schedules: files, those of contexts as ``"cond=FILE,uncond=FILE"``, names (``"uniform:2"``,
            ``"blocks:3:carry=0.5"``, ``"output:3"``, see `schedule_specs`), or what `compile` takes; a mapping gives
            them names, so that one of contexts goes in a list.
        prompts: texts; of pipelines that take labels numbers or names of classes, all unless given.
        inputs: a folder of pictures and captions, in place of prompts.
        backend: as `compile` takes it.
        rounds: times that all prompts are gone through; as many as make 3 timed calls unless given.
        seed: of the first prompt's noise; the others' follow.
        show: called with the phase, how far it is, its share of all and the seconds left, None while not known.
        call: the pipeline's own arguments, e.g. ``guidance_scale=3.5``. ``num_inference_steps`` is the files',
            or a name's (60 of ``"blocks:10of60"``), unless given.

    Raises:
        TypeError, ValueError: naming what was expected and what came, before anything runs.

    Returns:
        A `Comparison`: `print` it for a table (seconds, MiB, PSNR in dB), `save(folder)` it for a page with pictures.

    Example::

        compared = hrt.compare(pipe, ["uniform:2", "mine.json"], ["a lighthouse at dusk"], num_inference_steps=28)
        compared.save("out")
    """
    if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1):
        raise ValueError(f"rounds: expected a positive integer, got {rounds!r}")
    wanted = {name: _read(each) for name, each in _named(schedules).items()}
    steps = {each.steps for some in wanted.values() for each in _all(some)}
    steps |= {count for each in wanted.values() if isinstance(each, str) and (count := steps_of(each))}
    if len(steps) == 1:
        call = {"num_inference_steps": steps.pop(), **call}
    generation = Generation(pipe, prompts, inputs=inputs, seed=seed, **call)
    denoisers = compiling.denoisers_of(pipe)
    if not denoisers:
        raise TypeError(f"pipe: expected a pipeline with a denoiser and a scheduler, got {type(pipe).__name__}")
    if any(compiling.is_compiled(denoiser) for denoiser in denoisers.values()):
        raise ValueError("pipe: expected the pipeline as it came, got a compiled one: hrt.uncompile(pipe) first")
    model, count = next(iter(denoisers.values())), sampler_steps(generation)
    known: dict[str, Any] = {"sampler": type(pipe.scheduler).__name__, "guidance_scale": generation.guidance}
    with without_model_offload(pipe) as offload:
        candidates = [_Candidate(FULL, another(pipe), None)]
        try:
            for name, each in wanted.items():
                made = parse_schedule(each, model, count, **known) if isinstance(each, str) else each
                candidates.append(_candidate(name, pipe, made, count, backend))
            asked = {"backend": backend, "seed": seed}
            return _Comparing(generation, count, candidates, rounds, show, asked, offload).run()
        finally:
            for candidate in candidates:
                compiling.uncompile(candidate.pipe)


def sampler_steps(generation: Generation) -> int:
    """Calls that a run makes: some schedulers make more timesteps than they are asked for."""
    for name in ("timesteps", "sigmas"):
        if (given := generation.call.get(name)) is not None:
            return len(given)
    if (steps := generation.steps) is None:
        raise TypeError(f"num_inference_steps: expected a number for {type(generation.pipeline).__name__}, got none")
    scheduler = copy.deepcopy(generation.pipeline.scheduler)
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}  # no matter to how many there are
    scheduler.set_timesteps(steps, **shift)
    return len(scheduler.timesteps)


def _named(schedules: Any) -> dict[str, Any]:
    if isinstance(schedules, Mapping):
        return dict(schedules)
    if isinstance(schedules, (Schedule, str, Path)):
        schedules = [schedules]
    named: dict[str, Any] = {}
    for each in schedules:
        name = f"schedule {len(named) + 1}"
        if isinstance(each, (str, Path)):
            name = _name_of(str(each))
        elif isinstance(each, Schedule) and 0 < len(each.note) <= 40:
            name = each.note
        again = sum(known.split(" (")[0] == name for known in named)
        named[f"{name} ({again + 1})" if again else name] = each
    if not named:
        raise ValueError("schedules: expected at least one, got none")
    return named


def _read(schedule: Any) -> Any:
    """A file's schedule, or one each of several; names stay as they are."""
    if not isinstance(schedule, (str, Path)):
        return schedule
    read = {name: Schedule.load(file) for name, file in named_files(str(schedule)).items()}
    return read.get("", read) or str(schedule)


def _name_of(schedule: str) -> str:
    """A file's, or MINE of files MINE-cond and MINE-uncond."""
    stems = {file.stem.removesuffix(f"-{name}" if name else "") for name, file in named_files(schedule).items()}
    return stems.pop() if len(stems) == 1 else schedule


def _all(schedule: Any) -> list[Schedule]:
    """Of a mapping, as of contexts or denoisers, each; none of a name."""
    if isinstance(schedule, Mapping):
        return [each for value in schedule.values() for each in _all(value)]
    return [schedule] if isinstance(schedule, Schedule) else []


class _Candidate:
    def __init__(self, name: str, pipe: Any, schedule: Any) -> None:
        what = "as the pipeline came" if schedule is None else "; ".join(headline(s) for s in _all(schedule))
        self.pipe, self.schedule, self.row = pipe, schedule, Row(name, what)
        self.held = 0  # bytes between calls
        self.last: float | None = None  # seconds of a call and of judging it

    def describe(self) -> None:
        """What its reports say after the first call."""
        if self.schedule is None:
            return
        denoisers = compiling.denoisers_of(self.pipe).values()
        reports = [denoiser.report() for denoiser in denoisers if compiling.is_compiled(denoiser)]
        plans = [plan for report in reports for plan in report.plans]
        row = self.row
        row.level, row.backend = reports[0].level, "/".join(dict.fromkeys(plan.backend for plan in plans))
        row.note = "; ".join(dict.fromkeys(f"fell back to eager: {r.fallback}" for r in reports if r.fallback))
        row.slots, row.slot_bytes = sum(plan.slots for plan in plans), sum(plan.slot_bytes for plan in plans)
        self.held = row.slot_bytes + sum(plan.modulation_bytes for plan in plans)
        row.theory = theoretical_speedup(reports)


def _candidate(name: str, pipe: Any, schedule: Any, steps: int, backend: str) -> _Candidate:
    """`pipe` compiled for `schedule`, apart from the person's own."""
    if other := {own.steps for own in _all(schedule)} - {steps}:
        raise ValueError(
            f"{name}: expected a schedule of {steps} steps, as many as the call makes, got {other.pop()}; "
            "schedule.between(steps) carries it over"
        )
    try:
        return _Candidate(name, compiling.compile(another(pipe), schedule, backend=backend), schedule)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


class _Comparing:
    def __init__(
        self,
        generation: Generation,
        steps: int,
        candidates: list[_Candidate],
        rounds: int | None,
        show: Show,
        asked: dict[str, Any],
        offload: torch.device | None,
    ) -> None:
        self.generation, self.steps, self.show, self.asked = generation, steps, show, asked
        self.candidates, self.offload = list(candidates), offload
        self.passes = rounds or -(-ENOUGH // generation.count)
        self.numbers = range(generation.count)
        self.device = offload or getattr(generation.pipeline, "_execution_device", generation.pipeline.device)
        self.memory = PeakMemory(self.device)
        self.distance, self.lpips = perceptual_distance()
        self.reference: list[Frames] = []
        self.calls = {id(c): 1 + self.passes * generation.count for c in candidates}  # still to be made
        self.total = sum(self.calls.values())

    def run(self) -> Comparison:
        early, (full, *others) = False, list(self.candidates)
        try:
            for candidate in (full, *others):
                self._say("first calls", candidate)
                self._first(candidate)
            for turn in range(self.passes):
                for number in self.numbers:
                    for candidate in self.candidates:
                        self._say(f"pass {turn + 1} of {self.passes}", candidate, number)
                        self._timed(candidate, turn, number)
        except KeyboardInterrupt:
            if not full.row.shown:
                raise
            early = True
        return Comparison(
            pipeline=type(self.generation.pipeline).__name__,
            conditions=self._conditions(),
            subjects=self.generation.subjects,
            rows=[candidate.row for candidate in (full, *others)],
            lpips=self.lpips,
            memory=self.memory.kind,
            steps=self.steps,
            ended_early=early,
            schedules={candidate.row.name: candidate.schedule for candidate in others},
        )

    def _first(self, candidate: _Candidate) -> None:
        try:
            samples, seconds = self._call(candidate, 0)
        except (UnsupportedModelError, torch.OutOfMemoryError) as error:
            if candidate.schedule is None:
                raise
            candidate.row.note = " ".join(f"{type(error).__name__}: {error}".split())
            compiling.uncompile(candidate.pipe)
            self.candidates.remove(candidate)
            del self.calls[id(candidate)]
            return
        candidate.describe()
        candidate.row.first_call, candidate.row.images = seconds, len(samples)
        self._judge(candidate, 0, samples)

    def _timed(self, candidate: _Candidate, turn: int, number: int) -> None:
        samples, seconds = self._call(candidate, number)
        row = candidate.row
        row.seconds[turn, number] = seconds
        if (peak := self.memory.bytes()) is not None:
            others = sum(other.held for other in self.candidates if other is not candidate)
            row.peak = max(row.peak or 0, peak - others)
        if turn == 0:
            self._judge(candidate, number, samples)

    def _call(self, candidate: _Candidate, number: int) -> tuple[list[Frames], float]:
        began = time.perf_counter()
        given = {"output_type": "np"} if self.generation.takes("output_type") else {}
        with model_offload(candidate.pipe, self.offload):
            self.memory.start()
            self._wait()
            started = time.perf_counter()
            output = self.generation.generation([number], candidate.pipe, **given)
            self._wait()
            seconds = time.perf_counter() - started
        samples = samples_of(output)
        candidate.last = time.perf_counter() - began
        self.calls[id(candidate)] -= 1
        return samples, seconds

    def _judge(self, candidate: _Candidate, number: int, samples: list[Frames]) -> None:
        began = time.perf_counter()
        row = candidate.row
        finite = all(np.isfinite(frames).all() for frames in samples)
        row.shown[number] = middle(np.nan_to_num(samples[0]))
        if candidate.schedule is None:
            if not finite:
                raise FloatingPointError(f"prompt {self.generation.subjects[number]!r}: the full run is not finite")
            self.reference = samples
        elif not finite:
            row.note = "made images that are not finite"
        else:
            pairs = list(zip(samples, self.reference))
            measures: dict[str, Callable[..., float]] = {"psnr": psnr_of, "ssim": ssim_of}
            measures |= {"lpips": self.distance} if self.distance else {}
            row.quality[number] = {name: sum(of(*pair) for pair in pairs) / len(pairs) for name, of in measures.items()}
        candidate.last = (candidate.last or 0.0) + time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _say(self, phase: str, candidate: _Candidate, number: int = 0) -> None:
        left, full = None, self.candidates[0].last
        if full is not None:
            usual = {id(c): full if c.last is None else c.last for c in self.candidates}
            left = sum(count * usual[key] for key, count in self.calls.items())
        share = 1 - sum(self.calls.values()) / self.total
        text = f"{candidate.row.name}, prompt {number + 1} of {len(self.numbers)}"
        self.show(phase, text, share, left)

    def _conditions(self) -> dict[str, Any]:
        import diffusers

        on = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()
        dtype = str(next(iter(compiling.denoisers_of(self.generation.pipeline).values())).dtype).removeprefix("torch.")
        plain = (str, int, float, bool)
        call = {name: value for name, value in self.generation.call.items() if isinstance(value, plain)}
        made = {"num_inference_steps": self.generation.steps, **call, **self.asked}
        return {"on": on, "dtype": dtype, **made, "torch": torch.__version__, "diffusers": diffusers.__version__}
