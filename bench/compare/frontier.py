"""Rows of a model's frontier: candidates screened on a few noises, the best of them measured, and judged as sets.

Every row is on disk when it is known, so that a run that was stopped goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cached_property
from itertools import product
from typing import Any

from bench.measure.judges import APART
from bench.measure.timing import interleave
from bench.models import samplers
from bench.models.reference import noise
from bench.models.sampling import Sampling
from bench.peers import PEERS
from harmonica_rt.measuring import Timing
from harmonica_rt.train.contexts import every

from . import candidates
from .candidates import (
    EAGER,
    FIRST_SPECS,
    FULL,
    LEARNED,
    OURS,
    PEER,
    UNLEARNED,
    WHOLE,
    Candidate,
)
from .comparison import HELD_OUT
from .frontier_best import TELLING, best
from .frontier_runs import Job, Runner, backend
from .sets import Sets
from .store import Store

COSTS, SCREEN, MEASURE = "costs", "screen", "measure"  # a row's stage; sets' has their number beside
SCREENED = HELD_OUT + 10 * APART  # seed of the screen's noises: who is best on some is not judged by them
MARGIN, SAFE = 1.02, 1.1  # by which a screened time may miss a budget; and be within it, so that the measured one is
SHORT, EVERY = range(7, 15), (2, 3, 4, 5)  # steps and reuse of runs that tell which samplers are good
TIMES = ("latency", "latency_p20", "latency_p80", "ms_per_image")
WARMUP = 2  # of ours: compiled blocks compile at their first call and at the first of another step


def known(candidate: Candidate) -> dict[str, Any]:
    """Columns by which a row's candidate comes back."""
    return {"name": candidate.name, "family": candidate.family, "candidate": asdict(candidate)}


def finalists(rows: list[dict[str, Any]], whole: float) -> list[Candidate]:
    """Of each family, budget and mean PSNR the best of the screen, of ours two; peers also under torch.compile.

    What is learned is measured whole: there are few, and a screen of few noises cannot tell which of two is better.

    At each budget two times: measured times differ from the screen's, and no budget is to be left without a row that
    is fast enough.

    Args:
        rows: the screen's.
        whole: time under torch.compile, as a share.
    """
    found: dict[Candidate, None] = {}
    families = {family: [row for row in rows if row["family"] == family] for family in candidates.FAMILIES}
    for budget, axis, slack in product(TELLING, ("psnr", "converged"), (1 / MARGIN, SAFE)):
        for family, own in families.items():
            for row in own if family == LEARNED else best(own, axis, budget * slack, 1 + (family == UNLEARNED)):
                found[Candidate(**row["candidate"])] = None
        if axis == "psnr":
            for row in best(families[PEER], axis, budget * slack * whole):
                other = candidates.compiled(Candidate(**row["candidate"]))
                found |= {} if other is None else {other: None}
    return sorted(found, key=lambda each: each.by.endswith("-compiled"))  # these make the others compile again


