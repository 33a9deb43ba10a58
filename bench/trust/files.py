"""Every kind of file that is read: how a whole one is made, damaged, and read by what a user calls."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor

from harmonica_rt import Schedule, shards
from harmonica_rt.train.record import Course, Kept, Record
from harmonica_rt.train.weights import Judged, TrainerState
from tests.conftest import make_dit, make_pixart, random_schedule, timesteps
from tests.hub_server import Hub, on_loopback
from tests.test_channels import random_channels
from tests.test_trunk import mixed

from .damage import damaged


class Kind:
    """One file that `write` puts into a folder and `read` reads from there.

    Attributes:
        named: what an error must say the name of.
        network: whether reading connects to loopback.
    """

    network = False

    def __init__(
        self,
        name: str,
        write: Callable[[Path], None],
        read: Callable[[Path], Any],
        change: Callable[[Random, bytes], bytes] = damaged,
        named: str = "",
    ) -> None:
        self.file, self.write, self.read_file, self.change, self.named = name, write, read, change, named or name

    @contextmanager
    def prepared(self, folder: Path) -> Iterator[None]:
        """A whole file is in `folder` first, damaged ones within."""
        self.folder = folder
        self.write(folder / self.file)
        self.whole = (folder / self.file).read_bytes()
        yield

    @property
    def size(self) -> int:
        return len(self.whole)

    def damage(self, rng: Random) -> None:
        (self.folder / self.file).write_bytes(self.change(rng, self.whole))

    def read(self) -> Any:
        return self.read_file(self.folder / self.file)


REPOSITORY = "me/schedules"


class HubCache(Kind):
    """What huggingface_hub keeps on disk, read offline: blobs, refs, links and folders, one of them damaged."""

    def __init__(self) -> None:
        super().__init__("schedule.json", lambda path: None, lambda path: None, named=REPOSITORY)

    @contextmanager
    def prepared(self, folder: Path) -> Iterator[None]:
        self.pristine, self.cache = folder / "pristine", folder / "cache"
        with on_loopback(self.pristine):
            schedule(True).push_to_hub(self.named)
            Schedule.from_hub(self.named, self.file)
        self.whole = b"".join(path.read_bytes() for path in self.pristine.rglob("*") if path.is_file())
        shutil.copytree(self.pristine, self.cache, symlinks=True)
        with patch.multiple(constants, HF_HUB_CACHE=str(self.cache), HF_HUB_OFFLINE=True):
            huggingface_hub.close_session()
            yield
        huggingface_hub.close_session()

    def damage(self, rng: Random) -> None:
        shutil.rmtree(self.cache)
        shutil.copytree(self.pristine, self.cache, symlinks=True)
        paths = sorted(path for path in self.cache.rglob("*") if ".locks" not in path.parts and "TAG" not in path.name)
        path = rng.choice([*paths, *4 * [path for path in paths if path.is_file()]])
        if path.is_file() and rng.random() < 0.8:
            path.write_bytes(damaged(rng, path.read_bytes()))
            return
        kept = path.read_bytes() if path.is_file() else b""
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        match rng.randrange(5):
            case 0:
                path.mkdir()
            case 1:
                path.symlink_to(rng.choice((path.name, "../nowhere", "..")))
            case 2:
                path.write_bytes(kept)
            case 3:
                path.with_name(path.name + rng.choice((".incomplete", "0"))).write_bytes(kept)

    def read(self) -> Any:
        return Schedule.from_hub(self.named, self.file)


class HubDownload(Kind):
    """What the Hub sends, damaged, or of another size than it says."""

    network = True
    server: Hub

    def __init__(self, file: str) -> None:
        super().__init__(file, lambda path: None, lambda path: None, named=REPOSITORY)

    @contextmanager
    def prepared(self, folder: Path) -> Iterator[None]:
        self.cache = folder / "cache"
        with on_loopback(self.cache) as self.server:
            schedule(True).push_to_hub(self.named)
            random_channels(make_dit(), "branches").push_to_hub(self.named)
            self.whole = self.server.repos[self.named]["main"][self.file]
            yield

    def damage(self, rng: Random) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        if self.server.claimed:
            huggingface_hub.close_session()  # what was sent beyond the length told is not the next answer
        self.server.claimed.clear()
        body = damaged(rng, self.whole)
        self.server.repos[self.named]["main"] = {self.file: body}
        if rng.random() < 0.05:
            self.server.claimed[self.file] = rng.choice((0, len(body) // 2, 2**30 + 1, 2**62))

    def read(self) -> Any:
        return Schedule.from_hub(self.named, self.file)


def schedule(learned: bool = False) -> Schedule:
    made = random_schedule(3, steps=12, layers=4, learned=learned)
    named = {"sampler": "DDIMScheduler", "guidance_scale": 1.5, "note": "of the campaign"}
    times = timesteps(12)
    return made.replace(timesteps=times, log_snr=[-0.01 * t for t in times], **named)


def output_weights() -> Schedule:
    made = Schedule.uniform(make_dit(), 12, level="output", order=2)
    return made.replace(output_weights=made.output_weights * 1.25)


def router(path: Path, zipped: bool = True) -> None:
    """As published."""
    torch.manual_seed(0)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(6)}}, "param_groups": [{"lr": 0.01}]}
    logits = {f"{k}.prob": torch.randn(6) for k in range(12)}
    checkpoint = {"routers": logits, "opt": optimizer, "args": argparse.Namespace(lr=0.01, path="x")}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)


def its_pickle(rng: Random, data: bytes) -> bytes:
    """A torch archive whose pickle is damaged and whose sums are right, so that it comes to the reader."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as there, zipfile.ZipFile(out, "w") as here:
        for entry in there.infolist():
            text = there.read(entry)
            here.writestr(entry, damaged(rng, text) if entry.filename.endswith(".pkl") else text)
    return out.getvalue()


