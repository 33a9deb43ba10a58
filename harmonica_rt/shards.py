"""A folder of shards: files that appear once they are whole, all of one job, so that whatever ended it can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .drafts import draft_of
from .reading import read_json

FORMAT, VERSION, MANIFEST = "harmonica_rt.images", 1, "job.json"


class OtherJob(ValueError):
    """The folder is another job's."""


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.safetensors"


def missing(folder: Path, shards: int) -> list[int]:
    """Of so many, those that are still to be made. Those that are there are whole."""
    return [shard for shard in range(shards) if not shard_path(folder, shard).exists()]


def check(folder: Path, job: Mapping[str, Any]) -> None:
    """Raise OtherJob, naming both sides, unless `folder` is the job's or nobody's.

    Args:
        job: what its images are, as JSON holds it: equal jobs make equal images.
    """
    manifest = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out: expected a folder, got the file {folder}")
    if not manifest.exists():
        if any(folder.glob("shard-*.safetensors")):
            raise OtherJob(f"{folder} holds shards of an unknown job: there is no {MANIFEST}; expected another folder")
        return
    try:
        there = read_json(manifest, "job's description")
    except ValueError as error:
        raise OtherJob(str(error)) from None
    if not isinstance(there, dict):
        raise OtherJob(f"{manifest}: not a job's description: expected an object, got {type(there).__name__}")
    here = _description(job)
    if other := [name for name in {**here, **there} if here.get(name) != there.get(name)]:
        sides = "; ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in other)
        raise OtherJob(f"{folder} holds the images of another job: {sides}; expected the same job or another folder")


def begin(folder: Path, job: Mapping[str, Any]) -> None:
    """Make `folder` this job's, and clear away what killed runs left half written."""
    folder.mkdir(parents=True, exist_ok=True)
    for draft in (*folder.glob(".shard-*.tmp"), *folder.glob(f".{MANIFEST}.*.tmp")):
        draft.unlink()
    if not (folder / MANIFEST).exists():
        write(folder / MANIFEST, json.dumps(_description(job), indent=2).encode() + b"\n")


def write(path: Path, data: bytes) -> None:
    """All of `data` or, whatever goes wrong, no file."""
    try:
        with draft_of(path) as draft:
            draft.write_bytes(data)
    except OSError as error:
        raise OSError(f"{path} could not be written, the files before it are whole: {error}") from error


def _description(job: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **job}
