"""Images over processes: the same whatever made them, whole or not there, never another job's."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load, load_file
from torch import Tensor

import harmonica_rt as hrt
from bench import generate
from bench.models.image_jobs import Job, noise, prepare
from bench.models.pipelines import PixelPipeline
from bench.models.reference import load_pipeline
from harmonica_rt.shards import OtherJob

ROOT = Path(generate.__file__).parent.parent
SMALL: dict[str, Any] = {"count": 10, "steps": 2, "shard": 4, "batch": 2, "backend": "eager"}
OPTIONS = ["--schedule", "uniform:2", *(f"--{name}={value}" for name, value in SMALL.items())]
SHARDS = ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"]
DIT, PIXART = (1, 28, 28), (3, 32, 32)  # an image's shape
Prepared = tuple[PixelPipeline, Job]


def dit(**changes: Any) -> Prepared:
    return prepare("dit-fashion", "uniform:2", **SMALL | changes)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    """Ten images of dit-fashion in three shards: 4, 4, 2."""
    return dit()


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The job's files, made by one process in one go."""
    folder = tmp_path_factory.mktemp("whole") / "not" / "there" / "yet"
    assert generate.generate(*prepared, folder) == 10
    return contents(folder)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(thread, shard) of everything made while the test runs."""
    made, render = [], generate.render

    def recording(pipeline: PixelPipeline, job: Job, shard: int) -> dict[str, Tensor]:
        made.append((threading.current_thread().name, shard))
        return render(pipeline, job, shard)

    monkeypatch.setattr(generate, "render", recording)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def together(folder: Path, workers: list[Prepared]) -> list[int]:
    """The job by several processes at once, threads named after their ranks here: what `generate` returned to each."""
    barrier, made, failed = threading.Barrier(len(workers)), [], []

    def work(rank: int, pipeline: PixelPipeline, job: Job) -> None:
        torch.set_num_threads(1)
        try:
            made.append(generate.generate(pipeline, job, folder, rank, len(workers), barrier.wait))
        except BaseException as error:  # a thread's own would only be printed
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(r, *w), name=str(r)) for r, w in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    return made


# ---- what is made


def test_shards_hold_the_images_and_their_labels(whole: dict[str, bytes]) -> None:
    assert list(whole) == ["job.json", *SHARDS]
    shards = [load(whole[name]) for name in SHARDS]
    assert all(set(shard) == {"images", "labels"} for shard in shards)
    assert [shard["images"].shape for shard in shards] == [(4, *DIT), (4, *DIT), (2, *DIT)]
    assert torch.equal(torch.cat([shard["labels"] for shard in shards]), torch.arange(10))
    assert {shard["images"].dtype for shard in shards} == {torch.float32}
    job = json.loads(whole["job.json"])
    assert (job["model"], job["count"], job["seed"], job["sampler"]) == ("dit-fashion", 10, 0, "DDIMScheduler")
    assert job["schedule"].startswith("uniform:2, ")


def test_images_are_those_of_the_pipeline(tmp_path: Path) -> None:
    prepared = prepare("dit-fashion", **SMALL | {"seed": 5, "guidance": 3.0})
    generate.generate(*prepared, tmp_path)
    pipeline = load_pipeline("dit-fashion")
    call = {"num_inference_steps": 2, "latents": noise(5, range(4, 6), DIT), "output_type": "latent"}
    wanted = pipeline([4, 5], 3.0, **call).images
    assert torch.equal(load_file(tmp_path / SHARDS[1])["images"][:2], wanted)
    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["schedule"], job["backend"], job["guidance"]) == ("none", "diffusers", 3.0)


def test_prompts_in_half_precision(tmp_path: Path) -> None:
    pipeline, job = prepare("pixart-emoji", **SMALL | {"count": 3, "dtype": "float16"})
    generate.generate(pipeline, job, tmp_path)
    shard = load_file(tmp_path / SHARDS[0])
    assert shard["images"].shape == (3, *PIXART) and shard["images"].dtype == torch.float16
    assert torch.equal(shard["prompts"], torch.arange(3))
    call = {"num_inference_steps": 2, "latents": noise(0, range(2, 4), PIXART), "output_type": "latent"}
    wanted = pipeline(pipeline.prompts.names[2:4], job.guidance, **call).images
    assert torch.equal(shard["images"][2:], wanted[:1].half())


def test_noise_is_drawn_from_seed_and_index_alone() -> None:
    many = noise(3, range(12), DIT)
    assert torch.equal(many[7:9], noise(3, range(7, 9), DIT))
    others = torch.cat([many, noise(0, range(3, 5), DIT), noise(4, range(12), DIT)]).flatten(1)
    assert len(others.unique(dim=0)) == 26
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05


def test_images_do_not_depend_on_how_many_there_are(whole: dict[str, bytes], tmp_path: Path) -> None:
    generate.generate(*dit(count=5), tmp_path)
    assert (tmp_path / SHARDS[0]).read_bytes() == whole[SHARDS[0]]
    assert torch.equal(load_file(tmp_path / SHARDS[1])["images"], load(whole[SHARDS[1]])["images"][:1])


# ---- processes


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_makes_the_same(
    count: int, whole: dict[str, bytes], tmp_path: Path, rendered: list[tuple[str, int]]
) -> None:
    assert together(tmp_path, [dit() for _ in range(count)]) == [10] * count
    assert contents(tmp_path) == whole
    shares = {0: "0", 1: "1", 2: "0" if count == 2 else "2"}
    assert sorted(rendered) == sorted((rank, shard) for shard, rank in shares.items())


def test_what_is_missing_is_shared_out(
    whole: dict[str, bytes], tmp_path: Path, rendered: list[tuple[str, int]]
) -> None:
    (tmp_path / "job.json").write_bytes(whole["job.json"])
    (tmp_path / SHARDS[1]).write_bytes(whole[SHARDS[1]])
    before = (tmp_path / SHARDS[1]).stat().st_mtime_ns
    assert together(tmp_path, [dit(), dit()]) == [6, 6], "images of both"
    assert sorted(rendered) == [("0", 0), ("1", 2)]
    assert contents(tmp_path) == whole
    assert (tmp_path / SHARDS[1]).stat().st_mtime_ns == before


def test_accelerate_launches_it(whole: dict[str, bytes], tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--main_process_port=0"]  # any that is free
    script = [ROOT / "bench" / "generate.py", *OPTIONS, "--out", tmp_path / "images"]
    done = subprocess.run([*launch, *script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all 10 images; 10 images in" in done.stdout and "(2 processes)" in done.stdout
    assert contents(tmp_path / "images") == whole


# ---- stopping and going on


def test_going_on_makes_only_what_is_missing(
    prepared: Prepared, whole: dict[str, bytes], tmp_path: Path, rendered: list[tuple[str, int]]
) -> None:
    generate.generate(*prepared, tmp_path)
    rendered.clear()
    assert generate.generate(*prepared, tmp_path) == 0
    assert rendered == []
    (tmp_path / SHARDS[2]).unlink()
    seen = []
    assert generate.generate(*prepared, tmp_path, progress=lambda *numbers: seen.append(numbers)) == 2
    assert [shard for _, shard in rendered] == [2]
    assert seen == [(0, 2), (2, 2), (2, 2)]
    assert contents(tmp_path) == whole


def test_a_run_that_ends_midway_leaves_whole_shards(
    prepared: Prepared, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = generate.render

    def interrupted(pipeline: PixelPipeline, job: Job, shard: int) -> dict[str, Tensor]:
        if shard == 1:
            raise KeyboardInterrupt
        return render(pipeline, job, shard)

    monkeypatch.setattr(generate, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(*prepared, tmp_path)
    assert contents(tmp_path) == {name: whole[name] for name in ("job.json", SHARDS[0])}
    monkeypatch.setattr(generate, "render", render)
    (tmp_path / f".{SHARDS[1]}.1234.tmp").write_bytes(whole[SHARDS[1]][:100])  # as a process killed in mid-write does
    assert generate.generate(*prepared, tmp_path) == 6
    assert contents(tmp_path) == whole


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: to the writer, a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_half_file(prepared: Prepared, whole: dict[str, bytes], tmp_path: Path) -> None:
    wanted = r"shard-00000.safetensors could not be written, the files before it are whole: .*too large"
    with files_of_at_most(len(whole[SHARDS[0]]) - 1), pytest.raises(OSError, match=wanted):
        generate.generate(*prepared, tmp_path)
    assert list(contents(tmp_path)) == ["job.json"]
    generate.generate(*prepared, tmp_path)
    assert contents(tmp_path) == whole


# ---- other jobs


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"model": "pixart-emoji"}, "model is 'dit-fashion' there, 'pixart-emoji' here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"count": 11, "shard": 2}, "count is 10 there, 11 here; shard is 4 there, 2 here; expected the same job"),
        ({"dtype": "float16"}, "dtype is 'float32' there, 'float16' here"),
        ({"weights": "0"}, "there, '0' here"),
    ],
)
def test_another_jobs_folder_is_refused(
    changes: dict[str, Any], sides: str, prepared: Prepared, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for name in ("job.json", SHARDS[0]):
        (tmp_path / name).write_bytes(whole[name])
    pipeline, job = prepared
    for rank in range(2):
        with pytest.raises(OtherJob, match=sides):
            generate.generate(pipeline, replace(job, **changes), tmp_path, rank, 2)
    assert contents(tmp_path) == {name: whole[name] for name in ("job.json", SHARDS[0])}


def test_another_schedule_is_another_job(prepared: Prepared, tmp_path: Path) -> None:
    _, job = prepared
    assert {one.schedule for one in (job, dit()[1])} == {job.schedule}
    pipeline = load_pipeline("dit-fashion")
    uniform = hrt.Schedule.uniform(pipeline.transformer, 2, 2)
    names = []
    for n, schedule in enumerate((uniform, uniform.replace(weights=0.9 * uniform.weights), uniform.replace(order=0))):
        (tmp_path / str(n)).mkdir()
        schedule.save(tmp_path / str(n) / "s.json")
        names.append(prepare("dit-fashion", str(tmp_path / str(n) / "s.json"), **SMALL)[1].schedule)
    assert len({*names, job.schedule}) == 4
    assert all(name.startswith("s, ") for name in names)
    assert names[0].split(", ")[1] == job.schedule.split(", ")[1], "the same schedule under another name"


def test_folders_nobody_can_place_are_refused(prepared: Prepared, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / SHARDS[0]).write_bytes(whole[SHARDS[0]])
    with pytest.raises(OtherJob, match=r"shards of an unknown job: there is no job\.json"):
        generate.generate(*prepared, tmp_path)
    for text, why in (
        ("{", "Expecting property name"),
        ("[]", "expected an object, got list"),
        ("[" * 100_000, "JSON nested too deeply"),
    ):
        (tmp_path / "job.json").write_text(text)
        with pytest.raises(OtherJob, match=f"job.json: not a job's description: {why}"):
            generate.generate(*prepared, tmp_path)
    with pytest.raises(NotADirectoryError, match="out: expected a folder, got the file"):
        generate.generate(*prepared, tmp_path / SHARDS[0])


# ---- the command


@pytest.fixture
def _alone() -> Iterator[None]:
    """No trace of the command's process group for the tests that follow."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_alone")
