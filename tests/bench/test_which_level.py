"""One table from three models: every point once, a run goes on, figures of other weights stay apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import run_which_level
from bench.compare.level_tables import LEVELS, page
from bench.run_which_level import main

SMALL = ["--steps", "4", "--count", "2", "--batch", "2", "--every", "2", "--order", "1", "--guidance", "1", "3"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_every_point_once(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "r.jsonl"
    arguments = [*SMALL, "--model", "dit-fashion", "flux-emoji", "--out", str(out)]
    assert main(arguments) == 0
    rows = lines(out)
    points = [(model, guidance) for model in ("dit-fashion", "flux-emoji") for guidance in (1.0, 3.0)]
    assert [(r["model"], r["guidance"], r["level"]) for r in rows] == [(*p, level) for p in points for level in LEVELS]
    assert all(5 < r["worst"] <= r["mean"] < 70 and 1.9 < r["theoretical"] <= 2 for r in rows)
    one, both = rows[12], rows[18]  # flux-emoji's output
    assert (one["slots"], both["slots"]) == (2, 4) and both["slot_bytes"] == 2 * one["slot_bytes"] == 4 * 64 * 48 * 4
    trunk, carried = rows[13], rows[14]
    assert carried["slot_bytes"] == 2 * trunk["slot_bytes"] == 4 * 80 * 128 * 4
    printed = capsys.readouterr().out
    assert "| flux-emoji: PSNR in dB, mean / worst | output |" in printed
    assert f"| guidance 3, every 2, order 1 | {both['mean']:.1f} / {both['worst']:.1f} |" in printed.replace("**", "")
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-1]))
    measured = []
    quality = run_which_level.Qualities.__call__
    monkeypatch.setattr(
        run_which_level.Qualities, "__call__", lambda self, point: measured.append(point.level) or quality(self, point)
    )
    assert main(arguments) == 0
    again = lines(out)
    assert measured == ["branches"] and again[:-1] == rows[:-1]
    assert again[-1]["mean"] == pytest.approx(rows[-1]["mean"], abs=1e-6)
    monkeypatch.setattr(run_which_level, "digest_of", lambda model: "others")
    assert main([*SMALL, "--model", "dit-fashion", "--out", str(out)]) == 0
    assert len(measured) == 13 and len(lines(out)) == 36, "no point of these weights was there"


def test_contexts_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [*SMALL[:-2], "4", "--model", "flux-emoji", "--out", str(tmp_path / "r.jsonl")]
    for contexts in ("all", "cond", "uncond"):
        assert main([*arguments, "--contexts", contexts]) == 0
    both, cond, uncond = (
        [r for r in lines(tmp_path / "r.jsonl") if r["contexts"] == c] for c in ("all", "cond", "uncond")
    )
    assert len(both) == len(cond) == len(uncond) == len(LEVELS)
    assert all(r["theoretical"] == pytest.approx(4 / 3, abs=0.02) for r in (*cond, *uncond))
    assert all(len({round(r["mean"], 3) for r in rows}) == 3 for rows in zip(both, cond, uncond))
    assert "cond alone, guidance 4, every 2, order 1" in capsys.readouterr().out
    assert main([*SMALL, "--model", "dit-fashion", "--contexts", "cond", "--out", str(tmp_path / "d.jsonl")]) == 2
    assert "expected all for dit-fashion, guided in one call, got cond" in capsys.readouterr().out


def test_times_are_lines_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [*SMALL[:-2], "4", "--model", "flux-emoji", "--out", str(tmp_path / "r.jsonl")]
    assert main([*arguments, "--time", "--rounds", "1"]) == 0
    assert "PSNR" not in (printed := capsys.readouterr().out) and "x eager, 48 KiB |" in printed
    assert main(arguments) == 0
    rows = [row for row in lines(tmp_path / "r.jsonl") if row["kind"] == "time"]
    assert [row["guidance"] for row in rows] == [1.0] * len(LEVELS) + [4.0] * len(LEVELS)
    assert all(row["speedup"] > 0 and row["ms_per_image"] > 0 for row in rows)
    capsys.readouterr()
    assert main([*arguments, "--table"]) == 0
    assert f"| guided, every 2, order 1 | 2.00x, {rows[6]['speedup']:.2f}x eager, 48 KiB |" in capsys.readouterr().out
    assert main([*arguments, "--count", "4"]) == 2
    assert "expected the results of" in capsys.readouterr().out
    assert main([*arguments, "--count", "3"]) == 2
    assert "--count: expected a multiple of --batch, 2, got 3" in capsys.readouterr().out


def test_the_page_shows_the_latest_weights() -> None:
    row = {"kind": "quality", "model": "m", "contexts": "all", "guidance": 1.0, "every": 2, "order": 0}
    row |= {"level": "output", "worst": 1.0, "theoretical": 2.0, "slots": 1, "slot_bytes": 1024, "backend": "eager"}
    text = page([row | {"weights": "a", "mean": 10.0}, row | {"weights": "b", "mean": 20.0}])
    assert "20.0 / 1.0" in text and "10.0" not in text and "2.00x, 1 KiB" in text
