"""Other methods' static plans, on small files of the layouts they publish."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule

from .conftest import TextCalls, make_dit, make_pixart

PIXART = {"cross_attn": "attn2", "attn": "attn1", "mlp": "ff"}
FULL, SINGLE = ("full_attn", "full_ff", "full_ff_context"), ("single_attn", "single_proj_mlp", "single_proj_out")


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    torch.manual_seed(0)
    small = {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 8}
    return FluxTransformer2DModel(
        **small, num_layers=2, num_single_layers=3, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4)
    ).eval()


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=4))
    return path


def ecad(steps: list[dict[str, dict[str, bool]]], **more: Any) -> dict[str, Any]:
    plan = {"num_blocks": 2, "num_inference_steps": len(steps), "name": "gen_1_cand_2", "attributes": {}}
    numbered = {f"{i:03}": blocks for i, blocks in enumerate(steps)}
    return {"cache_schedule": {**plan, "schedule": numbered, **more}, "config": {}, "metrics": {}}


def pixart_steps(compute: np.ndarray, branches: tuple[str, ...]) -> list[dict[str, dict[str, bool]]]:
    return [
        {str(layer): {PIXART[b]: bool(v) for b, v in zip(branches, row)} for layer, row in enumerate(step)}
        for step in compute
    ]


def flux_steps(steps: int = 4) -> list[dict[str, dict[str, bool]]]:
    rng = np.random.default_rng(0)
    full = {str(block): FULL for block in range(2)}
    blocks = full | {f"single_{block}": SINGLE for block in range(3)}
    return [{b: {c: bool(rng.random() < 0.3) for c in cs} for b, cs in blocks.items()} for _ in range(steps)]


# ---- step masks


@pytest.mark.parametrize("mask", ["11010", "1,1,0,1,0", "1 1 0\n1 0", [1, 1, 0, 1, 0], np.array([1, 1, 0, 1, 0]) == 1])
def test_a_mask_is_steps(mask: Any) -> None:
    schedule = Schedule.from_mask(mask, make_dit())
    assert (schedule.level, schedule.order, schedule.note) == ("blocks", 0, "step mask")
    assert schedule.groups == (("trunk", 1, ("blocks",)),)
    assert schedule.compute[:, 0, 0].tolist() == [True, True, False, True, False]
    assert schedule.carry[:, 0, 0].tolist() == [0, 0, 1, 0, 1]  # what the blocks add is kept
    output = Schedule.from_mask(mask, make_dit(), level="output", order=1, note="mine")
    assert output.output.tolist() == [False, False, True, False, True] and output.note == "mine"
    branches = Schedule.from_mask(mask, make_dit(), level="branches")
    assert branches.compute.shape == (5, 3, 2) and (branches.compute == schedule.compute).all()
    assert Schedule.from_mask(mask, make_dit(), carry=0.5).carry.max() == 0.5


def test_a_uniform_mask_is_the_uniform_schedule() -> None:
    model = make_dit()
    for level in ("blocks", "output"):
        uniform = Schedule.uniform(model, 6, 2, 1, level=level, **({"carry": 1.0} if level == "blocks" else {}))
        assert Schedule.from_mask("101010", model, level=level, order=1) == uniform.replace(note="step mask")


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ("", "mask: expected digits 0 and 1, one a step, got ''"),
        ("1012", "mask: expected digits 0 and 1, one a step, got '1012'"),
        ("0101", "mask: expected 1 at step 0, where nothing is cached yet, got 0"),
        ([1, 0.5], "mask: expected 0 or 1 for each step, got [1, 0.5]"),
        ([[1, 0]], "mask: expected 0 or 1 for each step, got [[1, 0]]"),
        ([], "mask: expected 0 or 1 for each step, got []"),
    ],
)
def test_other_masks_are_refused(mask: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Schedule.from_mask(mask, make_dit())


# ---- ECAD


def test_ecad_of_pixart_is_its_branches(tmp_path: Path) -> None:
    model = make_pixart()
    full = Schedule.full(model, 5)
    compute = np.random.default_rng(0).random(full.compute.shape) < 0.4
    steps = pixart_steps(compute, full.branches)
    schedule = Schedule.from_ecad(written(tmp_path / "e.json", ecad(steps)), model)
    compute[0] = True  # ECAD computes what it has not cached yet
    assert schedule.level == "branches" and schedule.order == 0 and schedule.note == "ECAD, gen_1_cand_2"
    assert np.array_equal(schedule.compute, compute)
    outputs = TextCalls(model, 5).run(hrt.compile(model, schedule, backend="eager"))
    assert len(outputs) == 5 and all(output.isfinite().all() for output in outputs)


def test_ecad_of_flux_is_its_blocks(tmp_path: Path, flux: nn.Module) -> None:
    steps = flux_steps()
    path = written(tmp_path / "e.json", ecad(steps, num_single_blocks=3))
    schedule = Schedule.from_ecad(path, flux, guidance_scale=5.0)
    assert schedule.level == "blocks" and schedule.order == 0 and schedule.guidance_scale == 5.0
    assert [group[:2] for group in schedule.groups] == [("transformer_blocks", 2), ("single_transformer_blocks", 3)]
    for step in range(1, 4):
        for i, block in enumerate(["0", "1", "single_0", "single_1", "single_2"]):
            assert schedule.compute[step, i] == any(steps[step][block].values())
    assert schedule.compute[0].all() and (schedule.carry == ~schedule.compute).all()
    assert 0 < schedule.cur < 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s[1]["0"].pop("ff"), "step 1, block 0: expected attn1, attn2, ff, got {"),
        (lambda s: s[1]["2"].update(ff=1), "step 1, block 2: expected true or false, got ["),
        (lambda s: s[2].pop("1"), "step 2, block 1: expected attn1, attn2, ff, got None"),
        (lambda s: s[2].update({"3": {}}), "step 2: expected 3 blocks as the model has, got 3 too"),
        (
            lambda s: s[2]["1"].update(custom_compute_attn={"name": "avg"}),
            "step 2, block 1: expected no more than attn1, attn2, ff, got custom_compute_attn",
        ),
    ],
)
def test_ecads_own_faults_are_named(tmp_path: Path, change: Callable[[list[Any]], Any], text: str) -> None:
    steps = pixart_steps(np.ones((3, 3, 3), dtype=bool), ("attn", "cross_attn", "mlp"))
    change(steps)
    with pytest.raises(ValueError, match=rf"e\.json: {re.escape(text)}"):
        Schedule.from_ecad(written(tmp_path / "e.json", ecad(steps)), make_pixart())


def test_ecad_of_another_model_names_both(tmp_path: Path, flux: nn.Module) -> None:
    pixart = written(tmp_path / "p.json", ecad(pixart_steps(np.ones((2, 3, 3), bool), ("attn", "cross_attn", "mlp"))))
    with pytest.raises(ValueError, match=r"blocks have attn1, attn2, ff, but DiTTransformer2DModel has .*attn, mlp"):
        Schedule.from_ecad(pixart, make_dit())
    with pytest.raises(ValueError, match=r"blocks have attn1, attn2, ff, but FluxTransformer2DModel has .*attn, mlp"):
        Schedule.from_ecad(pixart, flux)
    of_flux = written(tmp_path / "f.json", ecad(flux_steps()))
    with pytest.raises(ValueError, match=r"expected a model with .* \(Flux\), got PixArtTransformer2DModel with"):
        Schedule.from_ecad(of_flux, make_pixart())


# ---- SmoothCache


def test_smoothcache_by_component_and_by_layer(tmp_path: Path) -> None:
    model = make_dit()
    attn, mlp = [1, 0, 0, 1], [1, 1, 0, 0]
    by_component = Schedule.from_smoothcache(written(tmp_path / "s.json", {"attn": attn, "mlp": mlp}), model)
    assert (by_component.level, by_component.order, by_component.note) == ("branches", 0, "SmoothCache")
    assert np.array_equal(by_component["transformer_blocks"][:, 1], np.array([attn, mlp]).T == 1)
    lists = {f"{name}-{layer}": steps for layer in range(3) for name, steps in (("attn", attn), ("mlp", mlp))}
    assert Schedule.from_smoothcache(written(tmp_path / "s.json", lists), model) == by_component
    alone = Schedule.from_smoothcache(written(tmp_path / "s.json", {"attn1": attn}), model, order=1)
    assert alone.compute[:, :, 1].all() and (alone.compute[:, :, 0] == by_component.compute[:, :, 0]).all()
    text = Schedule.from_smoothcache(written(tmp_path / "s.json", {"attn2": attn}), make_pixart())
    assert text.cur_by_branch == {"attn": 0.0, "cross_attn": 0.5, "mlp": 0.0}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], "expected a list of 0 and 1 for each component (SmoothCache), got []"),
        (
            {"attn": [1, 0], "mlp": [1]},
            "expected as many steps, one or more, for each component, got {'attn': 2, 'mlp'",
        ),
        ({"attn": []}, "expected as many steps, one or more, for each component, got {'attn': 0}"),
        ({"attn2": [1, 0]}, "expected components of DiTTransformer2DModel, '<attn|mlp>'"),
        ({"attn-3": [1, 0]}, "or '<...>-<layer, 0 to 2>', got 'attn-3'"),
        ({"attn": [1, 2]}, "attn: expected 0 or 1 for each step, got [1, 2]"),
        ({"attn": [1, True]}, "attn: expected 0 or 1 for each step, got [1, True]"),
        ({"attn": [0, 1]}, "expected 1 at step 0 of each component"),
        ({"attn": [1, 0], "attn-1": [1, 0]}, "expected one list for each layer's attn, got a second in 'attn-1'"),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, content: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        Schedule.from_smoothcache(written(tmp_path / "s.json", content), make_dit())
    assert str(caught.value).startswith(str(tmp_path / "s.json"))


@pytest.mark.parametrize("read", [Schedule.from_ecad, Schedule.from_smoothcache])
@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02cos\nsystem\n.", b"[" * 100_000, b"NaN", b'{"a": 1, "a": 2}', b"{}"]
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, read: Callable, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
        read(path, make_pixart())
    with path.open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(ValueError, match=r"x\.json: expected a schedule of .* of at most 16777216 bytes, got 16777217"):
        read(path, make_pixart())
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such schedule of"):
        read(tmp_path / "none.json", make_pixart())
