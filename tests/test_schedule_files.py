"""Schedule files and router checkpoints: exact there and back, and nothing gets in that is not one."""

from __future__ import annotations

import argparse
import codecs
import json
import math
import os
import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt import Schedule, reading, schedule_fields
from harmonica_rt.peak_memory import PeakMemory

from .conftest import make_dit, random_schedule

COMPUTE = np.array([[[1, 1], [1, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 1]]], dtype=bool)
SMALL = Schedule(COMPUTE, model="Tiny", branches=("a", "b"), sampler="DDIMScheduler", timesteps=[9, 5, 1])
TEXT = """{
  "format": "harmonica_rt.schedule",
  "version": 1,
  "model": "Tiny",
  "layers": 2,
  "branches": ["a", "b"],
  "steps": 3,
  "order": 1,
  "sampler": "DDIMScheduler",
  "guidance_scale": null,
  "note": "",
  "cur": 0.5,
  "timesteps": [9.0, 5.0, 1.0],
  "compute": [
    "11 11",
    "10 00",
    "00 01"
  ]
}
"""
FIELDS = json.loads(TEXT)
WEIGHTS = [[], [[1.0, 0.0]] * 3, [[2.0, -1.0], [1.0, 0.0], [1.0, 0.0]]]  # SMALL's forecast
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def load(tmp_path: Path, text: str | bytes) -> Schedule:
    path = tmp_path / "s.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Schedule.load(path)


def refuse(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 's.json'}: ")


# ---- there and back


@given(st.data(), st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_a_saved_schedule_loads_equal(
    tmp_path_factory: pytest.TempPathFactory, data: Any, seed: int, steps: int, layers: int, order: int, learned: bool
) -> None:
    schedule = random_schedule(seed, steps, layers, order, learned=learned).replace(
        model=data.draw(st.text()),
        branches=data.draw(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True)),
        sampler=data.draw(st.none() | st.text()),
        timesteps=data.draw(st.none() | st.lists(FINITE, min_size=steps, max_size=steps)),
        guidance_scale=data.draw(st.none() | FINITE),
        note=data.draw(st.text()),
    )
    path = tmp_path_factory.getbasetemp() / "round.json"
    schedule.save(path)
    loaded = Schedule.load(str(path))
    assert loaded == schedule
    assert loaded.learned == schedule.learned == ("weights" in json.loads(path.read_text()))


def test_the_file_can_be_read_by_a_person(tmp_path: Path) -> None:
    SMALL.save(tmp_path / "s.json")
    assert (tmp_path / "s.json").read_text() == TEXT
    weights = SMALL.weights.copy()
    weights[2, 0, 0] = [1.25, -0.5]
    SMALL.replace(weights=weights).save(tmp_path / "s.json")
    rows = ["[]", "[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]", "[[1.25, -0.5], [1.0, 0.0], [1.0, 0.0]]"]
    text = '  "weights": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
    assert (tmp_path / "s.json").read_text() == TEXT[: -len("\n}\n")] + ",\n" + text


def test_optional_fields_may_be_left_out(tmp_path: Path) -> None:
    bare = {name: FIELDS[name] for name in schedule_fields._REQUIRED | schedule_fields._LAYOUT[1]}
    assert load(tmp_path, json.dumps(bare)) == SMALL.replace(sampler=None, timesteps=None)
    assert load(tmp_path, json.dumps({**FIELDS, "weights": WEIGHTS})) == SMALL


@pytest.mark.parametrize("broken", ["os.replace", "pathlib.Path.write_text"])
def test_a_failing_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    SMALL.save(tmp_path / "s.json")

    def fail(path: Path, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"{")  # as far as it got
        raise OSError("disk full")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(OSError, match="disk full"):
        SMALL.replace(note="new").save(tmp_path / "s.json")
    assert os.listdir(tmp_path) == ["s.json"]
    assert Schedule.load(tmp_path / "s.json") == SMALL


def test_saving_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for note in ("old", "new"):
        SMALL.replace(note=note).save(tmp_path / "s.json")
    assert os.listdir(tmp_path) == ["s.json"]
    assert Schedule.load(tmp_path / "s.json").note == "new"


