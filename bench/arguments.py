"""Types of the commands' arguments."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)
