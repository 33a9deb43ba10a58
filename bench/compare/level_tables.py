"""The tables of `bench/run_which_level.py`, in Markdown, from its lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LEVELS = {  # in the order of the columns: what is reused, as `parse_schedule` takes it
    "output": "output:{every}:{order}",
    "trunk, c = 0": "blocks:{every}:{order}:carry=0",
    "trunk, c = 0.5": "blocks:{every}:{order}:carry=0.5",
    "trunk, c = 1": "blocks:{every}:{order}:carry=1",
    # Groups reused together with a carry of 0 are the trunk with 0, with 1 the trunk with 1: residuals add up
    "4 groups, c = 0.5": "blocks:{every}:{order}:groups=4:carry=0.5",
    "branches": "uniform:{every}:{order}",
}
Row = dict[str, Any]


def page(rows: list[Row]) -> str:
    """For each model PSNR to the full run, the best of a line bold, and then what levels cost."""
    latest = {row["model"]: row["weights"] for row in rows}  # of several weights those measured last
    rows = [row for row in rows if row["weights"] == latest[row["model"]]]
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        if qualities := [row for row in mine if row["kind"] == "quality"]:
            parts.append(_table(f"{model}: PSNR in dB, mean / worst", qualities, _setting, _quality))
        costs: dict[tuple[Any, ...], Row] = {}
        for row in (row for row in mine if row["contexts"] == "all"):
            at = (*_run(row), row["level"])
            costs[at] = costs.get(at, {}) | row  # a time has what a quality has not
        parts.append(_table(f"{model}: theory, speed-up, KiB an image", [*costs.values()], _run, _cost))
    return "\n\n".join(parts)


def _table(
    title: str, rows: list[Row], line: Callable[[Row], tuple[Any, ...]], cell: Callable[[Row, list[Row]], str]
) -> str:
    """A column a level, a line for each value of `line`, whose last parts are every and order.

    Args:
        cell: (row, rows of its line) -> text.
    """
    levels = [level for level in LEVELS if any(row["level"] == level for row in rows)]
    out = [f"| {title} | {' | '.join(levels)} |", "| --- " * (len(levels) + 1) + "|"]
    for key in sorted({line(row) for row in rows}):
        *what, every, order = key
        of = {row["level"]: row for row in rows if line(row) == key}
        cells = [cell(of[level], [*of.values()]) if level in of else "" for level in levels]
        named = ", ".join(str(part) for part in what[1:] if part)
        out.append(f"| {named}, every {every}, order {order} | {' | '.join(cells)} |")
    return "\n".join(out)


def _setting(row: Row) -> tuple[Any, ...]:
    contexts = "" if row["contexts"] == "all" else f"{row['contexts']} alone"
    return (row["guidance"], contexts, f"guidance {row['guidance']:g}", row["every"], row["order"])


def _run(row: Row) -> tuple[Any, ...]:
    """What a cost depends on beside the level."""
    return (row["model"], "guided" if row["guidance"] > 1 else "no guidance", row["every"], row["order"])


def _quality(row: Row, line: list[Row]) -> str:
    text = f"{row['mean']:.1f} / {row['worst']:.1f}"
    return f"**{text}**" if row["mean"] == max(each["mean"] for each in line) else text


def _cost(row: Row, line: list[Row]) -> str:
    speedup = [f"{row['speedup']:.2f}x {row['timed']}"] if "speedup" in row else []
    return ", ".join([f"{row['theoretical']:.2f}x", *speedup, f"{row['slot_bytes'] / 1024:.0f} KiB"])
