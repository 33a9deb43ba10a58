"""Compiled pipelines are called in the ways that diffusers' tests call every pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..conftest import relative_error
from .clients import TOLERANCE, WITH_CALLBACKS, WITH_TEXT, Client, over
from .parts import STEPS

Tensors = dict[str, Tensor]


@over()
def test_what_is_reused_shows(client: Client) -> None:
    """The other checks would see a run that computes everything; and that the family's pipeline is what was meant."""
    pipe = client.compiled()
    latents = client.check(pipe)
    assert relative_error(latents, client.call(client.made.make())) > 100 * TOLERANCE
    assert {getattr(pipe, name).report().level for name in client.made.denoisers} == {client.level}


# ---- batches


@over()
def test_batches(client: Client) -> None:
    """Of two images, of one, of two others; as by hand."""
    pipe = client.compiled()
    for numbers in ((0, 1), (2,), (2, 0)):
        assert len(client.check(pipe, **client.of(*numbers))) == len(numbers)


@over()
def test_an_image_is_the_same_in_a_batch_and_alone(client: Client) -> None:
    pipe = client.compiled()
    together = client.call(pipe, **client.of(0, 1, 2))
    assert relative_error(together[0], together[1]) > 100 * TOLERANCE
    for number in range(3):
        alone = client.call(pipe, **client.of(number))
        assert relative_error(together[number : number + 1], alone) < TOLERANCE, number


@over(*WITH_TEXT)
def test_several_images_a_prompt(client: Client) -> None:
    pipe = client.compiled()
    name = "num_videos_per_prompt" if client.family == "wan" else "num_images_per_prompt"
    for count, numbers in ((2, (0,)), (1, (0, 1)), (2, (0, 1))):
        call = client.of(*numbers) | {name: count, "seeds": range(count * len(numbers))}
        assert len(client.check(pipe, **call)) == count * len(numbers)


# ---- what is given and taken


@over()
def test_a_tuple_and_an_object_hold_the_same(client: Client) -> None:
    pipe = client.compiled()
    given = {"num_inference_steps": STEPS, "output_type": "np", **client.made.arguments()}

    def run(**more: Any) -> Any:
        return pipe(**given, generator=torch.Generator().manual_seed(1), **more)

    output, (alone, *rest) = run(), run(return_dict=False)
    name = "frames" if client.family == "wan" else "images"
    assert not rest and np.array_equal(getattr(output, name), alone) and np.array_equal(output[0], alone)
    assert relative_error(torch.as_tensor(alone), client.by_hand(output_type="np")) < TOLERANCE


@over(*WITH_TEXT)
def test_tensors_arrays_and_pictures_show_the_same(client: Client) -> None:
    pipe = client.compiled()
    tensor, array = (client.call(pipe, output_type=kind) for kind in ("pt", "np"))
    assert relative_error(tensor.movedim(-3, -1), array) < TOLERANCE
    pictures = client.made.call(pipe, output_type="pil")
    frames = pictures[0] if client.family == "wan" else pictures
    shown = torch.stack([torch.as_tensor(np.array(frame)) for frame in frames])
    assert (shown - (array.reshape(shown.shape) * 255).round()).abs().max() < 2


@over(*WITH_TEXT)
def test_noise_that_is_given_is_the_noise_drawn(client: Client) -> None:
    pipe, drawn = client.compiled(), []
    prepare = pipe.prepare_latents

    def keeping(*args: Any, **kwargs: Any) -> Any:
        latents = prepare(*args, **kwargs)
        drawn.append((latents[0] if isinstance(latents, tuple) else latents).clone())
        return latents

    pipe.prepare_latents = keeping
    wanted = client.call(pipe)
    # PixArt and Wan scale what they are given, but by 1
    assert torch.equal(client.call(pipe, latents=drawn[0], generator=None), wanted)
    other = client.call(pipe, latents=-drawn[0], generator=None)
    assert relative_error(other, client.by_hand(latents=-drawn[0], generator=None)) < TOLERANCE
    assert relative_error(other, wanted) > 0.1


@over()
def test_guidance_comes_and_goes(client: Client) -> None:
    pipe = client.compiled()
    unguided, without = client.unguided()
    guided = client.check(pipe)
    free = unguided.check(pipe, **without)
    assert free.shape == guided.shape and relative_error(free, guided) > 100 * TOLERANCE
    assert torch.equal(client.call(pipe), guided)


# ---- callbacks


