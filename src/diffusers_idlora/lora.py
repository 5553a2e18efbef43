"""
Adapter files: reading, describing, checking against a transformer, renaming, writing.

Two key formats exist for one set of weights. Released adapters use `diffusion_model.<module>.lora_A.weight` and store
no alpha; diffusers writes `transformer.<module>.lora_A.weight` and, in the file's metadata, the LoRA's configuration.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers
from diffusers.utils import logging
from diffusers.utils.peft_utils import get_peft_kwargs
from diffusers.utils.torch_utils import unwrap_module

from .adapter_files import find_adapter_file, read_safetensors
from .attention_processor import is_first_generation


logger = logging.get_logger(__name__)

IDLORA_METADATA_KEY = "idlora"

# The released files say nothing of their base, and the shapes of the adapted modules need not tell it.
RELEASED_ADAPTERS = {
    "AviadDahan/ID-LoRA-CelebVHQ": ("ltx-2", "Lightricks/LTX-2"),
    "AviadDahan/ID-LoRA-TalkVid": ("ltx-2", "Lightricks/LTX-2"),
    "AviadDahan/LTX-2.3-ID-LoRA-CelebVHQ-3K": ("ltx-2.3", "diffusers/LTX-2.3-Diffusers"),
    "AviadDahan/LTX-2.3-ID-LoRA-TalkVid-3K": ("ltx-2.3", "diffusers/LTX-2.3-Diffusers"),
}

_ORIGINAL_PREFIX = "diffusion_model."
_DIFFUSERS_PREFIX = "transformer."
# Text connectors are a component of their own, to which diffusers takes these keys.
_CONNECTOR_PREFIXES = ("text_embedding_projection.", "connectors.")

_WEIGHT_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_BLOCK_MODULE = re.compile(r"transformer_blocks\.(?P<block>\d+)\.(?P<module>.+)")
# Modules that have one name in both formats.
_COMMON_MODULE = re.compile(
    r"transformer_blocks\.\d+\."
    r"((audio_)?attn[12]|audio_to_video_attn|video_to_audio_attn|(audio_)?ff)\.(to_(q|k|v|out\.0|gate_logits)|net\..+)"
    r"\.lora_.+"
)
# Of the video and the audio stream, in the released checkpoints of both generations.
_RELEASED_WIDTHS = (4096, 2048)
_SECOND_GENERATION_MODULE = re.compile(r"to_gate_logits|prompt_adaln")
# The layers whose input is the video stream itself, or the audio stream itself.
_VIDEO_INPUT = re.compile(
    r"attn1\.to_[qkv]|attn2\.to_q|audio_to_video_attn\.to_q|video_to_audio_attn\.to_[kv]|ff\.net\.0\.proj"
)
_AUDIO_INPUT = re.compile(
    r"audio_attn1\.to_[qkv]|audio_attn2\.to_q|audio_to_video_attn\.to_[kv]|video_to_audio_attn\.to_q|audio_ff\.net\.0\.proj"
)


@dataclass(frozen=True)
class AdapterInfo:
    """
    What an adapter is, read from its weights and metadata.

    Args:
        format (`str`):
            `"original"` for the released key format (`diffusion_model.`), `"diffusers"` for `transformer.`.
        rank (`int` or `tuple[int, ...]`):
            The rank, or all distinct ranks in ascending order.
        alpha (`float`, `tuple[float, ...]` or `None`):
            The alpha stored in the file, or all distinct ones. `None` if none is stored: alpha equals the rank then,
            so the LoRA acts unscaled.
        dtype (`str`):
            Type of the weights, such as `"bfloat16"`; several are joined by commas.
        num_parameters (`int`):
            Number of LoRA parameters in the transformer.
        num_blocks (`int`):
            Number of transformer blocks with at least one adapted module.
        modules (`dict[str, int]`):
            Names of the adapted modules within a block, and in how many blocks each is adapted. A module outside the
            blocks has its full name and counts 1.
        touches_audio (`bool`):
            Whether a module of the audio stream, or one between the streams, is adapted.
        video_dim (`int`, *optional*):
            Width of the video stream it was made for; `None` if the adapted modules do not show it.
        audio_dim (`int`, *optional*):
            Width of the audio stream it was made for; `None` if the adapted modules do not show it.
        generation (`str`, *optional*):
            `"ltx-2"` or `"ltx-2.3"`, as the metadata says, or as modules show that only LTX-2.3 has.
        base_model (`str`, *optional*):
            The base checkpoint it was made for, as the metadata says.
        metadata (`dict`):
            The `idlora` block of the file's metadata, or an empty dict.
    """

    format: str
    rank: int | tuple[int, ...]
    alpha: float | tuple[float, ...] | None
    dtype: str
    num_parameters: int
    num_blocks: int
    modules: dict[str, int]
    touches_audio: bool
    video_dim: int | None = None
    audio_dim: int | None = None
    generation: str | None = None
    base_model: str | None = None
    metadata: dict = field(default_factory=dict)

    @property
    def made_for(self) -> str:
        """The base in words, such as `"LTX-2.3 (video width 4096, audio width 2048)"`."""
        widths = {"video": self.video_dim, "audio": self.audio_dim}
        widths = ", ".join(f"{stream} width {width}" for stream, width in widths.items() if width)
        names = [self.base_model, self.generation and self.generation.upper()]
        fits_both = (self.video_dim or _RELEASED_WIDTHS[0], self.audio_dim or _RELEASED_WIDTHS[1]) == _RELEASED_WIDTHS
        unnamed = "LTX-2 or LTX-2.3, whose shapes it fits alike" if fits_both else "a base that the file does not name"
        base = ", ".join(filter(None, names)) or unnamed
        return f"{base} ({widths})" if widths else base

    def rows(self) -> list[tuple[str, str]]:
        """Returns the facts as `(label, text)` rows of a table."""
        key = {"original": f"original (`{_ORIGINAL_PREFIX}`)", "diffusers": f"diffusers (`{_DIFFUSERS_PREFIX}`)"}
        return [
            ("Format", key[self.format]),
            ("Made for", self.made_for),
            ("Rank", _join(self.rank)),
            ("Alpha", "not stored: equal to the rank" if self.alpha is None else _join(self.alpha)),
            ("Type", self.dtype),
            ("Parameters", f"{self.num_parameters:,}"),
            ("Blocks", str(self.num_blocks)),
            ("Audio modules", "yes" if self.touches_audio else "none: a plain LoRA, the voice will not follow"),
            ("Modules", "\n".join(f"{module} ({count})" for module, count in self.modules.items())),
        ]


def load_adapter(
    source: str | os.PathLike | Mapping[str, torch.Tensor], *, name: str = "adapter", **kwargs
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Reads an adapter's tensors and file metadata.

    Tensors named `.alpha` are moved into the metadata in the form that diffusers reads (see [`lora_config`]), so the
    weights stay as they are and keep their scale. `lora_down` and `lora_up` become `lora_A` and `lora_B`.

    Args:
        source (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
            A safetensors file, a folder, a repository on the Hub, or the tensors themselves.
        name (`str`, *optional*, defaults to `"adapter"`):
            What error messages call this argument.
        kwargs:
            Where to look in a folder or repository, as in [`find_adapter_file`].

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, str]]`: The tensors on the CPU, and the file's metadata. For a
        released repository, which stores none, the metadata has an `idlora` block that names its base.

    Raises:
        ValueError: If there is no such file, or it is not a readable safetensors file.
    """
    if isinstance(source, Mapping):
        return _alpha_to_metadata(_peft_names(source), {}, name)
    state_dict, metadata = read_safetensors(find_adapter_file(source, name=name, **kwargs), name)
    if str(source) in RELEASED_ADAPTERS:
        generation, base_model = RELEASED_ADAPTERS[str(source)]
        block = json.dumps({"generation": generation, "base_model": base_model})
        metadata.setdefault(IDLORA_METADATA_KEY, block)
    return _alpha_to_metadata(_peft_names(state_dict), metadata, name)


