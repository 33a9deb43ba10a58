"""A schedule as plain fields and arrays, and back: what its files hold. What comes in is checked before it is believed.

The fields are JSON's types, so that a person can read and compare them; arrays are weights per channel alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .checks import may_carry
from .decisions import Decisions, S
from .layout import Group, check_groups, panels, reading_order
from .reading import short

FORMAT = "harmonica_rt.schedule"
VERSIONS = (1, 2)  # 1: one group at level branches
MAX_STEPS = 100_000
MAX_TENSOR_BYTES = 2**30  # weights per channel of 250 steps x 60 layers x 2 branches of width 3072 are about 1 GB
_REQUIRED = {"format", "version", "model", "steps", "order"}
_OPTIONAL = {"sampler", "timesteps", "guidance_scale", "note", "cur", "weights", "output", "output_weights"}
_OPTIONAL |= {"forecast", "log_snr"}
_LAYOUT = {1: {"layers", "branches", "compute"}, 2: {"level", "groups"}}  # further required fields of each version


def parts(schedule: Decisions) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What of `schedule` is text, and its weights per channel: all of it, for a file that holds more."""
    return _fields(schedule), _arrays(schedule)


def of_parts(kind: type[S], fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> S:
    """The `kind` that `parts` took apart. Raises TypeError or ValueError that says what is wrong with them."""
    return _with_arrays(_from_fields(kind, fields), arrays)


def _arrays(schedule: Decisions) -> dict[str, np.ndarray]:
    """Weights per channel of what is reused, [entries and steps, values, channels] in reading order."""
    arrays = {}
    if schedule.channels is not None:
        order = reading_order(schedule.groups)
        flat = schedule.channels.reshape(schedule.steps, -1, *schedule.channels.shape[-2:])
        arrays["channels"] = np.ascontiguousarray(flat[:, order][_with_rows(schedule)])
    if schedule.output_channels is not None:
        arrays["output_channels"] = np.ascontiguousarray(schedule.output_channels[schedule.output])
    return arrays


def _with_rows(schedule: Decisions) -> np.ndarray:
    """Which entries have weights per channel in a file, bool [steps, entries in reading order].

    Those not computed; of steps that reuse the trunk it alone.
    """
    rows = ~schedule.compute.reshape(schedule.steps, -1)
    if schedule.trunk.any():
        rows[schedule.trunk, :-1] = False
    return rows[:, reading_order(schedule.groups)]


def _fields(schedule: Decisions) -> dict[str, Any]:
    """What of `schedule` is text.

    ``compute``: one string a step, one word of 0/1 (1 = computed) a branch of a group, one digit a layer. ``weights``
    (only if not the forecast's): one list a step, one [newest, ...] list for each 0 of that step's string, in reading
    order. ``carry`` (only if any is not 0): likewise, one number for each 0. ``output`` (only if any is reused): one
    0/1 a step, 1 where the output is reused; ``output_weights``: a list a step.
    """
    steps, order = schedule.steps, reading_order(schedule.groups)
    computed = schedule.compute.reshape(steps, -1)[:, order]
    plain = schedule.level == "branches" and len(schedule.groups) == 1
    plain = plain and schedule.groups[0].name == "transformer_blocks"
    fields: dict[str, Any] = {"format": FORMAT, "version": 1 if plain else 2, "model": schedule.model}
    if plain:
        fields |= {"layers": schedule.layers, "branches": list(schedule.branches)}
    else:
        fields |= {"level": schedule.level, "groups": [[g.name, g.layers, list(g.branches)] for g in schedule.groups]}
    fields |= {
        "steps": steps,
        "order": schedule.order,
        "sampler": schedule.sampler,
        "guidance_scale": schedule.guidance_scale,
        "note": schedule.note,
        "cur": round(schedule.cur, 6),
        "timesteps": None if schedule.timesteps is None else list(schedule.timesteps),
    }
    if schedule.groups:
        ends = np.cumsum([len(panel.entries) for panel in panels(schedule.groups)])[:-1]
        digits = computed.astype(int).astype(str)
        fields["compute"] = [" ".join("".join(word) for word in np.split(row, ends)) for row in digits]
    if schedule.forecast != "index":
        fields["forecast"] = schedule.forecast
    if schedule.log_snr is not None:
        fields["log_snr"] = list(schedule.log_snr)
    if schedule.output.any():
        fields["output"] = "".join("01"[int(x)] for x in schedule.output)
    if schedule.learned:
        if schedule.output.any():
            fields["output_weights"] = schedule.output_weights.tolist()
        if schedule.groups:
            by_row = schedule.weights.reshape(steps, -1, schedule.order + 1)[:, order]
            fields["weights"] = [row[~mask].tolist() for row, mask in zip(by_row, computed)]
    if schedule.carry.any():
        by_row = schedule.carry.reshape(steps, -1)[:, order]
        fields["carry"] = [row[~mask].tolist() for row, mask in zip(by_row, computed)]
    return fields


def _with_arrays(schedule: S, arrays: dict[str, np.ndarray]) -> S:
    """`schedule` with the weights per channel that `_arrays` wrote."""
    fields: dict[str, np.ndarray] = {}
    reading = reading_order(schedule.groups)
    for name, mask in (("channels", _with_rows(schedule)), ("output_channels", schedule.output)):
        if (rows := arrays.get(name)) is None:
            continue
        carries = may_carry(schedule.compute, schedule.groups, schedule.level).any()
        values = schedule.order + 1 + (name == "channels" and bool(carries))
        if rows.ndim != 3 or rows.shape[:2] != (mask.sum(), values):
            raise ValueError(f"{name}: expected [{mask.sum()}, {values}, channels], got {list(rows.shape)}")
        if mask.size * values * rows.shape[2] * 4 > MAX_TENSOR_BYTES:
            raise ValueError(f"{name}: expected at most {MAX_TENSOR_BYTES} bytes for all steps, got {list(rows.shape)}")
        full = np.zeros((*mask.shape, *rows.shape[1:]), dtype=np.float32)
        full[mask] = rows
        if name == "channels":
            full = full[:, np.argsort(reading)].reshape(*schedule.compute.shape, *rows.shape[1:])
        fields[name] = full
    return schedule.replace(**fields) if fields else schedule


def _from_fields(kind: type[S], fields: Any) -> S:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f'not a schedule file: expected a JSON object with "format": "{FORMAT}"')
    if type(version := fields.get("version")) is not int or version not in VERSIONS:
        raise ValueError(f"schema version: this harmonica_rt reads versions 1 and 2, got {version!r}")
    if missing := sorted((_REQUIRED | _LAYOUT[version]) - set(fields)):
        raise ValueError(f"missing field {missing[0]!r}")
    known = _REQUIRED | _LAYOUT[version] | _OPTIONAL | ({"compute", "carry"} if version == 2 else set())
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown field {unknown[0]!r}")
    steps = fields["steps"]
    counts = [("steps", steps, 1), ("order", fields["order"], 0)]
    for name, value, least in [*counts, *([("layers", fields["layers"], 1)] if version == 1 else [])]:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TypeError(f"{name}: expected an integer from {least} on, got {value!r}")
    level, groups = _read_layout(fields)
    if not groups and steps > MAX_STEPS:  # no row a step, whose number would say so
        raise ValueError(f"steps: expected at most {MAX_STEPS}, got {steps}")
    by_row = _read_compute(fields.get("compute"), steps, groups) if groups else np.zeros((steps, 0), dtype=bool)
    flat = np.argsort(reading_order(groups))
    shape = (steps, groups[0].layers, len(groups[0].branches)) if len(groups) == 1 else (steps, len(flat))
    weights = carry = None
    if groups and fields.get("weights") is not None:
        weights = _read_weights(fields["weights"], by_row, fields["order"])[:, flat].reshape(*shape, -1)
    if groups and fields.get("carry") is not None:
        carry = _read_carry(fields["carry"], by_row)[:, flat].reshape(shape)
    output = fields.get("output")
    if output is not None:
        if not isinstance(output, str) or len(output) != steps or set(output) - set("01"):
            raise ValueError(f"output: expected {steps} digits 0 or 1 (one a step), got {short(output)}")
        output = np.array([digit == "1" for digit in output])
    output_weights = fields.get("output_weights")
    if output_weights is not None:
        output_weights = _read_rows(output_weights, steps, fields["order"], "output_weights")
    for name in ("timesteps", "log_snr"):
        if fields.get(name) is not None and not isinstance(fields[name], list):
            raise TypeError(f"{name}: expected a list, got {type(fields[name]).__name__}")
    meta = {name: fields.get(name) for name in ("sampler", "timesteps", "log_snr", "guidance_scale")}
    return kind(
        by_row[:, flat].reshape(shape),
        model=fields["model"],
        level=level,
        groups=groups,
        order=fields["order"],
        weights=weights,
        carry=carry,
        output=output,
        output_weights=output_weights,
        note=fields.get("note", ""),
        forecast=fields.get("forecast", "index"),
        **meta,
    )


