"""`bench/FRONTIER.md` from results files: who is best at each budget, and plots. Nothing by hand."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .candidates import FAMILIES, LEARNED, PEER, PLAIN, UNLEARNED, WHOLE
from .frontier import finalists
from .frontier_best import AXES, BUDGETS, best, verdict
from .peers_page import read

COLOURS = {PLAIN: "#c0392b", PEER: "#7f8c8d", UNLEARNED: "#5b8db8", LEARNED: "#1f4e79"}
MARKERS = {PLAIN: "s", PEER: "^", UNLEARNED: "o", LEARNED: "D"}
SETS = ("frechet", "accuracy", "precision", "recall")
OURS = (UNLEARNED, LEARNED)
IN_SHORT = ("psnr", "psnr_worst", "converged", "frechet")
SHOWN = ("psnr", "psnr_worst", "converged", "converged_worst", *SETS)


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured rows, each with the columns of its largest set."""
    found = {row["name"]: dict(row) for row in rows if row["stage"] == "measure" and row["error"] is None}
    sets = [row for row in rows if row["stage"].startswith("sets ") and row["error"] is None]
    for row in sorted(sets, key=lambda row: int(row["stage"].split()[1])):
        if row["name"] in found:
            columns = {name: value for name, value in row.items() if name.removesuffix("_spread") in SETS}
            found[row["name"]] |= columns | {"judged": int(row["stage"].split()[1])}
    return list(found.values())


