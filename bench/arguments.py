"""The commands' arguments."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def campaign_arguments(parser: argparse.ArgumentParser, each: str) -> None:
    """Arguments of a campaign: its seed, and the results file that gets a line of JSON an `each`."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"a file that gets a line of JSON a {each}")
