"""What surrounds every call of a compiled model. Each part is cheap: on a small model, or a GPU, a step has no time."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Forward:
    """A compiled model's ``forward``: a call, with the signature of the model's own."""

    __slots__ = ("compiled",)

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled._forward(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.compiled.model.forward)

    @property
    def _torchdynamo_orig_callable(self) -> Any:
        return self.compiled._torchdynamo_orig_callable

    def __getattr__(self, name: str) -> Any:
        if name == "compiled":  # not set yet: somebody makes a copy
            raise AttributeError(name)
        return getattr(self.compiled.model.forward, name)


class ForwardSignature:
    """`inspect.Signature.bind` for a model's forward, at every call: that one takes as long as the rest of our host."""

    def __init__(self, model: nn.Module) -> None:
        self.signature = inspect.signature(model.forward)
        self.parameters = self.signature.parameters
        self.defaults = {name: p.default for name, p in self.parameters.items() if p.default is not p.empty}
        self.open = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in self.parameters.values())

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name. Raises TypeError as a call of the forward would."""
        if self.open:
            return self._bind_open(args, kwargs)
        given = dict(zip(self.parameters, args))
        arguments = {**self.defaults, **given, **kwargs}
        if len(given) < len(args) or given.keys() & kwargs.keys() or arguments.keys() != self.parameters.keys():
            self.signature.bind(*args, **kwargs)  # raises: it says what is wrong
        return arguments

    def _bind_open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Those of a forward that takes any: by name or number."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                arguments |= {f"{name}[{i}]": each for i, each in enumerate(value)}
            else:
                arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return arguments


class Seen:
    """Tensors of a call, to know them again: equal to the same ones, unchanged since, or to others of equal values.

    Values on a device are not looked at, since that would make the host wait for it: only the same tensors are equal.
    """

    __slots__ = ("tensors", "versions")

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.tensors = tensors
        self.versions = [None if t.is_inference() else t._version for t in tensors]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Seen) or len(self.tensors) != len(other.tensors):
            return False
        return all(self._pairs(other))

    def alike(self, other: Seen) -> int:
        """How many are equal, if there are as many."""
        return sum(self._pairs(other)) if len(self.tensors) == len(other.tensors) else 0

    def _pairs(self, other: Seen) -> Iterator[bool]:
        for a, v, b, w in zip(self.tensors, self.versions, other.tensors, other.versions):
            yield (a is b and v == w) or (a is not b and a.device.type == b.device.type == "cpu" and _equal(a, b))

    __hash__ = None  # type: ignore[assignment]  # what cannot be hashed says it so


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


class Exclusive:
    """A compiled model serves one call at a time: a second one is refused, not queued."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise RuntimeError(
                "concurrent use: this compiled transformer is already running in another thread, and its cached "
                "values belong to that run; compile one for each thread"
            )

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def without_gradients() -> contextlib.AbstractContextManager[Any]:
    """Neither gradients nor inference mode; nothing to do in a pipeline, which calls under `torch.no_grad`."""
    if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
        return contextlib.nullcontext()
    modes = contextlib.ExitStack()
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.no_grad())
    return modes
