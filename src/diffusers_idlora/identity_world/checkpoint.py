"""The trained checkpoint of the identity world: a base in diffusers' layout and an ID-LoRA in the package's own."""

import os
from pathlib import Path

import torch
from diffusers import LTX2VideoTransformer3DModel

from ..lora import check_adapter, load_adapter, lora_config
from ..pipeline_ltx2_idlora import LTX2IDLoRAPipeline


# Made by `make identity-world`, which also writes the hashes of its files beside it.
SHIPPED_CHECKPOINT = Path(__file__).parent / "checkpoint"
BASE_NAME, ADAPTER_NAME, HASHES_NAME = "transformer", "id_lora", "sha256.json"


def load_identity_model(
    folder: str | os.PathLike = SHIPPED_CHECKPOINT, with_adapter: bool = True
) -> LTX2VideoTransformer3DModel:
    """
    Loads a base, and its ID-LoRA as the pipeline loads one.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Where they are; by default the checkpoint in this package.
        with_adapter (`bool`, *optional*, defaults to `True`): Whether the ID-LoRA is loaded too.

    Returns:
        `LTX2VideoTransformer3DModel`: In float32 and eval mode.

    Raises:
        ValueError: If the adapter does not fit the base.
    """
    folder = Path(folder)
    transformer = LTX2VideoTransformer3DModel.from_pretrained(folder / BASE_NAME, dtype=torch.float32)
    if with_adapter:
        load_id_lora(transformer, folder / ADAPTER_NAME)
    return transformer.eval()


def load_id_lora(transformer: LTX2VideoTransformer3DModel, source: str | os.PathLike) -> None:
    """
    Loads an adapter into a transformer as the pipeline does, whose other components this world has none of.

    Args:
        transformer (`LTX2VideoTransformer3DModel`): The base.
        source (`str` or `os.PathLike`): The adapter's file or folder.

    Raises:
        ValueError: If it does not fit the base.
    """
    state_dict, metadata = load_adapter(source)
    check_adapter(state_dict, metadata, transformer)
    LTX2IDLoRAPipeline.load_lora_into_transformer(state_dict, transformer, metadata=lora_config(metadata))
    # Half precision weights are for the file; so small a model computes in float32 on any machine.
    transformer.float()