class Frontier:
    """A frontier's results file, and what fills it.

    Args:
        expired: whether time is up; no row is begun then.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        progress: Callable[[str], None] = lambda message: None,
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        self.job, self.store, self.progress, self.expired = job, store, progress, expired
        self.sampling = Sampling.of(job.model)
        self.seen: set[tuple[str, str]] = set()  # failed ones too, within this process

    @cached_property
    def screening(self) -> Runner:
        start = noise(self.sampling.pipeline, self.job.screen, SCREENED)
        return Runner(self.job, start, self.job.batch, self.sampling)

    @cached_property
    def measuring(self) -> Runner:
        return Runner(self.job, noise(self.sampling.pipeline, self.job.count, HELD_OUT), sampling=self.sampling)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Those of a stage that came to a result."""
        return [row for row in self.store.rows if row["stage"] == stage and row["error"] is None]

    def fill(self, stage: str, wanted: Iterable[Candidate], row: Callable[[Candidate], dict[str, Any]]) -> None:
        """Add the rows of `wanted` that are not there; what fails is a row that says why."""
        for candidate in wanted:
            key = (stage, candidate.name)
            if key in self.store or key in self.seen:
                continue
            if self.expired():
                return
            self.progress(f"{self.job.model}, {stage}: {candidate.name}")
            self.seen.add(key)
            head = {"stage": stage, **known(candidate), "error": None}
            began, cpu = time.perf_counter(), time.process_time()
            try:
                found = row(candidate)
            except Exception as error:  # a candidate's own failure is a result
                words = str(error).strip().splitlines() or [""]
                found = {"error": f"{type(error).__name__}: {words[0]}"}
            spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
            self.store.add(_rounded(head | found | spent))

    # ---- the screen

    @cached_property
    def costs(self) -> dict[str, float]:
        """Times of the reference run on what does not change quality, as shares of diffusers' own; by its seconds.

        Measured once a results file, so that the shares on it are of one time.
        """
        found = next((row["costs"] for row in self.rows(COSTS)), None)
        if found is None:
            self.progress(f"{self.job.model}, {COSTS}: the reference run")
            began = time.perf_counter()
            found = self._costs()
            head = {"stage": COSTS, "name": "", "error": None, "costs": found}
            self.store.add(head | {"seconds": round(time.perf_counter() - began, 1)})
        return found

    def _costs(self) -> dict[str, float]:
        runner, found = self.screening, {}
        some = runner.start[: self.job.batch]
        for by, setting in ((EAGER, ""), (WHOLE, ""), (OURS, FULL)):
            candidate = runner.reference.on(by, setting)
            with runner.prepared(candidate, backend(candidate)) as own:
                run = {by: lambda own=own: runner.sample(own, some, self.job.steps)}
                found[by] = interleave(run, 2, WARMUP, time.process_time)[by].median
        return {by: seconds / found[EAGER] for by, seconds in found.items()} | {"seconds": found[EAGER]}

    def screen(self, wanted: Iterable[Candidate]) -> None:
        self.fill(SCREEN, wanted, self._screened)

    def _screened(self, candidate: Candidate) -> dict[str, Any]:
        """Quality on a few noises. Time is steps' share where all is computed, else the CPU's, seen once."""
        runner = self.screening
        if not candidate.reuses:
            latency = candidate.steps / self.job.steps * self.costs[candidate.by]
            return runner.quality(candidate, runner.plain(candidate.plain)) | {"latency": latency}
        with runner.prepared(candidate) as own:
            images = runner.sample(own, runner.start, candidate.steps)  # what is to build is built
            began = time.process_time()
            runner.sample(own, runner.start[: self.job.batch], candidate.steps)
            latency = (time.process_time() - began) / self.costs["seconds"]
            schedules = every(getattr(own.pipeline.transformer, "schedule", {}))
            if schedules and schedules[0].level != "branches":  # run as it is here, compiled when it is measured
                latency *= self.costs[WHOLE]
        return runner.quality(candidate, images) | {"latency": latency}

    def bases(self, count: int = 2, reusing: bool = False) -> list[tuple[str, str]]:
        """Samplers with their best spacing, the nearest to the converged solution first: the mean over their steps.

        Args:
            reusing: of the runs of as many steps as the reference's that reuse every few, not of short ones.
        """
        scores: dict[tuple[str, str], list[float]] = {}
        wanted = {spec.format(n) for spec in FIRST_SPECS for n in EVERY} if reusing else {""}
        for row in self.rows(SCREEN):
            candidate = Candidate(**row["candidate"])
            steps = range(self.job.steps, self.job.steps + 1) if reusing else SHORT
            if (
                candidate.by == (OURS if reusing else EAGER)
                and candidate.setting in wanted
                and candidate.steps in steps
            ):
                scores.setdefault((candidate.sampler, candidate.spacing), []).append(row["converged"])
        ranked = sorted(scores, key=lambda base: -sum(scores[base]) / len(scores[base]))
        firsts = {sampler: (sampler, spacing) for sampler, spacing in reversed(ranked)}
        return [base for base in ranked if base in firsts.values()][:count]

    # ---- what is measured

    def finalists(self) -> list[Candidate]:
        return finalists(self.rows(SCREEN), self.costs[WHOLE])

    def measure(self, wanted: Iterable[Candidate]) -> None:
        self.fill(MEASURE, wanted, self._measured)

    def _measured(self, candidate: Candidate) -> dict[str, Any]:
        """Quality and time; that of a row whose run makes the same calls, where there is one, is not taken again."""
        runner = self.measuring
        for row in self.rows(MEASURE):
            if runner.same_calls(candidate, Candidate(**row["candidate"])):
                same = {name: row[name] for name in TIMES} | {"time_of": row["name"]}
                return runner.quality(candidate, runner.images(candidate, runner.start)) | same
        return self._timed(candidate)

    def _timed(self, candidate: Candidate) -> dict[str, Any]:
        runner, job = self.measuring, self.job
        some = runner.start[: job.batch]
        with runner.prepared(runner.reference) as reference, runner.prepared(candidate, backend(candidate)) as own:
            timings = interleave(
                {
                    "reference": lambda: runner.sample(reference, some, job.steps),
                    "own": lambda: runner.sample(own, some, candidate.steps),
                },
                job.rounds,
                WARMUP if candidate.by == OURS else 1,
            )
            images = runner.sample(own, runner.start, candidate.steps) if candidate.by in PEERS else None
        ratios = Timing(tuple(b / a for a, b in zip(timings["reference"].seconds, timings["own"].seconds)))
        if images is None:
            images = runner.images(candidate, runner.start) if candidate.reuses else runner.plain(candidate.plain)
        return runner.quality(candidate, images) | {
            "latency": ratios.median,
            "latency_p20": ratios.percentile(20),
            "latency_p80": ratios.percentile(80),
            "ms_per_image": 1e3 * timings["own"].median / job.batch,
        }

    # ---- sets

    def judged(self) -> list[Candidate]:
        """What is worth judging as sets, the most telling first: by budget, each family's best, then its samplers'."""
        rows, found = self.rows(MEASURE), {}
        for axis in ("converged", "psnr"):
            for budget in TELLING:
                for family in candidates.FAMILIES:
                    own = [row for row in rows if row["family"] == family]
                    for row in best(own, axis, budget, 1):
                        found[Candidate(**row["candidate"])] = None
        for budget in TELLING:
            for sampler in samplers.of_same_kind(candidates.SAMPLERS[self.job.model]):
                for family in (candidates.PLAIN, UNLEARNED):
                    own = [r for r in rows if r["family"] == family and r["candidate"]["sampler"] == sampler]
                    for row in best(own, "converged", budget, 1):
                        found[Candidate(**row["candidate"])] = None
        return [self.measuring.reference, *found]

    def judge(self, count: int) -> None:
        """Judge sets of `count` images; runs that differ in time alone share one."""
        sets, stage = None, f"sets {count}"

        def row(candidate: Candidate) -> dict[str, Any]:
            nonlocal sets
            sets = sets or Sets.prepare(self.sampling, count)
            twin = next((r for r in self.rows(stage) if _same_images(Candidate(**r["candidate"]), candidate)), None)
            if twin is not None:
                return {name: twin[name] for name in twin if name in sets.COLUMNS}
            images = self.measuring.images(candidate, sets.start)[:count]
            return sets.columns(images, self.sampling.labels(len(sets.start))[:count])

        self.fill(stage, self.judged(), row)


def _same_images(a: Candidate, b: Candidate) -> bool:
    if a.reuses or b.reuses:
        return replace(a, by=a.by.removesuffix("-compiled")) == replace(b, by=b.by.removesuffix("-compiled"))
    return a.plain == b.plain


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