def test_command(tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture) -> None:
    for expected in ("10 images in", "nothing to make"):
        assert generate.main([*OPTIONS, "--out", str(tmp_path / "images")]) == 0
        printed = capsys.readouterr().out
        assert f"images: all 10 images; {expected}" in printed and "(1 process)" in printed
    assert contents(tmp_path / "images") == whole
    assert generate.main([*OPTIONS, "--out", str(tmp_path / "images"), "--seed", "1"]) == 2
    assert "error: " in (printed := capsys.readouterr().out) and "seed is 0 there, 1 here" in printed


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "dit-xl"], "--model: expected one of dit-fashion, pixart-emoji, flux-emoji, got 'dit-xl'"),
        (["--schedule", "uniform"], "or a schedule file, got 'uniform'"),
        (["--schedule", "bench/schedules/dit-fashion-ddim20-2x.json"], "has 20 steps, got 2"),
        (["--seed", "-1"], "--seed: expected an integer from 0 on, got -1"),
        (["--shard", "5"], "--shard: expected a multiple of --batch, 2, got 5"),
        (["--guidance", "nan"], "--guidance: expected a finite number, got nan"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(ROOT)
    assert generate.main([*OPTIONS, *arguments, "--out", str(tmp_path / "images")]) == 2
    assert message in capsys.readouterr().out
    assert not (tmp_path / "images").exists()


def test_unknown_names_and_schedules_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--backend: expected one of auto, eager, inductor, cudagraph, got 'fast'"):
        dit(backend="fast")
    with pytest.raises(ValueError, match="--dtype: expected one of float32, float16, got 'float64'"):
        dit(dtype="float64")
    pipeline = load_pipeline("dit-fashion")
    for fields, message in (
        ({"sampler": "DDPMScheduler"}, "was made for DDPMScheduler, the model samples with DDIMScheduler"),
        ({"timesteps": [999, 1]}, r"was made for timesteps \(999.0, 1.0\), DDIMScheduler has \[500, 0\]"),
    ):
        hrt.Schedule.uniform(pipeline.transformer, 2, 2, **fields).save(tmp_path / "s.json")
        with pytest.raises(ValueError, match=message):
            prepare("dit-fashion", str(tmp_path / "s.json"), **SMALL)
