"""Pictures of a schedule. Imports matplotlib, so nothing in the package imports this at the top."""

from __future__ import annotations

import os
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .decisions import Decisions
from .layout import Panel, panels

OUTPUT, REUSE, COMPUTE = "#ffffff", "#dfe6ee", "#1f4e79"
LETTERS = 12  # an inch, of a title


def plot_schedule(schedule: Decisions, path: str | os.PathLike[str] | None = None) -> Figure:
    """Heatmap of `schedule`, steps (across) by layers (up), one panel a branch, dark where computed.

    Learned weights have a second row: how far the newest value's weight is from the forecast's.
    """
    computed = schedule.compute.reshape(schedule.steps, -1) if schedule.groups else ~schedule.output[:, None]
    alone = schedule.left_alone.reshape(schedule.steps, -1) if schedule.groups else schedule.output[:, None]
    columns = list(panels(schedule.groups)) or [Panel("output", np.zeros(1, dtype=int))]
    cur = schedule.cur_by_branch or {"output": schedule.cur}
    learned = schedule.learned and bool(schedule.groups)
    rows = 2 if learned else 1
    figure = Figure(figsize=(1.4 + 3.4 * len(columns), 0.6 + 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, len(columns), sharey=len(schedule.groups) == 1, squeeze=False)
    for axes, panel in zip(grid[0], columns):
        values = (computed[:, panel.entries] - 1.0 * alone[:, panel.entries]).T
        _heatmap(axes, values, ListedColormap([OUTPUT, REUSE, COMPUTE]), 1)
        axes.set_title(f"{panel.title}: CUR {100 * cur[panel.title]:.0f} %", fontsize=10)
    if learned:
        unlearned = schedule.replace(weights=None, output_weights=None)
        change = (schedule.weights - unlearned.weights)[..., 0].reshape(schedule.steps, -1)
        reused = ~computed & ~alone
        limit = float(np.quantile(np.abs(change[reused]), 0.98)) if reused.any() else 1.0
        for axes, panel in zip(grid[1], columns):
            values = np.ma.masked_where(~reused[:, panel.entries], change[:, panel.entries]).T
            mesh = _heatmap(axes, values, "RdBu_r", max(limit, 1e-6))
            axes.set_title(f"{panel.title}:\nnewest value's weight - forecast's", fontsize=10)
        figure.colorbar(mesh, ax=grid[1], shrink=0.9)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in grid[:, 0]:
        axes.set_ylabel("layer" if schedule.level == "branches" else "group")
    whole = " or ".join(name for name in ("output", "trunk") if getattr(schedule, name).any())
    title = (
        f"{schedule.model}, {schedule.steps} steps, order {schedule.order}: CUR {100 * schedule.cur:.0f} % "
        f"(dark: computed, light: reused{f', white: {whole} reused' if whole else ''})"
    )
    figure.suptitle(textwrap.fill(title, int(LETTERS * figure.get_figwidth())), fontsize=10)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _heatmap(axes: Axes, values: np.ndarray, cmap: str | ListedColormap, limit: float) -> QuadMesh:
    """`values` [layers, steps] from -`limit` to `limit`."""
    mesh = axes.pcolormesh(values, cmap=cmap, vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.6)
    for axis, count in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
        ticks = [int(t) for t in MaxNLocator(8, integer=True).tick_values(0, count - 1) if 0 <= t < count]
        axis.set_ticks([t + 0.5 for t in ticks], labels=[str(t) for t in ticks])
    return mesh
