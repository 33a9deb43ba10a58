"""The cudagraph backend end to end on fake CUDA tensors: dtypes, shapes, launches, no hidden synchronisation.

A fake tensor has no data, so whatever would make the host wait for a value raises DataDependentOutputException.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import harmonica_rt as hrt

flash = torch.nn.functional.scaled_dot_product_attention
OUT_VARIANTS = {"mm": torch.mm, "addmm": torch.addmm, "_addmm_activation": torch.addmm}
XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}


class Launches(TorchDispatchMode):
    """Counts launches; stands in for the ops that a torch without CUDA cannot fake: copies, GEMMs with `out=`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def take(self) -> Counter[str]:
        """Launches since the last time."""
        names, self.names = self.names, Counter()
        return names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace != "prim" and not (
            func.is_view or name.startswith("empty") or name in ("_unsafe_view", "detach")
        ):
            self.names[name] += 1
        if name in OUT_VARIANTS and "out" in kwargs:
            out = kwargs["out"]
            made = OUT_VARIANTS[name](*args)
            assert (made.shape, made.dtype, made.device) == (out.shape, out.dtype, out.device)
            return out
        if name == "copy_" and args[0].device == args[1].device:
            assert args[0].shape == args[1].shape
            return args[0]
        return func(*args, **kwargs)


class Recorder:
    """Captures nothing; what it is given runs on fake tensors."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def warm_up(self, launch: Any) -> None:
        launch()

    def capture(self, launch: Any) -> Any:
        return self, launch()

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def getitem(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    """Basic indexing in terms of views: torch's own needs a real CUDA device even for a fake tensor."""
    keys, dim = key if isinstance(key, tuple) else (key,), 0
    for k in keys:
        if k is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(k, slice):
            start, stop, step = k.indices(tensor.shape[dim])
            assert step == 1
            tensor = tensor.narrow(dim, start, stop - start)
        else:
            tensor, dim = tensor.select(dim, k), dim - 1
        dim += 1
    return tensor


class InTermsOfViews(TorchFunctionMode):
    """Indexing and copies that need no device. (A method put into torch.Tensor and taken back would leave a trace:
    `torch.tensor([t])` then takes t for a sequence.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return getitem(*args)
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        return func(*args, **(kwargs or {}))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
    """One launch, laid out as flash attention does: without a device torch would fake the unfused form."""
    batch, heads, tokens, width = q.shape
    assert k.shape == v.shape == (batch, heads, k.shape[2], width)
    assert attn_mask is None or (attn_mask.shape, attn_mask.dtype) == ((batch, 1, 1, k.shape[2]), q.dtype)
    return torch.zeros(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    with FakeTensorMode(allow_non_fake_inputs=True), Launches() as launches, torch.no_grad(), InTermsOfViews():
        yield launches


def fake_dit(dtype: torch.dtype, device: str = "cuda", **config: int) -> DiTTransformer2DModel:
    config = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, **XL, **config}
    return fake(DiTTransformer2DModel(**config).eval(), dtype, device)


def fake(model: torch.nn.Module, dtype: torch.dtype, device: str = "cuda") -> torch.nn.Module:
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                made = torch.empty(value.shape, dtype=dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(made, requires_grad=False)
        for name, value in module._buffers.items():
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return model


def compile_fake(model: torch.nn.Module, schedule: hrt.Schedule) -> torch.nn.Module:
    fast = hrt.compile(model, schedule, backend="cudagraph")
    fast._recorder = Recorder
    return fast


def call(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Any:
    sample = torch.empty(2, 4, 32, 32, dtype=dtype, device=device)
    numbers = torch.empty(2, 2, dtype=torch.int64, device=device)
    return model(sample, numbers.select(0, 0), numbers.select(0, 1)).sample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dit_xl_2_runs_on_the_device_alone(dtype: torch.dtype, launches: Launches) -> None:
    model = fake_dit(dtype)
    fast = compile_fake(model, hrt.Schedule.uniform(model, 6, every=3, order=1))
    call(fast, dtype)  # plans and captures
    launches.take()
    for _ in range(5):
        output = call(fast, dtype)
    names = launches.take()
    assert isinstance(output, FakeTensor)
    assert (output.shape, output.dtype, output.device.type) == ((2, 8, 32, 32), dtype, "cuda")
    assert not {"lift_fresh", "_local_scalar_dense", "item"} & set(names), "nothing crosses between host and device"
    with pytest.raises(RuntimeError, match="beyond the last step: expected 6 steps, got another call"):
        call(fast, dtype)
    fast.reset()
    call(fast, dtype)


def test_pixart_runs_on_the_device_alone(launches: Launches) -> None:
    """Three branches a layer, 120 tokens of text: keys and values made at the run's first step alone."""
    model = fake(PixArtTransformer2DModel(sample_size=32, caption_channels=4096).eval(), torch.bfloat16)
    fast = compile_fake(model, hrt.Schedule.uniform(model, 6, every=3, order=1))
    text = torch.empty(2, 120, 4096, dtype=torch.bfloat16, device="cuda")
    mask, numbers = (torch.empty(2, n, dtype=torch.int64, device="cuda") for n in (120, 2))
    sample = torch.empty(2, 4, 32, 32, dtype=torch.bfloat16, device="cuda")

    def call() -> Counter[str]:
        output = fast(sample, text, numbers.select(0, 0), encoder_attention_mask=mask).sample
        assert (output.shape, output.dtype, output.device.type) == ((2, 8, 32, 32), torch.bfloat16, "cuda")
        return launches.take()

    call()  # plans and captures
    steps = [call() for _ in range(5)]
    assert not {"lift_fresh", "_local_scalar_dense", "item"} & set().union(*steps)
    assert sum(steps[0].values()) < 28 * 8, "modulation alone: 28 layers' keys and values would be 112 launches more"
    report = fast.report().plans[0]
    assert report.launches[1] == report.launches[2] == 5, "patches, positions, one Gap, projection, unpatchify"


