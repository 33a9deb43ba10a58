"""What pipelines return, as numbers: frames of images and videos, and how near they are to others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .measuring import pooled_psnr, ssim

Frames = np.ndarray  # float32 [frames, height, width, 3] in [0, 1]; an image is one frame
FRAMES_AT_ONCE = 8


def samples_of(output: Any) -> list[Frames]:
    """Images or videos of a pipeline's output, whatever they come as: arrays, tensors, PIL's, lists of these.

    Raises:
        TypeError: the output has neither images nor frames.
    """
    videos = getattr(output, "frames", None)
    made = getattr(output, "images", None) if videos is None else videos
    if made is None and isinstance(output, (tuple, list)):
        made = output[0]
    if made is None:
        raise TypeError(f"expected an output with images or frames, got {type(output).__name__}")
    return [_frames(sample) for sample in made]


def _frames(sample: Any) -> Frames:
    if isinstance(sample, (list, tuple)):
        return np.concatenate([_frames(frame) for frame in sample])
    if isinstance(sample, Tensor):
        sample = sample.detach().float().cpu().movedim(-3, -1).numpy()
    array = np.asarray(sample)
    if array.dtype == np.uint8:
        array = array / 255
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4):
        raise TypeError(f"expected pictures [height, width, channels], or frames of them, got {list(array.shape)}")
    array = array if array.ndim == 4 else array[None]
    array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3]
    return np.clip(array, 0, 1).astype(np.float32)


def middle(frames: Frames) -> np.ndarray:
    """The frame halfway, to be shown: uint8 [height, width, 3]."""
    return np.round(frames[len(frames) // 2] * 255).astype(np.uint8)


def psnr_of(frames: Frames, reference: Frames) -> float:
    """In dB, of the error over all frames."""
    return pooled_psnr(torch.from_numpy(frames), torch.from_numpy(reference), span=1.0)


def ssim_of(frames: Frames, reference: Frames) -> float:
    """Mean over the frames."""
    return _mean_over_frames(lambda x, y: ssim(x, y, span=1.0), frames, reference)


Distance = Callable[[Frames, Frames], float]


def perceptual_distance() -> tuple[Distance | None, str]:
    """LPIPS (Zhang et al. 2018, AlexNet) by a package for it, else None; and which it is, or why there is none."""
    if importlib.util.find_spec("lpips") is not None:
        return _ready("lpips", _of_lpips)
    if importlib.util.find_spec("torchmetrics") is not None and importlib.util.find_spec("torchvision") is not None:
        return _ready("torchmetrics", _of_torchmetrics)
    return None, "not installed (pip install lpips)"


def _ready(package: str, make: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> tuple[Distance | None, str]:
    try:
        distance = make()
    except OSError as error:  # its weights come from a network
        return None, f"{package} is installed, its weights are not: {error}"
    return lambda frames, reference: _mean_over_frames(distance, frames, reference), package


def _of_lpips() -> Callable[[Tensor, Tensor], Tensor]:
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return network(2 * x - 1, 2 * y - 1)

    return distance


def _of_torchmetrics() -> Callable[[Tensor, Tensor], Tensor]:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True, reduction="mean")

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([network(a[None], b[None]) for a, b in zip(x, y)])

    return distance


def _mean_over_frames(of: Callable[[Tensor, Tensor], Tensor], frames: Frames, reference: Frames) -> float:
    """A few frames at once: what is between may be many times as large."""
    x, y = (torch.from_numpy(f).movedim(-1, 1).contiguous() for f in (frames, reference))
    parts = [of(a, b).double().flatten() for a, b in zip(x.split(FRAMES_AT_ONCE), y.split(FRAMES_AT_ONCE))]
    return torch.cat(parts).mean().item()
