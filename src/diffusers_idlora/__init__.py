"""ID-LoRA for LTX-2 in diffusers: a prompt, a face image and a short voice recording to one talking video."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .caches import enable_first_block_cache
    from .continuation import join_clips
    from .denoising import TextContext
    from .guidance import GuidanceWindow, IdentityGuidance
    from .inputs import SpeakerTurn
    from .pipeline_ltx2_idlora import LTX2IDLoRAPipeline
    from .pipeline_two_stage import LTX2IDLoRATwoStagePipeline
    from .prompt import IDLoRAPrompt
    from .recipes import RECIPES
    from .schedulers import LTX2Res2sScheduler

# Imported on first use, so that the command line answers without loading torch.
_HOMES = {
    "GuidanceWindow": "guidance",
    "IDLoRAPrompt": "prompt",
    "IdentityGuidance": "guidance",
    "LTX2IDLoRAPipeline": "pipeline_ltx2_idlora",
    "LTX2IDLoRATwoStagePipeline": "pipeline_two_stage",
    "LTX2Res2sScheduler": "schedulers",
    "RECIPES": "recipes",
    "SpeakerTurn": "inputs",
    "TextContext": "denoising",
    "enable_first_block_cache": "caches",
    "join_clips": "continuation",
}

__all__ = [
    "GuidanceWindow",
    "IDLoRAPrompt",
    "IdentityGuidance",
    "LTX2IDLoRAPipeline",
    "LTX2IDLoRATwoStagePipeline",
    "LTX2Res2sScheduler",
    "RECIPES",
    "SpeakerTurn",
    "TextContext",
    "enable_first_block_cache",
    "join_clips",
]
__version__ = _version("diffusers-idlora")


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
