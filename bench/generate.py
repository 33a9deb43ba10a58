"""Many images of a reference model, in shards, by one process or several.

    python bench/generate.py --model dit-fashion --schedule uniform:2 --count 10000 --out out/images
    accelerate launch --multi_gpu --num_processes 2 bench/generate.py --count 10000 --out out/images

(``--multi_gpu`` is Accelerate's word for several processes on a machine: without a GPU they run on its cores and talk
by gloo; without the word a machine that has no GPU gets one process.) An image depends on the job and its index alone,
never on the number of processes. A shard appears in the folder once it is whole, so the same command again makes those
that are missing, whatever ended the last run. One launch at a time into a folder.

The folder holds ``job.json`` and ``shard-00000.safetensors``, ...: images [n, channels, height, width] as sampled,
around [-1, 1], and int64 labels [n], or prompts [n]: numbers of the model's ``prompts.json``. Image i is in shard
i // SHARD.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import harmonica_rt as hrt
from bench.arguments import positive
from bench.models.pipelines import PixelPipeline
from bench.models.reference import REFERENCES, TRAINED, load_pipeline, weights_digest
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.cuda_graphs import CaptureFailed
from harmonica_rt.kernels.inductor import CompilerMissing
from harmonica_rt.shards import begin, check, missing, shard_path, write

BACKENDS = ("auto", "eager", "inductor", "cudagraph")
DTYPES = ("float32", "float16")
PATIENCE = timedelta(days=7)  # how long a process that is done waits for the others


@dataclass(frozen=True)
class Job:
    """What a folder's images are: equal jobs make equal images.

    Attributes:
        weights: digest of the model's weights.
        schedule: name and digest; "none" where diffusers' own model samples.
        backend: as asked for; "diffusers" where there is no schedule.
        count: images.
        shard: images a file, a multiple of `batch`; the last file may hold fewer.
        batch: images a call; guidance doubles the samples.
        dtype: of the images in the files; they are sampled in fp32.
    """

    model: str
    weights: str
    sampler: str
    steps: int
    guidance: float
    schedule: str
    backend: str
    seed: int
    count: int
    shard: int
    batch: int
    dtype: str

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.count))

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard)


def prepare(
    model: str,
    schedule: str | None = None,
    *,
    count: int,
    seed: int = 0,
    steps: int = 20,
    guidance: float | None = None,
    shard: int = 32,
    batch: int = 16,
    backend: str = "auto",
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[PixelPipeline, Job]:
    """The pipeline that makes a job's images, and the job.

    Args:
        model: a trained reference model.
        schedule: a file or a name as in `parse_schedule`; diffusers' own model samples unless given.
        guidance: the model's own unless given.

    Raises:
        ValueError: naming what was expected and what came.
    """
    for name, value, allowed in (
        ("model", model, TRAINED),
        ("backend", backend, BACKENDS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"--{name}: expected one of {', '.join(allowed)}, got {value!r}")
    for name, number, least in (("count", count, 1), ("seed", seed, 0), ("batch", batch, 1), ("shard", shard, 1)):
        if number < least:
            raise ValueError(f"--{name}: expected an integer from {least} on, got {number}")
    if shard % batch:
        raise ValueError(f"--shard: expected a multiple of --batch, {batch}, got {shard}")
    guidance = REFERENCES[model].guidance if guidance is None else guidance
    if not np.isfinite(guidance):
        raise ValueError(f"--guidance: expected a finite number, got {guidance}")
    pipeline = load_pipeline(model)
    if device != "cpu":
        pipeline.to(device)
    weights, sampler = weights_digest(pipeline.transformer), type(pipeline.scheduler).__name__
    planned = "none"
    if schedule is not None:
        plan = parse_schedule(schedule, pipeline, steps)
        _check_schedule(schedule, plan, sampler, pipeline.timesteps(steps))
        planned = f"{Path(schedule).stem if Path(schedule).is_file() else schedule}, {_schedule_digest(plan)}"
        pipeline = hrt.compile(pipeline, plan, backend=backend, plans=1, strict=True)
    made = "diffusers" if schedule is None else backend
    return pipeline, Job(
        model, weights, sampler, steps, float(guidance), planned, made, seed, count, shard, batch, dtype
    )


def _check_schedule(name: str, schedule: hrt.Schedule, sampler: str, known: list[int]) -> None:
    """What a compiled pipeline refuses at its first step, before a folder is taken."""
    if schedule.steps != len(known):
        raise ValueError(f"--steps: {name} has {schedule.steps} steps, got {len(known)}")
    if schedule.sampler not in (None, sampler):
        raise ValueError(f"--schedule: {name} was made for {schedule.sampler}, the model samples with {sampler}")
    if schedule.timesteps is not None and not np.allclose(schedule.timesteps, known):
        raise ValueError(f"--schedule: {name} was made for timesteps {schedule.timesteps}, {sampler} has {known}")


def _schedule_digest(schedule: hrt.Schedule) -> str:
    """Of what it computes and with what weights it reuses; not of its note."""
    digest = hashlib.sha256(repr((schedule.order, schedule.branches, schedule.compute.shape)).encode())
    for array in (schedule.compute, schedule.weights, schedule.output, schedule.output_weights):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


# ---- images


def noise(seed: int, indices: range, shape: tuple[int, int, int]) -> Tensor:
    """Initial noise [len(indices), *shape]; an image's is drawn from (seed, its index) alone."""
    return torch.stack([_noise(seed, index, shape) for index in indices])


