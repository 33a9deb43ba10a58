"""Files that are whole or not there, whatever ends their writing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Where to write what is to stand at `path`: it takes that place, on disk, once the block ends without an error.

    Nothing reads a draft; one that a killed process left is hidden, and ends in ``.tmp``.
    """
    draft = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # processes of several machines may share the folder
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
