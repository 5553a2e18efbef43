"""
A small world with a trained tiny checkpoint, in which it can be seen and measured that a generated voice follows its
reference. Nothing of it is needed to generate real clips.
"""

from .checkpoint import SHIPPED_CHECKPOINT, load_id_lora, load_identity_model
from .demonstration import demonstrate
from .model import Sampler, build_transformer, make_references
from .world import IdentityWorld, Scenes


__all__ = [
    "SHIPPED_CHECKPOINT",
    "IdentityWorld",
    "Sampler",
    "Scenes",
    "build_transformer",
    "demonstrate",
    "load_id_lora",
    "load_identity_model",
    "make_references",
]
