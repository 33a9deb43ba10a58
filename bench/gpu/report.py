"""Tables and plots from the lines of `bench/run_gpu.py`, of one card or several: every row says which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.measure.latency import EAGER

from .latency import COMPILED, NAMES, OVERHEAD
from .record import read

PAGE = "GPU.md"
COLUMNS = ["", "ms/run, device", "p20-p80", "ms/run, wall", "ms/image", "speed-up", "realised", "vs compile"]
COLUMNS += ["realised, vs compile", "peak MiB", "reserved MiB", "compile s", "capture s", "error"]
MIB, GB = 2**20, 1e9


@dataclass(frozen=True)
class Line:
    """A line, and the card it was measured on."""

    card: str
    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)


def write(folder: Path) -> Path:
    """`folder`/GPU.md and its plots, from all `*.jsonl` in `folder`. Returns the page."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"--report: expected *.jsonl in {folder}, found none")
    lines = gather(paths)
    parts = [
        "# Measured on GPUs",
        "Made by `python bench/run_gpu.py --report FOLDER` from the lines beside it.",
        *cards(lines),
        *latency(lines),
        *(f"![{path.stem}]({path.name})" for path in [*plot_latency(lines, folder), *plot_gap(lines, folder)]),
        *levels(lines),
        *learning(lines),
        *correct(lines),
        *capture(lines),
        *gap(lines),
        *profile(lines),
        *left_out(lines),
    ]
    page = folder / PAGE
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def gather(paths: Sequence[Path]) -> list[Line]:
    """Figures, failures and what was skipped. Of a case that a card ran several times, the newest run with figures."""
    runs: dict[tuple[str, str, str], list[list[Line]]] = {}
    for path in paths:
        lines, own = read(path), {}
        card = lines[0]["machine"]
        for values in lines:
            if values["kind"] in ("figure", "failed", "skipped"):
                own.setdefault((card, values["stage"], values["case"]), []).append(Line(card, values))
        for key, found in own.items():
            runs.setdefault(key, []).append(found)
    return [line for found in runs.values() for line in max(reversed(found), key=_has_figures)]


def _has_figures(lines: list[Line]) -> bool:
    return any(line["kind"] == "figure" for line in lines)


