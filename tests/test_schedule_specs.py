"""Schedules by short names."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from harmonica_rt import Schedule, UnsupportedModelError
from harmonica_rt.schedule_specs import named_files, parse_schedule, steps_of

from .conftest import make_dit
from .pipelines.images import flux


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("uniform:3", {"every": 3}),
        ("branches:2:2", {"order": 2, "level": "branches"}),
        ("trunk:2:carry=0.5", {"level": "branches", "trunk": True, "carry": 0.5}),
        ("blocks:3:0:groups=2:carry=0.5", {"every": 3, "order": 0, "level": "blocks", "groups": 2, "carry": 0.5}),
        ("output:2", {"level": "output"}),
        ("full", {"every": 1}),
        ("blocks:2of6:2:carry=0.5", {"computed": 2, "order": 2, "level": "blocks", "carry": 0.5}),
        ("uniform:4of6:0", {"computed": 4, "order": 0}),
    ],
    ids=str,
)
def test_names(text: str, options: dict) -> None:
    model = make_dit()
    made = parse_schedule(text, model, 6, sampler="DDIMScheduler")
    assert made == Schedule.uniform(model, 6, **options, sampler="DDIMScheduler")
    assert steps_of(text) == (6 if "computed" in options else None)


def test_a_name_for_other_runs() -> None:
    with pytest.raises(ValueError, match="expected a run of 60 steps for 'blocks:10of60:2', got one of 20"):
        parse_schedule("blocks:10of60:2", make_dit(), 20)
    assert steps_of("blocks:10of60:2") == 60


def test_uniform_is_of_the_level_that_a_model_gets() -> None:
    model = flux().transformer
    assert parse_schedule("uniform:2", model, 6).level == "blocks"
    assert parse_schedule("uniform:2", model, 6, uniform="branches").level == "branches"


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    Schedule.uniform(make_dit(), 6, every=3).save(file)
    assert parse_schedule(str(file), make_dit(), 20) == Schedule.load(file)


def test_named_files_of_contexts(tmp_path: Path) -> None:
    file, other = tmp_path / "a=b,c.json", tmp_path / "d.json"
    for path in (file, other):
        Schedule.uniform(make_dit(), 6).save(path)
    assert named_files(str(file)) == {"": file} and named_files(f"cond={other},uncond={other}").keys() == {
        "cond",
        "uncond",
    }
    assert not any(named_files(text) for text in ("blocks:3:carry=0.5", "uniform:2", "none.json"))
    with pytest.raises(ValueError, match=r"expected a schedule file for uncond, got 'none\.json'"):
        named_files(f"cond={other},uncond=none.json")
    with pytest.raises(ValueError, match="expected each name once, got"):
        named_files(f"cond={other},cond={other}")


@pytest.mark.parametrize(
    "text",
    [
        "uniform",
        "uniform:x",
        "uniform:\u00b2",
        "blocks:2:carry=x",
        "output:2:carry=1",
        "s.json",
        "full:2",
        "s:2of6",
        "full:2of6",
        "blocks:2of6x",
        "blocks:2:1:1",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"expected full, uniform:N.* NofT in place of N or a schedule file, got '" + text
    ):
        parse_schedule(text, make_dit(), 6)


def test_what_a_model_cannot_have() -> None:
    with pytest.raises(UnsupportedModelError, match="expected a diffusers model of a supported class"):
        parse_schedule("branches:2", nn.Linear(2, 2), 6)
