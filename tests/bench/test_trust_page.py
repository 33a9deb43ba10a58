"""The campaigns' page has a section for each results file that is there, with its figures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from bench.trust import churning, killing, reading
from bench.trust.page import sections


def test_sections_tell_the_figures(tmp_path: Path) -> None:
    assert sections(tmp_path) == []
    files = reading.Tally("router", 0, 0, bytes=4673)
    for number, (result, told) in enumerate([("refused", "ValueError"), ("valid", ""), ("failed", "KeyError: 'x'")]):
        files.add(reading.Outcome(number, result, told, 0.25, 3 * 2**20))
    kills = killing.Tally("learn", 0, 50, 26.25, 61, 4, {"s.json": 7})
    churn = churning.Tally("runs", 5000, 60, 5000, 16, 16, [2**30, 2**30 + 2**20, 2**30], [16, 0], [9, 0], [2**20, 0])
    for name, line in {"files": files.line(), "kills": asdict(kills), "churn": asdict(churn)}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line | {"commit": "abc1234"}) + "\n")
    text = [part.splitlines()[-1] for part in sections(tmp_path)]
    assert text[0] == "| router | 4,673 | 3 | 1 | 1 | 0 | 1 | 250 | 3.0 |"
    assert text[1] == "| learn | 26.2 | 50 | 61 | 4 | s.json 7 | 0 | 0 |"
    assert text[2] == "| runs | 5,000 | 60 | 5,000 | 1024.0 / 1025.0 / 1024.0 | 16 of 16, 0 | 1.0 / 1.0 / 0.0 | 0 |"
    assert all("abc1234" in part for part in sections(tmp_path))