def test_launches_of_dit_xl_2(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures to hold: 8 a computed block, 2 for any run of reused branches, 12 around the blocks."""
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", flash)
    eager = fake_dit(torch.bfloat16, "cpu")
    launches.take()
    call(eager, device="cpu")
    theirs = sum(launches.take().values())
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    model = fake_dit(torch.bfloat16)
    fast = compile_fake(model, hrt.Schedule.uniform(model, 4, every=2, order=1))
    call(fast)
    plan = next(iter(fast._plans.values()))
    sample = torch.empty(2, 4, 32, 32, dtype=torch.bfloat16, device="cuda")
    counts = []
    for step in range(4):
        plan.select(step)
        launches.take()
        plan.launch(step, sample)
        counts.append(launches.take())
    full, reused = sum(counts[0].values()), sum(counts[1].values())
    around = reused - 1  # one Gap is all a step that reuses everything does in its blocks
    assert counts[1]["gap"] == 1
    assert around + 3 <= 12, "with the step's number, the sample's copy in and the output's copy out"
    assert full - around - 1 <= 8 * 28
    assert counts[0]["gap"] == 2 * 28 + 1
    assert tuple(sum(c.values()) for c in counts) == fast.report().plans[0].launches
    assert theirs > 4 * full


@pytest.mark.parametrize(("carry", "slots", "launched"), [(0.0, 2, 3), (0.5, 5, 5)])
def test_reuse_of_the_trunk_of_dit_xl_2(carry: float, slots: int, launched: int, launches: Launches) -> None:
    """One Gap, projection and unpatchify; patches and positions with a carry alone. A computed step has a copy more."""
    model = fake_dit(torch.bfloat16)
    plain = compile_fake(model, hrt.Schedule.uniform(model, 8, every=2, order=1))
    trunk = hrt.Schedule.uniform(model, 8, every=2, order=1, level="branches", trunk=True, carry=carry)
    fast = compile_fake(model, trunk)
    for each in (plain, fast):
        call(each)
    without, report = plain.report().plans[0], fast.report().plans[0]
    assert (report.slots, without.slots) == (slots, 112)
    assert report.launches[1] == launched
    assert report.launches[0] == without.launches[0] + 1
    (plan,) = fast._plans.values()
    sample = torch.empty(2, 4, 32, 32, dtype=torch.bfloat16, device="cuda")
    for step in range(4):
        plan.select(step)
        launches.take()
        plan.launch(step, sample)
        assert sum(launches.take().values()) == report.launches[step]


@pytest.mark.parametrize(("order", "share"), [(0, 0.06), (1, 0.10)])
def test_slots_of_dit_xl_2(order: int, share: float, launches: Launches) -> None:
    """Slot memory against the model's, batch 1 with guidance (the paper: under 6 % for plain reuse)."""
    model = fake_dit(torch.bfloat16)
    fast = compile_fake(model, hrt.Schedule.uniform(model, 20, every=2, order=order))
    call(fast)
    report = fast.report().plans[0]
    assert report.slots == 56 * (order + 1)
    assert report.slot_bytes / report.model_bytes < share
    assert report.graphs == (2 if order == 0 else 5)


@pytest.mark.parametrize(
    ("dtype", "device", "match"),
    [
        (torch.float64, "cuda", r"bfloat16 on cuda:0, got torch\.float64 on cuda:0"),
        (torch.bfloat16, "cpu", "on the sample's device, cpu, got cuda:0"),
    ],
)
def test_samples_of_another_dtype_or_device(dtype: torch.dtype, device: str, match: str, launches: Launches) -> None:
    model = fake_dit(torch.bfloat16, num_layers=1)
    fast = compile_fake(model, hrt.Schedule.full(model, 2))
    numbers = torch.empty(2, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match=match):
        fast(torch.empty(2, 4, 32, 32, dtype=dtype, device=device), numbers, numbers)