def _read_layout(fields: dict[str, Any]) -> tuple[str, tuple[Group, ...]]:
    if fields["version"] == 1:
        if not isinstance(fields["branches"], list):
            raise TypeError(f"branches: expected a list of names, got {type(fields['branches']).__name__}")
        return check_groups("branches", [("transformer_blocks", fields["layers"], fields["branches"])])
    if not isinstance(fields["groups"], list):
        raise TypeError(f"groups: expected a list of [name, layers, branches], got {type(fields['groups']).__name__}")
    return check_groups(fields["level"], fields["groups"])


def _read_compute(rows: Any, steps: int, groups: tuple[Group, ...]) -> np.ndarray:
    """bool [steps, entries in reading order]."""
    if not isinstance(rows, list) or len(rows) != steps:
        raise ValueError(f"compute: expected a list of {steps} rows (one a step), got {_size(rows)}")
    lengths = [group.layers for group in groups for _ in group.branches]
    for i, row in enumerate(rows):  # lengths before patterns: the file's own counts are not to be trusted
        words = row.split(" ") if isinstance(row, str) else None
        if words is None or [len(word) for word in words] != lengths or set(row) - set("01 "):
            each = f"{lengths[0]} digits" if len(set(lengths)) == 1 else f"{lengths} digits"
            raise ValueError(
                f"compute, step {i}: expected {len(lengths)} groups (one a branch) of {each} 0 or 1 "
                f"(one a layer), got {short(row)}"
            )
    return np.array([[digit == "1" for digit in row.replace(" ", "")] for row in rows], dtype=bool)


