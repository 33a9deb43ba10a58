"""Figures of schedules that were run on a pipeline: what was measured of each, and the table it makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .measuring import Timing, ratio

FULL = "full run"
FIGURES = {  # heading -> key of `Row.figures`, its format
    "level": ("level", "{}"),
    "backend": ("backend", "{}"),
    "s/image": ("seconds", "{:.3g}"),
    "ms/step": ("step_ms", "{:.4g}"),
    "first call, s": ("first_call", "{:.2f}"),
    "speed-up": ("speedup", "{:.2f}x"),
    "theory": ("theory", "{:.2f}x"),
    "realised": ("realised", "{:.2f}"),
    "peak MiB": ("peak_mib", "{:.0f}"),
    "slots": ("slots", "{}"),
    "slots MiB": ("slot_mib", "{:.1f}"),
    "PSNR": ("psnr", "{:.1f}"),
    "worst": ("psnr_worst", "{:.1f}"),
    "SSIM": ("ssim", "{:.3f}"),
    "worst SSIM": ("ssim_worst", "{:.3f}"),
    "LPIPS": ("lpips", "{:.3f}"),
    "worst LPIPS": ("lpips_worst", "{:.3f}"),
}


@dataclass
class Row:
    """One schedule on the pipeline, or the pipeline as it came.

    Attributes:
        name: as it was asked for.
        what: the schedule in a line.
        level, backend: that run it; None for the pipeline as it came.
        note: what did not go as asked: a fallback, or why there is nothing.
        first_call: seconds, compilation and capture included.
        seconds: of the timed calls, by (pass, prompt).
        images: a call makes.
        theory: speed-up of the denoiser by multiply-accumulates; None where they were not counted.
        peak: bytes, without what other schedules hold at the same time.
        slots, slot_bytes: values that are held between steps.
        quality: by prompt PSNR in dB, SSIM and, where there is a package for it, LPIPS to the full run.
        shown: by prompt the picture, of a video its middle frame: uint8 [height, width, 3].
    """

    name: str
    what: str
    level: str | None = None
    backend: str | None = None
    note: str = ""
    first_call: float | None = None
    seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    images: int = 1
    theory: float | None = None
    peak: int | None = None
    slots: int = 0
    slot_bytes: int = 0
    quality: dict[int, dict[str, float]] = field(default_factory=dict)
    shown: dict[int, np.ndarray] = field(default_factory=dict)

    def figures(self, full: Row, steps: int) -> dict[str, Any]:
        """What is shown of it; None where it is not known. Speed-up: the median over pairs within a round."""
        own: dict[str, Any] = {"name": self.name, "what": self.what} | dict.fromkeys(key for key, _ in FIGURES.values())
        own |= {"level": self.level, "backend": self.backend, "first_call": self.first_call, "note": self.note}
        if self.seconds:
            call = Timing(tuple(self.seconds.values()))
            own |= {"seconds": call.median / self.images, "step_ms": 1e3 * call.median / steps}
            own |= {"seconds_p20": call.percentile(20) / self.images, "seconds_p80": call.percentile(80) / self.images}
            own["calls"] = len(self.seconds)
        if pairs := [(full.seconds[at], seconds) for at, seconds in self.seconds.items() if at in full.seconds]:
            own["speedup"] = ratio(*(Timing(side) for side in zip(*pairs)))
        if self is full:
            own["theory"] = 1.0
        elif self.level is not None:
            own |= {"theory": self.theory, "slots": self.slots, "slot_mib": self.slot_bytes / 2**20}
            if self.theory and own["speedup"]:
                own["realised"] = own["speedup"] / self.theory
        own["peak_mib"] = None if self.peak is None else self.peak / 2**20
        for key, worst in {"psnr": min, "ssim": min, "lpips": max}.items():
            if values := [quality[key] for quality in self.quality.values() if key in quality]:
                own |= {key: sum(values) / len(values), f"{key}_worst": worst(values)}
        return own


@dataclass
class Figures:
    """The rows of a comparison and what they hold for; attributes are those of `Comparison`, which shows them."""

    pipeline: str
    conditions: dict[str, Any]
    subjects: list[Any]
    rows: list[Row]
    lpips: str
    memory: str
    steps: int
    ended_early: bool = False
    schedules: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def full(self) -> Row:
        return self.rows[0]

    @property
    def numbers(self) -> list[int]:
        """Prompts that the full run was shown for."""
        return sorted(self.full.shown)

    def figures(self) -> list[dict[str, Any]]:
        """One row a schedule, the full run first."""
        return [row.figures(self.full, self.steps) for row in self.rows]

    def columns(self) -> list[str]:
        """Headings of what is known of at least one row."""
        rows = self.figures()
        return [heading for heading, (key, _) in FIGURES.items() if any(row.get(key) is not None for row in rows)]

    def cells(self) -> list[list[str]]:
        """By row, as text: its name, then `columns`."""
        shown = [FIGURES[heading] for heading in self.columns()]
        return [
            [row["name"], *("" if row.get(key) is None else form.format(row[key]) for key, form in shown)]
            for row in self.figures()
        ]

    def remarks(self) -> list[str]:
        """What a reader must know beside the table."""
        done = len(self.numbers)
        made = f"{done} of {len(self.subjects)} prompts" + (", ended early" if self.ended_early else "")
        lines = [
            f"{self.pipeline}, {made}; " + ", ".join(f"{key} {value}" for key, value in self.conditions.items()),
            "Time is of whole calls, text encoding and decoding included; speed-up over the pipeline as it came, in "
            "turns; theory by multiply-accumulates of the denoiser; realised is speed-up over theory.",
            "PSNR in dB, SSIM and LPIPS are to the full run: mean over prompts, and worst. "
            f"LPIPS: {self.lpips}. Peak memory: {self.memory}.",
        ]
        return lines + [f"{row.name}: {row.note}" for row in self.rows if row.note]
