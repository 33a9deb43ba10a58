"""Checkpoints of a training: one safetensors file with everything needed to go on bit for bit, JSON in its header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from harmonica_rt.decisions import Decisions
from harmonica_rt.drafts import draft_of
from harmonica_rt.schedule_fields import parts

KEY = "harmonica_rt.train"
SHORT = 80  # characters that are told of what was asked for


class Identified(Protocol):
    """What a checkpoint can belong to: a `Task`, a `PipelineTask`."""

    def parameters(self) -> dict[str, Tensor]: ...
    def fields(self) -> dict[str, Any]: ...
    def asked(self) -> dict[str, Any]: ...


def identity(task: Identified) -> dict[str, Any]:
    """What a checkpoint belongs to: model, sampler, guidance, and what images are to be."""
    digest = hashlib.sha256()
    for name, parameter in sorted(task.parameters().items()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        values = parameter.detach().flatten()
        digest.update(values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    own = {**task.fields(), "weights": digest.hexdigest()[:16]}
    own |= {name: fingerprint(value) for name, value in task.asked().items()}
    return json.loads(json.dumps(own))  # as it is read again


def fingerprint(value: Any) -> str:
    """Short, and other for another value."""
    if isinstance(value, Tensor):
        numbers = value.detach().float().cpu().numpy()
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(numbers.tobytes()).hexdigest()[:16]}"
    if isinstance(value, Decisions):
        fields, arrays = parts(value)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for name in sorted(arrays):
            digest.update(arrays[name].tobytes())
        return f"{value!r} {digest.hexdigest()[:16]}"
    if isinstance(value, dict):
        text = ", ".join(f"{name}={fingerprint(own)}" for name, own in sorted(value.items()))
    elif isinstance(value, (list, tuple)):
        text = ", ".join(map(fingerprint, value))
    else:
        text = repr(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Replace `path` once the new file is complete; whatever goes wrong, the old one stays."""
    path = Path(path)
    try:
        with draft_of(path) as draft:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, draft, {KEY: json.dumps(state)})
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"{path}: the checkpoint could not be written, the one before it is intact: {error}") from error


def check_path(path: str | os.PathLike[str], resume: bool) -> None:
    """Raise unless there is a checkpoint to go on from, or none to write over."""
    if resume and not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not resume and Path(path).exists():
        raise ValueError(f"checkpoint: {path} exists; expected --resume to go on from it, or another file")


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is missing within, or of another kind than was written, as a ValueError that names the checkpoint."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a whole checkpoint, got one that lacks {error}") from error
    except (ValueError, RuntimeError) as error:  # torch's, where tensors are of other shapes
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: expected a whole checkpoint, got one with {error}") from error


def check_settings(path: str | os.PathLike[str], expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Raise ValueError naming both sides unless a checkpoint's settings are those `expected`."""
    for name in sorted(expected):
        if got.get(name) != expected[name]:
            raise ValueError(f"{path}: made with other settings: {name} expected {expected[name]}, got {got.get(name)}")


def read(path: str | os.PathLike[str], task: Identified) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint for `task`. Raises ValueError naming both sides if it is another's."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:  # the last of JSON nested too deeply
        raise ValueError(f"{path}: not a checkpoint of harmonica_rt.train: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
        raise ValueError(f"{path}: not a checkpoint of harmonica_rt.train")
    for name, expected in identity(task).items():
        if (got := state["identity"].get(name)) != expected:
            raise ValueError(f"{path}: made for another task: {name} expected {expected}, got {got}")
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value)
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".")
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
