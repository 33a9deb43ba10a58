"""`bench/RESULTS.md` from results files: tables, Pareto plots, picture sheets at equal latency. Nothing by hand."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

FULL, OURS, FEWER = "diffusers, eager", "harmonica_rt", "fewer steps"  # what their peers' names begin with
COLOURS = {
    "harmonica_rt, learned": "#1f4e79",
    "harmonica_rt, learned, to converged": "#3a9188",
    "harmonica_rt, uniform": "#5b8db8",
    "fewer steps": "#c0392b",
}
PLOTS = {  # columns: a plot's name and what it shows
    "psnr": ("psnr", "PSNR to the full run, dB"),
    "psnr_converged": ("converged", "PSNR to the converged solution, dB"),
    "frechet_full": ("frechet", "Fréchet distance to the full run's images"),
    "frechet_real": ("frechet-real", "Fréchet distance to real images"),
}
LOWER = ("frechet_full", "frechet_real")  # is better
COMPILED = ", torch.compile"  # what names of peers under it end with
SPEEDUPS = (1.5, 2.0, 3.0, 4.0)  # realised, that the page compares at
COLUMNS = [
    ("latency", "latency", "{:.2f}"),
    ("latency_p20", "p20", "{:.2f}"),
    ("latency_p80", "p80", "{:.2f}"),
    ("cur", "CUR %", "{:.0%}"),
    ("psnr", "PSNR", "{:.1f}"),
    ("psnr_worst", "worst", "{:.1f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("max_error", "max error", "{:.2f}"),
    ("psnr_converged", "to converged", "{:.1f}"),
    ("frechet_full", "Fréchet (full run)", "{:.2f}"),
    ("frechet_real", "Fréchet (real)", "{:.2f}"),
    ("class_accuracy", "class acc.", "{:.1%}"),
    ("glyph_accuracy", "glyph acc.", "{:.1%}"),
]


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A results file's head and its rows."""
    head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return head, rows


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["error"] is None]


def _is_ours(row: dict[str, Any]) -> bool:
    return row["peer"].startswith(OURS)


def outside(rows: list[dict[str, Any]], quality: str = "psnr") -> list[dict[str, Any]]:
    """Peers' points beyond our curve, among those faster than the full run.

    The curve joins our best points by straight lines: schedules are learned for any speed-up. It ends at our fastest.
    """
    sign = -1 if quality in LOWER else 1
    front: list[tuple[float, float]] = []
    for row in sorted((row for row in whole(rows) if _is_ours(row)), key=lambda row: row["latency"]):
        if not front or sign * row[quality] > front[-1][1]:
            front.append((row["latency"], sign * row[quality]))
    latencies, best = zip(*front) if front else ((np.inf,), (-np.inf,))
    theirs = [row for row in whole(rows) if not _is_ours(row) and row["peer"] != FULL and row["latency"] < 0.98]
    return [row for row in theirs if sign * row[quality] > np.interp(row["latency"], latencies, best, left=-np.inf)]


def at_speedup(rows: list[dict[str, Any]], speedup: float) -> dict[str, dict[str, Any] | None]:
    """The best PSNR of ours, of a peer and of fewer steps (compiled ones too) that is at least so much faster."""
    fast = [row for row in whole(rows) if row["latency"] <= 1.02 / speedup]  # 1.97x counts as 2x
    groups = {
        "ours": [row for row in fast if _is_ours(row)],
        "best peer": [row for row in fast if not _is_ours(row) and not row["peer"].startswith(FEWER)],
        "fewer steps": [row for row in fast if row["peer"].startswith(FEWER)],
    }
    best = {
        name: max(group, key=lambda row: (round(row["psnr"], 1), -row["latency"]), default=None)
        for name, group in groups.items()
    }
    return best


