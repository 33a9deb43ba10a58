"""What the tests of all adapters need to know of one: how it is made small, called by a pipeline, what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from harmonica_rt.layout import shape_of_entries
from harmonica_rt.models import adapt

STEPS = 6
TIMES = torch.linspace(1000, 130, STEPS)  # a sampler's
Config = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A class of models at level branches.

    Attributes:
        model: the class; config: of a small one; width: of its stream.
        given: (config, randn, batch, text, size, **options) -> samples [STEPS, batch, ...], and the other arguments.
        size, sizes: of a sample, whatever `given` takes for it: one, and what is drawn.
        layout: its groups at level branches.
        launches: of a computed and a reused step, where a Call is one and its copy one a segment.
        batch: of a pipeline's call for one image, at which the ends launch what the adapter says.
        kinds: configs that a full run is tried on; variants: those that schedules are.
        options: ways to call it.
        half: config in half precision; dtypes: which it takes.
        counted: configs whose multiply-accumulates are compared.
        halved: at least what computing every second step gains at the default size.
        lora: parts that take a LoRA layer.
        per_thousand: the pipeline calls it with a thousandth of the sampler's timesteps.
        trunk: the oracle of a trunk beside branches takes it.
        refused_models: how to make it, and what is said.
        refused_calls: arguments instead, and what is said.
    """

    model: type[nn.Module]
    config: Config
    width: int
    given: Callable[..., tuple[Tensor, Config]]
    size: Any
    sizes: SearchStrategy
    layout: list[tuple[str, int, tuple[str, ...]]]
    launches: tuple[int, int]
    kinds: dict[str, Config]
    lora: tuple[str, ...]
    batch: int = 2
    variants: tuple[Config, ...] = ({},)
    options: tuple[Config, ...] = ({},)
    half: Config = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    counted: dict[str, Config] = field(default_factory=lambda: {"as it is": {}})
    halved: float = 1.5
    per_thousand: bool = False
    trunk: bool = False
    refused_models: dict[str, tuple[Callable[[], nn.Module], str]] = field(default_factory=dict)
    refused_calls: dict[str, tuple[Config, str]] = field(default_factory=dict)

    def make(self, seed: int = 0, **config: Any) -> nn.Module:
        """In eval mode, every parameter random."""
        torch.manual_seed(seed)
        model = self.model(**{**self.config, **config}).eval()
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        return model

    def schedule(
        self, model: nn.Module, seed: int, order: int = 1, learned: bool = False, **fields: Any
    ) -> hrt.Schedule:
        rng, groups = np.random.default_rng(seed), adapt(model).groups
        compute = rng.random((STEPS, *shape_of_entries(groups))) >= 0.5
        compute[0] = True
        schedule = hrt.Schedule(compute, model=self.model.__name__, groups=groups, order=order, **fields)
        if learned:
            schedule = schedule.replace(weights=schedule.weights * rng.normal(1.0, 0.5, schedule.weights.shape))
        return schedule


class Calls:
    """The calls of one context of a run, as the pipeline makes them."""

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        batch: int = 2,
        text: int = 3,
        size: Any = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.case = case
        size = case.size if size is None else size
        self.samples, self.given = case.given(model.config, randn, batch, text, size, **options)

    def arguments(self, step: int) -> Config:
        sample = self.samples[step]
        time = TIMES[step].expand(len(sample))
        if self.case.per_thousand:
            time = time.to(sample.dtype) / 1000
        return {"hidden_states": sample, "timestep": time, **self.given}

    def call(self, model: Any, step: int) -> Tensor:
        with torch.no_grad():
            return model(**self.arguments(step)).sample

    def run(self, model: Any) -> list[Tensor]:
        return [self.call(model, step) for step in range(STEPS)]

    def in_float32(self) -> Calls:
        """The same calls: what is rounded stays so."""
        floats = {name: value.float() for name, value in self.given.items() if torch.is_tensor(value)}
        own = object.__new__(Calls)
        own.case, own.samples = self.case, self.samples.float()
        own.given = self.given | {name: value for name, value in floats.items() if self.given[name].is_floating_point()}
        return own


def as_loaded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In `dtype`, but for what `from_pretrained` keeps in float32."""
    kept = model._keep_in_fp32_modules or ()
    for name, p in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            p.data = p.data.to(dtype)
    return model


def by_module(model: nn.Module, schedule: hrt.Schedule, calls: Calls) -> list[Tensor]:
    """Reuse at module level on the model itself: the oracle."""
    reuse = ModuleReuse(model, schedule)
    try:
        return calls.run(reuse)
    finally:
        reuse.remove()


def full(model: nn.Module) -> hrt.Schedule:
    return hrt.Schedule.full(model, STEPS, level="branches")


def each(cases: dict[str, Case], names: Callable[[Case], Any]) -> Iterator[tuple[str, Case, Any]]:
    """(an id, the case, one of its `names`) for all."""
    for adapter, case in cases.items():
        for name in names(case):
            yield f"{adapter}-{name}", case, name
