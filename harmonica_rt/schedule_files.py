"""Files of a `Schedule`: JSON, or safetensors, for weights per channel. Nothing read here can run code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .decisions import Decisions, S
from .drafts import draft_of
from .reading import check_size, read_json
from .schedule_fields import MAX_TENSOR_BYTES, of_parts, parts


def write(schedule: Decisions, path: str | os.PathLike[str]) -> None:
    """Write `schedule`; the file is replaced only once it is complete.

    JSON; under the name of a .safetensors, which weights per channel need, the JSON without its line breaks is its
    metadata ``schedule``.
    """
    path, (fields, arrays) = Path(path), parts(schedule)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if arrays and path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file for weights per channel, got {path.name!r}")
    with draft_of(path) as draft:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(arrays, draft, metadata={"schedule": json.dumps(fields)})
        else:
            draft.write_text(_json(fields), encoding="utf-8")


def _json(fields: dict[str, Any]) -> str:
    lines = []
    for name, value in fields.items():
        if name in ("compute", "weights", "carry", "output_weights"):
            text = "[\n    " + ",\n    ".join(json.dumps(row) for row in value) + "\n  ]"
        else:
            text = json.dumps(value)
        lines.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(kind: type[S], path: str | os.PathLike[str]) -> S:
    """Read a file of `write` as a `kind`. Raises ValueError that names the file and what is wrong with it."""
    arrays: dict[str, np.ndarray] = {}
    text = None
    if Path(path).suffix == ".safetensors":
        text, arrays = _read_tensors(path)
    fields = read_json(path, "schedule file", text)
    try:
        return of_parts(kind, fields, arrays)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tensors(path: str | os.PathLike[str]) -> tuple[str, dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    check_size(path, "schedule file", MAX_TENSOR_BYTES)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if unknown := sorted(names - {"channels", "output_channels"}):
                raise ValueError(f"{path}: not a schedule file: unknown tensor {unknown[0]!r}")
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, TypeError) as error:  # a dtype numpy has not
        raise ValueError(f"{path}: not a schedule file: {error}") from None
    if "schedule" not in metadata:
        raise ValueError(f"{path}: not a schedule file: expected the schedule's text in its metadata, got none")
    return metadata["schedule"], arrays
