"""A schedule as text: one line, or a page with a row a step."""

from __future__ import annotations

import numpy as np

from .checks import may_carry
from .decisions import Decisions
from .layout import TRUNK, Group, Panel, panels


def headline(schedule: Decisions) -> str:
    parts = [_group(schedule, group) for group in schedule.groups]
    shape = f"{schedule.steps} steps x {' + '.join(parts) or 'output'}"
    if schedule.cur == 0:
        return f"{schedule.model}: {shape}, all computed"
    kind = "learned weights" if schedule.learned else "forecast" if schedule.order else "plain reuse"
    if schedule.channels is not None or schedule.output_channels is not None:
        kind += " per channel"
    carries = schedule.carry[may_carry(schedule.compute, schedule.groups, schedule.level) & ~schedule.compute]
    if carries.size:
        least, most = carries.min(), carries.max()
        kind += f", carry {least:g}" if least == most else f", carry {least:.2g} to {most:.2g}"
    return f"{schedule.model}: {shape}, order {schedule.order} ({kind}), CUR {100 * schedule.cur:.1f} %"


def _group(schedule: Decisions, group: Group) -> str:
    if group.name == TRUNK:
        return TRUNK
    if schedule.level == "blocks":
        return f"{group.layers} groups of {group.name}"
    return f"{group.layers} {'layers' if len(schedule.groups) == 1 else group.name} x {'/'.join(group.branches)}"


def page(schedule: Decisions) -> str:
    head = [headline(schedule)]
    head[0] = f"Schedule {head[0]}"
    if schedule.level == "branches":
        head.append("CUR by branch: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in schedule.cur_by_branch.items()))
    guidance = None if schedule.guidance_scale is None else f"guidance {schedule.guidance_scale:g}"
    if any(made := [schedule.sampler, guidance, schedule.note]):
        head.append(", ".join(part for part in made if part))
    columns = list(panels(schedule.groups)) or [Panel("output", np.zeros(1, dtype=int))]
    computed = schedule.compute.reshape(schedule.steps, -1) if schedule.groups else ~schedule.output[:, None]
    widths = [max(len(panel.entries), len(panel.title)) for panel in columns]
    legend = "# compute, . reuse" + (", = output reused" if schedule.output.any() else "")
    legend += ", - trunk reused" if schedule.trunk.any() else ""
    head.append("step  " + "  ".join(p.title.ljust(w) for p, w in zip(columns, widths)) + f"  ({legend})")
    marked = np.where(computed, "#", ".")
    if schedule.groups:
        marked = np.where(schedule.left_alone.reshape(computed.shape), "-", marked)
    for i, marks in enumerate(np.where(schedule.output[:, None], "=", marked)):
        row = "  ".join("".join(marks[p.entries]).ljust(w) for p, w in zip(columns, widths))
        head.append(f"{i:4}  {row.rstrip()}")
    return "\n".join(head)