def listening(names: list[str] | None) -> tuple[list[Tensors], dict[str, Any]]:
    """What a callback got after each step, and the arguments that put it there."""
    got: list[Tensors] = []

    def note(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        assert step == len(got) and pipe.scheduler.timesteps[step] == timestep
        got.append({name: tensor.clone() for name, tensor in tensors.items()})
        return tensors

    return got, {"callback_on_step_end": note} | (
        {} if names is None else {"callback_on_step_end_tensor_inputs": names}
    )


@over(*WITH_CALLBACKS)
def test_callbacks_get_what_they_ask_for(client: Client) -> None:
    pipe = client.compiled()
    latents = client.call(pipe)
    for names in (["latents"], [*type(pipe)._callback_tensor_inputs]):
        got, callback = listening(names)
        assert torch.equal(client.call(pipe, **callback), latents)
        assert [set(tensors) for tensors in got] == [set(names)] * STEPS
        wanted, callback = listening(names)
        client.by_hand(**callback)
        for step, tensors in enumerate(got):
            for name in names:
                assert relative_error(tensors[name], wanted[step][name]) < TOLERANCE, (step, name)


@over("pixart")
def test_the_older_callbacks(client: Client) -> None:
    """Every second step's latents."""
    seen: list[Tensor] = []
    every_other = {"callback": lambda step, timestep, latents: seen.append(latents.clone()), "callback_steps": 2}
    latents = client.call(client.compiled(), **every_other)
    client.by_hand(**every_other)
    assert len(seen) == STEPS
    for got, wanted in zip(seen[: STEPS // 2], seen[STEPS // 2 :]):
        assert relative_error(got, wanted) < TOLERANCE
    assert torch.equal(client.call(client.compiled()), latents)


def changing(step: int, name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A callback that changes one of the loop's tensors after `step`."""

    def change_it(pipe: DiffusionPipeline, at: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        return tensors | ({name: change(tensors[name])} if at == step else {})

    return {"callback_on_step_end": change_it, "callback_on_step_end_tensor_inputs": [name]}


@over(*WITH_CALLBACKS)
def test_callbacks_change_the_latents(client: Client) -> None:
    """After steps that the next one follows by reuse and by computing; after the last one nothing is left of them."""
    pipe = client.compiled()
    unchanged = client.call(pipe)
    for step in (0, 1, STEPS - 2):
        changed = client.check(pipe, **changing(step, "latents", lambda latents: 0.5 * latents.flip(-1)))
        assert relative_error(changed, unchanged) > 100 * TOLERANCE
    assert not client.call(pipe, **changing(STEPS - 1, "latents", torch.zeros_like)).any()
    assert torch.equal(client.call(pipe), unchanged)


@over(*WITH_CALLBACKS)
def test_callbacks_change_the_text(client: Client) -> None:
    pipe = client.compiled()
    unchanged = client.call(pipe)
    for step in (0, 1):
        changed = client.check(pipe, **changing(step, "prompt_embeds", lambda text: 2 * text.flip(-1)))
        assert relative_error(changed, unchanged) > 100 * TOLERANCE
    assert torch.equal(client.call(pipe), unchanged)


@over(*WITH_CALLBACKS)
def test_callbacks_raise_the_guidance(client: Client) -> None:
    def raise_it(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        pipe._guidance_scale += 1.0
        return tensors

    pipe = client.compiled()
    raised = client.check(pipe, guidance_scale=2.0, callback_on_step_end=raise_it)
    assert pipe.guidance_scale == 2.0 + STEPS
    if client.family == "sd3":  # the others read it before the loop
        assert relative_error(raised, client.call(pipe, guidance_scale=2.0)) > 100 * TOLERANCE


@over(*WITH_CALLBACKS)
def test_an_interrupted_run_gives_what_it_has(client: Client) -> None:
    """After each step; the next run is whole, and so is one of two images."""
    pipe = client.compiled()
    by_hand, callback = listening(["latents"])
    client.by_hand(**callback)
    wanted, two = client.call(pipe), client.call(pipe, **client.of(0, 1))
    for last in range(STEPS):

        def interrupt(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: Tensors) -> Tensors:
            pipe._interrupt = step >= last  # noqa: B023  # called within this turn
            return tensors

        got = client.call(pipe, callback_on_step_end=interrupt)
        assert relative_error(got, by_hand[last]["latents"]) < TOLERANCE, last
        assert torch.equal(client.call(pipe), wanted), last
    client.call(pipe, callback_on_step_end=interrupt)
    assert torch.equal(client.call(pipe, **client.of(0, 1)), two)


# ---- text apart

ENCODED = {
    "pixart": ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
    "sd3": ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "wan": ("prompt_embeds", "negative_prompt_embeds"),
    "flux": ("prompt_embeds", "pooled_prompt_embeds"),
    "qwen": ("prompt_embeds", "prompt_embeds_mask"),
}


@over(*WITH_TEXT)
def test_text_encoded_by_a_pipeline_of_encoders(client: Client) -> None:
    """A pipeline of encoders alone, and a compiled one without any, are the whole one."""
    whole = client.made.make()
    texts = {name for name in whole.components if "text" in name or "tokenizer" in name}
    kind, parts = type(whole), whole.components
    wan = {"boundary_ratio": 0.8} if client.family == "wan" else {}
    encoder = kind(**{name: part if name in texts else None for name, part in parts.items()}, **wan)
    rest = kind(**{name: None if name in texts else part for name, part in parts.items()}, **wan)
    rest.set_progress_bar_config(disable=True)

    arguments = client.made.arguments()
    accepted = inspect.signature(encoder.encode_prompt).parameters
    given = {name: value for name, value in arguments.items() if name in accepted and name != "negative_prompt"}
    given |= {name: None for name in ("prompt_2", "prompt_3") if name in accepted}
    with torch.no_grad():
        if "negative_prompt" in accepted:
            given["negative_prompt"] = arguments.get("negative_prompt", "")
            states = dict(zip(ENCODED[client.family], encoder.encode_prompt(**given)))
        else:
            states = dict(zip(ENCODED[client.family], encoder.encode_prompt(**given)))
            given["prompt"] = arguments["negative_prompt"]
            negative = zip(ENCODED[client.family], encoder.encode_prompt(**given))
            states |= {f"negative_{name}": state for name, state in negative}
    states |= {"prompt": None, "negative_prompt": None}
    got = client.call(client.compiled(rest), **states)
    assert relative_error(got, client.by_hand()) < TOLERANCE
