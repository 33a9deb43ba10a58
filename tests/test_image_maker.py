"""Images by request: what a seed decides, what shares a call, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harmonica_rt as hrt
from harmonica_rt.image_maker import ImageMaker

from .pipelines.folders import labelled_dit, text_flux

CALL = {"num_inference_steps": 4, "max_sequence_length": 16}
SIZES = [(16, 16), (16, 32)]


def maker(**options: Any) -> ImageMaker:
    schedules = {"fast": "output:2", "good": "full"}
    return ImageMaker(text_flux, schedules, **{"sizes": SIZES, "call": CALL, "backend": "eager", **options})


def test_an_image_is_its_seeds_whatever_batch_it_is_in() -> None:
    made = maker(batches=(3,))
    ask = [made.read(prompt, seed) for prompt, seed in (("a cat", 5), ("a dog", 6), ("a fish", 7))]
    alone = [made.make([each])[0] for each in ask]
    assert [image.shape for image in alone] == [(16, 16, 3)] * 3 and {image.dtype for image in alone} == {
        np.dtype("u1")
    }
    for order in ([0, 1, 2], [2, 1, 0], [1, 2], [2, 2]):
        for number, image in zip(order, made.make([ask[n] for n in order])):
            assert np.array_equal(image, alone[number])
    assert not np.array_equal(made.make([made.read("a cat", 6)])[0], alone[0])


def test_images_are_those_of_the_compiled_pipeline() -> None:
    import torch

    pipe = text_flux()
    hrt.compile(pipe, hrt.Schedule.uniform(pipe.transformer, steps=4, every=2, level="output"), backend="eager")
    generator = torch.Generator().manual_seed(9)
    wanted = pipe("a cat", height=16, width=32, generator=generator, output_type="np", **CALL).images[0]
    made = maker(batches=(1, 2))
    got = made.make([made.read("a cat", 9, height=16, width=32)])[0]
    assert np.array_equal(got, np.round(wanted * 255).astype(np.uint8))
    pair = made.make([made.read("a cat", 9, height=16, width=32)] * 2)[1]
    assert abs(got.astype(int) - pair).max() <= 1


def test_schedules_by_name_differ_and_share_their_weights() -> None:
    made = maker()
    fast, good = (made.make([made.read("a cat", schedule=name)])[0] for name in ("fast", "good"))
    assert not np.array_equal(fast, good)
    assert len({id(pipe.transformer.model) for pipe in made.pipelines.values()}) == 1


def test_what_shares_a_call() -> None:
    made = maker()
    same = {
        made.read(prompt, seed, guidance_scale=scale).bucket for prompt, seed, scale in (("a", 0, 3), ("b", 1, 3.0))
    }
    assert len(same) == 1
    negative = {"true_cfg_scale": 2.0}
    assert (
        made.read("a", negative_prompt="b", **negative).bucket == made.read("c", negative_prompt="d", **negative).bucket
    )
    assert made.read("a", height=16, num_inference_steps=4).bucket == made.read("a").bucket
    others = [
        made.read("a", **settings).bucket
        for settings in (
            {},
            {"schedule": "good"},
            {"width": 32},
            {"guidance_scale": 3.0},
            {"negative_prompt": "b", **negative},
        )
    ]
    assert len(set(others)) == len(others)
    with pytest.raises(ValueError, match="expected at most 4 images of one bucket, got 2 of 2"):
        made.make([made.read("a"), made.read("a", width=32)])


def test_negative_prompts_are_each_requests_own() -> None:
    made = maker(batches=(2,))
    ask = [made.read("a cat", 3, negative_prompt=text, true_cfg_scale=4.0) for text in ("bad", "worse things")]
    alone = [made.make([each])[0] for each in ask]
    assert not np.array_equal(*alone)
    assert all(np.array_equal(*pair) for pair in zip(made.make(ask), alone))


def test_warming_up_makes_the_plans_that_requests_need() -> None:
    made = maker(batches=(1, 2))
    assert list(made.warm_up())[:3] == ["fast, 1 of 16x16", "fast, 2 of 16x16", "fast, 1 of 16x32"]
    for size in SIZES:
        for count in (1, 2):
            for name in made.pipelines:
                made.make([made.read("a cat", schedule=name, height=size[0], width=size[1])] * count)
    assert (made.calls, made.hits) == (8, 8)
    made.make([made.read("a cat", negative_prompt="b", true_cfg_scale=2.0)])
    assert (made.calls, made.hits) == (9, 8), "a second context has plans of its own"


def test_files_and_labels(tmp_path: Path) -> None:
    pipe = labelled_dit()
    hrt.Schedule.uniform(pipe.transformer, steps=3, every=2).save(tmp_path / "s.json")
    made = ImageMaker(lambda: pipe, {"file": tmp_path / "s.json", "spec": "output:2of3"}, batches=(1,), backend="eager")
    assert made.steps == {"file": 3, "spec": 3}
    assert made.read("goldfish").subject == 1
    assert made.make([made.read("goldfish")])[0].shape[-1] == 3


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"prompt": 3}, "prompts: expected texts for FluxPipeline, got 3"),
        ({"schedule": "best"}, "schedule: expected one of fast, good, got 'best'"),
        ({"height": 64}, "height, width: expected one of 16x16, 16x32, got 64x16"),
        ({"height": "16"}, "height, width: expected one of 16x16, 16x32, got '16'x16"),
        ({"seed": -1}, "seed: expected an integer from 0 to .*, got -1"),
        ({"seed": 1.5}, "seed: expected an integer from 0 to .*, got 1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number, got nan"),
        ({"guidance_scale": "3"}, "guidance_scale: expected a finite number, got '3'"),
        (
            {"num_inference_steps": 50},
            "expected 4, the steps of schedule 'fast', got 50; there are fast of 4, good of 4",
        ),
        ({"negative_prompt": ["a"]}, r"negative_prompt: expected a text, got \['a'\]"),
        ({"latents": 3}, "latents: expected prompt, seed, schedule, height, .* to ask by"),
        ({"num_images_per_prompt": 1000}, "num_images_per_prompt: expected prompt, seed"),
    ],
    ids=str,
)
def test_refused(request_: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        maker().read(**{"prompt": "a cat", **request_})


def test_one_size_is_served_where_none_is_listed() -> None:
    made = ImageMaker(text_flux, {"fast": "output:2"}, call={**CALL, "height": 16, "width": 16}, backend="eager")
    assert made.make([made.read("a cat")])[0].shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"height, width: expected none, .*, got width 16"):
        made.read("a cat", width=16)


def test_arguments_of_every_call_may_be_lists() -> None:
    made = maker(call={**CALL, "sigmas": [1.0, 0.7, 0.4, 0.1]}, sizes=[(16, 16)])
    assert not np.array_equal(*(one.make([one.read("a cat")])[0] for one in (made, maker())))


def test_what_cannot_be_served_at_all() -> None:
    with pytest.raises(ValueError, match="batches: expected positive integers, got 0"):
        maker(batches=(0,))
    with pytest.raises(TypeError, match="load: expected a pipeline with a denoiser and a scheduler, got int"):
        ImageMaker(lambda: 3, {"fast": "output:2"})
