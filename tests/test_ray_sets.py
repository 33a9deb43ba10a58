"""Sets by Ray Data: exactly one image a prompt, whoever dies; and what is there already stays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import harmonica_rt as hrt
from harmonica_rt.image_maker import ImageMaker
from harmonica_rt.ray_sets import ShardWriter, make_set, schedule_digest
from harmonica_rt.shards import OtherJob

from .conftest import make_dit
from .pipelines.folders import text_flux

ray = pytest.importorskip("ray", reason="the extra `serve` is not installed")
pytest.importorskip("ray.data", reason="the extra `serve` is not installed")

CALL = {"num_inference_steps": 4, "max_sequence_length": 16, "height": 16, "width": 16}
PROMPTS = [f"a cat of {n}" for n in range(11)]
MADE: dict[str, Any] = {"seed": 3, "shard": 4, "batch": 2, "call": CALL, "backend": "eager", "workers": 2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    text_flux().save_pretrained(path)
    return str(path)


def dying(folder: str, flag: Path) -> Callable[[], Any]:
    """Loads a pipeline whose first call, of all workers', ends its process."""

    def load() -> Any:
        from harmonica_rt.generating import load_pipeline

        pipeline = load_pipeline(folder)
        encode = pipeline.encode_prompt

        def once(*args: Any, **kwargs: Any) -> Any:
            try:
                flag.touch(exist_ok=False)
            except FileExistsError:
                return encode(*args, **kwargs)
            os._exit(1)

        pipeline.encode_prompt = once
        return pipeline

    return load


def read(out: Path) -> dict[int, tuple[str, np.ndarray]]:
    """Number -> prompt and image; each must be there once."""
    found: dict[int, tuple[str, np.ndarray]] = {}
    for path in sorted(out.glob("shard-*.safetensors")):
        with safe_open(path, "numpy") as file:
            prompts, images = json.loads(file.metadata()["prompts"]), file.get_tensor("images")
            for number, prompt, image in zip(file.get_tensor("numbers").tolist(), prompts, images, strict=True):
                assert number not in found
                found[number] = (prompt, image)
    return found


@pytest.mark.usefixtures("cluster")
def test_one_image_a_prompt_though_a_worker_dies(folder: str, tmp_path: Path) -> None:
    load, out = dying(folder, tmp_path / "died"), tmp_path / "out"
    assert make_set(load, "output:2", PROMPTS, out, **MADE) == len(PROMPTS)
    assert (tmp_path / "died").exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "job.json",
        *(f"shard-0000{n}.safetensors" for n in range(3)),
    ]
    found = read(out)
    assert [found[n][0] for n in range(len(PROMPTS))] == PROMPTS
    maker = ImageMaker(text_flux, {"s": "output:2"}, batches=(2,), call=CALL, backend="eager")
    for number in (0, 6, 10):
        assert np.array_equal(found[number][1], maker.make([maker.read(PROMPTS[number], 3 + number)])[0])
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert make_set(load, "output:2", PROMPTS, out, **MADE) == 0
    (out / "shard-00001.safetensors").unlink()
    (out / ".shard-00001.safetensors.1.tmp").write_bytes(b"half")
    assert make_set(load, "output:2", PROMPTS, out, **MADE) == 4
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert after.keys() == before.keys() and {n for n in after if after[n] != before[n]} == {"shard-00001.safetensors"}
    again = read(out)
    assert all(np.array_equal(again[number][1], found[number][1]) for number in found)
    with pytest.raises(OtherJob, match="seed is 3 there, 4 here"):
        make_set(load, "output:2", PROMPTS, out, **MADE | {"seed": 4})
    with pytest.raises(OtherJob, match=r"prompts is .* there"):
        make_set(load, "output:2", PROMPTS[::-1], out, **MADE)


def test_other_weights_are_not_mixed_in(folder: str, tmp_path: Path) -> None:
    options = {"sizes": [], "batches": [2], "call": CALL, "backend": "eager"}
    row = {"shard": 0, "first": 0, "prompts": PROMPTS[:3]}
    written = ShardWriter(folder, "output:2", tmp_path, 3, options)(row)
    assert (written["shard"], written["images"]) == (0, 3) and list(read(tmp_path)) == [0, 1, 2]
    ShardWriter(folder, "output:2", tmp_path, 3, options)

    def changed() -> Any:
        pipeline = text_flux()
        torch.nn.init.normal_(next(pipeline.transformer.parameters()))
        return pipeline

    with pytest.raises(OtherJob, match=r"is of weights .*, the pipeline has .*: expected the same"):
        ShardWriter(changed, "output:2", tmp_path, 3, options)


def test_schedules_are_told_apart_by_what_they_do(tmp_path: Path) -> None:
    schedule = hrt.Schedule.uniform(make_dit(), steps=4, every=2)
    schedule.save(tmp_path / "s.json")
    same = [schedule, tmp_path / "s.json", schedule.replace(note="another")]
    assert len({schedule_digest(each) for each in same}) == 1
    others = [schedule, schedule.replace(weights=0.9 * schedule.weights), "uniform:2", {"a": schedule}]
    assert len({schedule_digest(each) for each in others}) == 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"shard": 3}, "expected a multiple of batch and at least one prompt, got 3 of 2, and 11 prompts"),
        ({"batch": 0}, "batch: expected a positive integer, got 0"),
        ({"workers": True}, "workers: expected a positive integer, got True"),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        make_set("x", "output:2", PROMPTS, tmp_path / "out", **MADE | changes)
    assert not (tmp_path / "out").exists()
