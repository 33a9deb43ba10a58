"""Ours and every peer on one model: latency, quality, what is skipped. One JSON line a row, so that a run goes on."""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .frechet import WIDTH
from .measure import environment, interleave, pooled_psnr, psnr, ssim
from .peers import PEERS, Peer
from .peers.base import branch_names
from .pipelines import PixelPipeline
from .reference import TRAINED, noise
from .sampling import Judge, Sampling

HELD_OUT = 500_000  # seed of the noises; training's are elsewhere


@dataclass(frozen=True)
class Job:
    """What a results file is about; rows of another job do not go into it.

    Attributes:
        count: noises that PSNR is taken on.
        frechet: images of the Fréchet distance; 0 for none.
        batch, rounds: of the timings: images a call, interleaved with diffusers' own.
    """

    model: str
    steps: int = 20
    count: int = 64
    frechet: int = 0
    batch: int = 4
    rounds: int = 7
    threads: int = 1

    def __post_init__(self) -> None:
        if self.model not in TRAINED:
            raise ValueError(f"--model: expected one of {', '.join(TRAINED)}, got {self.model!r}")
        if self.frechet and (self.frechet <= WIDTH or self.model != "dit-fashion"):
            raise ValueError(
                f"--frechet: expected more than {WIDTH} images of dit-fashion, which has a classifier, or 0, got "
                f"{self.frechet} of {self.model}"
            )


class Store:
    """A results file: its first line is the job, each other a row. A row is written when it is known, once.

    Raises:
        ValueError: the file holds another job's rows.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.rows = path, []
        head = {"job": asdict(job), "environment": environment()}
        if path.exists():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            if not lines or lines[0].get("job") != asdict(job):
                got = lines[0].get("job") if lines else "none"
                raise ValueError(f"{path}: expected the results of {asdict(job)}, got those of {got}")
            self.rows = lines[1:]
            head = lines[0]
        self._write([head, *self.rows])  # a line cut short is gone

    def __contains__(self, key: tuple[str, str]) -> bool:
        return any((row["peer"], row["setting"]) == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _write(self, lines: list[dict[str, Any]]) -> None:
        draft = self.path.with_name(f".{self.path.name}.tmp")
        try:
            draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)


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
        if job.frechet:
            progress(f"{job.model}: {job.frechet} images of the full run")
            self.judge = Judge.prepare(self.sampling, job.steps, job.frechet, HELD_OUT)

    def row(self, peer: Peer, setting: str) -> dict[str, Any]:
        """Everything about one point; `error` holds the peer's own words where it did not come to one."""
        row: dict[str, Any] = {"peer": peer.name, "setting": setting, "error": None}
        if peer.missing:
            return row | {"error": peer.missing}
        began = time.perf_counter()
        try:
            own = self._own()
            evaluations = _Evaluations(own.transformer)
            own = peer.prepare(own, setting, self.job.steps)
            row |= self._measured(own, evaluations)
        except Exception as error:  # a peer's own failure is a result
            return row | {
                "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            }
        return row | {"seconds": round(time.perf_counter() - began, 1)}

    def _own(self) -> PixelPipeline:
        return self.sampling.pipeline.around(copy.deepcopy(self.sampling.pipeline.transformer))

    def _measured(self, own: PixelPipeline, evaluations: _Evaluations) -> dict[str, Any]:
        job, steps = self.job, own.steps or self.job.steps
        sampling = Sampling(own, self.sampling.guidance)
        some = self.start[: job.batch]
        schedule = getattr(own.transformer, "schedule", None)  # ours says what it skips, and runs no hooks
        whole = isinstance(own.transformer, torch._dynamo.OptimizedModule)  # computes all; hooks would compile it twice
        with nullcontext([0]) if whole or schedule is not None else evaluations.counted() as counted:
            first = sampling(some, steps)
        images = sampling(self.start, steps)
        if not torch.isfinite(images).all():
            raise FloatingPointError("the images are not finite")
        again = sampling(some, steps)
        full = job.steps * evaluations.of_a_forward
        values = psnr(images, self.full)
        row = {
            "cur": schedule.cur if schedule is not None else 0.0 if whole else 1 - counted[0] / full,
            "drift": (again - first).abs().max().item(),  # between two runs from the same noise
            "psnr": values.mean().item(),
            "psnr_pooled": pooled_psnr(images, self.full),
            "psnr_worst": values.min().item(),
            "psnr_converged": psnr(images, self.converged).mean().item(),
            "ssim": ssim(images, self.full).mean().item(),
            "max_error": (images - self.full).abs().max().item(),
        }
        if self.judge is not None:
            judge = Judge(
                sampling, *(getattr(self.judge, name) for name in ("start", "count", "classifier", "real", "full"))
            )
            row |= judge(steps)
        reference = self.sampling
        timings = interleave(
            {"eager": lambda: reference(some, job.steps), "own": lambda: sampling(some, steps)}, job.rounds
        )
        ratios = [b / a for a, b in zip(timings["eager"].seconds, timings["own"].seconds)]
        low, middle, high = (
            statistics.quantiles(ratios, n=5)[0],
            statistics.median(ratios),
            statistics.quantiles(ratios, n=5)[3],
        )
        return row | {
            "latency": middle,  # of diffusers' own full run
            "latency_p20": low,
            "latency_p80": high,
            "ms_per_image": 1e3 * timings["own"].median / job.batch,
            "ms_per_image_eager": 1e3 * timings["eager"].median / job.batch,
        }


class _Evaluations:
    """How often a model's branch modules run, whatever is wrapped around them later."""

    def __init__(self, model: nn.Module) -> None:
        names = branch_names(model)
        self.modules = [getattr(block, name) for block in model.transformer_blocks for name in names]
        self.of_a_forward = len(self.modules)

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Counts the projections that every evaluation runs, which a cache around the module leaves out."""
        count, handles = [0], []
        for module in self.modules:
            inner = module.to_out[0] if hasattr(module, "to_out") else module.net[2]
            handles.append(inner.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1)))
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
    progress: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Measure every point that `path` does not hold yet; all rows.

    Args:
        peers: of `PEERS`; all of them unless given.
        settings: at most so many of each peer's sweep.
    """
    store, bench = Store(path, job), None
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
