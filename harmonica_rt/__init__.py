"""Diffusion models that sample faster, on a fixed plan of what each step computes and what it reuses.

    import harmonica_rt as hrt

    schedule = hrt.Schedule.uniform(pipe.transformer, steps=28, every=2)  # which steps compute, or .load(file)
    pipe = hrt.compile(pipe, schedule)  # the pipeline's own call, with a faster denoiser
    images = pipe("a lighthouse at dusk", num_inference_steps=28).images
    print(pipe.transformer.report())  # what it takes: level, slots, bytes, MACs
    hrt.uncompile(pipe)

`compare` shows what schedules do to a pipeline, `learn` (extra `train`; `pydoc harmonica_rt.learn`) makes one for it.
The same from a shell: `harmonica try`, `harmonica learn`. Errors name what was expected and what came.
"""

from typing import Any

from .comparing import compare
from .compiled import CompiledTransformer
from .compiling import compile, uncompile
from .models import UnsupportedModelError
from .schedule import Schedule
from .version import __version__ as __version__

__all__ = ["CompiledTransformer", "Schedule", "UnsupportedModelError", "compare", "compile", "learn", "uncompile"]


def __getattr__(name: str) -> Any:
    if name == "learn":  # it needs the extra `train`
        from .train.pipeline import learn

        return learn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
