"""Ours and every peer on one model: latency, quality, what is skipped. One JSON line a row, so that a run goes on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure.frechet import WIDTH
from bench.measure.judges import JUDGES
from bench.measure.timing import interleave
from bench.models.reference import TRAINED, noise
from bench.models.sampling import Sampling
from bench.peers import PEERS, Peer
from bench.peers.base import branch_modules
from harmonica_rt.measuring import Timing, pooled_psnr, psnr, ssim

from .store import Store

SHOWN = 8  # images of a row that picture sheets may show
HELD_OUT = 500_000  # seed of the noises; training's are elsewhere


@dataclass(frozen=True)
class Job:
    """What a results file is about; rows of another job do not go into it.

    Attributes:
        count: noises that PSNR is taken on.
        judged: images that are judged as a set (`bench.measure.judges`); 0 for none.
        batch, rounds: of the timings: images a call, interleaved with diffusers' own.
    """

    model: str
    steps: int = 20
    count: int = 64
    judged: int = 0
    batch: int = 4
    rounds: int = 7
    threads: int = 1

    def __post_init__(self) -> None:
        if self.model not in TRAINED:
            raise ValueError(f"--model: expected one of {', '.join(TRAINED)}, got {self.model!r}")
        if self.judged and self.judged <= WIDTH:
            raise ValueError(
                f"--judged: expected 0, or more images than the {WIDTH} features they are judged by, got {self.judged}"
            )


class Bench:
    """One model's reference images, made once, and the rows measured against them."""

    def __init__(self, job: Job, progress: Callable[[str], None] = lambda message: None) -> None:
        self.job, self.progress = job, progress
        self.sampling = Sampling.of(job.model)
        self.start = noise(self.sampling.pipeline, job.count, HELD_OUT)
        progress(f"{job.model}: the full run")
        self.full = self.sampling(self.start, job.steps)
        progress(f"{job.model}: the converged solution")
        self.converged = self.sampling.converged(self.start)
        self.judge = None
        if job.judged:
            progress(f"{job.model}: {job.judged} images of the full run")
            self.judge = JUDGES[job.model].prepare(self.sampling, job.steps, job.judged, HELD_OUT)

    def row(self, peer: Peer, setting: str) -> dict[str, Any]:
        """Everything about one point; `error` holds the peer's own words where it did not come to one."""
        row: dict[str, Any] = {"peer": peer.name, "setting": setting, "error": None}
        if peer.missing:
            return row | {"error": peer.missing}
        began = time.perf_counter()
        try:
            row |= self._measured(peer, setting)
        except Exception as error:  # a peer's own failure is a result
            return row | {
                "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            }
        return row | {"seconds": round(time.perf_counter() - began, 1)}

    def _measured(self, peer: Peer, setting: str) -> dict[str, Any]:
        job, pipeline = self.job, self.sampling.pipeline
        own = pipeline.around(copy.deepcopy(pipeline.transformer))
        evaluations = _Evaluations(own.transformer)
        own = peer.prepare(own, setting, job.steps)
        sampling, steps = Sampling(own, self.sampling.guidance), own.steps or job.steps
        some = self.start[: job.batch]
        if (schedule := getattr(own.transformer, "schedule", None)) is None:
            with evaluations.counted() as counted:
                sampling(some, steps)
            samples = len(some) * (1 + (sampling.guidance > 1))
            cur = 1 - counted[0] / (job.steps * evaluations.of_a_forward * samples)
        else:
            cur = schedule.cur  # ours says what it skips, and calls no module
        if peer.compile is not None:
            torch._dynamo.reset()  # or peers share one recompile limit
            peer.compile(own)
        first = sampling(some, steps)
        candidates = {"eager": lambda: self.sampling(some, job.steps), "own": lambda: sampling(some, steps)}
        timings = interleave(candidates, job.rounds)  # before other batches: a second shape makes code slower
        ratios = Timing(tuple(b / a for a, b in zip(timings["eager"].seconds, timings["own"].seconds)))
        images, again = sampling(self.start, steps, job.batch), sampling(some, steps)
        if not torch.isfinite(images).all():
            raise FloatingPointError("the images are not finite")
        values = psnr(images, self.full)
        row = {
            "cur": cur,
            "drift": (again - first).abs().max().item(),  # between two runs from the same noise
            "psnr": values.mean().item(),
            "psnr_pooled": pooled_psnr(images, self.full),
            "psnr_worst": values.min().item(),
            "psnr_converged": psnr(images, self.converged).mean().item(),
            "ssim": ssim(images, self.full).mean().item(),
            "max_error": (images - self.full).abs().max().item(),
            "images": images[:SHOWN],
        }
        if self.judge is not None:
            row |= self.judge(sampling, steps)
        return row | {
            "latency": ratios.median,  # of diffusers' own full run
            "latency_p20": ratios.percentile(20),
            "latency_p80": ratios.percentile(80),
            "ms_per_image": 1e3 * timings["own"].median / job.batch,
            "ms_per_image_eager": 1e3 * timings["eager"].median / job.batch,
        }


class _Evaluations:
    """How often a model's branch modules run, whatever is wrapped around them later."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(branch_modules(model).values())
        self.of_a_forward = len(self.modules)

    @staticmethod
    def _inner(module: nn.Module) -> nn.Module:
        """A projection within it."""
        if not hasattr(module, "to_q"):
            return module.net[2]
        out = getattr(module, "to_out", None)  # Flux's single blocks have theirs outside
        return out[0] if out else module.to_q

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Samples whose projections run, one a branch: a cache around the module leaves them out, or half the batch."""
        count, handles = [0], []

        def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
            count[0] += len(output)

        handles += [self._inner(module).register_forward_hook(add) for module in self.modules]
        try:
            yield count
        finally:
            for handle in handles:
                handle.remove()


def compare(
    job: Job,
    path: Path,
    peers: dict[str, Peer] | None = None,
    settings: int | None = None,
    command: str = "",
    progress: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Measure every point that `path` does not hold yet; all rows.

    Args:
        peers: of `PEERS`; all of them unless given.
        settings: at most so many of each peer's sweep.
        command: what a person gave to get here, for the page.
    """
    store, bench = Store(path, job, command), None
    points = [
        (peer, setting)
        for peer in (PEERS if peers is None else peers).values()
        for setting in peer.sweep(job.model)[:settings]
    ]
    for done, (peer, setting) in enumerate(points):
        if (peer.name, setting) in store:
            continue
        bench = bench or Bench(job, progress)
        progress(f"{job.model}: {done + 1} of {len(points)}: {peer.name}, {setting}")
        store.add(bench.row(peer, setting))
    return store.rows