# ---- files that are none


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Schedule.load(tmp_path / "none.json")


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    for end in range(len(TEXT) - 1):  # only the last newline may be missing
        refuse(tmp_path, TEXT[:end], "not a schedule file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a schedule file: Expecting value"),
        (bytes(range(256)), "not a schedule file: 'utf-8' codec"),
        (b"\x80\x04N.", "not a schedule file: 'utf-8' codec"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", 'expected a JSON object with "format": "harmonica_rt.schedule"'),
        ("3", "expected a JSON object"),
        (TEXT + "{}", "not a schedule file: Extra data"),
        (TEXT.replace('"version": 1', '"version": 1, "version": 1'), "a field is given twice"),
        (TEXT.replace("5.0", "NaN"), "NaN is not a number"),
        (TEXT.replace("null", "-Infinity"), "-Infinity is not a number"),
        (TEXT.replace("5.0", "1e999"), "timesteps: expected a finite number, got inf"),
        (TEXT.replace("null", "1e999"), "guidance_scale: expected a finite number, got inf"),
        (TEXT.replace("null", "1" + "0" * 400), "guidance_scale: expected a finite number, got inf"),
        (json.dumps({**FIELDS, "weights": WEIGHTS}).replace("2.0", "1e999"), "weights: expected finite numbers"),
        (json.dumps({**FIELDS, "weights": WEIGHTS}).replace("2.0", "1" + "0" * 400), "too large"),
    ],
)  # fmt: skip
def test_text_that_is_no_schedule_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    refuse(tmp_path, text, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a schedule file"),
        ({"version": 3}, "reads versions 1 and 2, got 3"),
        ({"version": True}, "reads versions 1 and 2, got True"),
        ({"version": "1"}, "reads versions 1 and 2, got '1'"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"model": 3}, "model: expected a str, got int"),
        ({"note": None}, "note: expected a str, got NoneType"),
        ({"sampler": 3}, "sampler: expected a str, got int"),
        ({"branches": "ab"}, "branches: expected a list of names, got str"),
        ({"branches": {"a": 1, "b": 2}}, "branches: expected a list of names, got dict"),
        ({"branches": [1, 2]}, "branches: expected a sequence of names, got [1, 2]"),
        ({"branches": ["a", "a"]}, "branches: expected distinct names, got ('a', 'a')"),
        ({"branches": ["a"]}, "step 0: expected 1 groups (one a branch) of 2 digits 0 or 1 (one a layer), got '11 11'"),
        ({"branches": [], "compute": [""] * 3}, "branches: expected a sequence of names, got []"),
        ({"steps": True}, "steps: expected an integer from 1 on, got True"),
        ({"steps": 3.0}, "steps: expected an integer from 1 on, got 3.0"),
        ({"steps": 4}, "compute: expected a list of 4 rows (one a step), got 3"),
        ({"steps": 10**15}, "expected a list of 1000000000000000 rows (one a step), got 3"),
        ({"steps": 0, "compute": []}, "steps: expected an integer from 1 on, got 0"),
        ({"layers": False}, "layers: expected an integer from 1 on, got False"),
        ({"layers": "2"}, "layers: expected an integer from 1 on, got '2'"),
        ({"layers": 10**15}, "step 0: expected 2 groups (one a branch) of 1000000000000000 digits"),
        ({"layers": -2}, "layers: expected an integer from 1 on, got -2"),
        ({"layers": 0, "compute": [" "] * 3}, "layers: expected an integer from 1 on, got 0"),
        ({"order": True}, "order: expected an integer from 0 on, got True"),
        ({"order": -1, "weights": WEIGHTS}, "order: expected an integer from 0 on, got -1"),
        ({"order": 10**9}, "order: expected one of (0, 1, 2), got 1000000000"),
        ({"order": 10**9, "weights": WEIGHTS}, "order: expected one of (0, 1, 2), got 1000000000"),
        ({"compute": "11 11"}, "compute: expected a list of 3 rows (one a step), got str"),
        ({"compute": ["11 11", "10 00"]}, "compute: expected a list of 3 rows (one a step), got 2"),
        ({"compute": ["11 11", "10 00", 3]}, "step 2: expected 2 groups (one a branch) of 2 digits"),
        ({"compute": ["11 11", "10 00", "00 0"]}, "step 2: expected 2 groups"),
        ({"compute": ["11 11", "10 02", "00 01"]}, "step 1: expected 2 groups"),
        ({"compute": ["11 11", "1000", "00 01"]}, "got '1000'"),
        ({"compute": ["11 11", "x" * 1000, "00 01"]}, f"got '{'x' * 76}..."),
        ({"compute": ["11 10", "10 00", "00 01"]}, "step 0 must compute every branch, but layer 1, branch 1"),
        ({"timesteps": "951"}, "timesteps: expected a list, got str"),
        ({"timesteps": [9, 5]}, "timesteps: expected 3 (one a step), got 2"),
        ({"timesteps": [9, 5, None]}, "timesteps: expected a number, got NoneType"),
        ({"guidance_scale": True}, "guidance_scale: expected a number, got bool"),
        ({"weights": {}}, "weights: expected a list of 3 rows (one a step), got dict"),
        ({"weights": WEIGHTS[:2]}, "weights: expected a list of 3 rows (one a step), got 2"),
        ({"weights": [*WEIGHTS[:2], WEIGHTS[2][:2]]}, "weights, step 2: expected 3 lists (one a reused branch), got 2"),
        ({"weights": [*WEIGHTS[:2], [[1.0]] * 3]}, "weights, step 2: expected lists of 2 numbers, got [1.0]"),
        ({"weights": [*WEIGHTS[:2], [[1.0, True]] * 3]}, "weights, step 2: expected numbers, got [1.0, True]"),
        ({"weights": [*WEIGHTS[:2], [[1.0, "2"]] * 3]}, "weights, step 2: expected numbers, got [1.0, '2']"),
        ({"weights": [[], [[1.0, 0.5]] * 3, WEIGHTS[2]]}, "value 1 (0 = newest) does not exist yet at step 1"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_fast(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    text = json.dumps({**FIELDS, **changes})
    tracemalloc.start()
    try:
        refuse(tmp_path, text, message)
        assert tracemalloc.get_traced_memory()[1] < 2**20, "no count of the file's is trusted"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(schedule_fields._REQUIRED - {"format", "version"}))
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    refuse(tmp_path, json.dumps({k: v for k, v in FIELDS.items() if k != name}), f"missing field '{name}'")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*FIELDS, "weights"]), JSON, min_size=1, max_size=3))
def test_any_value_anywhere_loads_or_is_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({**FIELDS, **changes}))
    try:
        loaded = Schedule.load(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
    else:
        assert loaded.compute.shape == SMALL.compute.shape


def test_a_huge_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", len(TEXT))
    assert load(tmp_path, TEXT) == SMALL
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("was read"))
    refuse(tmp_path, TEXT + " ", f"expected a schedule file of at most {len(TEXT)} bytes, got {len(TEXT) + 1}")


