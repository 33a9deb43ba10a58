"""Figures to look at: a sheet of pictures, and a page in one file; and what is written of them into a folder."""

from __future__ import annotations

import base64
import io
import os
import re
import textwrap
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .comparison_figures import Figures, Row
from .drafts import draft_of
from .schedule import Schedule

CELL, LABEL, GAP, LINE = 224, 190, 8, 17  # of the sheet, in pixels
PAGE_SIDE = 512  # longest side of a picture in the page
GAINS = (1, 2, 4, 8, 16, 32, 64)  # differences are shown so much stronger

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .3em .7em; text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid #222; } tbody tr { border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.pictures td, .pictures th { text-align: center; vertical-align: top; padding: .3em; }
.pictures td:first-child { max-width: 14em; white-space: normal; text-align: left; }
.pictures img { width: 200px; display: block; margin: 0 auto .3em; image-rendering: auto; }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; } small { color: #555; }
"""


def sheet(comparison: Figures) -> Image.Image:
    """`Comparison.sheet`."""
    rows, numbers, gain = _shown_rows(comparison), comparison.numbers, _gain(comparison)
    font = ImageFont.load_default(size=13)
    height, width = comparison.full.shown[numbers[0]].shape[:2]
    scale = CELL / max(height, width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    across, down = cell[0] + GAP, 2 * (cell[1] + GAP)
    head = 3 * LINE + GAP
    size = (LABEL + across * len(rows) + GAP, head + down * len(numbers) + LINE + GAP)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    text = partial(draw.text, font=font, fill="black")
    columns = cell[0] // 7  # letters of a cell's width
    for column, row in enumerate(rows):
        for line, words in enumerate(_head(comparison, row)):
            text((LABEL + column * across, GAP + line * LINE), textwrap.shorten(words, columns, placeholder="..."))
    for place, number in enumerate(numbers):
        top = head + place * down
        lines = textwrap.wrap(str(comparison.subjects[number] or ""), (LABEL - GAP) // 7) or [f"image {number + 1}"]
        for line, words in enumerate(lines[: max(1, down // LINE - 1)]):
            text((GAP, top + line * LINE), words)
        for column, row in enumerate(rows):
            if number in row.shown:
                at = (LABEL + column * across, top)
                picture.paste(_scaled(row.shown[number], cell), at)
                if row is not comparison.full:
                    difference = _difference(comparison, row, number, gain)
                    picture.paste(_scaled(difference, cell), (at[0], top + cell[1] + GAP // 2))
    text((GAP, size[1] - LINE - GAP // 2), f"{comparison.pipeline}; under each, {gain}x its difference to the full run")
    return picture


def page(comparison: Figures) -> str:
    """`Comparison.page`."""
    title = f"Schedules on {comparison.pipeline}"
    head = "".join(f"<th>{escape(name)}</th>" for name in ("schedule", *comparison.columns()))
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in comparison.cells()
    )
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>",
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>',
        *(f"<p><small>{escape(line)}</small></p>" for line in comparison.remarks()),
        f"<h2>Pictures</h2>\n{_pictures(comparison)}",
        f"<h2>Schedules</h2>\n<pre>{escape(_schedules(comparison))}</pre>",
        f"<h2>Commands</h2>\n<pre>{escape(_commands(comparison))}</pre>",
    ]
    return "\n".join(parts) + "\n</body></html>\n"


def write(folder: str | os.PathLike[str], files: Mapping[str, bytes], schedules: Mapping[str, Any]) -> list[str]:
    """`Comparison.save`: `files` and each schedule into `folder`; their names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with draft_of(folder / name) as draft:
            draft.write_bytes(data)
    named = _files(schedules)
    for name, schedule in named.items():
        schedule.save(folder / name)
    return [*files, *named]


# ---- pictures


def _shown_rows(comparison: Figures) -> list[Row]:
    return [row for row in comparison.rows if row.shown]


def _head(comparison: Figures, row: Row) -> list[str]:
    own = row.figures(comparison.full, comparison.steps)
    speed = "" if own["speedup"] is None or row is comparison.full else f"{own['speedup']:.2f}x"
    near = "" if own["psnr"] is None else f"{own['psnr']:.1f} dB, worst {own['psnr_worst']:.1f}"
    return [row.name, speed, near]


def _off(comparison: Figures, row: Row, number: int) -> np.ndarray:
    return np.abs(row.shown[number].astype(np.int16) - comparison.full.shown[number])


def _gain(comparison: Figures) -> int:
    """The most that leaves all but a hundredth of the usual picture's differences below white."""
    rows = _shown_rows(comparison)[1:]
    off = [np.percentile(_off(comparison, row, number), 99) for row in rows for number in row.shown]
    usual = float(np.median(off)) if off else 0.0
    return max((gain for gain in GAINS if gain * usual <= 255), default=1)


def _difference(comparison: Figures, row: Row, number: int, gain: int) -> np.ndarray:
    return np.minimum(gain * _off(comparison, row, number), 255).astype(np.uint8)


def _scaled(picture: np.ndarray, size: tuple[int, int]) -> Image.Image:
    larger = size[0] > picture.shape[1]
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _embedded(picture: np.ndarray, title: str) -> str:
    """Small pictures as they are, others scaled down and compressed."""
    height, width = picture.shape[:2]
    scale, data, small = min(1.0, PAGE_SIDE / max(height, width)), io.BytesIO(), max(height, width) <= 128
    if small:
        Image.fromarray(picture).save(data, "PNG")
    else:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        _scaled(picture, size).save(data, "JPEG", quality=90)
    kind, text = "png" if small else "jpeg", base64.b64encode(data.getvalue()).decode()
    sharp = ' style="image-rendering: pixelated"' if small else ""
    return f'<img alt="{escape(title)}" title="{escape(title)}"{sharp} src="data:image/{kind};base64,{text}">'


def _pictures(comparison: Figures) -> str:
    rows, gain = _shown_rows(comparison), _gain(comparison)
    heads = "".join(f"<th>{'<br>'.join(map(escape, _head(comparison, row)))}</th>" for row in rows)
    lines = [f'<div class="wide"><table class="pictures"><thead><tr><th></th>{heads}</tr></thead><tbody>']
    for number in comparison.numbers:
        subject = str(comparison.subjects[number] or f"image {number + 1}")
        cells = "".join(f"<td>{_cell(comparison, row, number, gain)}</td>" for row in rows)
        lines.append(f"<tr><td>{escape(subject)}</td>{cells}</tr>")
    note = f"Under each picture {gain}x its difference to the full run; of a video, the middle frame."
    return "\n".join([*lines, f"</tbody></table></div><p><small>{note}</small></p>"])


def _cell(comparison: Figures, row: Row, number: int, gain: int) -> str:
    if number not in row.shown:
        return ""
    own = _embedded(row.shown[number], row.name)
    if row is comparison.full:
        return own
    near = ", ".join(
        f"{value:.1f} dB" if name == "psnr" else f"{name.upper()} {value:.3f}"
        for name, value in row.quality.get(number, {}).items()
    )
    difference = _embedded(_difference(comparison, row, number, gain), f"{gain}x the difference")
    return f"{own}{difference}<small>{near}</small>"


# ---- schedules


def _files(schedules: Mapping[str, Any]) -> dict[str, Schedule]:
    """Every schedule by the name of its file."""
    files: dict[str, Schedule] = {}

    def add(stem: str, schedule: Any) -> None:
        if isinstance(schedule, Mapping):
            for name, each in schedule.items():
                add(f"{stem}-{name}", each)
        else:
            files[_file(stem, schedule)] = schedule

    for name, schedule in schedules.items():
        add(name, schedule)
    return files


def _file(stem: str, schedule: Schedule) -> str:
    per_channel = schedule.channels is not None or schedule.output_channels is not None
    name = re.sub(r"[^\w.+=-]+", "-", stem).strip("-.") or "schedule"
    return f"{name}{'.safetensors' if per_channel else '.json'}"


def _loaded(stem: str, schedule: Any) -> str:
    """The code that reads what `compile` takes from its files."""
    if isinstance(schedule, Mapping):
        return "{" + ", ".join(f'"{name}": {_loaded(f"{stem}-{name}", own)}' for name, own in schedule.items()) + "}"
    return f'hrt.Schedule.load("{_file(stem, schedule)}")'


def _schedules(comparison: Figures) -> str:
    return "\n".join(f"{row.name}: {row.what}" for row in comparison.rows[1:])


def _commands(comparison: Figures) -> str:
    lines = [comparison.command, ""] if comparison.command else []
    lines += ["# to sample with one of them; files lie beside this page"]
    lines += [f"pipe = hrt.compile(pipe, {_loaded(*named)})" for named in comparison.schedules.items()]
    return "\n".join(lines)
