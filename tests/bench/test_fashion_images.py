"""The data set's files as L2C's training reads them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench import fashion_images


def test_files_become_images_and_labels(tmp_path: Path) -> None:
    pixels = np.arange(3 * 784).astype(np.uint8)
    for name, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, np.array([7, 0, 9], np.uint8))):
        with gzip.open(tmp_path / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + values.tobytes())
    assert fashion_images.main([str(tmp_path / "out.safetensors"), "--root", str(tmp_path), "--count", "2"]) == 0
    found = load_file(tmp_path / "out.safetensors")
    assert found["images"].shape == (2, 1, 28, 28) and found["labels"].tolist() == [7, 0]
    expected = torch.tensor(pixels[:1568].astype(np.float32)).view(2, 1, 28, 28) / 127.5 - 1
    assert torch.equal(found["images"], expected)


def test_without_the_data_it_names_the_package(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fashion_images.main([str(tmp_path / "out.safetensors"), "--root", str(tmp_path)]) == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().err
