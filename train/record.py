"""What a learning on the end error keeps in a file, so that it goes on after whatever ended it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica_rt import schedule_fields
from harmonica_rt.compiled import Schedules
from harmonica_rt.schedule import Schedule

from . import checkpoint
from .weights import TrainerState

EVERY = 30.0  # seconds between files, where nothing better was found


@dataclass(frozen=True)
class Course:
    """How far a learning is, besides its trainers.

    Attributes:
        at: the try whose turn it is; how many tries of starts there are once the best one's weights learn.
        leader: which try was best of those before.
        channels: whether it has weights per channel.
        iterations: of all trainers before.
        forecast, reached: dB, of the forecast's weights and of the best schedule told.
        judging: seconds that the verdict takes.
        seconds: spent.
    """

    at: int
    leader: int
    channels: bool
    iterations: int
    forecast: float
    reached: float
    judging: float
    seconds: float


@dataclass(frozen=True)
class Kept:
    """A learning to go on with.

    Attributes:
        best: of the leader; trainer: of what learns.
    """

    course: Course
    best: TrainerState
    trainer: TrainerState


class Record:
    """The file of one learning.

    Args:
        path: where to keep it; None for nowhere.
        resume: whether to go on from what is kept there.
        task, settings: what it belongs to; a file of others is refused.

    Attributes:
        starts: what the learning starts from, one schedule or one a context each, as kept; None where it begins.
        chosen: what else was found out before it began, JSON.
        kept: where it was, if it goes on.

    Raises:
        FileNotFoundError: there is nothing to go on from. ValueError: there is a file already, or it is of another
            task or other settings.
    """

    def __init__(
        self,
        path: Path | None = None,
        resume: bool = False,
        task: checkpoint.Identified | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        if resume and path is None:
            raise ValueError("resume: expected a checkpoint to go on from, got none")
        self.path, self.settings = path, settings or {}
        self.starts: Sequence[Schedules] | None = None
        self.chosen: dict[str, Any] = {}
        self.kept: Kept | None = None
        self._at = time.monotonic()
        if path is None:
            return
        if task is None:
            raise ValueError(f"task: expected the one that {path} is of, got none")
        checkpoint.check_path(path, resume)
        self._identity = checkpoint.identity(task)
        if resume:
            self._read(path, task)

    def keep(self, now: bool, kept: Callable[[], Kept]) -> None:
        """Replace the file, if it is to be `now` or that was long ago."""
        if self.path is None or not (now or time.monotonic() - self._at >= EVERY):
            return
        own = kept()
        tensors = {f"best.{name}": t for name, t in own.best.tensors().items()}
        tensors |= {f"trainer.{name}": t for name, t in own.trainer.tensors().items()}
        starts: list[list[Any]] = []
        for number, start in enumerate(self.starts or ()):
            starts.append([])
            for context, schedule in start.items() if isinstance(start, Mapping) else [(None, start)]:
                fields, arrays = schedule_fields.parts(schedule)
                starts[-1].append([context, fields])
                tensors |= {f"start.{number}.{context}.{k}": torch.from_numpy(a) for k, a in arrays.items()}
        state = {"identity": self._identity, "settings": self.settings, "chosen": self.chosen, "starts": starts}
        state |= {"course": asdict(own.course), "best": own.best.numbers(), "trainer": own.trainer.numbers()}
        checkpoint.write(self.path, {name: t.clone() for name, t in tensors.items()}, state)
        self._at = time.monotonic()

    def _read(self, path: Path, task: checkpoint.Identified) -> None:
        tensors, state = checkpoint.read(path, task)
        if "course" not in state:
            raise ValueError(f"{path}: expected a checkpoint of the end error, got a router's")
        with checkpoint.whole(path):
            checkpoint.check_settings(path, self.settings, state["settings"])
            self._take(tensors, state)

    def _take(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.chosen, self.starts = state["chosen"], []
        for number, parts in enumerate(state["starts"]):
            own = {}
            for context, fields in parts:
                arrays = {name: t.numpy() for name, t in under(f"start.{number}.{context}.").items()}
                own[context] = schedule_fields.of_parts(Schedule, fields, arrays)
            self.starts.append(own.get(None, own))
        best, trainer = (TrainerState.of(under(f"{part}."), state[part]) for part in ("best", "trainer"))
        self.kept = Kept(Course(**state["course"]), best, trainer)
