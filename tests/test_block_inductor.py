"""Blocks compiled by TorchInductor: what the model gives, one compile for blocks of a kind, and never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import harmonica_rt as hrt
from harmonica_rt import compiled_blocks
from harmonica_rt.kernels.inductor import CompilerMissing

from .conftest import Calls, TextCalls, assert_close, make_dit, make_pixart, needs_compiler, relative_error
from .pairings.made import Sampler, make_flux, make_unet

STEPS = 5
MAKERS: dict[str, Callable[..., nn.Module]] = {"dit": make_dit, "pixart": make_pixart, "flux": make_flux}


def pair(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """Compiled for backends inductor and eager."""
    schedule = hrt.Schedule.uniform(model, STEPS, **{"level": "blocks", **options})
    return tuple(hrt.compile(model, schedule, backend=backend) for backend in ("inductor", "eager"))


def run_both(fast: Any, eager: Any, calls: Any, tolerance: float = 1e-4) -> list[Tensor]:
    outputs = calls.run(fast)
    assert_close(outputs, calls.run(eager), tolerance)
    return outputs


def compiles(fast: Any) -> int:
    return fast.report().compiled.compiles


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"groups": 2}], ids=["trunk", "groups"])
@pytest.mark.parametrize("name", MAKERS)
def test_equals_eager(name: str, options: dict[str, Any]) -> None:
    model = MAKERS[name]()
    fast, eager = pair(model, **options)
    for seed in range(2):
        run_both(fast, eager, Sampler(name, seed=seed))
    report = fast.report()
    kinds = 2 if name == "flux" else 1
    assert (report.compiled.kinds, report.compiled.compiles, report.compiled.eager) == (kinds, kinds, {})
    assert report.plans[0].backend == "inductor"
    assert f"{report.compiled.blocks} of {report.compiled.blocks} blocks compiled" in str(report)
    assert report.plans[0].full_macs == eager.report().plans[0].full_macs


@needs_compiler
@pytest.mark.parametrize("options", [{"level": "output"}, {"every": 1}], ids=["output", "everything computed"])
def test_ten_blocks_of_no_entry_cost_one_compile(options: dict[str, Any]) -> None:
    model = make_dit(10)
    fast, eager = pair(model, **options)
    run_both(fast, eager, Calls(STEPS))
    assert (fast.report().compiled.blocks, compiles(fast)) == (10, 1)
    block = model.transformer_blocks[4]
    called: list[int] = []
    plain, block.ff.forward = block.ff.forward, lambda *args: called.append(1) or plain(*args)
    run_both(fast, eager, Calls(STEPS))
    assert called, "the block with another forward ran as it is"
    assert compiles(fast) == 1


@needs_compiler
def test_batches_sizes_and_texts_cost_two_compiles_a_kind() -> None:
    """A batch of 1, and all others."""
    fast, eager = pair(make_flux())
    for batch, size, tokens in [(2, 4, 16), (1, 4, 16), (8, 3, 5), (3, 5, 7), (1, 5, 3), (4, 4, 16), (5, 7, 9)]:
        for context, words in (("cond", tokens), ("uncond", tokens + 3)):
            calls = FluxCalls(batch, size, words)
            for step in range(STEPS):
                with fast.cache_context(context), eager.cache_context(context):
                    assert_close([calls.call(fast, step)], [calls.call(eager, step)], 1e-4)
        fast.reset()
        eager.reset()
    assert (fast.report().compiled.kinds, compiles(fast)) == (2, 4)


class FluxCalls(Sampler):
    def __init__(self, batch: int, size: int, words: int) -> None:
        super().__init__("flux", seed=batch)
        self.samples = [torch.randn(batch, size * size, 4) for _ in range(STEPS)]
        self.fixed |= {
            "encoder_hidden_states": torch.randn(batch, words, 8), "pooled_projections": torch.randn(batch, 6),
            "txt_ids": torch.zeros(words, 3),
            "img_ids": torch.cartesian_prod(*map(torch.arange, (1, size, size))).float(),
        }  # fmt: skip


@needs_compiler
def test_half_of_a_batch_goes_on() -> None:
    model = make_pixart()
    fast, eager = pair(model)
    calls = TextCalls(model, STEPS, batch=4)
    for step in range(STEPS):
        if step == 3:
            calls.samples = calls.samples.chunk(2, 1)[1]
            for name in ("encoder_hidden_states", "encoder_attention_mask"):
                calls.arguments[name] = calls.arguments[name].chunk(2)[1]
        with torch.no_grad():
            assert_close([calls.call(fast, step)], [calls.call(eager, step)], 1e-4)
    assert compiles(fast) <= 2, "one on torch 2.13; 2.11 compiles the half anew"


@needs_compiler
def test_half_precision() -> None:
    """No further from what fp32 gives than the model itself, whose roundings are other ones."""
    model, sampler = make_flux(), Sampler("flux", dtype=torch.bfloat16)
    _, exact = pair(copy.deepcopy(model))
    wanted = Sampler("flux").run(exact)
    fast, eager = pair(model.to(torch.bfloat16))
    sampler.run(fast)  # the first call learns, by the plain model
    for got, plain, true in zip(sampler.run(fast), sampler.run(eager), wanted):
        assert got.dtype is torch.bfloat16
        error = relative_error(plain.float(), true)
        assert 0 < relative_error(got.float(), true) <= 1.5 * error < 0.3
    assert compiles(fast) == 2


@needs_compiler
def test_lora_and_new_weights_are_followed() -> None:
    model, calls = make_pixart(), Sampler("pixart")
    fast, eager = pair(model)
    runs, counts = [run_both(fast, eager, calls)], [compiles(fast)]

    def changed(change: Callable[[], Any]) -> None:
        change()
        runs.append(run_both(fast, eager, calls))
        counts.append(compiles(fast))
        assert relative_error(runs[-1][0], runs[-2][0]) > 1e-3
        assert relative_error(runs[-1][2], runs[-2][2]) > 1e-3

    def enable(enabled: bool) -> None:
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.enable_adapters(enabled)

    def new(name: str) -> None:
        for parameter_name, parameter in model.named_parameters():
            if name in parameter_name:
                parameter.data = torch.randn_like(parameter) * 0.3

    adapter = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False)
    changed(lambda: new("to_k.weight"))
    changed(lambda: inject_adapter_in_model(adapter, model, "one"))
    changed(lambda: new("lora_A"))
    changed(lambda: enable(False))
    changed(lambda: enable(True))
    assert counts == [1, 1, 2, 2, 3, 3], "weights need none, and what is switched back is known"


@needs_compiler
def test_weights_in_another_layout_are_followed(dit: nn.Module) -> None:
    fast, eager = pair(dit)
    before = run_both(fast, eager, Calls(STEPS))
    weight = dit.transformer_blocks[1].ff.net[2].weight
    weight.data = 2.0 * weight.data.t().contiguous().t()
    for _ in range(2):
        after = run_both(fast, eager, Calls(STEPS))
    assert relative_error(after[0], before[0]) > 1e-3
    assert (fast.report().compiled.kinds, compiles(fast), fast.report().compiled.eager) == (2, 2, {})


def test_arguments_are_copied_only_where_they_do_not_lie_in_a_row() -> None:
    whole = torch.randn(1, 7, 4)
    half, expanded, turned = whole[:, 3:], whole[:, :1].expand(1, 3, 4), whole[:, 1:].mT
    arguments = (whole, {"half": half, "rest": [expanded, (turned, 2)]})
    got_whole, named = compiled_blocks._dense(arguments)
    (got_expanded, (got_turned, number)), got_half = named["rest"], named["half"]
    assert got_whole is whole and got_expanded is expanded and number == 2
    for got, given in ((got_half, half), (got_turned, turned)):
        assert_close(got, given, 0.0)
        assert not got._is_view() and got.storage_offset() == 0
        assert got.stride() == torch.empty(given.shape).stride()
    assert got_half.data_ptr() == half.data_ptr()
    got_half[0, 0, 0] = 5.0
    assert whole[0, 3, 0] == 5.0, "what a block writes into its arguments is the model's"


@needs_compiler
def test_hooks_are_called_and_said(dit: nn.Module) -> None:
    fast, eager = pair(dit)
    calls = Calls(STEPS)
    run_both(fast, eager, calls)  # its first call learns, by plain blocks
    before = run_both(fast, eager, calls)
    on_it = dit.transformer_blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    within = dit.transformer_blocks[2].ff.net[0].register_forward_hook(lambda module, args, output: output * 2)
    hooked = run_both(fast, eager, calls)
    assert relative_error(hooked[0], before[0]) > 1e-2
    reasons = {"transformer_blocks.1": "forward hooks", "transformer_blocks.2": "forward hooks of its ff.net.0"}
    assert fast.report().compiled.eager == reasons
    assert "1 of 3 blocks compiled" in str(fast.report())
    assert "\n  transformer_blocks.2 eager: forward hooks of its ff.net.0" in str(fast.report())
    on_it.remove()
    within.remove()
    assert_close(run_both(fast, eager, calls), before, 0.0)
    assert (compiles(fast), fast.report().compiled.eager) == (1, {})


class Wide(nn.Module):
    """A denoiser of two kinds of blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.eval()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            sample = block(sample)
        return sample + timestep.view(-1, 1)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale, self.shape = 1.0, "relu"

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(getattr(self.first(x), self.shape)()) * self.scale


