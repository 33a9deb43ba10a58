"""Where a compiled run's time goes: computed branches, Gaps, both ends, modulation and text, and the host between."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

import harmonica_rt as hrt
from bench.models.pipelines import PixelPipeline
from harmonica_rt.executor import Built, Plan

PARTS = ("branches", "Gaps", "ends", "modulation", "host")


@dataclass
class Profile:
    """Seconds, [rounds][step] of each part; `host` is what is left of a denoiser call.

    Attributes:
        sampler: seconds a run spends outside the denoiser, per round.
    """

    seconds: dict[str, list[list[float]]] = field(default_factory=lambda: {part: [] for part in PARTS})
    sampler: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, np.ndarray]:
        """Seconds a step, [steps]."""
        return {part: np.median(np.array(rows), axis=0) for part, rows in self.seconds.items()}


class _Timed:
    """A plan whose calls are timed one by one: CPU backends are synchronous, so that a call's time is its work."""

    def __init__(self, plan: Plan) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        calls, adapter = plan.calls, copy.copy(plan.adapter)

        @cache
        def timed_calls(step: int) -> Built:
            body, last = calls(step)
            timed = [(self.timed("Gaps", gap), self.timed("branches", compute)) for gap, compute in body]
            return timed, self.timed("Gaps", last)

        plan.adapter, plan.calls = adapter, timed_calls
        plan._reuse_output = self.timed("ends", plan._reuse_output)
        adapter.embed, adapter.finish = self.timed("ends", adapter.embed), self.timed("ends", adapter.finish)
        plan.modulate, plan.encode = self.timed("modulation", plan.modulate), self.timed("modulation", plan.encode)

    def timed(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            result = run(*args)
            self.spent[part] += time.perf_counter() - began
            return result

        return timed


def profile(
    pipeline: PixelPipeline,
    schedule: hrt.Schedule,
    backend: str,
    sample: Callable[[PixelPipeline], Tensor],
    rounds: int,
) -> Profile:
    """Run `sample`(compiled pipeline) and time what its plan does.

    Args:
        backend: eager or inductor, on a CPU.
    """
    fast = hrt.compile(pipeline, schedule, backend=backend)
    sample(fast)
    (plan,) = fast.transformer._plans.values()
    timed, found, forward = _Timed(plan), Profile(), fast.transformer._forward
    calls: list[dict[str, float]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        timed.spent = dict.fromkeys(PARTS, 0.0)
        began = time.perf_counter()
        result = forward(*args, **kwargs)
        timed.spent["host"] = time.perf_counter() - began - sum(timed.spent.values())
        calls.append(timed.spent)
        return result

    fast.transformer._forward = call
    for _ in range(rounds):
        calls.clear()
        began = time.perf_counter()
        sample(fast)
        whole = time.perf_counter() - began
        for part in PARTS:
            found.seconds[part].append([spent[part] for spent in calls])
        found.sampler.append(whole - sum(sum(spent.values()) for spent in calls))
    hrt.uncompile(fast)
    return found


def table(found: Profile, full_seconds: float, theoretical: float, title: str) -> Table:
    """Shares of a run, and what each takes of the time that theory allows.

    Args:
        full_seconds: a full run's, by diffusers.
    """
    parts = {part: values.sum() for part, values in found.medians().items()} | {
        "sampler": float(np.median(found.sampler))
    }
    total, allowed = sum(parts.values()), full_seconds / theoretical
    out = Table(
        title=title, caption=f"realised / theoretical {allowed / total:.2f}; theory allows {1e3 * allowed:.1f} ms a run"
    )
    for column in ("", "ms a run", "share %", "of what theory allows %"):
        out.add_column(column, justify="right" if column else "left")
    for part, seconds in parts.items():
        out.add_row(part, f"{1e3 * seconds:.2f}", f"{100 * seconds / total:.1f}", f"{100 * seconds / allowed:.1f}")
    return out


def plot(found: Profile, title: str, path: Path | str) -> None:
    """Stacked bars, one a step."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes, bottom = figure.subplots(), None
    colours = {"branches": "#1f4e79", "Gaps": "#e08e45", "ends": "#7aa874", "modulation": "#a678b4", "host": "#c0392b"}
    for part, values in found.medians().items():
        bottom = np.zeros_like(values) if bottom is None else bottom
        axes.bar(range(len(values)), 1e3 * values, bottom=bottom, label=part, color=colours[part], width=0.85)
        bottom = bottom + 1e3 * values
    axes.set_xlabel("step")
    axes.set_ylabel("ms (median)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, ncols=5)
    figure.savefig(path, dpi=150)