def test_a_huge_text_in_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SMALL.save(path := tmp_path / "s.safetensors")
    monkeypatch.setattr(reading, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"s\.safetensors: expected a schedule file's text of at most 100 bytes, got "):
        Schedule.load(path)


# ---- router checkpoints


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make_dit(2)


def write_router(path: Path, routers: Any, zipped: bool = True, **extra: Any) -> Path:
    """As published: beside the routers lie the optimiser's state and the arguments of the run."""
    opt = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.01}]}
    checkpoint = {"routers": routers, "opt": opt, "args": argparse.Namespace(lr=0.01, path="x"), **extra}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    return path


def routers(*by_k: list[float]) -> dict[str, torch.Tensor]:
    return {f"{k}.prob": torch.tensor(logits) for k, logits in enumerate(by_k)}


ON, OFF = 5.0, -5.0
LAST, THIRD, SECOND, FIRST = [ON, OFF, ON, ON], [OFF, ON, ON, OFF], [ON, ON, OFF, OFF], [OFF] * 4  # k = 0 1 2 3


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("method", ["harmonica", "l2c"])
def test_a_router_counts_steps_from_the_end(tmp_path: Path, model: torch.nn.Module, method: str, zipped: bool) -> None:
    path = write_router(tmp_path / "r.pt", routers(LAST, THIRD, SECOND, FIRST), zipped)
    schedule = Schedule.from_router(path, model, method)
    expected = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]], bool)  # step 0 is pinned
    if method == "l2c":
        expected[[0, 2]] = True  # k = 3 and 1
    np.testing.assert_array_equal(schedule.compute, expected.reshape(4, 2, 2))
    assert (schedule.order, schedule.note) == (0, f"{method} router, tau 0.1")
    assert Schedule.from_router(path, model, method, order=1, note="n").order == 1


def test_l2c_pins_the_first_step_of_an_odd_run_too(tmp_path: Path, model: torch.nn.Module) -> None:
    path = write_router(tmp_path / "r.pt", routers(FIRST, FIRST, FIRST, FIRST, FIRST))
    computed = Schedule.from_router(path, model, "l2c").compute.all(axis=(1, 2))
    assert computed.tolist() == [True, True, False, True, False]


def test_ten_and_more_steps_are_ordered_by_number(tmp_path: Path, model: torch.nn.Module) -> None:
    by_k = [[ON] * 4] * 12
    by_k[2] = FIRST
    shuffled = dict(reversed(routers(*by_k).items()))
    computed = Schedule.from_router(write_router(tmp_path / "r.pt", shuffled), model).compute.all(axis=(1, 2))
    assert np.flatnonzero(~computed).tolist() == [9]


@pytest.mark.filterwarnings("error")
def test_an_entry_is_computed_above_tau(tmp_path: Path, model: torch.nn.Module) -> None:
    edge = math.log(0.1 / 0.9)
    path = write_router(tmp_path / "r.pt", routers([edge + 1e-4, edge - 1e-4, 0.0, -1000.0], [ON] * 4))
    last = {tau: Schedule.from_router(path, model, tau=tau).compute[1].flatten().tolist() for tau in (0.1, 0.5, 0.0)}
    assert last == {0.1: [True, False, True, False], 0.5: [False] * 4, 0.0: [True, True, True, False]}