class Breaks(Plain):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class WideCalls:
    def run(self, model: nn.Module, width: int = 4) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(STEPS, 3, width, generator=generator)
        with torch.no_grad():
            return [model(sample, torch.full((3,), 9.0 - step)) for step, sample in enumerate(samples)]


@needs_compiler
def test_a_graph_break_is_counted_and_said() -> None:
    fast, eager = pair(Wide(Plain(), Breaks(), Plain(), Breaks()))
    run_both(fast, eager, WideCalls())
    run_both(fast, eager, WideCalls())
    report = fast.report().compiled
    assert (report.blocks, report.kinds, report.compiles, report.graph_breaks) == (4, 2, 1, 1)
    assert report.eager.keys() == {"blocks.1", "blocks.3"}
    assert report.eager["blocks.1"].startswith("graph break: ")
    assert "blocks.1, blocks.3 eager: graph break: " in str(fast.report())


@needs_compiler
def test_numbers_that_change_are_followed_and_too_many_words_said() -> None:
    model = Wide(Plain(), Plain())
    fast, eager = pair(model)

    def set_all(**values: Any) -> None:
        for block in model.blocks:
            vars(block).update(values)
        run_both(fast, eager, WideCalls())

    for scale in (1.0, 2.0, 3.0, 4.0):
        set_all(scale=scale)
    assert (compiles(fast), fast.report().compiled.eager) == (1, {}), "for any number"
    with torch._dynamo.config.patch(recompile_limit=2):
        for shape in ("sigmoid", "tanh", "cos"):
            set_all(shape=shape)
    assert compiles(fast) == 2
    assert fast.report().compiled.eager["blocks.0"].startswith("too many compiles: ")


