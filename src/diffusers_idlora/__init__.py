"""ID-LoRA for LTX-2 in diffusers: a prompt, a face image and a short voice recording to one talking video."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .denoising import TextContext
    from .guidance import IdentityGuidance
    from .pipeline_ltx2_idlora import LTX2IDLoRAPipeline
    from .prompt import IDLoRAPrompt

# Imported on first use, so that the command line answers without loading torch.
_HOMES = {
    "IDLoRAPrompt": "prompt",
    "IdentityGuidance": "guidance",
    "LTX2IDLoRAPipeline": "pipeline_ltx2_idlora",
    "TextContext": "denoising",
}

__all__ = ["IDLoRAPrompt", "IdentityGuidance", "LTX2IDLoRAPipeline", "TextContext"]
__version__ = _version("diffusers-idlora")


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
