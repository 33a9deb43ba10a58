"""What a peer is: another way to sample the same model faster, through one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn

from ..module_reuse import MODULES
from ..pipelines import PixelPipeline


@dataclass(frozen=True)
class Peer:
    """One peer.

    Attributes:
        name: as tables show it.
        settings: what to sweep, from cautious to fast.
        prepare: (a pipeline whose transformer is the peer's own to change, a setting, denoiser calls of a full run) ->
            the pipeline to sample with. It raises, in the peer's own words, where the peer does not run on the model.
        compile: compiles what `prepare` returned, in place. Branch evaluations were counted before: no hook is traced.
        package: what it needs besides diffusers, by the name it is imported by; "" for nothing.
        install: how to get that.
        applies: (model, setting) -> whether that point exists; all do unless given.
    """

    name: str
    settings: tuple[str, ...]
    prepare: Callable[[PixelPipeline, str, int], PixelPipeline]
    compile: Callable[[PixelPipeline], None] | None = None
    package: str = ""
    install: str = "pip install -e '.[peers]'"
    applies: Callable[[str, str], bool] | None = None

    def sweep(self, model: str) -> tuple[str, ...]:
        """Settings for a reference model, by its name."""
        return tuple(s for s in self.settings if self.applies is None or self.applies(model, s))

    @property
    def missing(self) -> str | None:
        """Why it cannot be run here, or None."""
        if self.package and find_spec(self.package) is None:
            return f"package {self.package} is not installed: {self.install}"
        return None


def with_denoiser(pipeline: PixelPipeline, denoiser: nn.Module) -> PixelPipeline:
    """`pipeline` with `denoiser` in place of its transformer, past what diffusers checks and records."""
    object.__setattr__(pipeline, "transformer", denoiser)
    return pipeline


def branch_names(model: nn.Module) -> list[str]:
    """Names of a block's branch modules."""
    return list(MODULES[type(model).__name__].values())


def branch_patterns(model: nn.Module) -> list[str]:
    """Patterns that match the whole name of every branch module."""
    return [rf"transformer_blocks\.\d+\.{name}" for name in branch_names(model)]