@needs_compiler
def test_an_error_of_the_blocks_own_is_raised_as_it_is() -> None:
    fast, eager = pair(Wide(Plain(), Plain()), every=1)
    run_both(fast, eager, WideCalls())
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        WideCalls().run(fast, width=5)
    assert fast.report().compiled.eager == {}
    run_both(fast, eager, WideCalls())


@needs_compiler
def test_the_model_stays_plain(dit: nn.Module) -> None:
    calls, before = Calls(STEPS), [set(vars(module)) for module in dit.modules()]
    wanted = calls.run(copy.deepcopy(dit))
    fast, _ = pair(dit)
    calls.run(fast)
    got = calls.run(fast)
    assert [set(vars(module)) for module in dit.modules()] == before
    assert all(module._compiled_call_impl is None for module in dit.modules())
    assert_close(calls.run(dit), wanted, 0.0)
    twin = copy.deepcopy(fast)
    calls.run(twin)
    assert_close(calls.run(twin), got, 0.0)
    assert fast.uncompile() is dit
    assert_close(calls.run(dit), wanted, 0.0)


@needs_compiler
def test_blocks_that_torch_compile_took_stay_so(dit: nn.Module) -> None:
    fast, eager = pair(dit)
    dit.transformer_blocks[0].compile(backend="eager")
    run_both(fast, eager, Calls(STEPS))
    assert fast.report().compiled.eager == {"transformer_blocks.0": "torch.compile compiled it already"}


def test_no_compiler_is_an_error_by_name_and_auto_is_eager(dit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_blocks, "missing_compiler", lambda device: f"none for {device}")
    for level in ("blocks", "output"):
        fast, _ = pair(dit, level=level)
        with pytest.raises(CompilerMissing, match="none for cpu"):
            Calls(STEPS).run(fast)
        auto = hrt.compile(dit, hrt.Schedule.uniform(dit, STEPS, level=level))
        assert_close(Calls(STEPS).run(auto)[:1], Calls(STEPS).run(dit)[:1], 0.0)
        assert (auto.report().plans[0].backend, auto.report().compiled) == ("eager", None)


def test_a_model_without_blocks_has_none_to_compile() -> None:
    unet = make_unet()
    with pytest.raises(ValueError, match="for UNet2DConditionModel, got 'inductor', which compiles blocks"):
        hrt.compile(unet, hrt.Schedule.uniform(unet, STEPS), backend="inductor")
