"""What `latency.measure` found, as a table and as a plot."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table


def table(result: dict[str, Any]) -> Table:
    """The result as people read it."""
    env = result["environment"]
    title = (
        f"{result['model']}, {result['layers']} layers, {result['sampler']} {result['steps']}, batch {result['batch']}"
        f"{' with guidance' if result['guidance'] > 1 else ''}, {result['schedule']}: "
        f"CUR {100 * result['cur']:.0f} %, theoretical {result['theoretical']:.2f}x"
    )
    where = f"{env['cpu']}, {env['threads']} thread(s)" if result["device"] == "cpu" else result["device"]
    caption = f"{where}, {result['dtype']}, torch {env['torch']}, {result['rounds']} rounds, median"
    out = Table(title=title, caption=f"{caption}; commit {env['commit']}")
    out.add_column("")
    for column in (
        "ms/image",
        "p20-p80",
        "ms/step, batch",
        "speed-up",
        "realised",
        "vs compile",
        "launches",
        "slots",
        "compile s",
        "PSNR",
    ):
        out.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        slots = (
            "" if row["slot_bytes"] is None else f"{row['slot_bytes'] / 2**20:.1f} MiB, {100 * row['slot_share']:.0f} %"
        )
        out.add_row(
            row["name"],
            f"{row['ms_per_image']:.1f}",
            f"{row['ms_per_image_p20']:.1f}-{row['ms_per_image_p80']:.1f}",
            f"{row['ms_per_step']:.1f}",
            f"{row['speedup']:.2f}x",
            _or_blank(row["realised"]),
            _or_blank(row["realised_over_compile"]),
            _or_blank(row["launches_per_step"], ".0f"),
            slots,
            f"{row['compile_seconds']:.1f}",
            _or_blank(row["psnr"], ".1f"),
        )
    return out


def _or_blank(value: float | None, form: str = ".2f") -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def plot(result: dict[str, Any], path: str) -> None:
    """Bars: ms an image of every candidate, and the time the theory allows."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(8, 0.7 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    values = [row["ms_per_image"] for row in rows]
    errors = [
        [v - r["ms_per_image_p20"] for v, r in zip(values, rows)],
        [r["ms_per_image_p80"] - v for v, r in zip(values, rows)],
    ]
    colours = ["#1f4e79" if row["name"].startswith("harmonica_rt") else "#a9b8c6" for row in rows]
    bars = axes.barh([row["name"] for row in rows], values, xerr=errors, color=colours, ecolor="#333333", capsize=3)
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none"}
    axes.bar_label(bars, [f"{row['speedup']:.2f}x" for row in rows], label_type="center", bbox=box)
    axes.axvline(values[0] / result["theoretical"], color="#c0392b", linestyle="--", linewidth=1)
    axes.annotate(
        f"theoretical {result['theoretical']:.2f}x",
        (values[0] / result["theoretical"], len(rows) - 0.55),
        xytext=(4, 0),
        textcoords="offset points",
        color="#c0392b",
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel("ms an image (median; whiskers p20 to p80)")
    axes.set_title(
        f"{result['model']}, {result['layers']} layers, {result['sampler']} {result['steps']}, "
        f"batch {result['batch']}, {result['schedule']}: CUR {100 * result['cur']:.0f} %",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
