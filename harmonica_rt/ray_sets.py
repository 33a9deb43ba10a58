"""Sets of images by Ray Data: prompts in, shards out, one image a prompt whoever dies. Needs the extra ``serve``.

    from harmonica_rt.ray_sets import make_set

    made = make_set("black-forest-labs/FLUX.1-dev", "uniform:3", prompts, Path("/shared/set"),
                    workers=8, num_gpus=1, call={"guidance_scale": 3.5})

Image number i shows prompt i, from noise of ``seed + i``, in shard i // `shard`. A shard appears in the folder once it
is whole (`shards`), so the same call again makes those that are missing, whatever ended the last one; one of a worker
that died is made again by another, with the same images. The folder is one that all workers see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import shards
from .compiling import denoisers_of
from .image_maker import ImageMaker
from .schedule import Schedule
from .schedule_files import parts
from .shards import OtherJob


def make_set(
    load: str | Callable[[], Any],
    schedule: Any,
    prompts: Sequence[str | int],
    out: Path,
    *,
    seed: int = 0,
    shard: int = 64,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    call: Mapping[str, Any] | None = None,
    backend: str = "auto",
    workers: int = 1,
    **options: Any,
) -> int:
    """Make what `out` lacks of a set; one launch at a time into a folder.

    It then holds ``job.json`` and ``shard-00000.safetensors``, ...: ``images``, uint8 [n, height, width, 3], and
    ``numbers``, int64 [n]; in the metadata are ``prompts``, as JSON, and a digest of the ``weights``.

    Args:
        load, schedule, call, backend: as `ImageMaker` takes them.
        seed: of the first image.
        shard: images a file, a multiple of `batch`; the last one may hold fewer.
        batch: images a call; the last one's are padded.
        size: (height, width) in pixels; the pipeline's own unless given.
        workers: that make shards, each with a pipeline of its own.
        options: of a worker, as Ray Data's ``map`` takes them: ``num_gpus``, ``num_cpus``, ...

    Returns:
        Images made.

    Raises:
        OtherJob: the folder is another job's; nothing was changed.
        TypeError, ValueError: naming what was expected and what came.
        ImportError: Ray Data is not installed.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ImportError(f'expected Ray: pip install "harmonica_rt[serve]"; got {error}') from error
    for name, value in (("shard", shard), ("batch", batch), ("workers", workers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if shard % batch or not prompts:
        got = f"{shard} of {batch}, and {len(prompts)} prompts"
        raise ValueError(f"shard, prompts: expected a multiple of batch and at least one prompt, got {got}")
    folder, count, call = Path(out).absolute(), len(prompts), dict(call or {})
    job = {
        "pipeline": load if isinstance(load, str) else getattr(load, "__qualname__", type(load).__name__),
        "schedule": schedule_digest(schedule),
        "prompts": _digest(*map(repr, prompts)),
        "call": repr(sorted(call.items())),
        "size": None if size is None else list(size),
        **{"backend": backend, "seed": seed, "count": count, "shard": shard, "batch": batch},
    }
    shards.check(folder, job)
    shards.begin(folder, job)
    lacking = shards.missing(folder, -(-count // shard))
    if not lacking:
        return 0
    rows = [
        {"shard": number, "first": number * shard, "prompts": list(prompts[number * shard : (number + 1) * shard])}
        for number in lacking
    ]
    made = {"sizes": [] if size is None else [size], "batches": [batch], "call": call, "backend": backend}
    # A block a shard: a worker that dies takes one with it, which Ray Data gives to another
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardWriter,
        fn_constructor_args=(load, schedule, folder, seed, made),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
        **options,
    )
    return sum(row["images"] for row in written.iter_rows())


class ShardWriter:
    """A worker of Ray Data: a row in is a shard to be made, a row out what was written."""

    def __init__(
        self, load: str | Callable[[], Any], schedule: Any, folder: Path, seed: int, options: Mapping[str, Any]
    ) -> None:
        self.folder, self.seed = folder, seed
        self.maker = ImageMaker(load, {"schedule": schedule}, **options)
        self.weights = weights_digest(self.maker.pipelines["schedule"])
        for path in folder.glob("shard-*.safetensors"):
            if (there := _metadata(path).get("weights")) != self.weights:
                raise OtherJob(f"{path} is of weights {there!r}, the pipeline has {self.weights!r}: expected the same")

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        from safetensors.numpy import save

        prompts, first, images = list(row["prompts"]), int(row["first"]), []
        asked = [self.maker.read(_plain(prompt), self.seed + first + n) for n, prompt in enumerate(prompts)]
        for start in range(0, len(asked), self.maker.largest):
            images += self.maker.make(asked[start : start + self.maker.largest])
        numbers = np.arange(first, first + len(images), dtype=np.int64)
        shown = json.dumps([_plain(prompt) for prompt in prompts], ensure_ascii=False)
        metadata = {"prompts": shown, "weights": self.weights}
        data = save({"images": np.stack(images), "numbers": numbers}, metadata)
        shards.write(path := shards.shard_path(self.folder, int(row["shard"])), data)
        return {"shard": int(row["shard"]), "images": len(images), "path": str(path)}


def schedule_digest(schedule: Any) -> str:
    """Of what it computes and with what weights; the text itself of a name."""
    if isinstance(schedule, Mapping):
        return "; ".join(f"{name}: {schedule_digest(each)}" for name, each in schedule.items())
    if isinstance(schedule, (str, Path)) and Path(schedule).is_file():
        schedule = Schedule.load(schedule)
    if not isinstance(schedule, Schedule):
        return str(schedule)
    fields, arrays = parts(schedule)
    fields.pop("note", None)
    return _digest(
        json.dumps(fields, sort_keys=True), *(f"{name} {arrays[name].tobytes().hex()}" for name in sorted(arrays))
    )


def weights_digest(pipeline: Any) -> str:
    """Of 64 values of each tensor of its denoisers: tells weights from others, but not from a change of single ones."""
    digest = hashlib.sha256()
    for denoiser in denoisers_of(pipeline).values():
        for name, tensor in sorted(denoiser.state_dict().items()):
            values = tensor.detach().flatten()
            few = values[:: max(1, len(values) // 64)].float().cpu().numpy()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + few.tobytes())
    return digest.hexdigest()[:16]


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def _plain(prompt: Any) -> str | int:
    return prompt if isinstance(prompt, str) else int(prompt)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
