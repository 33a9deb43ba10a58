"""Published router checkpoints (HarmoniCa, Learning-to-Cache), read without running what they pickle."""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import finite
from .decisions import S
from .models import Adapter, adapt
from .reading import MAX_BYTES, check_size, short

if TYPE_CHECKING:
    from torch import nn

NEEDED = re.compile(  # what tensors, optimisers' states and arguments are pickled with
    r"collections OrderedDict|argparse Namespace|__builtin__ set"
    r"|torch (Size|device|\w+Storage|bfloat16|(float|int|uint)\d+)|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch\.nn\.parameter Parameter|torch\.storage UntypedStorage"
)


def _check_names(data: bytes) -> None:
    """Raise ValueError if its pickles name anything but `NEEDED`, before they are run.

    torch's reader runs no code of a file's, but calls what would fill the memory for a few bytes: bytearray(10**11),
    encode(encode(...)), a view of one number copied.
    """
    for text in _pickles(data):
        for operation, argument, _ in pickletools.genops(text):
            if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"expected names in it as torch writes them, got {operation.name}")
            if operation.name == "GLOBAL" and not NEEDED.fullmatch(str(argument)):
                raise ValueError(f"expected tensors and an argparse.Namespace in it, got {short(argument)}")


def _pickles(data: bytes) -> Iterator[io.BytesIO]:
    """Those of a torch file, an archive or from before these: one behind another."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inflated = sum(entry.file_size for entry in archive.infolist())
            if inflated > MAX_BYTES:
                raise ValueError(f"expected at most {MAX_BYTES} bytes, got {inflated} once inflated")
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl"):
                    yield io.BytesIO(archive.read(entry))
    else:
        text = io.BytesIO(data)
        for _ in range(5):  # magic number, version, machine, what was saved, the storages' keys
            yield text


def _holds_its_numbers(value: Any) -> bool:
    """Whether `value` is a plain float tensor with a number in the file for each of its elements."""
    import torch

    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout is not torch.strided:
        return False
    if value.device.type != "cpu" or not value.is_floating_point():
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def from_router(
    kind: type[S], path: str | os.PathLike[str], model: nn.Module, method: str, tau: float, fields: dict[str, Any]
) -> S:
    """`Schedule.from_router`."""
    if method not in ("harmonica", "l2c"):
        raise ValueError(f"method: expected 'harmonica' or 'l2c', got {method!r}")
    tau, adapter = finite("tau", tau), adapt(model)
    own: dict[str, Any] = {"note": f"{method} router, tau {tau:g}", "order": 0} | fields
    compute = _computed(path, adapter, method, tau)
    return kind(compute, model=adapter.model_class, branches=adapter.branches, **own)


def _computed(path: str | os.PathLike[str], adapter: Adapter, method: str, tau: float) -> np.ndarray:
    """What a published router checkpoint computes of a model: bool [T, L, B]."""
    logits, kinds = _read_logits(path), len(adapter.branches)
    if logits.shape[1] != (entries := adapter.layers * kinds):
        raise ValueError(
            f"{path}: the router has {logits.shape[1]} logits a step, but {adapter.model_class} has "
            f"{adapter.layers} layers x {kinds} branches = {entries}"
        )
    with np.errstate(over="ignore"):  # a logit far below 0 is a sigmoid of 0
        compute = 1.0 / (1.0 + np.exp(-logits)) > tau
    if method == "l2c":
        compute[len(compute) - 1 - np.arange(len(compute)) & 1 == 1] = True
    compute[0] = True
    return compute.reshape(-1, adapter.layers, kinds)


def _read_logits(path: str | os.PathLike[str]) -> np.ndarray:
    """Logits of a published router checkpoint, float64 [T, entries], in the order the steps run.

    The file numbers the other way: ``<k>.prob`` is step i = T-1-k. Only tensors and an argparse.Namespace may be in it.

    Raises:
        ValueError: not such a checkpoint; a pickle that wants anything else is refused before it runs.
    """
    import argparse
    import pickle

    import torch

    check_size(path, "router checkpoint", MAX_BYTES)
    data = Path(path).read_bytes()
    try:
        _check_names(data)
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # refused, or corrupt: there is no end to what the unpickler can trip over
        reason = "it holds more than tensors and an argparse.Namespace, or is damaged"
        if not isinstance(error, pickle.UnpicklingError):  # torch's text would advise to load it unsafely
            reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a router checkpoint that can be read safely: {reason}") from None
    routers = checkpoint.get("routers") if isinstance(checkpoint, dict) else None
    if not isinstance(routers, dict) or not routers:
        raise ValueError(f'{path}: expected a dict with a state dict under "routers", got {type(checkpoint).__name__}')
    rows: dict[int, np.ndarray] = {}
    for name, value in routers.items():
        match = re.fullmatch(r"(0|[1-9][0-9]{0,5})\.prob", name) if isinstance(name, str) else None
        if match is None or not _holds_its_numbers(value):
            raise ValueError(
                f"{path}: expected floating-point tensors named '<k>.prob' under \"routers\", got {short(name)}"
            )
        if value.numel() * len(routers) > MAX_BYTES:
            raise ValueError(
                f"{path}: expected at most {MAX_BYTES} logits, got {value.numel()} in each of {len(routers)} steps"
            )
        rows[int(match[1])] = value.detach().double().flatten().numpy()
    if sorted(rows) != list(range(len(rows))):
        raise ValueError(f"{path}: expected routers 0 to {len(rows) - 1}, got {sorted(rows)}")
    sizes = {len(row) for row in rows.values()}
    if len(sizes) != 1:
        raise ValueError(f"{path}: expected as many logits in every step, got {sorted(sizes)}")
    logits = np.stack([rows[k] for k in reversed(range(len(rows)))])
    if not np.isfinite(logits).all():
        raise ValueError(
            f"{path}: expected finite logits, got NaN or infinity in step {np.argwhere(~np.isfinite(logits))[0][0]}"
        )
    return logits
