"""What came of comparing schedules on a pipeline, to print, to look at and to save."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .comparison_figures import Figures

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Comparison(Figures):
    """Schedules compared on one pipeline; `print` it, `save` it, or look at `figures()`, `sheet()` and `page()`.

    Attributes:
        pipeline: its class.
        conditions: what figures hold for: device, dtype, steps, versions, the call's arguments.
        subjects: prompts or labels.
        rows: the full run first.
        lpips: the package that took it, or why none did.
        memory: what peak memory is of.
        ended_early: a person stopped it: rows may have fewer prompts and calls than asked for.
        schedules: by name, as `compile` takes them.
        command: that a person gave to get here, if there was one.
    """

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("schedule", no_wrap=True)
        for heading in self.columns():
            table.add_column(heading, justify="right", no_wrap=True)
        for cells in self.cells():
            table.add_row(*cells)
        text = io.StringIO()
        console = Console(width=400, file=text, force_terminal=False)
        console.print(table, markup=False, highlight=False)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join([*lines, *self.remarks()])

    def json(self) -> str:
        """Everything but the pictures."""
        rows = self.figures()
        for own, row in zip(rows, self.rows):
            own["all_seconds"] = list(row.seconds.values())
            own["by_prompt"] = [{"prompt": self.subjects[number], **row.quality[number]} for number in row.quality]
        about = {"pipeline": self.pipeline, "conditions": self.conditions, "ended_early": self.ended_early}
        about |= {"command": self.command, "lpips": self.lpips, "memory": self.memory}
        return json.dumps({**about, "rows": rows}, indent=1) + "\n"

    def csv(self) -> str:
        """A line a schedule."""
        rows = self.figures()
        keys = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def sheet(self) -> Image:
        """A PIL picture: prompts down, schedules across, the full run first, under each the amplified difference."""
        from .comparison_page import sheet  # imports PIL

        return sheet(self)

    def page(self) -> str:
        """An HTML page that needs no other file."""
        from .comparison_page import page

        return page(self)

    def save(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write ``index.html``, ``sheet.png``, ``figures.csv``, ``figures.json`` and each schedule into `folder`.

        Each file is whole or not there; those of an earlier comparison by the same names are replaced.

        Returns:
            Their names.
        """
        from .comparison_page import write

        png = io.BytesIO()
        self.sheet().save(png, "PNG")
        files = {
            "figures.csv": self.csv().encode(),
            "figures.json": self.json().encode(),
            "sheet.png": png.getvalue(),
            "index.html": self.page().encode(),
        }
        return write(folder, files, self.schedules)