def its_header(rng: Random, data: bytes) -> bytes:
    """A safetensors file whose header is damaged and whose length is right."""
    length = int.from_bytes(data[:8], "little")
    header = damaged(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def ecad(path: Path) -> None:
    row = {str(block): {"attn1": True, "attn2": False, "ff": block == 1} for block in range(3)}
    whole = {block: dict.fromkeys(row[block], True) for block in row}
    steps = {str(step): row if step % 3 else whole for step in range(12)}
    path.write_text(json.dumps({"cache_schedule": {"name": "fast", "schedule": steps}}))


def smooth_cache(path: Path) -> None:
    lists = {"attn1-0": [1, 0] * 6, "attn1-1": [1, 1, 0] * 4, "ff": [1, 0, 0] * 4}
    path.write_text(json.dumps(lists))


class _Task:
    """What a learning's checkpoint belongs to."""

    def parameters(self) -> dict[str, Tensor]:
        return {"weight": torch.arange(6.0)}

    def fields(self) -> dict[str, Any]:
        return {"model": "DiTTransformer2DModel", "steps": 12}

    def asked(self) -> dict[str, Any]:
        return {"prompts": ["a cat", "red fox"]}


def learning(path: Path) -> None:
    record = Record(path, task=_Task(), settings={"iterations": 4, "lr": 0.02})
    record.starts, record.chosen = [schedule(), random_channels(_DIT, "groups")], {"batch": 2}
    best = Judged(torch.ones(4, 3), torch.ones(2))
    state = TrainerState(torch.ones(4, 3), best, {"rows": torch.ones(4)}, 0.1, 2, 1.5, None)
    record.keep(True, lambda: Kept(Course(0, 1, True, 3, 30.0, 31.0, 0.1, 9.5), state, state))


def go_on(path: Path) -> dict[str, Any]:
    record = Record(path, True, _Task(), {"iterations": 4, "lr": 0.02})
    assert record.kept is not None
    return asdict(record.kept.course)


JOB = {"model": "dit", "prompts": "12ab", "images": 48, "schedule": {"steps": 12, "note": "x"}}


def check_job(path: Path) -> None:
    shards.check(path.parent, JOB)


def _saved(make: Callable[[], Schedule]) -> Callable[[Path], None]:
    return lambda path: make().save(path)


_DIT, _PIXART = make_dit(), make_pixart()
KINDS: dict[str, Callable[[], Kind]] = {
    f"schedule, {name}": lambda name=name, make=make: Kind(f"s.{name.rsplit('.', 1)[1]}", _saved(make), Schedule.load)
    for name, make in {
        "branches .json": lambda: schedule(True),
        "trunk and output .json": lambda: mixed(_DIT, order=2),
        "groups of blocks .json": lambda: Schedule.uniform(_DIT, 12, level="blocks", groups=3, carry=0.5),
        "output .json": output_weights,
        "branches .safetensors": lambda: random_channels(_DIT, "branches"),
        "trunk and output .safetensors": lambda: mixed(_DIT, order=2, channels=True),
        "groups of blocks .safetensors": lambda: random_channels(_DIT, "groups"),
        "output .safetensors": lambda: random_channels(_DIT, "output"),
    }.items()
}
KINDS |= {
    "schedule, header of a .safetensors": lambda: Kind(
        "s.safetensors", _saved(lambda: mixed(_DIT, channels=True)), Schedule.load, its_header
    ),
    "router": lambda: Kind("r.pt", router, lambda path: Schedule.from_router(path, _DIT)),
    "router, its pickle": lambda: Kind("r.pt", router, lambda path: Schedule.from_router(path, _DIT), its_pickle),
    "router of torch before 1.6": lambda: Kind(
        "r.pt", lambda path: router(path, False), lambda path: Schedule.from_router(path, _DIT)
    ),
    "ECAD's": lambda: Kind("e.json", ecad, lambda path: Schedule.from_ecad(path, _PIXART)),
    "SmoothCache's": lambda: Kind("c.json", smooth_cache, lambda path: Schedule.from_smoothcache(path, _DIT)),
    "learning's checkpoint": lambda: Kind("c.safetensors", learning, go_on),
    "learning's checkpoint, its header": lambda: Kind("c.safetensors", learning, go_on, its_header),
    "job of a set": lambda: Kind(
        shards.MANIFEST, lambda path: shards.begin(path.parent, JOB), check_job, named="files"
    ),
    "Hub's cache, offline": HubCache,
    "Hub's download, .json": lambda: HubDownload("schedule.json"),
    "Hub's download, .safetensors": lambda: HubDownload("schedule.safetensors"),
}


def is_valid(value: Any, folder: Path) -> bool:
    """Whether what was read is whole: of schedules, that they are equal once written and read."""
    if not isinstance(value, Schedule):
        return True
    wide = value.channels is not None or value.output_channels is not None
    path = folder / f"again.{'safetensors' if wide else 'json'}"
    value.save(path)
    again = Schedule.load(path)
    return again == value and bool(np.isfinite(again.weights).all())