def _noise(seed: int, index: int, shape: tuple[int, int, int]) -> Tensor:
    (mixed,) = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(mixed)))


def render(pipeline: PixelPipeline, job: Job, shard: int) -> dict[str, Tensor]:
    """The tensors of a shard's file. Batches are always whole, so that one plan serves all: what is beyond is cut."""
    known, shown = pipeline.known, "labels" if pipeline.prompts is None else "prompts"
    indices, parts = job.indices(shard), []
    for first in range(indices.start, indices.stop, job.batch):
        batch = range(first, first + job.batch)
        wanted = [known[i % len(known)] for i in batch]
        start = noise(job.seed, batch, pipeline.shape).to(pipeline.transformer.device)
        call = {"num_inference_steps": job.steps, "latents": start, "output_type": "latent"}
        parts.append(pipeline(wanted, job.guidance, **call).images.cpu())
    images = torch.cat(parts)[: len(indices)].to(getattr(torch, job.dtype))
    return {"images": images, shown: torch.tensor([i % len(known) for i in indices])}


# ---- all of them


def generate(
    pipeline: PixelPipeline,
    job: Job,
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], object] = lambda: None,
    progress: Callable[[int, int], object] = lambda done, images: None,
) -> int:
    """Make what `folder` lacks of the job: this process's share, every `ranks`-th of the missing shards.

    Args:
        rank, ranks: this process's number, from 0, and how many there are.
        wait: returns once all of them have called it.
        progress: called with the images all processes have made so far, and will have made.

    Returns:
        Images all processes have made together.

    Raises:
        OtherJob: the folder is another job's; nothing was changed.
        OSError: a file could not be written; those that are there are whole.
    """
    check(folder, asdict(job))
    if rank == 0:
        begin(folder, asdict(job))
    sizes = {shard: len(job.indices(shard)) for shard in missing(folder, job.shards)}
    images = sum(sizes.values())

    def show() -> None:
        progress(sum(size for shard, size in sizes.items() if shard_path(folder, shard).exists()), images)

    show()
    wait()  # all have seen the same shards missing before one is made
    for shard in list(sizes)[rank::ranks]:
        write(shard_path(folder, shard), save(render(pipeline, job, shard)))
        show()
    wait()
    show()
    return images


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=TRAINED[0], help=f"one of {', '.join(TRAINED)}")
    parser.add_argument("--schedule", help="full, uniform:N[:ORDER] or a schedule file; diffusers' model unless given")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs the schedule")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--guidance", type=float, help="1 turns guidance off; unless given, the model's own")
    parser.add_argument("--count", type=positive, default=1024, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=positive, default=32, help="images a file, a multiple of --batch")
    parser.add_argument("--batch", type=positive, default=16, help="images a call; guidance doubles the samples")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the images in the files")
    parser.add_argument("--threads", type=positive, default=1, help="of each process")
    parser.add_argument("--out", type=Path, default=Path("out/images"))
    arguments = vars(parser.parse_args(argv))
    torch.set_num_threads(arguments.pop("threads"))
    # Without a GPU, Accelerate takes a launcher's processes for a group only if it is told of the CPU
    waits = [InitProcessGroupKwargs(timeout=PATIENCE)]
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=waits)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)
    folder, console = arguments.pop("out"), Console(width=160)
    try:
        pipeline, job = prepare(**arguments, device=device)
        with tqdm(disable=rank > 0, unit="image", delay=0.1) as bar:

            def show(done: int, images: int) -> None:
                bar.total = images
                bar.update(done - bar.n)

            began = time.perf_counter()
            images = generate(pipeline, job, folder, rank, ranks, accelerator.wait_for_everyone, show)
            seconds = time.perf_counter() - began
    except (ValueError, TypeError, OSError, CompilerMissing, CaptureFailed) as error:
        # From all processes that fail: a launcher ends the others with the first
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 2
    accelerator.end_training()
    if rank == 0:
        by = "1 process" if ranks == 1 else f"{ranks} processes"
        made = f"{images} images in {seconds:.1f} s, {images / seconds:.1f} images/s" if images else "nothing to make"
        console.print(f"{folder}: all {job.count} images; {made} ({by})", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
