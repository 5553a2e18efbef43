"""ID-LoRA for LTX-2 in diffusers: a prompt, a face image and a short voice recording to one talking video."""

from importlib.metadata import version as _version

from .denoising import TextContext
from .guidance import IdentityGuidance
from .pipeline_ltx2_idlora import LTX2IDLoRAPipeline
from .prompt import IDLoRAPrompt


__all__ = ["IDLoRAPrompt", "IdentityGuidance", "LTX2IDLoRAPipeline", "TextContext"]
__version__ = _version("diffusers-idlora")
