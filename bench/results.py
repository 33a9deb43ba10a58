"""`bench/RESULTS.md` from results files: tables, Pareto plots, picture sheets at equal latency. Nothing by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

OURS = "harmonica_rt, learned"
COLOURS = {OURS: "#1f4e79", "harmonica_rt, uniform": "#5b8db8", "fewer steps": "#c0392b"}
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
]


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A results file's head and its rows."""
    head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return head, rows


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["error"] is None]


def outside(rows: list[dict[str, Any]], quality: str = "psnr") -> list[dict[str, Any]]:
    """Peers' points that no point of ours is as fast and as good as, among those faster than the full run."""
    ours = [row for row in whole(rows) if row["peer"].startswith("harmonica_rt")]
    theirs = [row for row in whole(rows) if row not in ours and row["latency"] < 0.98]
    return [
        row for row in theirs if not any(o["latency"] <= row["latency"] and o[quality] >= row[quality] for o in ours)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; columns that no row has are left out."""
    columns = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    lines = ["| | setting | " + " | ".join(title for _, title, _ in columns) + " |"]
    lines.append("| --- " * (len(columns) + 2) + "|")
    for row in sorted(whole(rows), key=lambda r: (r["peer"] != "diffusers, eager", r["latency"])):
        cells = [form.format(row[key]) if row.get(key) is not None else "" for key, _, form in columns]
        name = f"**{row['peer']}**" if row["peer"].startswith("harmonica_rt") else row["peer"]
        lines.append(f"| {name} | {row['setting']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def failures(rows: list[dict[str, Any]]) -> str:
    lines = [f"* {row['peer']}, {row['setting']}: {row['error']}" for row in rows if row["error"] is not None]
    return "\n".join(lines) or "None."


def pareto(rows: list[dict[str, Any]], quality: str, label: str, title: str, path: Path) -> None:
    """Every point, named: latency across, `quality` up."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    points = [row for row in whole(rows) if row.get(quality) is not None and row["peer"] != "diffusers, eager"]
    points = [row for row in points if row[quality] < 100]  # a run without reuse equals the full one
    for peer in dict.fromkeys(row["peer"] for row in points):
        own = sorted((row for row in points if row["peer"] == peer), key=lambda r: r["latency"])
        x, y = [r["latency"] for r in own], [r[quality] for r in own]
        emphasis = {"linewidth": 2.2, "zorder": 3} if peer in COLOURS else {"linewidth": 0.8, "alpha": 0.8}
        axes.plot(x, y, marker="o", markersize=4, label=peer, color=COLOURS.get(peer), **emphasis)
        for row in own:
            short = row["setting"].replace("TaylorSeer", "TS").replace("interval", "every")
            at, away = (row["latency"], row[quality]), (4, 3)
            axes.annotate(short, at, xytext=away, textcoords="offset points", fontsize=6, color="#333333")
    axes.set_xlabel("latency / diffusers' full run (median of interleaved rounds)")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="best")
    figure.savefig(path, dpi=130)


def write(files: list[Path], out: Path, command: str) -> None:
    """The page `out`, its plots beside it.

    Args:
        files: as `comparison.compare` wrote them, one a model.
        command: that makes them again.
    """
    parts = ["# Results", "", f"Made by `{command}`; nothing here is written by hand."]
    for file in files:
        head, rows = read(file)
        job, env = head["job"], head["environment"]
        model, where = job["model"], f"{env['cpu']}, {job['threads']} thread(s), torch {env['torch']}"
        parts += ["", f"## {model}", ""]
        parts.append(
            f"{job['steps']} steps, {job['count']} noises held out, timed at batch {job['batch']} with guidance over "
            f"{job['rounds']} rounds interleaved with diffusers' own full run; {where}, diffusers {env['diffusers']}, "
            f"commit {env['commit']}. PSNR in dB to the full run without reuse; *to converged*: to the solution that "
            "the sampler approximates."
        )
        stem = out.parent / f"results-{model}"
        where = f"{model}: {job['count']} noises"
        pareto(rows, "psnr", "PSNR to the full run, dB", where, stem.with_name(f"{stem.name}-psnr.png"))
        pareto(
            rows,
            "psnr_converged",
            "PSNR to the converged solution, dB",
            where,
            stem.with_name(f"{stem.name}-converged.png"),
        )
        kinds = ["psnr", "converged"]
        if any(row.get("frechet_full") is not None for row in rows):
            label = "Fréchet distance to the full run's images"
            pareto(rows, "frechet_full", label, where, stem.with_name(f"{stem.name}-frechet.png"))
            kinds.append("frechet")
        parts += ["", *(f"![{kind}]({stem.name}-{kind}.png)" for kind in kinds), "", table(rows)]
        for quality, what in (("psnr", "PSNR to the full run"), ("psnr_converged", "PSNR to the converged solution")):
            beyond = outside(rows, quality)
            named = ", ".join(f"{r['peer']} {r['setting']} ({r['latency']:.2f}, {r[quality]:.1f} dB)" for r in beyond)
            parts += ["", f"Points of peers outside our curve by {what}: {named or 'none'}."]
        drifting = [r for r in whole(rows) if r["drift"] > 1e-4]
        named = ", ".join(f"{r['peer']} {r['setting']} ({r['drift']:.2g})" for r in drifting)
        parts += ["", f"Two runs from the same noise differ: {named or 'none'}."]
        parts += ["", "Where a peer does not run, in its own words:", "", failures(rows)]
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")
