"""The picture in ARCHITECTURE.md, made of the code's imports: `python -m tests.import_picture architecture.svg`.

A module stands above all that it imports. Of the arrows those are left out that others imply.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .import_graph import circles, imports, modules

PARTS = {  # by colour, what a module is for: the way of a schedule, the way of a call, what people are shown
    "#c6dcef": "schedule decisions layout checks forecast builders resampling reading schedule_fields schedule_files "
    "schedule_text schedule_specs router_files imports hub theory plotting",
    "#fbd9b5": "compiling compiled calling face tracking sampling inspection engine pipeline_copies",
    "#cfe8cf": "lowering program branch_engine executor buffers backends cuda_graphs streams loop",
    "#f3d0e0": "forward_engine forward_plan first_forward steered_forward forward_graphs entry kept_streams "
    "kept_output interception compiled_blocks counting",
    "#e3dcf0": "models",
}
OTHER = "#eeeeee"


def shown(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The runtime: `harmonica_rt` without its root and `train`; `models` and `kernels` are one node each."""

    def node(name: str) -> str:
        own = name.removeprefix("harmonica_rt.")
        return own.split(".")[0]

    out: dict[str, set[str]] = {}
    for name, others in graph.items():
        if name != "harmonica_rt" and node(name) not in ("train", "version"):
            own = out.setdefault(node(name), set())
            own |= {node(other) for other in others if other != "harmonica_rt"} - {node(name), "version", "train"}
    return out


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """How many modules stand below each, one upon another."""
    found: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in found:
            found[name] = max((1 + of(other) for other in graph[name]), default=0)
        return found[name]

    for name in graph:
        of(name)
    return found


def implied(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Of each module, what it imports that another of its imports needs anyway."""
    below: dict[str, set[str]] = {}
    for name in sorted(graph, key=levels(graph).__getitem__):
        below[name] = graph[name].union(*(below[other] for other in graph[name]))
    return {name: set().union(*(below[other] for other in others)) & others for name, others in graph.items()}


def placed(graph: dict[str, set[str]], arrows: dict[str, set[str]]) -> dict[str, tuple[float, int]]:
    """Where each module stands: rows by level, in a row near what it is joined to."""
    level = levels(graph)
    rows = [sorted(name for name in graph if level[name] == i) for i in range(max(level.values()) + 1)]
    x = {name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
    near = {name: arrows[name] | {other for other in graph if name in arrows[other]} for name in graph}
    for _ in range(40):
        for row in rows:
            wanted = {name: np.mean([x[other] for other in near[name]]) if near[name] else x[name] for name in row}
            for i, name in enumerate(sorted(row, key=wanted.__getitem__)):
                x[name] = (i + 0.5) / len(row)
    return {name: (x[name], level[name]) for name in graph}


def draw(graph: dict[str, set[str]]) -> Figure:
    without = implied(graph)
    arrows = {name: others - without[name] for name, others in graph.items()}
    place = placed(graph, arrows)
    colours = {name: colour for colour, names in PARTS.items() for name in names.split()}
    figure = Figure(figsize=(15, 0.75 * (1 + max(y for _, y in place.values()))), layout="tight")
    axes = figure.subplots()
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, max(y for _, y in place.values()) + 0.6)
    for name, others in arrows.items():
        for other in others:
            (a, b), (c, d) = place[name], place[other]
            style = {"arrowstyle": "-|>", "color": "#999999", "lw": 0.7, "shrinkA": 9, "shrinkB": 9}
            axes.annotate("", xy=(c, d), xytext=(a, b), arrowprops=style)
    for name, (a, b) in place.items():
        box = {"boxstyle": "round,pad=0.3", "fc": colours.get(name, OTHER), "ec": "#666666", "lw": 0.6}
        axes.text(a, b, name, ha="center", va="center", fontsize=9, bbox=box)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    graph = imports(modules())
    assert not circles(graph)
    with matplotlib.rc_context({"svg.hashsalt": "harmonica_rt", "svg.fonttype": "none"}):  # the same file again
        draw(shown(graph)).savefig(arguments.out, metadata={"Date": None} if arguments.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
