"""harmonica_rt: diffusion transformers on a static compute-or-reuse schedule, as compiled programs."""

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
