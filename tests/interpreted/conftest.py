"""Kernels on triton's interpreter. It must be chosen before triton is imported, so these tests are a run of their own:

TRITON_INTERPRET=1 pytest tests/interpreted
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    from .mend import mend, needs_mending

    NEEDED = needs_mending()
    if NEEDED:
        mend()
