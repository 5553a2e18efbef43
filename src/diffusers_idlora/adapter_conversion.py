"""
From one key format of an adapter to the other and back, without loss.

Tools that read the released format take alpha to be equal to the rank. An adapter with another alpha therefore gets
its scale folded into `lora_B` on the way there; the file's metadata says so and keeps what is needed to undo it.
"""

import json
import math
from collections.abc import Mapping

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import logging
from peft.utils.other import get_pattern_key

from .lora import inspect_adapter, lora_config, to_diffusers_keys, to_original_keys


logger = logging.get_logger(__name__)

FORMATS = ("original", "diffusers")
CONVERSION_METADATA_KEY = "idlora_conversion"

_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


def convert_adapter(
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    to: str | None = None,
    *,
    name: str = "adapter",
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Puts an adapter into the other key format.

    Where alpha differs from the rank, the released format gets `lora_B * alpha / rank`, and the metadata a block
    `idlora_conversion`, with which the way back undoes it bit for bit: `lora_B` is kept in float32 where its own type
    would round the product.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            The tensors, as [`~lora.load_adapter`] returns them.
        metadata (`dict[str, str]`, *optional*):
            The file metadata, as [`~lora.load_adapter`] returns it.
        to (`str`, *optional*):
            `"original"` for the released key format, which ComfyUI reads, or `"diffusers"`. Left out: the one that the
            adapter is not in.
        name (`str`, *optional*, defaults to `"adapter"`):
            What error messages call the adapter.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, str]]`: The tensors under their new keys, and their file metadata.

    Raises:
        ValueError: If it is no LoRA of an LTX-2 transformer, or has no form in the wanted format.
    """
    if to not in (None, *FORMATS):
        raise ValueError(f"`to` is {to!r}; give one of {', '.join(FORMATS)}.")
    metadata = dict(metadata or {})
    is_original = inspect_adapter(state_dict, name=name).format == "original"
    if to == "original" or (to is None and not is_original):
        return _to_original(state_dict, metadata, name)
    return _to_diffusers(state_dict, metadata, name)


def _to_original(
    state_dict: Mapping[str, torch.Tensor], metadata: dict[str, str], name: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    other = [key for key in state_dict if not key.endswith((_LORA_A, _LORA_B))]
    if other:
        raise ValueError(
            f"`{name}` has `{other[0]}`, for which the released format has no name; keep a DoRA, or a LoRA with "
            "biases, in diffusers' format."
        )
    scales = _scales(state_dict, metadata, name)
    state_dict = to_original_keys(state_dict)
    if all(scale == 1 for scale in scales.values()):
        return state_dict, metadata
    scales = dict(zip(_lora_b_keys(state_dict), scales.values()))
    folded = {key: _fold(tensor, scales.get(key, 1.0)) for key, tensor in state_dict.items()}
    rounded = [key for key in scales if not torch.equal(_unfold(folded, key, scales[key]), state_dict[key])]
    if rounded:
        logger.warning(f"`{name}` has {len(rounded)} tensors, such as `{rounded[0]}`, that its scale rounds.")
    return folded, _folded_metadata(metadata, name)


def _to_diffusers(
    state_dict: Mapping[str, torch.Tensor], metadata: dict[str, str], name: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    state_dict = to_diffusers_keys(state_dict)
    if CONVERSION_METADATA_KEY not in metadata:
        return state_dict, metadata
    try:
        metadata[LORA_ADAPTER_METADATA_KEY] = json.loads(metadata.pop(CONVERSION_METADATA_KEY))["before"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"`{name}` has `{CONVERSION_METADATA_KEY}` metadata that can't be read, so its scale can't be told: "
            "convert it again from the file that it was made of."
        ) from error
    scales = dict(zip(_lora_b_keys(state_dict), _scales(state_dict, metadata, name).values()))
    unfolded = {key: _unfold(state_dict, key, scales[key]) for key in scales}
    return {key: unfolded.get(key, tensor) for key, tensor in state_dict.items()}, metadata


def _lora_b_keys(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    return [key for key in state_dict if key.endswith(_LORA_B)]


def _scales(state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str], name: str) -> dict[str, float]:
    """Maps each `lora_B` key to the factor that its layer acts with, as peft computes it."""
    config = lora_config(metadata, name=name) or {}
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    alphas = config.get("alpha_pattern") or {}
    scales = {}
    for key in _lora_b_keys(state_dict):
        # Without the prefix of its format, as peft's patterns are matched.
        module, rank = key.removesuffix(_LORA_B).split(".", 1)[1], state_dict[key].shape[1]
        alpha = alphas.get(get_pattern_key(alphas, module), config.get("lora_alpha", rank))
        scales[key] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


def _fold(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    # float64, so that the result is rounded once.
    product = tensor.double() * scale
    folded = product.to(tensor.dtype)
    is_exact = torch.equal((folded.double() / scale).to(tensor.dtype), tensor)
    return folded if is_exact else product.float()


def _unfold(state_dict: Mapping[str, torch.Tensor], key: str, scale: float) -> torch.Tensor:
    # Folding leaves `lora_A` as it was, which tells the type that `lora_B` had.
    dtype = state_dict[key.removesuffix(_LORA_B) + _LORA_A].dtype
    return (state_dict[key].double() / scale).to(dtype)


def _folded_metadata(metadata: dict[str, str], name: str) -> dict[str, str]:
    config = lora_config(metadata, name=name)
    neutral = {
        "transformer.lora_alpha": config.get("transformer.r"),
        "transformer.alpha_pattern": config.get("transformer.rank_pattern") or {},
        "transformer.use_rslora": False,
    }
    block = {"note": "lora_B holds the scale alpha / rank", "before": metadata[LORA_ADAPTER_METADATA_KEY]}
    return {
        **metadata,
        LORA_ADAPTER_METADATA_KEY: json.dumps({**config, **neutral}, indent=2, sort_keys=True),
        CONVERSION_METADATA_KEY: json.dumps(block),
    }