def inspect_adapter(
    source: str | os.PathLike | Mapping[str, torch.Tensor], *, name: str = "adapter", **kwargs
) -> AdapterInfo:
    """
    Reads an adapter and says what it is; the arguments are those of [`load_adapter`].

    Raises:
        ValueError: If it can't be read, or is not a LoRA of an LTX-2 transformer.
    """
    state_dict, metadata = load_adapter(source, name=name, **kwargs)
    return _adapter_info(state_dict, _lora_layers(state_dict, name), metadata, name)


def check_adapter(
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None,
    transformer: LTX2VideoTransformer3DModel,
    *,
    name: str = "adapter",
) -> AdapterInfo:
    """
    Checks that an adapter fits a transformer, before anything is loaded into it.

    diffusers only logs when an adapter fits no module. Here that is an error; a plain LoRA and weights that would be
    left out are warnings.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            The tensors, as [`load_adapter`] returns them.
        metadata (`dict[str, str]`, *optional*):
            The file metadata, as [`load_adapter`] returns it.
        transformer (`LTX2VideoTransformer3DModel`):
            The model to load into; it may have other adapters already.
        name (`str`, *optional*, defaults to `"adapter"`):
            What messages call the adapter.

    Returns:
        [`AdapterInfo`]: What the adapter is.

    Raises:
        ValueError: If it is not a LoRA of an LTX-2 transformer, or was made for another base than this one.
    """
    layers = _lora_layers(state_dict, name)
    info = _adapter_info(state_dict, layers, metadata or {}, name)
    model = unwrap_module(transformer)
    this_base = _describe(model)
    advice = f"it was made for {info.made_for}, so load it on that base or take an adapter made for {this_base}."

    unknown = _check_modules(layers, model, name, advice)
    other_generation = info.generation not in (None, transformer_generation(model))
    if len(unknown) == len(layers) or (unknown and other_generation):
        raise ValueError(f"`{name}` adapts `{unknown[0]}`, which this transformer does not have: {advice}")
    if unknown:
        _warn_ignored(unknown, "modules, which this transformer does not have", name)
    elif other_generation:
        logger.warning(f"`{name}` was made for {info.made_for}, but is loaded into {this_base}; its shapes fit.")
    _check_other_keys(state_dict, name)
    if not info.touches_audio:
        logger.warning(
            f"`{name}` touches no audio module: it is a plain LoRA, and the voice will not follow a reference."
        )
    return info


