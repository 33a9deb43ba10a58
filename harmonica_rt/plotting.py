"""Pictures of a schedule. Imports matplotlib, so nothing else in the package imports this at the top."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from .schedule import Schedule

OUTPUT, REUSE, COMPUTE = "#ffffff", "#dfe6ee", "#1f4e79"


def plot_schedule(schedule: Schedule, path: str | os.PathLike[str] | None = None) -> Figure:
    """Heatmap of `schedule`, steps (across) by layers (up), one panel a branch, dark where computed."""
    panels = len(schedule.branches)
    figure = Figure(figsize=(1.4 + 3.4 * panels, 3.4), layout="constrained")
    for axes, (b, name) in zip(figure.subplots(1, panels, sharey=True, squeeze=False)[0], enumerate(schedule.branches)):
        axes.pcolormesh(
            schedule.compute[..., b].T - 1.0 * schedule.output,
            cmap=ListedColormap([OUTPUT, REUSE, COMPUTE]),
            vmin=-1,
            vmax=1,
            edgecolors="white",
            linewidth=0.6,
        )
        axes.set_title(f"{name}: CUR {100 * schedule.cur_by_branch[name]:.0f} %", fontsize=10)
        axes.set_xlabel("step")
        for axis, count in ((axes.xaxis, schedule.steps), (axes.yaxis, schedule.layers)):
            ticks = [int(t) for t in MaxNLocator(8, integer=True).tick_values(0, count - 1) if 0 <= t < count]
            axis.set_ticks([t + 0.5 for t in ticks], labels=[str(t) for t in ticks])
        if b == 0:
            axes.set_ylabel("layer")
    figure.suptitle(
        f"{schedule.model}, {schedule.steps} steps, order {schedule.order}: CUR {100 * schedule.cur:.0f} % "
        f"(dark: computed, light: reused{', white: output reused' if schedule.output.any() else ''})",
        fontsize=10,
    )
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
