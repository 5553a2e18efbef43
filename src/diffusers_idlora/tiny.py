"""
A complete tiny LTX-2 / LTX-2.3 checkpoint with random weights, made offline, for tests and the demo.

Every component is of the real class and keeps what the pipeline relies on: 32x spatial and 8x temporal video
compression, 4x audio compression at 16 kHz and hop 160, latent statistics that are not 0 and 1, dynamic shifting,
connectors with learnable registers. Only the widths and depths are tiny.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel, LTX2TextConnectors, LTX2Vocoder
from diffusers.utils import logging
from safetensors.torch import save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    SiglipVisionConfig,
)


logger = logging.get_logger(__name__)

FAMILIES = ("ltx-2", "ltx-2.3")

_FAMILY_SPELLINGS = {"ltx-2": "ltx-2", "ltx2": "ltx-2", "ltx-2.3": "ltx-2.3", "ltx23": "ltx-2.3"}
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_IMAGE_TOKENS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
_TEXT_HIDDEN_SIZE = 32
_TEXT_LAYERS = 2
_NUM_REGISTERS = 8
_VIDEO_LATENT_CHANNELS = 8
_MEL_BINS = 16
_AUDIO_LATENT_CHANNELS = 2
# The audio VAE keeps one mean and one std per packed feature, `base_channels` of them, so the two must agree.
_AUDIO_FEATURES = _AUDIO_LATENT_CHANNELS * _MEL_BINS // 4

# The generations differ in width, so that an adapter of one does not fit the other.
_VIDEO_HEADS, _AUDIO_HEADS = 2, 2
_VIDEO_HEAD_DIM = {"ltx-2": 12, "ltx-2.3": 16}
_AUDIO_HEAD_DIM = {"ltx-2": 6, "ltx-2.3": 8}

_ADAPTER_MODULE = re.compile(
    r"transformer_blocks\.\d+\."
    r"((audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn)\.(to_q|to_k|to_v|to_out\.0)"
    r"|audio_ff\.net\.(0\.proj|2))"
)


def tiny_components(family: str = "ltx-2.3", seed: int = 0) -> dict[str, object]:
    """
    Builds all components of a tiny `LTX2ConditionPipeline` with random weights.

    The tokenizer is character level: a prompt takes one token per character and one for its beginning, so
    `max_sequence_length=16` keeps the first 15 characters.

    Args:
        family (`str`, *optional*, defaults to `"ltx-2.3"`):
            The model generation: `"ltx-2"` (also `"ltx2"`) or `"ltx-2.3"` (also `"ltx23"`).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random weights. The global random state is left as it was.

    Returns:
        `dict[str, object]`:
            Keyword arguments of `LTX2ConditionPipeline`: float32 modules in eval mode, optional components `None`.

    Raises:
        ValueError: If `family` is unknown.
    """
    family = normalize_family(family)
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`: that would also reseed the accelerators, which `devices=[]` does not restore.
        torch.default_generator.manual_seed(seed)
        tokenizer = _tokenizer()
        components = {
            "scheduler": _scheduler(),
            "vae": _video_vae(),
            "audio_vae": _audio_vae(),
            "text_encoder": _text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "connectors": _connectors(family),
            "transformer": _transformer(family),
            "vocoder": _vocoder(),
            "audio_scheduler": None,
            "processor": None,
            "prompt_enhancer": None,
            "duration_head": None,
        }
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return components


def tiny_latent_upsampler(seed: int = 0) -> LTX2LatentUpsamplerModel:
    """The tiny checkpoint's x2 latent upsampler with random weights, for two-stage generation."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LTX2LatentUpsamplerModel(
            in_channels=_VIDEO_LATENT_CHANNELS, mid_channels=32, num_blocks_per_stage=1
        ).eval()