def _read_weights(rows: Any, by_row: np.ndarray, order: int) -> np.ndarray:
    """[steps, entries in reading order, order + 1]."""
    if not isinstance(rows, list) or len(rows) != len(by_row):
        raise ValueError(f"weights: expected a list of {len(by_row)} rows (one a step), got {_size(rows)}")
    if order > 2:
        raise ValueError(f"order: expected one of (0, 1, 2), got {order}")
    weights = np.zeros((*by_row.shape, order + 1))
    for i, (row, computed) in enumerate(zip(rows, by_row)):
        reused = int((~computed).sum())
        if not isinstance(row, list) or len(row) != reused:
            raise ValueError(f"weights, step {i}: expected {reused} lists (one a reused branch), got {_size(row)}")
        if reused:
            weights[i][~computed] = _read_rows(row, reused, order, f"weights, step {i}")
    return weights


def _read_carry(rows: Any, by_row: np.ndarray) -> np.ndarray:
    """[steps, entries in reading order]."""
    if not isinstance(rows, list) or len(rows) != len(by_row):
        raise ValueError(f"carry: expected a list of {len(by_row)} rows (one a step), got {_size(rows)}")
    carry = np.zeros(by_row.shape)
    for i, (row, computed) in enumerate(zip(rows, by_row)):
        reused = int((~computed).sum())
        if not isinstance(row, list) or len(row) != reused:
            raise ValueError(f"carry, step {i}: expected {reused} numbers (one a reused group), got {_size(row)}")
        if not all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in row):
            raise TypeError(f"carry, step {i}: expected numbers, got {short(row)}")
        carry[i][~computed] = row
    return carry


def _read_rows(rows: Any, count: int, order: int, what: str) -> np.ndarray:
    """`count` lists of order + 1 numbers."""
    if not isinstance(rows, list) or len(rows) != count:
        raise ValueError(f"{what}: expected {count} lists, got {_size(rows)}")
    for row in rows:
        if not isinstance(row, list) or len(row) != order + 1:
            raise ValueError(f"{what}: expected lists of {order + 1} numbers, got {short(row)}")
        if not all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in row):
            raise TypeError(f"{what}: expected numbers, got {short(row)}")
    return np.array(rows, dtype=np.float64)


def _size(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, list) else type(value).__name__
