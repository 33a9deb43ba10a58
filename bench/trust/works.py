"""What is killed: saving, learning, trying, a comparison of peers, compiling; on small models."""

from __future__ import annotations

import csv
import functools
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

import harmonica_rt as hrt
from bench import run_quality
from bench.compare import comparison
from bench.compare.comparison import Job
from harmonica_rt import Schedule, shards
from harmonica_rt.train import checkpoint, record
from harmonica_rt.train import learn as learner
from harmonica_rt.train.pipeline_task import PipelineTask
from tests.conftest import Calls, make_dit, random_schedule
from tests.pipelines.folders import text_flux
from tests.train.commands import run, succeeded
from tests.train.test_resuming import ITERATIONS, SMALL, bytes_of

from .killing import Work


class Saving(Work):
    """Two schedules by turns under one name, of each format."""

    TIMES = 60

    def prepare(self, place: Path) -> None:
        super().prepare(place)
        rng = np.random.default_rng(0)
        plain = random_schedule(0, steps=60, layers=28, order=1, learned=True)
        plain = plain.replace(channels=None)
        exists = (plain.weights != 0)[..., None]
        wide = [plain.replace(channels=rng.normal(0, 0.1, (*plain.weights.shape, 64)) * exists) for _ in "ab"]
        self.versions = {"s.json": [plain, plain.replace(note="b")], "s.safetensors": wide}

    def run(self, folder: Path) -> None:
        for number in range(self.TIMES):
            for name, versions in self.versions.items():
                versions[number % 2].save(folder / name)

    def check(self, folder: Path) -> list[str]:
        there = [name for name in self.versions if (folder / name).exists()]
        for name in there:
            if Schedule.load(folder / name) not in self.versions[name]:
                raise ValueError(f"{name}: neither the one nor the other schedule")
        return there

    def result(self, folder: Path) -> Any:
        return [Schedule.load(folder / name) == versions[1] for name, versions in self.versions.items()]


class _OfPipeline(Work):
    """Work on a small Flux in a folder."""

    def prepare(self, place: Path) -> None:
        super().prepare(place)
        text_flux().save_pretrained(place / "flux")
        (place / "prompts.txt").write_text("a cat\nred fox\nold house\n")


class Learning(_OfPipeline):
    """`harmonica learn`, and `--resume` where there is a checkpoint."""

    def run(self, folder: Path) -> None:
        learner.TRIAL, PipelineTask.held_out, record.EVERY = 2, 2, 0.0
        hrt.learn.__kwdefaults__["validation"] = 2
        options = [*SMALL, "--iterations", ITERATIONS, "--prompts", self.place / "prompts.txt"]
        options += ["--resume"] * (folder / "s.safetensors.checkpoint").exists()
        succeeded(run("learn", "--pipeline", self.place / "flux", "--out", folder / "s.safetensors", *options))

    def check(self, folder: Path) -> list[str]:
        out, kept = folder / "s.safetensors", folder / "s.safetensors.checkpoint"
        if out.exists():
            Schedule.load(out)
        if kept.exists():
            with safe_open(kept, "pt") as file:
                state = json.loads(file.metadata()[checkpoint.KEY])
                assert set(state) >= {"identity", "course", "trainer"}, sorted(state)
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        return [path.name for path in (out, kept) if path.exists()]

    def result(self, folder: Path) -> Any:
        made = Schedule.load(folder / "s.safetensors")
        assert not (folder / "s.safetensors.checkpoint").exists()
        return bytes_of(made), made.note.split(" s; ")[1]


class Trying(_OfPipeline):
    """`harmonica try`, begun again."""

    LASTING = ("name", "level", "backend", "theory", "slots", "psnr", "psnr_worst", "ssim", "ssim_worst", "calls")

    def run(self, folder: Path) -> None:
        options = ["--steps", 4, "--height", 16, "--width", 16, "--call", "max_sequence_length=16", "--rounds", 1]
        options += ["--prompts", self.place / "prompts.txt", "--schedule", "uniform:2", "--schedule", "output:3"]
        succeeded(
            run("try", "--pipeline", self.place / "flux", "--out", folder / "out", "--backend", "eager", *options)
        )

    def check(self, folder: Path) -> list[str]:
        readers = {".csv": _table, ".json": _json, ".png": _picture, ".html": _page}
        there = sorted(path for path in (folder / "out").glob("[!.]*"))
        for path in there:
            readers[path.suffix](path)
        return [path.name for path in there]

    def result(self, folder: Path) -> Any:
        rows = json.loads((folder / "out" / "figures.json").read_text())["rows"]
        return self.check(folder), [[row.get(key) for key in self.LASTING] for row in rows]


def _table(path: Path) -> None:
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 3 and None not in rows[-1].values(), f"{path.name}: {len(rows)} rows"


def _json(path: Path) -> None:
    json.loads(path.read_text())
    if path.name != "figures.json":
        Schedule.load(path)


def _picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def _page(path: Path) -> None:
    assert path.read_text().endswith("</html>\n"), f"{path.name}: cut short"


class Comparing(Work):
    """`bench/run_quality.py --peers`, which goes on by itself."""

    PEERS = ("eager", "uniform", "output", "fewer")
    COLUMNS = ("peer", "setting", "error", "cur", "psnr", "psnr_worst", "psnr_converged", "ssim", "max_error", "strip")

    def run(self, folder: Path) -> None:
        options = ["--peers", ",".join(self.PEERS), "--steps", "4", "--count", "1", "--judged", "0"]
        few = functools.partial(Job, batch=1, rounds=1)
        whole = comparison.compare
        with patch.object(comparison, "Job", few), patch.object(comparison, "compare") as compare:
            compare.side_effect = lambda job, file, peers, settings, *more: whole(job, file, peers, 1, *more)
            assert run_quality.main([*options, "--out", str(folder)]) == 0

    def check(self, folder: Path) -> list[str]:
        file = folder / "peers-dit-fashion.jsonl"
        if not file.exists():
            return []
        rows = _rows(file)
        for row in rows:
            _picture(file.with_suffix("") / row["strip"])
        return [f"{file.name}, {len(rows)} rows"]

    def result(self, folder: Path) -> Any:
        rows = _rows(folder / "peers-dit-fashion.jsonl")
        pictures = [(folder / "peers-dit-fashion" / row["strip"]).read_bytes() for row in rows]
        page = (folder / "RESULTS.md").read_text()
        return [[row[name] for name in self.COLUMNS] for row in rows], pictures, page.count("\n")


def _rows(file: Path) -> list[dict[str, Any]]:
    """As `bench.compare.store` reads them."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")][1:]


class Compiling(Work):
    """A model compiled with backend inductor: what is left of a kernel's files in the cache is found by who goes on."""

    children = True

    def run(self, folder: Path) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        model = make_dit(2)
        fast = hrt.compile(model, random_schedule(0, steps=3, layers=2), backend="inductor")
        torch.manual_seed(0)
        outputs = {str(step): output for step, output in enumerate(Calls(3).run(fast))}
        shards.write(folder / "outputs.safetensors", save(outputs))

    def check(self, folder: Path) -> list[str]:
        there = [path for path in [folder / "outputs.safetensors"] if path.exists()]
        return [path.name for path in there if len(load_file(path)) == 3]

    def result(self, folder: Path) -> Any:
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "outputs.safetensors").items()}


WORKS = {"save": Saving, "learn": Learning, "try": Trying, "run_quality": Comparing, "compile": Compiling}