def comparison(rows: list[dict[str, Any]]) -> str:
    """Markdown: who is best at each of `SPEEDUPS`."""
    lines = ["| at least | ours | best peer | fewer steps |", "| --- | --- | --- | --- |"]
    for speedup in SPEEDUPS:
        cells = ["" if row is None else _named(row) for row in at_speedup(rows, speedup).values()]
        lines.append(f"| {speedup:g}x | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _named(row: dict[str, Any]) -> str:
    psnr = "exact" if row["psnr"] > 100 else f"{row['psnr']:.1f} dB"
    return f"{psnr}, {1 / row['latency']:.2f}x ({_point(row)})"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; columns that no row has are left out."""
    columns = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    lines = ["| | setting | " + " | ".join(title for _, title, _ in columns) + " |"]
    lines.append("| --- " * (len(columns) + 2) + "|")
    for row in sorted(whole(rows), key=lambda r: (r["peer"] != FULL, r["latency"])):
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, _, form in columns]
        name = f"**{row['peer']}**" if _is_ours(row) else row["peer"]
        lines.append(f"| {name} | {row['setting']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def failures(rows: list[dict[str, Any]]) -> str:
    lines = [f"* {row['peer']}, {row['setting']}: {row['error']}" for row in rows if row["error"] is not None]
    return "\n".join(lines) or "None."


def pareto(rows: list[dict[str, Any]], quality: str, label: str, title: str, path: Path) -> None:
    """Every point, named: latency across, `quality` up. A line joins settings of one kind; dashed: torch.compile."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots()
    points = [row for row in whole(rows) if row.get(quality) is not None and row["peer"] != FULL]
    points = [row for row in points if row[quality] < 100]  # a run without reuse equals the full one
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in points:
        kinds.setdefault((row["peer"], re.sub(r"[\d.]+[a-z-]*$", "", row["setting"])), []).append(row)
    peers = dict.fromkeys(peer.removesuffix(COMPILED) for peer, _ in kinds)
    palette = iter(colormaps["tab20"].colors)
    colours = {peer: COLOURS.get(peer) or next(palette) for peer in peers}
    named: set[str] = set()
    for (peer, _), own in kinds.items():
        own, plain = sorted(own, key=lambda row: row["latency"]), peer.removesuffix(COMPILED)
        style = {"linewidth": 2.2, "zorder": 3} if plain in COLOURS else {"linewidth": 0.9, "alpha": 0.9}
        if plain != peer:
            style |= {"linestyle": "--", "markerfacecolor": "white", "linewidth": 0.9}
        known = plain if plain not in named else None
        named.add(plain)
        x, y = [row["latency"] for row in own], [row[quality] for row in own]
        axes.plot(x, y, marker="o", markersize=4, label=known, color=colours[plain], **style)
        for row in own:
            short = row["setting"].replace("TaylorSeer", "TS").replace("interval", "every")
            at, away = (row["latency"], row[quality]), (4, 3)
            axes.annotate(short, at, xytext=away, textcoords="offset points", fontsize=6, color="#333333")
    if quality in LOWER:
        axes.set_yscale("log")
    axes.set_xlabel("latency / diffusers' full run (median of interleaved rounds)")
    axes.set_ylabel(f"{label} ({'lower' if quality in LOWER else 'higher'} is better)")
    axes.set_title(f"{title}; dashed: under torch.compile", fontsize=10)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=130)


