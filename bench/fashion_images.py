"""Fashion-MNIST as `harmonica learn --objective l2c --images` reads it: images in [-1, 1] and labels.

    python bench/fashion_images.py out/fashion.safetensors

Reads the training images of Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path("/usr/share/datasets/fashion-mnist")


def read(root: Path, name: str, header: int) -> np.ndarray:
    with gzip.open(root / name) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def images(root: Path = ROOT, part: str = "train") -> tuple[Tensor, Tensor]:
    """(images [n, 1, 28, 28] in [-1, 1], labels [n]) of `part`: "train" (60,000) or "t10k" (10,000)."""
    pixels = torch.tensor(read(root, f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28))
    return pixels.float() / 127.5 - 1, torch.tensor(read(root, f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--count", type=int, default=10_000, help="images, in the data set's order")
    arguments = parser.parse_args(argv)
    try:
        pixels, labels = images(arguments.root)
        save_file({"images": pixels[: arguments.count], "labels": labels[: arguments.count]}, arguments.out)
    except OSError as error:
        print(f"error: {error} (Debian's package dataset-fashion-mnist holds the data)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
