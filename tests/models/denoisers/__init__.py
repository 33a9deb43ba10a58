"""Every denoiser class of diffusers 0.42.1, small, with the arguments of one call of its own pipeline.

`DENOISERS[name].make()` is a model with random parameters and `.call(model, step)` the keyword arguments of its
forward at a step of a sampling loop: the sample is another one at each step, the timestep falls in the units that the
model's pipeline passes, the conditioning stays.
"""

from __future__ import annotations

from tests.models.denoisers.audio import AUDIO
from tests.models.denoisers.image import IMAGE
from tests.models.denoisers.joint import JOINT
from tests.models.denoisers.joint_video import JOINT_VIDEO
from tests.models.denoisers.making import STEPS, Denoiser
from tests.models.denoisers.unets import UNETS
from tests.models.denoisers.video import VIDEO

__all__ = ["CANNOT_RUN", "DENOISERS", "NOT_DENOISERS", "STEPS", "Denoiser"]

DENOISERS: dict[str, Denoiser] = {**IMAGE, **JOINT, **VIDEO, **JOINT_VIDEO, **AUDIO, **UNETS}

NOT_DENOISERS: dict[str, str] = {
    "DreamLiteTransformer2DModel": "the attention inside the blocks of DreamLiteUNetModel",
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive decoder of audio tokens",
    "MotionAdapter": "weights that UNetMotionModel takes over, without a forward",
    "TransformerTemporalModel": "the attention over time inside the blocks of UNets of video",
}

CANNOT_RUN: dict[str, str] = {}