def sheet(rows: list[dict[str, Any]], strips: Path, title: str, path: Path) -> None:
    """Pictures at equal latency: the full run's, then at each of `SPEEDUPS` what `at_speedup` found, and how far off.

    Args:
        strips: folder of the rows' images.
    """
    full = next(row for row in whole(rows) if row["peer"] == FULL)
    shown = [("the full run", full)] + [
        (f"{speedup:g}x, {name}", row)
        for speedup in SPEEDUPS[1:]
        for name, row in at_speedup(rows, speedup).items()
        if row is not None
    ]
    figure = Figure(figsize=(13, 0.95 * len(shown) + 0.6), layout="constrained")
    wanted = _strip(strips, full)
    for pair, (label, row) in zip(figure.subplots(len(shown), 2, squeeze=False), shown):
        images = _strip(strips, row)
        for axes, picture in zip(pair, (images, np.clip(8 * np.abs(images - wanted), 0, 255))):
            axes.imshow(picture.astype(np.uint8), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
        pair[0].set_title(label if row is full else f"{label}: {_named(row)}", fontsize=8, loc="left")
    figure.suptitle(f"{title}; right: 8 x the difference to the full run", fontsize=9)
    figure.savefig(path, dpi=130)


def _strip(strips: Path, row: dict[str, Any]) -> np.ndarray:
    return np.array(Image.open(strips / row["strip"])).astype(float)


def _pictures(file: Path, rows: list[dict[str, Any]], title: str) -> dict[str, Path]:
    """Draw a section's pictures beside its file; what each shows and where it is."""
    stem, drawn = file.with_suffix(""), {}
    for quality, (kind, label) in PLOTS.items():
        if any(row.get(quality) is not None for row in rows):
            drawn[label] = stem.with_name(f"{stem.name}-{kind}.png")
            pareto(rows, quality, label, title, drawn[label])
    pictures = stem.with_name(f"{stem.name}-sheet.png")
    strips = [stem / row.get("strip", "") for row in whole(rows)]  # not in git: a clone keeps its picture
    if any(row["peer"] == FULL for row in whole(rows)) and all(strip.is_file() for strip in strips):
        sheet(rows, stem, title, pictures)
    return drawn | ({"pictures at equal latency": pictures} if pictures.exists() else {})


def section(file: Path, page: Path) -> list[str]:
    """A results file as Markdown for `page`, its pictures drawn."""
    head, rows = read(file)
    job, env = head["job"], head["environment"]
    model, threads = job["model"], job["threads"]
    commits = dict.fromkeys([env["commit"], *(row["commit"] for row in rows if "commit" in row)])
    title = f"{model}, {threads} thread{'s' if threads > 1 else ''}"
    parts = [
        f"## {title}",
        f"`{head['command']}`: {job['steps']} steps, {job['count']} noises held out, timed at batch {job['batch']} "
        f"with guidance over {job['rounds']} rounds, interleaved with diffusers' own full run. {env['cpu']}, torch "
        f"{env['torch']}, diffusers {env['diffusers']}, commit {', '.join(commits)}.",
        comparison(rows),
        *(
            f"![{model}, {what}]({os.path.relpath(picture, page.parent)})"
            for what, picture in _pictures(file, rows, f"{title}, {job['count']} noises").items()
        ),
        table(rows),
    ]
    for quality, (_, label) in PLOTS.items():
        if any(row.get(quality) is not None for row in rows):
            beyond = outside(rows, quality)
            named = ", ".join(f"{_point(row)} ({row['latency']:.2f}, {row[quality]:.2f})" for row in beyond)
            parts.append(f"Points of peers outside our curve by {label}: {named or 'none'}.")
    drifting = [f"{_point(row)} ({row['drift']:.2g})" for row in whole(rows) if row["drift"] > 1e-4]
    parts.append(f"Two runs from the same noise differ: {', '.join(drifting) or 'none'}.")
    return [*parts, "Where a peer does not run, in its own words:", failures(rows)]


def _point(row: dict[str, Any]) -> str:
    return f"{row['peer']}: {row['setting']}"


INTRODUCTION = """\
# Results

Written by `bench/run_quality.py`, nothing by hand. *Latency*: share of the time of diffusers' own full run, measured in
the same rounds (median, p20, p80). *CUR*: share of branch evaluations left out. *PSNR* in dB to the full run without
reuse, mean over noises, *worst* of them; *to converged*: to the solution that the sampler approximates. *Fréchet*:
distance of features of a set of images to other images of the full run, or to real ones. *Class*, *glyph acc.*: images
that show what they were asked for. A peer's points are its own settings; our curve joins the best of the shipped
schedules and the uniform ones by straight lines."""


def write(files: list[Path], page: Path) -> None:
    """The page; its pictures beside the files.

    Args:
        files: as `comparison.compare` wrote them, one a model and number of threads.
    """
    parts = [INTRODUCTION, *(part for file in files for part in section(file, page))]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
