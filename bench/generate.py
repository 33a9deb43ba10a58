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
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save
from tqdm import tqdm

from bench.arguments import positive
from bench.models.image_jobs import BACKENDS, DTYPES, Job, prepare, render
from bench.models.pipelines import PixelPipeline
from bench.models.reference import TRAINED
from harmonica_rt.cuda_graphs import CaptureFailed
from harmonica_rt.kernels.inductor import CompilerMissing
from harmonica_rt.shards import begin, check, missing, shard_path, write

PATIENCE = timedelta(days=7)  # how long a process that is done waits for the others


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
