"""Who is best at a time budget, of rows that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUDGETS = (1.5, 2.0, 3.0, 4.0, 5.0)  # times the reference run's speed
TELLING = (2.0, 4.0, 3.0, 1.5, 5.0)  # the order they are filled in: a run that is cut short has said most
SLACK = 1.02  # a time that is so much above a budget's is within it


@dataclass(frozen=True)
class Axis:
    """What rows are compared by; a row's spread is in the column `column`_spread.

    Attributes:
        label: for people.
        form: of a figure.
        lower: whether that is better.
    """

    column: str
    label: str
    form: str = "{:.1f}"
    lower: bool = False

    def better(self, a: float, b: float) -> float:
        """By how much `a` is better than `b`."""
        return b - a if self.lower else a - b

    def show(self, row: dict[str, Any]) -> str:
        """The figure with its spread; a run without reuse equals its reference."""
        value, spread = row[self.column], row.get(f"{self.column}_spread")
        if self.form == "{:.1f}" and value > 100:
            return "exact"
        return self.form.format(value) + ("" if spread is None else f" ± {self.form.format(spread)}")


AXES = {
    axis.column: axis
    for axis in (
        Axis("psnr", "PSNR to the run without reuse, dB"),
        Axis("psnr_worst", "the same, worst image"),
        Axis("converged", "PSNR to the converged solution, dB"),
        Axis("converged_worst", "the same, worst image"),
        Axis("frechet", "Fréchet distance to real images", "{:.2f}", lower=True),
        Axis("accuracy", "share that shows what was asked for", "{:.3f}"),
        Axis("precision", "precision of sets", "{:.3f}"),
        Axis("recall", "recall of sets", "{:.3f}"),
    )
}


def best(rows: list[dict[str, Any]], axis: str, speedup: float, count: int = 1) -> list[dict[str, Any]]:
    """The `count` best rows by `axis` that are at least so fast, the best first; of equals the faster."""
    fast = [row for row in rows if row["latency"] <= SLACK / speedup and row.get(axis) is not None]
    sign = 1 if AXES[axis].lower else -1
    return sorted(fast, key=lambda row: (sign * row[axis], row["latency"]))[:count]


def verdict(ours: dict[str, Any] | None, other: dict[str, Any] | None, axis: str) -> str:
    """Whether ours is ahead of the best of the others: in words, with the difference.

    Within spread: differences of less than both rows' spreads together, as standard deviations add.
    """
    if ours is None or other is None:
        return "nothing of ours" if ours is None else "ours alone"
    own = AXES[axis]
    by = own.better(ours[axis], other[axis])
    spread = sum(row.get(f"{axis}_spread", 0.0) ** 2 for row in (ours, other)) ** 0.5
    words = "ahead" if by > 0 else "behind"
    if abs(by) <= spread:
        words = "within spread"
    size = f"{by:+.3f}" if own.form == "{:.3f}" else f"{by:+.2f}" if own.lower else f"{by:+.1f}"
    return f"{words}, {size}"
