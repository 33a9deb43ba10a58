"""harmonica_rt: diffusion transformers on a static compute-or-reuse schedule, as compiled programs."""

from .comparing import compare
from .compiled import CompiledTransformer
from .compiling import compile, uncompile
from .models import UnsupportedModelError
from .schedule import Schedule

__version__ = "0.1.0"
__all__ = ["CompiledTransformer", "Schedule", "UnsupportedModelError", "compare", "compile", "uncompile"]
