"""Random cases of reuse against an oracle that shares nothing with the runtime: `python bench/run_fuzz.py`.

A `Case` says all of itself, `check` plays it and raises if the runtime is wrong: scripts of failures are these two.
"""

from .case import Case, Change, Plan, Recompile, Run
from .playing import Wrong, check, play

__all__ = ["Case", "Change", "Plan", "Recompile", "Run", "Wrong", "check", "play"]
