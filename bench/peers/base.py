"""What a peer is: another way to sample the same model faster, through one interface."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn

from bench.by_hand.module_reuse import MODULES
from bench.by_hand.wrapper import Wrapper
from bench.models.pipelines import PixelPipeline

LISTS = {"WanTransformer3DModel": "blocks"}  # the one of a class whose list has another name
# Names of a block's branch modules, by model class and list of blocks
BRANCHES = {
    name: {LISTS.get(name, "transformer_blocks"): tuple(part for parts in modules.values() for part in parts)}
    for name, modules in MODULES.items()
}
BRANCHES["FluxTransformer2DModel"] = {
    "transformer_blocks": ("attn", "ff", "ff_context"),
    "single_transformer_blocks": ("attn",),  # its MLP is in one projection with it
}


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


def expect_batched_guidance(pipeline: PixelPipeline, peer: str) -> None:
    """Raise ValueError where a pipeline calls its model twice a step: `peer` would take one context for the other."""
    if not pipeline.batched_guidance:
        kind = type(pipeline).__name__
        raise ValueError(f"{peer}: expected both halves of guidance in one batch, got a call for each from {kind}")


class Running(Wrapper):
    """`model`, which knows where a run of `steps` steps begins."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__(model)
        self.steps = steps
        self.calls: Counter[str | None] = Counter()  # of each context

    def count(self) -> bool:
        """Count a call; whether it is a run's first. The same context begins every run."""
        begins = self.context == next(iter(self.calls), self.context) and self.calls[self.context] % self.steps == 0
        self.calls[self.context] += 1
        return begins


def branch_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every branch module, by its name in `model`."""
    return {
        f"{blocks}.{number}.{name}": module
        for blocks, names in BRANCHES[type(model).__name__].items()
        for number, block in enumerate(getattr(model, blocks))
        for name in names
        if (module := getattr(block, name)) is not None  # the last block of SD3 leaves text as it is
    }


def branch_names(model: nn.Module) -> list[str]:
    """Names of the branch modules of a block, in models whose blocks are all alike."""
    (names,) = BRANCHES[type(model).__name__].values()
    return list(names)
