"""Every pipeline made small, and how each calls its denoiser.

Calls of one step, in turn; ``cond`` in code is a name given to `cache_context`, otherwise the pipeline gives none (and
the class may not have the method: those marked with a star). Timesteps as the denoiser gets them, t being the
scheduler's: a tensor [batch] unless said otherwise. "Counts": the scheduler's `step_index` tells the step.

| pipeline | calls of a step | timestep | scheduler | midway |
| --- | --- | --- | --- | --- |
| flux | `cond` | t / 1000, falling from 1 | flow Euler, counts | |
| flux, true CFG; flux.2 klein | `cond`, `uncond` | t / 1000 | flow Euler, counts | |
| flux, image to image; inpainting | one, unnamed | t / 1000 | flow Euler, counts, `begin_index` 2 | enters at step 2 |
| flux, ControlNet | one, unnamed | t / 1000 | flow Euler, counts | control residuals are 0 from step 3 on |
| flux.2 | one, unnamed | t / 1000 | flow Euler, counts | |
| sd3* | one, [uncond, cond] in its batch | t | flow Euler, counts | |
| sd3, skipped layers* | as sd3; then `skip_layers`, the conditional half alone | t | flow Euler, counts | second call at steps 1 to 4 |
| sd3, guidance cut off* | as sd3 | t | flow Euler, counts | from step 3 on the conditional half alone |
| sd3, image to image; inpainting* | as sd3 | t | flow Euler, counts, `begin_index` 2 | enters at step 2 |
| qwen; qwen, edit | `cond`, `uncond`, texts of other masks | t / 1000 | flow Euler, counts | |
| z-image* | one, lists of samples, [cond..., uncond...] | (1000 - t) / 1000, rising from 0 | flow Euler, counts | |
| z-image, guidance cut off* | as z-image | likewise | flow Euler, counts | from step 3 on the conditional half alone |
| sana* | one, [uncond, cond] | t, scaled by a factor of its config | DPM-Solver++ on flow, counts | |
| chroma | conditional, unconditional, unnamed | t / 1000 | flow Euler, counts | |
| lumina2* | conditional, unconditional, unnamed | 1 - t / 1000, rising from 0 | flow Euler, counts | |
| lumina2, guidance cut off* | as lumina2 | likewise | flow Euler, counts | from step 3 on the conditional one alone |
| pixart* | one, [uncond, cond] | t | DPM-Solver++, counts | |
| wan 2.1 | `cond`, `uncond`, with step_index, sigma, num_inference_steps | t | UniPC on flow, counts | |
| wan 2.2 | as wan 2.1 | t | UniPC on flow, counts | `transformer_2` from step 3 on |
| ltx | `cond_uncond`, [uncond, cond] | t | flow Euler, counts | |
| hunyuan | `cond`, `uncond` | t | flow Euler, counts | |
| cogvideox | `cond_uncond`, [uncond, cond] | t | CogVideoX's DDIM, does not count | |
| sd, sdxl, guidance cut off* | as below | as below | as below | from step 3 on the conditional half alone |
| sd* | one, [uncond, cond] | t, one number | DDIM, does not count | |
| sdxl* | one, [uncond, cond] | t, one number | Euler, counts | |
| unidiffuser* | conditional; on noise for a text | `timestep_img` t; `timestep_text` 0, then 1000 | DPM-Solver++, counts | |
| unidiffuser, joint* | conditional; on noise for a picture; on noise for a text | (img, text): (t, t), (1000, t), (t, 1000) | DPM-Solver++, counts | |

UniDiffuser draws that noise anew at every step, and gives the constant 1000 as a plain number.
"""  # noqa: E501

from __future__ import annotations

from .images import IMAGES
from .parts import Made
from .unets import UNETS
from .videos import VIDEOS

MADE: dict[str, Made] = IMAGES | VIDEOS | UNETS