GOOD = routers([ON] * 4, [ON] * 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, 'expected a dict with a state dict under "routers"'),
        ([1], 'expected a dict with a state dict under "routers"'),
        (routers([ON] * 6, [ON] * 6), "has 6 logits a step, but DiTTransformer2DModel has 2 layers x 2 branches = 4"),
        (routers([ON] * 4, [ON] * 3), "expected as many logits in every step, got [3, 4]"),
        ({**GOOD, "3.prob": GOOD["0.prob"]}, "expected routers 0 to 2, got [0, 1, 3]"),
        ({"1.prob": GOOD["0.prob"]}, "expected routers 0 to 0, got [1]"),
        ({**GOOD, "01.prob": GOOD["0.prob"]}, "got '01.prob'"),
        ({**GOOD, "2.bias": GOOD["0.prob"]}, "got '2.bias'"),
        ({**GOOD, 2: GOOD["0.prob"]}, "got 2"),
        ({**GOOD, "1.prob": [ON] * 4}, "expected floating-point tensors named '<k>.prob'"),
        ({**GOOD, "1.prob": torch.ones(4, dtype=torch.complex64)}, "expected floating-point tensors"),
        ({**GOOD, "1.prob": torch.ones(4).to_sparse()}, "got 'torch._utils _rebuild_sparse_tensor'"),
        ({**GOOD, "1.prob": torch.ones(4, device="meta")}, "got 'torch._utils _rebuild_meta_tensor"),
        ({**GOOD, "1.prob": torch.ones(1).expand(10**13)}, "expected floating-point tensors"),
        (routers([ON] * 4, [ON, math.nan, ON, ON]), "expected finite logits, got NaN or infinity in step 0"),
        (routers([ON, math.inf, ON, ON], [ON] * 4), "expected finite logits, got NaN or infinity in step 1"),
    ],
)  # fmt: skip
def test_a_router_that_does_not_fit_is_refused(
    tmp_path: Path, model: torch.nn.Module, content: Any, message: str
) -> None:
    path = write_router(tmp_path / "r.pt", content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Schedule.from_router(path, model)
    assert str(caught.value).startswith(f"{path}: ")


def test_router_arguments_are_checked(tmp_path: Path, model: torch.nn.Module) -> None:
    path = write_router(tmp_path / "r.pt", GOOD)
    with pytest.raises(ValueError, match="method: expected 'harmonica' or 'l2c', got 'fora'"):
        Schedule.from_router(path, model, "fora")
    with pytest.raises(ValueError, match="tau: expected a finite number, got nan"):
        Schedule.from_router(path, model, tau=math.nan)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such router checkpoint"):
        Schedule.from_router(tmp_path / "none.pt", model)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_crafted_pickle_does_not_run(tmp_path: Path, model: torch.nn.Module, how: str) -> None:
    path, target = tmp_path / "r.pt", tmp_path / "written"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"routers": Evil(target)}, protocol=2))
        pickle.loads(path.read_bytes())["routers"].close()
    else:
        write_router(path, GOOD, how == "zip", extra=Evil(target))
        torch.load(path, weights_only=False)["extra"].close()
    assert target.exists(), "it would run"
    target.unlink()
    with pytest.raises(ValueError, match=r"r\.pt: not a router checkpoint that can be read safely"):
        Schedule.from_router(path, model)
    assert not target.exists()


class Called:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called


ONE = torch.ones(1).expand(3 * 10**8)  # of one number in the file


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("bomb", "name"),
    [
        (Called(bytearray, 3 * 10**9), "__builtin__ bytearray"),
        (Called(codecs.encode, Called(codecs.encode, b"0" * 2**20, "hex"), "hex"), "_codecs encode"),
        (Called(torch._utils._rebuild_device_tensor_from_cpu_tensor, ONE, torch.float64, "cpu", False), "torch._utils"),
    ],
)
def test_a_pickle_that_would_fill_the_memory_is_refused_unrun(
    tmp_path: Path, model: torch.nn.Module, zipped: bool, bomb: Called, name: str
) -> None:
    path = write_router(tmp_path / "r.pt", GOOD, zipped, extra=bomb)
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = memory.bytes()
    with pytest.raises(ValueError, match=rf"r\.pt: not a router .* argparse\.Namespace in it, got '{name}"):
        Schedule.from_router(path, model)
    assert before is None or memory.bytes() - before < 2**28


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cut_short_is_refused(tmp_path: Path, model: torch.nn.Module, zipped: bool) -> None:
    whole = write_router(tmp_path / "r.pt", GOOD, zipped).read_bytes()
    for end in range(0, len(whole), 13):
        (tmp_path / "r.pt").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="not a router checkpoint that can be read safely"):
            Schedule.from_router(tmp_path / "r.pt", model)