def transformer_generation(transformer: LTX2VideoTransformer3DModel) -> str:
    """Returns `"ltx-2.3"` for a transformer of LTX-2.3 or later, else `"ltx-2"`."""
    return "ltx-2" if is_first_generation(transformer) else "ltx-2.3"


def lora_config(metadata: Mapping[str, str] | None, *, name: str = "adapter") -> dict | None:
    """
    Reads the LoRA configuration that diffusers keeps in a file's metadata.

    Args:
        metadata (`dict[str, str]`, *optional*):
            File metadata, as [`load_adapter`] returns it.
        name (`str`, *optional*, defaults to `"adapter"`):
            What error messages call the adapter.

    Returns:
        `dict` or `None`: peft's `LoraConfig` arguments under `transformer.` keys, as diffusers' `lora_state_dict`
        returns them; `None` if the file has none, in which case alpha equals the rank.

    Raises:
        ValueError: If the metadata is not valid JSON.
    """
    return _json_block(metadata, LORA_ADAPTER_METADATA_KEY, name)


def to_diffusers_keys(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames released keys (`diffusion_model.`) to those of diffusers (`transformer.`); the tensors stay the same.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            An adapter, all in the released format or all in that of diffusers.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors, in the same order.

    Raises:
        ValueError: If a key is in neither format, or two keys would get one name.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        (new_key,) = _convert_non_diffusers_ltx2_lora_to_diffusers({key: tensor}) or (key,)
        if not new_key.startswith(_DIFFUSERS_PREFIX) or new_key in renamed:
            raise ValueError(
                f"`state_dict` has the key `{key}`, which has no name of its own in diffusers' format: leave it out."
            )
        renamed[new_key] = tensor
    return renamed


def to_original_keys(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames diffusers' keys (`transformer.`) to those of the released adapters (`diffusion_model.`).

    Only attention and feed-forward layers of the blocks are taken, which is all that an ID-LoRA touches: their names
    are the same in both formats. Tools that read this format take alpha to be equal to the rank.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            An adapter, all in the released format or all in that of diffusers.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors, in the same order.

    Raises:
        ValueError: If a key belongs to another module, or two keys would get one name.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        path = key.removeprefix(_ORIGINAL_PREFIX).removeprefix(_DIFFUSERS_PREFIX)
        new_key = _ORIGINAL_PREFIX + path
        if path == key or not _COMMON_MODULE.fullmatch(path) or new_key in renamed:
            raise ValueError(
                f"`state_dict` has the key `{key}`, which has no name of its own in the released format: leave it "
                "out, or keep the adapter in diffusers' format."
            )
        renamed[new_key] = tensor
    return renamed


def _json_block(metadata: Mapping[str, str] | None, key: str, name: str) -> dict | None:
    if not metadata or not metadata.get(key):
        return None
    try:
        block = json.loads(metadata[key])
    except ValueError:
        block = None
    if not isinstance(block, dict):
        raise ValueError(
            f"`{name}` has {metadata[key]!r} as its `{key}` metadata, which is no JSON object: mend the file."
        )
    return block


# Names


def _peft_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {key: key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.") for key in state_dict}
    return {names[key]: tensor for key, tensor in state_dict.items()}


def _is_original(state_dict: Mapping[str, torch.Tensor]) -> bool:
    return any(key.startswith(_ORIGINAL_PREFIX) for key in state_dict)


def _transformer_keys(state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Maps the transformer's own key to the given key, for each key that diffusers would load into it."""
    if _is_original(state_dict):
        names = _convert_non_diffusers_ltx2_lora_to_diffusers({key: key for key in state_dict})
    else:
        names = {key: key for key in state_dict if key.startswith(_DIFFUSERS_PREFIX)}
    return {key.removeprefix(_DIFFUSERS_PREFIX): given for key, given in names.items()}


def _lora_layers(state_dict: Mapping[str, torch.Tensor], name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Maps module paths of the transformer to `lora_A` `[rank, in]` and `lora_B` `[out, rank]`."""
    if not any(_WEIGHT_KEY.fullmatch(key) for key in state_dict):
        keys = f"only keys such as `{next(iter(state_dict))}`" if state_dict else "nothing at all"
        raise ValueError(f"`{name}` holds no LoRA (`lora_A.weight`, `lora_B.weight`), {keys}: give a LoRA file.")
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, given in _transformer_keys(state_dict).items():
        if match := _WEIGHT_KEY.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"]] = state_dict[given]
    if not sides:
        raise ValueError(
            f"`{name}` has keys such as `{next(iter(state_dict))}`, but only those that begin with "
            f"`{_ORIGINAL_PREFIX}` (released files) or `{_DIFFUSERS_PREFIX}` (diffusers) are read: rename its keys."
        )
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(
                f"`{name}` has only `lora_{min(pair)}` for `{module}`: the file is incomplete, so fetch it again."
            )
        shapes = [tuple(pair[side].shape) for side in "AB"]
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise ValueError(
                f"`{name}` has lora_A {shapes[0]} and lora_B {shapes[1]} for `{module}`, which are not the "
                "(rank, inputs) and (outputs, rank) of a linear layer: export it again."
            )
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _alpha_to_metadata(
    state_dict: dict[str, torch.Tensor], metadata: dict[str, str], name: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Takes `.alpha` tensors, which diffusers refuses, out of the weights and into the LoRA configuration."""
    keys = [key for key in state_dict if key.endswith(".alpha")]
    if not keys:
        return state_dict, metadata
    weights = {key: tensor for key, tensor in state_dict.items() if key not in keys}
    if LORA_ADAPTER_METADATA_KEY in metadata or any(key.startswith(_CONNECTOR_PREFIXES) for key in state_dict):
        raise ValueError(
            f"`{name}` has `{keys[0]}` beside a stored LoRA configuration or connector weights, so that its scale is "
            "unclear: export it with diffusers' `save_lora_weights`."
        )
    layers = _lora_layers(weights, name)
    given = _transformer_keys(state_dict)
    alphas = {
        f"{module}.alpha": float(state_dict[given[f"{module}.alpha"]]) if f"{module}.alpha" in given else len(lora_a)
        for module, (lora_a, _) in layers.items()
    }
    ranks = {f"^{module}.lora_B.weight": len(lora_a) for module, (lora_a, _) in layers.items()}
    config = get_peft_kwargs(ranks, alphas, {f"{module}.lora_A.weight": None for module in layers})
    config["target_modules"] = sorted(config["target_modules"])
    block = {f"{_DIFFUSERS_PREFIX}{key}": value for key, value in config.items()}
    return weights, {**metadata, LORA_ADAPTER_METADATA_KEY: json.dumps(block)}


# Facts and checks


def _adapter_info(
    state_dict: Mapping[str, torch.Tensor],
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    metadata: Mapping[str, str],
    name: str,
) -> AdapterInfo:
    in_block = {module: _BLOCK_MODULE.fullmatch(module) for module in layers}
    modules = Counter(match["module"] if match else module for module, match in in_block.items())
    widths = {match["module"]: layers[module][0].shape[1] for module, match in in_block.items() if match is not None}
    block = _json_block(metadata, IDLORA_METADATA_KEY, name) or {}
    config = lora_config(metadata, name=name) or {}
    alphas = {config.get("transformer.lora_alpha"), *(config.get("transformer.alpha_pattern") or {}).values()} - {None}
    is_second = any(_SECOND_GENERATION_MODULE.search(module) for module in modules)
    tensors = [tensor for pair in layers.values() for tensor in pair]
    return AdapterInfo(
        format="original" if _is_original(state_dict) else "diffusers",
        rank=_one_or_all({len(lora_a) for lora_a, _ in layers.values()}),
        alpha=_one_or_all(alphas) if alphas else None,
        dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        num_parameters=sum(tensor.numel() for tensor in tensors),
        num_blocks=len({match["block"] for match in in_block.values() if match}),
        modules=dict(modules),
        touches_audio=any("audio" in module for module in modules),
        video_dim=next((width for module, width in widths.items() if _VIDEO_INPUT.fullmatch(module)), None),
        audio_dim=next((width for module, width in widths.items() if _AUDIO_INPUT.fullmatch(module)), None),
        generation=block.get("generation") or ("ltx-2.3" if is_second else None),
        base_model=block.get("base_model"),
        metadata=block,
    )


def _one_or_all(values: set) -> float | tuple[float, ...]:
    return next(iter(values)) if len(values) == 1 else tuple(sorted(values))


def _join(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{item:g}" for item in (value if isinstance(value, tuple) else (value,)))


def _describe(transformer: LTX2VideoTransformer3DModel) -> str:
    config = transformer.config
    video = config.num_attention_heads * config.attention_head_dim
    audio = config.audio_num_attention_heads * config.audio_attention_head_dim
    return f"{transformer_generation(transformer).upper()} (video width {video}, audio width {audio})"


def _check_modules(
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    transformer: LTX2VideoTransformer3DModel,
    name: str,
    advice: str,
) -> list[str]:
    """Raises if a block or a shape does not fit; returns the modules that the transformer does not have."""
    num_layers = transformer.config.num_layers
    targets = dict(transformer.named_modules())
    unknown = []
    for module, (lora_a, lora_b) in layers.items():
        target = targets.get(module)
        match = _BLOCK_MODULE.fullmatch(module)
        if match and int(match["block"]) >= num_layers:
            raise ValueError(
                f"`{name}` adapts `{module}`, but this transformer has {num_layers} blocks, the last being "
                f"{num_layers - 1}: {advice}"
            )
        if not hasattr(target, "in_features"):
            unknown.append(module)
        elif (lora_a.shape[1], lora_b.shape[0]) != (target.in_features, target.out_features):
            raise ValueError(
                f"`{name}` has lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)} for `{module}`, which "
                f"takes {target.in_features} and gives {target.out_features} features in this transformer: {advice}"
            )
    return unknown


def _check_other_keys(state_dict: Mapping[str, torch.Tensor], name: str) -> None:
    # diffusers leaves out `dora_scale` itself, and says so.
    foreign = [key for key in state_dict if "lora" not in key and "dora_scale" not in key]
    if foreign:
        raise ValueError(
            f"`{name}` has {len(foreign)} tensors that are no LoRA weights, such as `{foreign[0]}`: read it with "
            "`load_adapter`, which understands `.alpha`, or remove them."
        )
    prefix = _ORIGINAL_PREFIX if _is_original(state_dict) else _DIFFUSERS_PREFIX
    ignored = [key for key in state_dict if not key.startswith((prefix, *_CONNECTOR_PREFIXES))]
    if ignored:
        _warn_ignored(ignored, f"keys, which lack the prefix `{prefix}` of the others", name)


def _warn_ignored(items: list[str], what: str, name: str) -> None:
    first = ", ".join(f"`{item}`" for item in items[:3])
    logger.warning(f"`{name}` loads without {len(items)} {what}: {first}{', ...' if len(items) > 3 else ''}.")
