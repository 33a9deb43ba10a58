"""What a pipeline is asked for: from files, folders and arguments; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from harmonica_rt.generating import Generation, load_pipeline, read_inputs, read_prompts
from harmonica_rt.train.pipeline_options import call_arguments

from .pipelines.folders import labelled_dit, text_flux

CALL = {"num_inference_steps": 3, "height": 16, "width": 16, "max_sequence_length": 16}


class Editing:
    """A pipeline that needs a picture, and takes what it was called with for its answer."""

    def __call__(self, image, prompt, strength=0.6, guidance_scale=3.0, num_images_per_prompt=1, generator=None):
        return {"image": image, "prompt": prompt, "seeds": [g.initial_seed() for g in generator]}


def folder_of(tmp_path: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name}\n", encoding="utf-8")
    return tmp_path


def test_an_image_is_the_same_alone_and_among_others(tmp_path: Path) -> None:
    text_flux().save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path), torch.float32, "cpu")
    generation = Generation(pipe, ["a cat", "a dog", "a fish"], seed=7, **CALL)
    assert (generation.count, generation.steps, generation.guidance) == (3, 3, None)
    together = generation.generation([0, 1, 2], output_type="np").images
    alone = generation.generation([2], output_type="np").images
    assert torch.allclose(torch.tensor(together[2]), torch.tensor(alone[0]), atol=1e-5)
    assert abs(together[1] - together[2]).max() > 0.01


def test_labels_are_numbers_or_names() -> None:
    pipe = labelled_dit()
    assert Generation(pipe).count == 1000
    generation = Generation(pipe, ["goldfish", "7", 3], num_inference_steps=2)
    assert generation.arguments([0, 1, 2])["class_labels"] == [1, 7, 3]
    assert generation.guidance == 4.0
    with pytest.raises(ValueError, match=r"expected a class's name or number, 0 to 999, for DiTPipeline, got 'a cat'"):
        Generation(pipe, ["a cat"])


def test_negative_prompts_and_true_guidance() -> None:
    generation = Generation(text_flux(), ["a", "b"], negative_prompt="bad", true_cfg_scale=3.0, **CALL)
    assert generation.arguments([0, 1])["negative_prompt"] == ["bad", "bad"]
    assert generation.guidance == 3.0


def test_pictures_with_captions(tmp_path: Path) -> None:
    generation = Generation(Editing(), inputs=folder_of(tmp_path, "cat", "dog"), seed=5, num_images_per_prompt=2)
    made = generation.generation([1])
    assert made["prompt"] == ["a dog"] and made["seeds"] == [7, 8]
    assert made["image"][0].getpixel((0, 0)) == (1, 0, 0)
    (tmp_path / "dog.txt").unlink()
    with pytest.raises(ValueError, match=r"expected a caption beside .*dog\.png"):
        read_inputs(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "arguments", "error"),
    [
        (None, {}, "prompts: expected at least one for FluxPipeline, got none"),
        ([], {}, "prompts: expected at least one"),
        ([3], {}, "prompts: expected texts for FluxPipeline, got 3"),
        (["a"], {"num_frames": 9}, "num_frames: FluxPipeline takes no such argument, .*expected prompt_2, negative"),
        (["a"], {"output_type": "pt"}, "output_type: FluxPipeline takes no such argument, or not from here"),
    ],
    ids=str,
)
def test_refused(prompts: list | None, arguments: dict, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        Generation(text_flux(), prompts, **arguments)


def test_refused_pictures(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="image: Editing needs it: expected a folder of pictures"):
        Generation(Editing(), ["a"])
    with pytest.raises(ValueError, match="inputs: expected pictures"):
        Generation(Editing(), inputs=tmp_path)
    with pytest.raises(ValueError, match="inputs: expected a pipeline that takes an image, got FluxPipeline"):
        Generation(text_flux(), inputs=folder_of(tmp_path, "cat"))
    with pytest.raises(ValueError, match=r"expected no prompts beside .*, whose captions they are; got 1"):
        Generation(Editing(), ["a"], inputs=tmp_path)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(file) == ["a cat", "a dog"]
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="expected prompts, one a line, got none"):
        read_prompts(file)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder with model_index\.json, got .*, which has none"):
        load_pipeline(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected a folder or a hub name \(owner/name\), got '/no/such'"):
        load_pipeline("/no/such")


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", unreachable)
    with pytest.raises(OSError, match="a network to get it by, got owner/name: cannot reach the hub"):
        load_pipeline("owner/name")


def test_call_arguments() -> None:
    made = call_arguments(["max_sequence_length=16", "clean_caption=false", "prompt_2=a cat"], steps=4, guidance=None)
    assert made == {
        "num_inference_steps": 4,
        "max_sequence_length": 16,
        "clean_caption": False,
        "prompt_2": "a cat",
    }
    for call, error in (["steps"], "expected key=value, got 'steps'"), (["height=8"], "height once, got it twice"):
        with pytest.raises(ValueError, match=error):
            call_arguments(call, height=16)