def comparable(rows: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """Rows that have the axis; sets of one size alone, the largest: smaller ones are further off."""
    own = [row for row in rows if row.get(axis) is not None]
    if axis in SETS:
        most = max((row["judged"] for row in own), default=0)
        own = [row for row in own if row["judged"] == most]
    return own


def table(rows: list[dict[str, Any]], axis: str) -> str:
    """Markdown: each family's best at each budget, and whether ours is ahead of the others."""
    own = AXES[axis]
    lines = ["| at least | " + " | ".join(FAMILIES) + " | ours to the best of the others |", "| --- " * 6 + "|"]
    for budget in BUDGETS:
        tops = {f: next(iter(best([r for r in rows if r["family"] == f], axis, budget)), None) for f in FAMILIES}
        ours = _better(tops[UNLEARNED], tops[LEARNED], axis)
        others = _better(tops[PLAIN], tops[PEER], axis)
        top = _better(ours, others, axis)
        cells = []
        for row in tops.values():
            bold = "**" if row is top and row is not None else ""
            shown = "" if row is None else f"{bold}{own.show(row)}{bold}, {1 / row['latency']:.2f}x: {row['name']}"
            cells.append(shown)
        lines.append(f"| {budget:g}x | " + " | ".join(cells) + f" | {verdict(ours, others, axis)} |")
    return "\n".join(lines)


def _better(a: dict[str, Any] | None, b: dict[str, Any] | None, axis: str) -> dict[str, Any] | None:
    if a is None or b is None:
        return a or b
    return b if AXES[axis].better(b[axis], a[axis]) > 0 else a


def plot(rows: list[dict[str, Any]], axis: str, title: str, path: Path) -> None:
    """Every measured point, and each family's staircase: the best that is at least so fast."""
    own = AXES[axis]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots()
    points = [
        row for row in rows if 0.9 <= 1 / row["latency"] <= 7 and not (axis.startswith("psnr") and row[axis] > 100)
    ]
    numbered: dict[str, int] = {}
    for family in FAMILIES:
        some = sorted((row for row in points if row["family"] == family), key=lambda row: row["latency"])
        if not some:
            continue
        x, y = [1 / row["latency"] for row in some], [row[axis] for row in some]
        axes.scatter(x, y, s=16, color=COLOURS[family], marker=MARKERS[family], alpha=0.35, linewidths=0)
        front: list[dict[str, Any]] = []
        for row in some:  # from the fastest
            if not front or own.better(row[axis], front[-1][axis]) > 0:
                front.append(row)
        steps = [(1 / row["latency"], row[axis]) for row in front]
        axes.plot(
            *zip(*steps), color=COLOURS[family], marker=MARKERS[family], markersize=6, linewidth=1.8, label=family,
            drawstyle="steps-post",
        )  # fmt: skip
        for row in front:
            number = numbered.setdefault(row["name"], len(numbered) + 1)
            at, away = (1 / row["latency"], row[axis]), (3, 4 if family in (LEARNED, PLAIN) else -10)
            axes.annotate(str(number), at, xytext=away, textcoords="offset points", fontsize=7, color=COLOURS[family])
    if points:
        some = [row for row in points if row["family"] != PEER] or points  # peers end where nobody would look
        fronts = sorted(row[axis] for row in some if row["name"] in numbered)
        low, high = fronts[0], fronts[-1]
        margin = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    if own.lower:
        axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, *BUDGETS], ["1x", *(f"{budget:g}x" for budget in BUDGETS)])
    axes.minorticks_off()
    for budget in BUDGETS:
        axes.axvline(budget, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_xlabel("speed-up over the reference run (measured, median of interleaved rounds)")
    axes.set_ylabel(own.label + (" (better is up)" if own.lower else ""))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.2, axis="y")
    axes.legend(fontsize=8, loc="best")
    names = "\n".join(f"{number}  {name}" for name, number in numbered.items())
    figure.text(1.0, 0.5, names, fontsize=6, va="center", ha="left", family="monospace")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def summary(files: list[Path]) -> str:
    """Markdown: ours and the best of the others at a few budgets, a row a model and budget."""
    heads = "".join(f" {AXES[axis].label}: **ours** / best of the others |" for axis in IN_SHORT)
    lines = [f"| | at least |{heads}", "| --- " * (2 + len(IN_SHORT)) + "|"]
    for file in files:
        head, found = read(file)
        rows = merged(found)
        for budget in BUDGETS[1:4]:
            cells = []
            for axis in IN_SHORT:
                some = comparable(rows, axis)
                pair = [[row for row in some if (row["family"] in OURS) == own] for own in (True, False)]
                tops = [next(iter(best(side, axis, budget)), None) for side in pair]
                ours, others = ("-" if top is None else AXES[axis].show(top) for top in tops)
                cells.append(f"**{ours}** / {others}" if some else "")
            lines.append(f"| {head['job']['model']} | {budget:g}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(file: Path, page: Path) -> list[str]:
    """A results file as Markdown for `page`, its plots drawn."""
    head, lines = read(file)
    job, env, rows = head["job"], head["environment"], merged(lines)
    model = job["model"]
    commits = dict.fromkeys([env["commit"], *(row["commit"] for row in lines if "commit" in row)])
    screened = [row for row in lines if row["stage"] == "screen" and row["error"] is None]
    missing = _missing(screened, rows, job["steps"])
    hours = sum(row["seconds"] for row in lines) / 3600
    parts = [
        f"## {model}",
        f"`{head['command']}`: {len(screened)} candidates screened on {job['screen']} noises, {len(rows)} measured on "
        f"{job['count']} others, timed at batch {job['batch']} with guidance over {job['rounds']} rounds, interleaved "
        f"with the reference run of {job['steps']} steps, {job['threads']} thread; {hours:.1f} hours. {env['cpu']}, "
        f"torch {env['torch']}, diffusers {env['diffusers']}, commit {', '.join(commits)}.",
    ]
    if missing:
        parts.append(f"Not yet measured, of the best of the screen: {', '.join(missing)}.")
    for axis in SHOWN:
        if some := comparable(rows, axis):
            picture = file.with_name(f"frontier-{model}-{axis.replace('_', '-')}.png")
            sized = f"; sets of {some[0]['judged']} images, {len(some)} of {len(rows)} judged" if axis in SETS else ""
            plot(some, axis, f"{model}: {AXES[axis].label}{sized}", picture)
            parts += [f"### {AXES[axis].label}{sized}", table(some, axis)]
            parts.append(f"![{model}, {AXES[axis].label}]({os.path.relpath(picture, page.parent)})")
    failures = Counter((*_without_setting(row["name"]), row["error"]) for row in lines if row["error"] is not None)
    if failed := [f"* {who} on {run}, {n} of its runs: {error}" for (run, who, error), n in failures.items()]:
        parts += ["What did not run, in its own words:", "\n".join(failed)]
    return parts


def _without_setting(name: str) -> tuple[str, str]:
    """A candidate's run, and what runs it."""
    run, _, rest = name.partition(", ")
    return run, rest.split(":")[0] or "diffusers"


def _missing(screened: list[dict[str, Any]], measured: list[dict[str, Any]], steps: int) -> list[str]:
    """Finalists that a run was ended before."""
    whole = [row for row in screened if row["candidate"]["by"] == WHOLE]
    if not whole:
        return []
    share = whole[0]["latency"] * steps / whole[0]["candidate"]["steps"]
    there = {row["name"] for row in measured}
    return [each.name for each in finalists(screened, share) if each.name not in there]


INTRODUCTION = """\
# The frontier at equal time

Written by `bench/run_frontier.py`, nothing by hand. A budget of 2x is a time of at most half the reference run's,
within 2 %; in each cell is what a family has best: its figure with its spread, its measured speed-up, and its name:
sampler, spacing, steps, and what reuses there. *PSNR to the run without reuse* is to the same sampler's run of as many
steps, and for what reuses nothing, or has fewer steps than the reference, to the reference run. *Ours, unlearned*:
uniform schedules at all levels, reuse of the model's output too, and samplers without reuse on this engine (`full`).
Ours run by backend inductor, at level output with the model under torch.compile; plain samplers and peers as they come
or so compiled. Learned schedules of which as many steps compute and reuse the same share one measured time. Images of a
run at noise levels of its own (`own sigmas`) are compared with the reference run's.
Spreads are standard deviations over resamples of the noises or of the set; *within spread*: a difference of less than
both together. Candidates are screened on other noises than they are measured on. Plots: a point a measured candidate,
stairs the best that is at least so fast, numbers named beside."""


def write(files: list[Path], page: Path) -> None:
    """The page; its plots beside the files."""
    parts = [INTRODUCTION, "## In short", summary(files), *(part for file in files for part in section(file, page))]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