def save_tiny_checkpoint(directory: str | os.PathLike, family: str = "ltx-2.3", seed: int = 0) -> Path:
    """
    Saves a tiny checkpoint in the diffusers layout, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`):
            Folder to create. It may exist only if it is empty.
        family (`str`, *optional*, defaults to `"ltx-2.3"`):
            The model generation, as in [`tiny_components`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random weights.

    Returns:
        `pathlib.Path`: The folder, which `LTX2ConditionPipeline.from_pretrained` loads.

    Raises:
        ValueError: If `family` is unknown or `directory` exists and is not an empty folder.
    """
    family = normalize_family(family)
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(
            f"`directory` {str(directory)!r} already exists and is not an empty folder: choose another or remove it."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        pipeline = LTX2ConditionPipeline(**tiny_components(family, seed))
        # The folder of `mkdtemp` is readable by its owner only; a folder made inside has the usual permissions.
        pipeline.save_pretrained(temporary / "checkpoint")
        # As on the Hub: a folder beside the components, which the index does not name.
        tiny_latent_upsampler(seed).save_pretrained(temporary / "checkpoint" / "latent_upsampler")
        os.replace(temporary / "checkpoint", directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info(f"Saved a tiny random {family} checkpoint to {directory}.")
    return directory


def save_tiny_adapter(
    path: str | os.PathLike,
    transformer: LTX2VideoTransformer3DModel,
    rank: int = 4,
    seed: int = 0,
    scale: float = 0.2,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """
    Saves a random ID-LoRA for `transformer` in the format of the released adapters.

    Its keys are `diffusion_model.transformer_blocks.N.<module>.lora_A.weight` and `...lora_B.weight`, for the four
    audio attentions and the audio feed-forward of every block; there is no alpha and no metadata.

    Args:
        path (`str` or `os.PathLike`):
            The safetensors file to write.
        transformer (`LTX2VideoTransformer3DModel`):
            The model that the adapter is to fit.
        rank (`int`, *optional*, defaults to `4`):
            Rows of `lora_A`, columns of `lora_B`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random weights. The global random state is not used.
        scale (`float`, *optional*, defaults to `0.2`):
            Size of an adapted module's change, relative to an input of size 1: large enough to change the output
            visibly.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Type of the saved weights.

    Returns:
        `pathlib.Path`: The file.

    Raises:
        ValueError: If `rank` is less than 1.
    """
    if rank < 1:
        raise ValueError(f"`rank` is {rank}: give a positive number.")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in transformer.named_modules():
        if not _ADAPTER_MODULE.fullmatch(name):
            continue
        lora_a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
        lora_b = torch.randn(module.out_features, rank, generator=generator) * scale / rank**0.5
        weights[f"diffusion_model.{name}.lora_A.weight"] = lora_a.to(dtype)
        weights[f"diffusion_model.{name}.lora_B.weight"] = lora_b.to(dtype)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        save_file(weights, Path(temporary) / path.name)
        os.replace(Path(temporary) / path.name, path)
    return path


def normalize_family(family: str) -> str:
    """One of `FAMILIES` for any accepted spelling of it; another one is a ValueError."""
    if family not in _FAMILY_SPELLINGS:
        raise ValueError(f"`family` is {family!r}: choose one of {', '.join(map(repr, _FAMILY_SPELLINGS))}.")
    return _FAMILY_SPELLINGS[family]


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def _tokenizer() -> GemmaTokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [*_SPECIAL_TOKENS, *byte_tokens, "▁", *characters, *_IMAGE_TOKENS]
    return GemmaTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[],
        model_max_length=64,
        padding_side="left",
        add_bos_token=True,
    )


def _text_encoder(tokenizer: GemmaTokenizer) -> Gemma3ForConditionalGeneration:
    start_of_image, end_of_image, image = tokenizer.convert_tokens_to_ids(list(_IMAGE_TOKENS))
    text_config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=_TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vision_config = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = Gemma3Config(
        text_config=text_config,
        vision_config=vision_config,
        mm_tokens_per_image=4,
        boi_token_index=start_of_image,
        eoi_token_index=end_of_image,
        image_token_index=image,
    )
    return Gemma3ForConditionalGeneration(config)


def _connectors(family: str) -> LTX2TextConnectors:
    if family == "ltx-2":
        # One projection to the text encoder's width; the transformer projects once more per modality.
        widths = {
            "video_connector_num_attention_heads": 4,
            "video_connector_attention_head_dim": _TEXT_HIDDEN_SIZE // 4,
            "audio_connector_num_attention_heads": 4,
            "audio_connector_attention_head_dim": _TEXT_HIDDEN_SIZE // 4,
        }
    else:
        widths = {
            "video_connector_num_attention_heads": _VIDEO_HEADS,
            "video_connector_attention_head_dim": _VIDEO_HEAD_DIM[family],
            "audio_connector_num_attention_heads": _AUDIO_HEADS,
            "audio_connector_attention_head_dim": _AUDIO_HEAD_DIM[family],
            "video_hidden_dim": _VIDEO_HEADS * _VIDEO_HEAD_DIM[family],
            "audio_hidden_dim": _AUDIO_HEADS * _AUDIO_HEAD_DIM[family],
            "per_modality_projections": True,
            "proj_bias": True,
            "video_gated_attn": True,
            "audio_gated_attn": True,
        }
    return LTX2TextConnectors(
        caption_channels=_TEXT_HIDDEN_SIZE,
        text_proj_in_factor=_TEXT_LAYERS + 1,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=_NUM_REGISTERS,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=_NUM_REGISTERS,
        connector_rope_base_seq_len=32,
        rope_type="split",
        rope_double_precision=True,
        **widths,
    )


def _transformer(family: str) -> LTX2VideoTransformer3DModel:
    newer = family == "ltx-2.3"
    return LTX2VideoTransformer3DModel(
        in_channels=_VIDEO_LATENT_CHANNELS,
        out_channels=_VIDEO_LATENT_CHANNELS,
        num_attention_heads=_VIDEO_HEADS,
        attention_head_dim=_VIDEO_HEAD_DIM[family],
        cross_attention_dim=_VIDEO_HEADS * _VIDEO_HEAD_DIM[family],
        vae_scale_factors=(8, 32, 32),
        audio_in_channels=_AUDIO_FEATURES,
        audio_out_channels=_AUDIO_FEATURES,
        audio_num_attention_heads=_AUDIO_HEADS,
        audio_attention_head_dim=_AUDIO_HEAD_DIM[family],
        audio_cross_attention_dim=_AUDIO_HEADS * _AUDIO_HEAD_DIM[family],
        num_layers=3,
        caption_channels=_TEXT_HIDDEN_SIZE,
        rope_type="split",
        rope_double_precision=True,
        gated_attn=newer,
        cross_attn_mod=newer,
        audio_gated_attn=newer,
        audio_cross_attn_mod=newer,
        perturbed_attn=newer,
        use_prompt_embeddings=not newer,
    )


def _video_vae() -> AutoencoderKLLTX2Video:
    vae = AutoencoderKLLTX2Video(
        latent_channels=_VIDEO_LATENT_CHANNELS,
        block_out_channels=(4, 8, 8, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        timestep_conditioning=False,
        encoder_causal=True,
        decoder_causal=False,
        # Reflection, which some releases use, is impossible on the single latent of a 32x32 picture.
        decoder_spatial_padding_mode="zeros",
        # Four down blocks, of which one keeps the size and one keeps the rate; the default formula counts all of them.
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    _randomize_statistics(vae)
    return vae


def _audio_vae() -> AutoencoderKLLTX2Audio:
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=_AUDIO_FEATURES,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        resolution=32,
        latent_channels=_AUDIO_LATENT_CHANNELS,
        norm_type="pixel",
        causality_axis="height",
        sample_rate=16000,
        mel_hop_length=160,
        mel_bins=_MEL_BINS,
    )
    _randomize_statistics(audio_vae)
    return audio_vae


def _randomize_statistics(vae: AutoencoderKLLTX2Video | AutoencoderKLLTX2Audio) -> None:
    # With means of 0 and stds of 1 a forgotten or misplaced normalisation would go unnoticed.
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)


def _vocoder() -> LTX2Vocoder:
    # 6 * 5 * 8 samples per mel frame of 160 / 16000 s are 24 kHz. Kernels of stride + an even number keep it exact.
    return LTX2Vocoder(
        in_channels=2 * _MEL_BINS,
        hidden_channels=16,
        out_channels=2,
        upsample_kernel_sizes=[12, 11, 16],
        upsample_factors=[6, 5, 8],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=24000,
    )
