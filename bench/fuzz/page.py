"""The page of all campaigns: runs, calls and failures by level and backend, by class, and what happened in them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

Line = dict[str, Any]
HEAD = """# Random cases against an oracle

`python bench/run_fuzz.py` plays random cases: a model class, a schedule, and what happens around its runs. The oracle
(`fuzz/oracle.py`) is a twin of the model: what its modules return is kept and combined by the formula alone, nothing is
shared with the runtime. A run is one pass of the sampler through one compiled model, a call one forward; each is
compared. How far rounding may go is found on the oracle itself (`fuzz/rounding.py`). What the documentation refuses is
counted, and ends the case. A failure is printed as a script that fails by itself. What failed has been mended at its
cause, with a test (`CHANGELOG.md`, Fixed), and its chunk played again at the commit after. Runs/s are of the
processor's time, the oracle's included.
"""


def page(lines: Sequence[Line]) -> str:
    commits = sorted({line["commit"] for line in lines})
    seeds = sorted({line["seed"] for line in lines})
    runs, calls, count = (sum(line[what] for line in lines) for what in ("runs", "calls", "cases"))
    failures = sum(len(line["failures"]) for line in lines)
    total = (
        f"{runs:,} runs, {calls:,} calls in {count:,} cases, "
        f"{failures} failures; seeds {', '.join(map(str, seeds))}; commits {', '.join(commits)}."
    )
    parts = [HEAD, total, ""]
    parts += table(lines, "level, backend, dtype", lambda line: f"{line['level']}, {line['backend']}, {line['dtype']}")
    parts += ["", *happened(lines), ""]
    parts += table(lines, "class", lambda line: line["model"].split(",")[0])
    return "\n".join(parts) + "\n"


def table(lines: Sequence[Line], head: str, key: Callable[[Line], str]) -> list[str]:
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[key(line)].append(line)
    rows = [f"| {head} | cases | runs | calls | refused | failures | worst error | runs/s |", "| --- |" + " --- |" * 7]
    for name, own in sorted(groups.items()):
        runs, cpu = sum(line["runs"] for line in own), sum(line["cpu"] for line in own)
        refused = sum(sum(line["refused"].values()) for line in own)
        cells = [sum(line["cases"] for line in own), runs, sum(line["calls"] for line in own), refused]
        cells.append(sum(len(line["failures"]) for line in own))
        worst = max(line["worst"] for line in own)
        rows.append(
            f"| {name} | {' | '.join(f'{cell:,}' for cell in cells)} | {worst:.0e} | {runs / max(cpu, 1e-9):.1f} |"
        )
    return rows


def happened(lines: Sequence[Line]) -> list[str]:
    """What runs were and what came between them, and what was refused; runs/s are of a core's own time."""
    events, refused = Counter(), Counter()
    for line in lines:
        events.update(line["events"])
        refused.update(line["refused"])
    rows = ["| what | how often |", "| --- | --- |"]
    rows += [f"| {name} | {count:,} |" for name, count in events.most_common() if count]
    rows += [f"| refused: {name} | {count:,} |" for name, count in refused.most_common()]
    return rows
