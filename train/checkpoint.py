"""Checkpoints of a training: one safetensors file with everything needed to go on bit for bit, JSON in its header."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from .task import Task

KEY = "harmonica_rt.train"


def identity(task: Task) -> dict[str, Any]:
    """What a checkpoint belongs to: model, sampler, guidance."""
    digest = hashlib.sha256()
    for name, parameter in sorted(task.model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        values = parameter.detach().flatten()
        digest.update(values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return {**task.fields(), "branches": list(task.adapter.branches), "weights": digest.hexdigest()[:16]}


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Replace `path` once the new file is complete; whatever goes wrong, the old one stays."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, draft, {KEY: json.dumps(state)})
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"{path}: the checkpoint could not be written, the one before it is intact: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint for `task`. Raises ValueError naming both sides if it is another's."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint of harmonica_rt.train: {error}") from None
    if not isinstance(state, dict) or "identity" not in state:
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
