"""
The recipes: settings of a call that belong together, as data (method sections 4 and 5).

```py
pipe(prompt, image=face, reference_audio=voice, **RECIPES["distilled"])
pipe(prompt, image=face, reference_audio=voice, **RECIPES["distilled"] | {"identity_guidance_scale": 0.5})
```
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES


NUM_FRAMES = 121
# Spatio-temporal guidance perturbs this block, or the last one of a smaller model.
STG_BLOCK = 29
# One-stage and two-stage shift their noise levels as if for this many video tokens, whatever the size.
SHIFT_TOKENS = 4096

# Identity guidance is left out where it is 3.0 or what the adapter's own metadata recommend.
ONE_STAGE: Mapping[str, Any] = MappingProxyType(
    {
        "num_inference_steps": 30,
        "sampler": None,
        "sigma_shift_tokens": SHIFT_TOKENS,
        "guidance_scale": 3.0,
        "audio_guidance_scale": 7.0,
        "cfg_star": False,
        "stg_scale": 1.0,
        "modality_scale": 3.0,
        "guidance_rescale": 0.0,
    }
)
TWO_STAGE: Mapping[str, Any] = MappingProxyType(
    ONE_STAGE | {"distilled_scales": (0.0, 0.8), "stage_2_sigmas": tuple(STAGE_2_DISTILLED_SIGMA_VALUES)}
)
# Of LTX-2.3. The "rescale" factors that other tools list for it only switch CFG-star on.
HQ: Mapping[str, Any] = MappingProxyType(
    TWO_STAGE
    | {
        "num_inference_steps": 15,
        "sampler": "res_2s",
        "sigma_shift_tokens": None,
        "cfg_star": True,
        "stg_scale": 0.0,
        "distilled_scales": (0.25, 0.5),
    }
)
# For a distilled checkpoint, or a base with the distilled LoRA among its active adapters.
DISTILLED: Mapping[str, Any] = MappingProxyType(
    {
        "sigmas": tuple(DISTILLED_SIGMA_VALUES),
        "guidance_scale": 1.0,
        "audio_guidance_scale": 1.0,
        "identity_guidance_scale": 1.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
    }
)

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"one-stage": ONE_STAGE, "two-stage": TWO_STAGE, "hq": HQ, "distilled": DISTILLED}
)
# These need `LTX2IDLoRATwoStagePipeline` with its upsampler and the distilled LoRA. The others are of one stage; with
# two, "distilled" needs `distilled_scales` besides, or the distilled LoRA would be off in stage 1.
TWO_STAGE_RECIPES = frozenset({"two-stage", "hq"})
