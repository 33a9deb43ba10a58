"""Results on disk, a JSON line a row, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from bench.measure.environment import environment
from harmonica_rt.drafts import draft_of


def append(path: Path | None, line: dict[str, Any]) -> None:
    """Write `line` at the end of a results file, if there is to be one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Store:
    """A results file: its first line is the job, each other a row. A row is written when it is known, once.

    Args:
        job: a dataclass.
        command: what a person gave to get here.
        key: columns by which a row is known.

    Raises:
        ValueError: the file holds another job's rows.
    """

    def __init__(self, path: Path, job: Any, command: str = "", key: Sequence[str] = ("peer", "setting")) -> None:
        self.path, self.key, self.rows = path, tuple(key), []
        head = {"job": asdict(job), "command": command, "environment": environment()}
        self.commit = head["environment"]["commit"]  # a run that goes on may be at a later one
        if path.exists():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            if not lines or lines[0].get("job") != asdict(job):
                got = lines[0].get("job") if lines else "none"
                raise ValueError(f"{path}: expected the results of {asdict(job)}, got those of {got}")
            self.rows = [row for row in lines[1:] if row.get("error") is None]  # what failed is tried again
            head = lines[0] | ({"command": command} if command else {})  # whoever goes on may want more rows
        self._write([head, *self.rows])  # a line cut short is gone

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return any(tuple(row[name] for name in self.key) == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row; its images, if any, become a strip in a folder beside the file."""
        row = row | {"commit": self.commit}
        if (images := row.pop("images", None)) is not None:
            folder = self.path.with_suffix("")
            folder.mkdir(exist_ok=True)
            strip = (images.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
            row["strip"] = re.sub(r"[^a-z0-9.]+", "-", f"{row['peer']} {row['setting']}".lower()) + ".png"
            Image.fromarray(strip.squeeze(-1).numpy()).save(folder / row["strip"])
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with draft_of(self.path) as draft:
            draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
