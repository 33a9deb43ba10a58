"""A pipeline's text encoders: on the device only while prompts are encoded, and each prompt but once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from harmonica_rt.compiled import put

PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)


class Away:
    """In place of a pipeline's module: what is asked of it beside running."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class TextEncoders:
    """Those of `pipeline`, whose `encode_prompt` is called once for the same arguments from now on.

    Args:
        pipeline: one with `encode_prompt`, or without: then there is nothing to do.
        device: where they run.

    Attributes:
        away: those that are off the device but while they encode, by name.
    """

    def __init__(self, pipeline: Any, device: Callable[[], torch.device]) -> None:
        self.pipeline, self.device = pipeline, device
        self.away: dict[str, nn.Module] = {}
        self._memory: dict[Any, Any] = {}
        self._encoding = 0
        if hasattr(pipeline, "encode_prompt"):
            put(pipeline, "encode_prompt", self._remembered(pipeline.encode_prompt))

    def leave(self, encoders: dict[str, nn.Module]) -> None:
        """These leave the device, but for encoding."""
        if hasattr(self.pipeline, "encode_prompt"):
            self.away = encoders
            self._rest()

    def come_back(self) -> None:
        """The pipeline has them again, wherever they are."""
        for name, part in self.away.items():
            put(self.pipeline, name, part)
        self.away = {}

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Within, the text encoders are the pipeline's, on its device."""
        if not self._encoding:
            for name, part in self.away.items():
                put(self.pipeline, name, part.to(self.device()))
        self._encoding += 1
        try:
            yield
        finally:
            self._encoding -= 1
            if not self._encoding:
                self._rest()

    def _rest(self) -> None:
        """Text encoders leave the device."""
        for name, part in self.away.items():
            put(self.pipeline, name, Away(part.to("cpu")))

    def _stay(self) -> None:
        """Text encoders stay on the device from now on."""
        with self.present():
            self.away = {}

    def _remembered(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_prompt`, called once for the same arguments; results wait on the CPU."""

        def remembered(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            if not all(isinstance(leaf, PLAIN) for leaf in leaves):  # features, pictures: read anew at each call
                if kwargs.get("prompt_embeds") is None:
                    self._stay()
                return encode(*args, **kwargs)
            key = (tuple(leaves), str(spec))
            if key not in self._memory:
                with torch.no_grad(), self.present():
                    self._memory[key] = tree_map(_to_cpu, encode(*args, **kwargs))
            return tree_map(lambda t: t.to(self.device()) if isinstance(t, Tensor) else t, self._memory[key])

        return remembered


def can_move(part: Any, name: str) -> bool:
    """Whether a pipeline's part of that name may leave the device: not quantised, nor spread over devices."""
    if not (isinstance(part, nn.Module) and (name == "vae" or name.startswith("text_encoder"))):
        return False
    fixed = ("hf_quantizer", "hf_device_map", "_hf_hook")
    return next(part.parameters(), None) is not None and all(getattr(part, name, None) is None for name in fixed)


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
