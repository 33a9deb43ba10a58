"""Sections of the campaigns' page about files, kills and churn, of their results files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
MIB = 2**20


def sections(folder: Path) -> list[str]:
    """Markdown of each results file that is in `folder`."""
    parts = []
    for name, section in SECTIONS.items():
        if (path := folder / name).exists():
            parts.append(section([json.loads(line) for line in path.read_text().splitlines()]))
    return parts


def files(lines: Sequence[Line]) -> str:
    rows = [
        f"| {line['kind']} | {line['bytes']:,} | {line['count']:,} | {line['results'].get('refused', 0):,} | "
        f"{line['results'].get('valid', 0):,} | {line['results'].get('as whole', 0):,} | {len(line['failures'])} | "
        f"{1e3 * line['seconds']:.0f} | {line['memory'] / MIB:.1f} |"
        for line in lines
    ]
    head = f"""## Damaged files

`python bench/run_files.py --count 10000`: bytes flipped, overwritten, inserted, deleted, doubled, moved, cut,
counts and numbers replaced, in files of every kind that is read (`trust/files.py`). Each is refused by a ValueError
or OSError that names it, or read as a whole schedule, which is equal once saved and loaded. Watched in a process of
its own: a second of its processor, 64 MiB beyond what it had, no address space beyond 1 GiB more, and Python's
audit events (PEP 578): no code compiled or executed but imports of installed modules, no process, no connection but
to the loopback Hub, no file written beside the cache. {_sum(lines, "count"):,} files, {_failures(lines)} failures;
{_commits(lines)}.

| kind | bytes | files | refused | valid | as if whole | failures | ms at most | MiB at most |
| --- |{" --- |" * 8}"""
    return "\n".join([head, *rows])


def kills(lines: Sequence[Line]) -> str:
    rows = [
        f"| {line['work']} | {line['seconds']:.1f} | {line['moments']} | {line['kills']} | {line['late']} | "
        f"{_whole(line['left'])} | {line['drafts']} | {len(line['failures'])} |"
        for line in lines
    ]
    head = f"""## Killed at random moments

`python bench/run_kill.py --moments 50`: SIGKILL at a random moment, half of them in the last fifth, three in ten
killed again as they go on; then every file that is there is read, and the work is gone on with. The result must be
that of an undisturbed run, bit for bit. `compile` is backend inductor with a cache of its own, every second time
with the compilers it started. Drafts are files under a hidden name that nothing reads. {_sum(lines, "kills"):,}
kills, {_failures(lines)} failures; {_commits(lines)}.

| work | seconds, undisturbed | moments | killed | too late | files whole then | most drafts | failures |
| --- |{" --- |" * 7}"""
    return "\n".join([head, *rows])


def churn(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        resident = [f"{value / MIB:.1f}" for value in (line["resident"][0], max(line["resident"]))]
        resident.append(f"{line['resident'][-1] / MIB:.1f}")
        graphs = [f"{value / MIB:.1f}" for value in (line["graph_bytes"][0], max(line["graph_bytes"]))]
        rows.append(
            f"| {line['what']} | {line['count']:,} | {line['shapes']} | {line['threads']:,} | {' / '.join(resident)} | "
            f"{line['peak_plans']} of {line['kept']}, {line['plans'][-1]} | {' / '.join(graphs)} / "
            f"{line['graph_bytes'][-1] / MIB:.1f} | {len(line['failures'])} |"
        )
    head = f"""## Shapes, threads and compilations that come and go

`python bench/run_churn.py --runs 5000 --cycles 20`: runs of four compiled models by turns, each in a thread of its
own, now and then cut short; cycles of compile, run, uncompile. Resident memory of the process and what emulated
CUDA graphs hold: once a fifth is done, at most after that, and at the end, where all is uncompiled. Plans by weak
references: most alive of those that may be kept, and at the end. {_failures(lines)} failures; {_commits(lines)}.

| what | times | shapes | threads | resident MiB | plans | graphs' MiB | failures |
| --- |{" --- |" * 7}"""
    return "\n".join([head, *rows])


SECTIONS: dict[str, Callable[[Sequence[Line]], str]] = {
    "files.jsonl": files,
    "kills.jsonl": kills,
    "churn.jsonl": churn,
}


def _whole(left: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(left.items())) or "none yet"


def _sum(lines: Sequence[Line], name: str) -> int:
    return sum(line[name] for line in lines)


def _failures(lines: Sequence[Line]) -> int:
    return sum(len(line["failures"]) for line in lines)


def _commits(lines: Sequence[Line]) -> str:
    return f"commits {', '.join(sorted({line['commit'] for line in lines}))}"