def of(lines: Sequence[Line], stage: str, kind: str = "figure") -> list[Line]:
    return [line for line in lines if line["kind"] == kind and line["stage"] == stage]


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown. Bars within cells are escaped; None is an empty cell."""
    cells = [["" if cell is None else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = ".2f") -> str | None:
    return None if value is None else format(value, form)


def section(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"## {title}", table(columns, rows)] if rows else []


def cards(lines: list[Line]) -> list[str]:
    known: dict[str, dict[str, Any]] = {}
    for line in of(lines, "environment"):
        known.setdefault(line.card, {}).update(line.values)
    rows = []
    for card, values in known.items():
        packages = values.get("packages", {})
        tf32 = values.get("tf32", {})
        rows.append(
            [
                card,
                values.get("driver_version"),
                values.get("cuda"),
                *(packages.get(name) for name in ("torch", "triton", "diffusers")),
                values.get("commit"),
                f"matmul {tf32.get('matmul')}, cuDNN {tf32.get('cudnn')}",
                number(values.get("copy_gbps"), ".0f"),
                number(values.get("bf16_tflops"), ".0f"),
                number(values.get("launch_us")),
                number(values.get("node_us")),
            ]
        )
    columns = ["card", "driver", "CUDA", "torch", "triton", "diffusers", "commit", "TF32", "copy GB/s", "bf16 TFLOP/s"]
    return section("Cards", [*columns, "us a launch", "us a graph node"], rows)


def timed(lines: list[Line]) -> dict[tuple[str, str], list[Line]]:
    """Latency rows by card and case, in the order of `NAMES`."""
    cases: dict[tuple[str, str], dict[str, Line]] = {}
    for line in of(lines, "latency"):
        if line["device_ms"] is not None:
            cases.setdefault((line.card, line["case"]), {})[line["name"]] = line
    return {key: [rows[name] for name in NAMES if name in rows] for key, rows in cases.items()}


def latency(lines: list[Line]) -> list[str]:
    heads = {(line.card, line["case"]): line for line in of(lines, "latency") if line["theory"] is not None}
    parts, best = [], []
    for key, rows in timed(lines).items():
        head = heads[key]
        about = f"{head['sampler'].removesuffix('Scheduler')} {head['steps']}, guidance {head['guidance']:g}"
        parts.append(f"### {key[1]}, {key[0]}")
        parts.append(f"{head['dtype']}, {about}; CUR {100 * head['cur']:.0f} %, theory {head['theory']:.2f}x")
        parts.append(table(COLUMNS, [latency_row(row) for row in rows]))
        ours = [row for row in rows if row["name"].startswith("harmonica_rt")]
        if ours:
            fastest = min(ours, key=lambda row: row["device_ms"])
            best.append(
                [*key, number(head["theory"]), fastest["name"].removeprefix("harmonica_rt, "),
                 number(fastest["ms_per_image"]), number(fastest["speedup"]), number(fastest["realised"]),
                 number(fastest["speedup_over_compile"]), number(fastest["realised_over_compile"])]
            )  # fmt: skip
    columns = ["card", "case", "theory", "fastest of ours", "ms/image", "speed-up", "realised", "vs compile"]
    summary = section("Latency", [*columns, "realised, vs compile"], best)
    if not summary and parts:
        summary = ["## Latency"]
    return [*summary, *parts]


def latency_row(line: Line) -> list[Any]:
    return [
        line["name"],
        number(line["device_ms"]),
        f"{line['device_ms_p20']:.2f}-{line['device_ms_p80']:.2f}",
        number(line["wall_ms"]),
        number(line["ms_per_image"]),
        number(line["speedup"]),
        number(line["realised"]),
        number(line["speedup_over_compile"]),
        number(line["realised_over_compile"]),
        *(number(line[key] / MIB, ".0f") for key in ("peak_bytes", "reserved_bytes")),
        number(line["compile_seconds"], ".1f"),
        number(line["capture_seconds"], ".2f"),
        number(line["error"], ".1e"),
    ]


def levels(lines: list[Line]) -> list[str]:
    rows = [
        [line.card, line["size"], line["steps"], line["name"], number(line["device_ms"], ".0f"),
         f"{line['p20_ms']:.0f}-{line['p80_ms']:.0f}", number(line["theory"]), number(line["speedup"]),
         number(line["speedup_over_compile"]), number(line["own_bytes"] / MIB, ".0f"),
         number(line["compile_seconds"], ".0f"), number(line["error"], ".1e")]
        for line in of(lines, "levels")
    ]  # fmt: skip
    columns = ["card", "pipeline", "steps", "", "ms/run, device", "p20-p80", "theory", "over eager", "over compile"]
    return section("Levels", [*columns, "peak beyond what was held, MiB", "compile s", "to plain launches"], rows)


def learning(lines: list[Line]) -> list[str]:
    rows = [
        [line.card, line["case"], line["name"], line["steps"], line["learned"],
         number(line["predicted_bytes"] / GB), number(line["peak_bytes"] / GB), number(line["ratio"]),
         *(number(line["seconds"][name]) for name in ("prediction", "target", "iteration"))]
        for line in of(lines, "learning")
        if line["predicted_bytes"] is not None
    ]  # fmt: skip
    columns = ["card", "pipeline", "level", "steps", "numbers learned", "predicted GB", "measured GB", "ratio"]
    return section("Learning", [*columns, "s to predict", "s a target", "s an iteration of one image"], rows)


def correct(lines: list[Line]) -> list[str]:
    rows = [
        [line.card, line["case"], line["name"], number(line["error"], ".1e"), number(line["tolerance"], ".0e"),
         number(line["own"], ".1e"), number(line["ours"], ".1e"), "yes" if line["passed"] else "**no**"]
        for line in of(lines, "correct")
    ]  # fmt: skip
    columns = ["card", "case", "check", "error", "tolerance", "diffusers to fp32", "ours to fp32", "passed"]
    return section("Correct", columns, rows)


def capture(lines: list[Line]) -> list[str]:
    made = [line for line in of(lines, "capture") if line["graphs"] is not None]
    left = {(line.card, line["case"], line["name"]): line for line in of(lines, "capture") if line["graphs"] is None}
    rows = []
    for line in made:
        freed = left.get((line.card, line["case"], f"{line['name']}, uncompiled"))
        rows.append(
            [line.card, line["case"], line["name"], line["graphs"], number(line["plan_seconds"]),
             number(line["capture_seconds"]), number(line["loop_seconds"]), number(line["replayed_ms"]),
             number(line["launched_ms"]), number(line["plan_reserved"] / MIB, ".0f"),
             number(line["loop_reserved"] / MIB, ".0f"),
             number(freed["left_reserved"] / MIB, ".0f") if freed is not None else None]
        )  # fmt: skip
    columns = ["card", "case", "schedule", "graphs", "plan s", "of it capture s", "loop capture s", "replayed ms",
               "launched ms", "plan MiB", "loop MiB", "left after uncompile MiB"]  # fmt: skip
    return section("Capture", columns, rows)


def gap(lines: list[Line]) -> list[str]:
    rows = []
    copies = {(line.card, line["case"]): line["copy_gbps"] for line in of(lines, "gap") if line["copy_gbps"]}
    for line in of(lines, "gap"):
        if line["us"] is not None:
            copy = copies.get((line.card, line["case"]))
            rows.append(
                [line.card, line["shape"], line["terms"], line["name"], number(line["us"]),
                 number(line["gbps"], ".0f"), number(copy, ".0f"), number(copy and line["gbps"] / copy),
                 "in cache" if line["in_cache"] else ""]
            )  # fmt: skip
    columns = ["card", "shape", "terms", "", "us", "GB/s", "copy GB/s", "of copy", ""]
    return section("Gap", columns, rows)


def profile(lines: list[Line]) -> list[str]:
    rows = []
    for line in of(lines, "profile"):
        top = "; ".join(f"{each['kernel'][:48]} {100 * each['share']:.0f} %" for each in line["top"][:3])
        rows.append(
            [line.card, line["case"], line["name"], line["step"], number(line["kernels"], ".0f"),
             number(line["span_us"], ".0f"), number(line["busy_us"], ".0f"), number(100 * line["idle"], ".0f"), top]
        )  # fmt: skip
    columns = ["card", "case", "", "step", "kernels", "us", "busy us", "idle %", "most time in"]
    return section("One step", columns, rows)


def left_out(lines: list[Line]) -> list[str]:
    rows = []
    for line in lines:
        if line["kind"] in ("failed", "skipped"):
            why = (line["error"] or line["reason"]).strip().splitlines()[0][:200]
            rows.append([line.card, line["kind"], f"{line['stage']}: {line['case']}", line["name"], why])
    return section("Failed and skipped", ["card", "", "case", "candidate", "why"], rows)


# ---- plots


def slug(card: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in card.lower())


def plot_latency(lines: list[Line], folder: Path) -> list[Path]:
    """A plot for each card: speed-up of every candidate, one group of bars a case."""
    paths = []
    cases = timed(lines)
    for card in dict.fromkeys(card for card, _ in cases):
        own = {case: {row["name"]: row["speedup"] for row in rows} for (c, case), rows in cases.items() if c == card}
        own = {case: speedups for case, speedups in own.items() if speedups.get(EAGER)}
        if not own:
            continue
        names = [name for name in NAMES if any(name in speedups for speedups in own.values())]
        figure = Figure(figsize=(9, 1.2 + 0.14 * len(own) * (len(names) + 2)), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(names):
            at = [n * (len(names) + 2) + i for n in range(len(own))]
            axes.barh(at, [speedups.get(name, 0.0) for speedups in own.values()], label=name, color=colour(name))
        axes.set_yticks([n * (len(names) + 2) + (len(names) - 1) / 2 for n in range(len(own))], list(own), fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"speed-up over diffusers eager, device time, {card}")
        axes.legend(fontsize=7)
        paths.append(folder / f"{slug(card)}-latency.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def plot_gap(lines: list[Line], folder: Path) -> list[Path]:
    """A plot for each card: GB/s by terms, one panel a shape."""
    paths = []
    rows = [line for line in of(lines, "gap") if line["us"] is not None]
    for card in dict.fromkeys(line.card for line in rows):
        own = [line for line in rows if line.card == card]
        shapes = list(dict.fromkeys(line["shape"] for line in own))
        figure = Figure(figsize=(3.4 * len(shapes), 3.2), layout="constrained")
        for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes):
            for name in dict.fromkeys(line["name"] for line in own):
                points = sorted(
                    (line["terms"], line["gbps"]) for line in own if (line["shape"], line["name"]) == (shape, name)
                )
                axes.plot(*zip(*points), marker="o", label=name, color=colour(name)) if points else None
            axes.set_title(shape, fontsize=8)
            axes.set_xscale("symlog", base=2)
            axes.set_xlabel("terms")
        figure.axes[0].set_ylabel(f"GB/s, {card}")
        figure.axes[0].legend(fontsize=7)
        paths.append(folder / f"{slug(card)}-gap.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def colour(name: str) -> str:
    if name.startswith("harmonica_rt"):
        shades = ("#1f4e79", "#3a7ab5", "#7fb0d9", "#0c2d48")
        return shades[sum(map(ord, name)) % len(shades)]
    if name in (COMPILED, OVERHEAD, "torch.compile"):
        return "#e08e45" if name != OVERHEAD else "#b8651b"
    return "#8a98a6" if name.endswith("eager") else "#b9c4ce"
