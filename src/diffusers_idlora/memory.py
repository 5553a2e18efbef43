"""Loading the models and fitting them into memory: fewer bits for the weights, idle weights elsewhere, tiles."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    BitsAndBytesConfig,
    GGUFQuantizationConfig,
    LTX2VideoTransformer3DModel,
    PipelineQuantizationConfig,
    TorchAoConfig,
)
from diffusers.hooks import apply_layerwise_casting
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from .settings import NO_DISTILLED_LORA, ModelSettings, naming
from .values import first_line


if TYPE_CHECKING:
    # Not otherwise, because the checks here are to answer at once.
    from .pipeline_ltx2_idlora import LTX2IDLoRAPipeline


# Kinds that are applied while a model is loaded, and the package that each needs.
PACKAGES = {
    "torchao_int8": "torchao",
    "torchao_fp8": "torchao",
    "bnb_8bit": "bitsandbytes",
    "bnb_4bit": "bitsandbytes",
}
# Beside the first two, what the libraries raise on files that are whole but say something wrong.
LOADING_ERRORS = (
    OSError,
    SafetensorError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    NotImplementedError,
)
# Frames of one tile when the video VAE decodes in tiles, and of its step to the next: 16 are blended.
TILE_FRAMES, TILE_STRIDE_FRAMES = 64, 48
# Where the repositories of LTX-2 keep the upsampler.
UPSAMPLER_FOLDER = "latent_upsampler"
# What diffusers' reader of single files does not rename, as it was written for LTX-2.
SECOND_GENERATION_NAMES = {"prompt_adaln_single.": "prompt_adaln."}


def check_memory(models: ModelSettings, device: torch.device) -> None:
    """
    Raises a `ValueError` for memory settings that cannot work on this machine or not with each other.

    Args:
        models (`ModelSettings`): The settings.
        device (`torch.device`): Where the models are to run.
    """
    check_offload(models, device)
    kinds = {name: getattr(models, name) for name in ("quantize", "quantize_text_encoder")}
    for name, kind in kinds.items():
        check_quantization(kind, device, name)
        if kind in PACKAGES and models.offload == "sequential":
            raise ValueError(
                f"`offload` 'sequential' cannot move what `{name}` {kind!r} makes of the weights; use group or model."
            )
        if kind.startswith("bnb") and models.offload == "group":
            raise ValueError(f"`offload` 'group' cannot move what `{name}` {kind!r} makes of the weights; use model.")
    if models.compile and (models.offload in ("group", "sequential") or models.quantize == "fp8_casting"):
        other = "quantize" if models.quantize == "fp8_casting" else "offload"
        raise ValueError(
            f"`compile` does not work with `{other}` {getattr(models, other)!r}, which changes the weights within a "
            "block; leave one of them out."
        )
    if models.transformer_file is not None:
        check_transformer_file(models)


def check_recipe_models(models: ModelSettings) -> None:
    """Raises a `ValueError` where the recipe lacks a model, or has one that it does not use."""
    for name in models.unused_models:
        if getattr(models, name) is not None:
            raise ValueError(f"`{name}` is given, but `recipe` {models.recipe!r} does not use it; leave it out.")
    if not models.has_two_stages:
        return
    if models.distilled_lora is None:
        raise ValueError(
            f"`distilled_lora` is missing, which `recipe` {models.recipe!r} needs; give the distilled LoRA, or "
            f"{NO_DISTILLED_LORA} where the base is distilled itself."
        )
    name, source, folders = upsampler_places(models)
    if os.path.isdir(source) and not any(os.path.isfile(os.path.join(source, x, "config.json")) for x in folders):
        raise ValueError(
            f"`{name}` {source} has no latent upsampler; give `upsampler`, a folder in diffusers layout or a Hub "
            "repository."
        )


def upsampler_places(models: ModelSettings) -> tuple[str, str, tuple[str, ...]]:
    """The setting that names the latent upsampler, folder or repository, and the folders in it where it may be."""
    if models.upsampler is None:
        return "base", models.base, (UPSAMPLER_FOLDER,)
    return "upsampler", models.upsampler, (UPSAMPLER_FOLDER, "")


def check_offload(models: ModelSettings, device: torch.device) -> None:
    """Raises a `ValueError` for offloading that the device does not have or that has nothing to offload."""
    if models.offload != "none" and device.type == "cpu":
        raise ValueError(f"`offload` {models.offload!r} needs an accelerator, but `device` is cpu; use none.")
    if models.stream is not None and models.offload != "group":
        raise ValueError(f"`stream` belongs to `offload` group, but `offload` is {models.offload!r}; leave it out.")
    if models.stream and device.type != "cuda":
        raise ValueError(f"`stream` needs a CUDA device, but `device` is {device}; leave it out.")


def check_quantization(kind: str, device: torch.device, name: str) -> None:
    """Raises a `ValueError` where weights cannot be kept in that kind on the device; `name` is the setting."""
    package = PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(f"`{name}` {kind!r} needs a package that is missing: pip install {package}.")
    if package == "bitsandbytes" and device.type != "cuda":
        raise ValueError(f"`{name}` {kind!r} needs a CUDA device, but `device` is {device}; use torchao_int8.")
    if kind in ("fp8_casting", "torchao_fp8"):
        try:
            torch.zeros(1, device=device).to(torch.float8_e4m3fn).float().item()
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"`{name}` {kind!r} needs float8, which `device` {device} does not have; use torchao_int8."
            ) from error


def check_transformer_file(models: ModelSettings) -> None:
    """Raises a `ValueError` for a file of no kind that is read here, or that something else does not go with."""
    file = models.transformer_file
    if Path(file).suffix not in (".gguf", ".safetensors"):
        raise ValueError(f"`transformer_file` is {file!r}; give a .gguf or .safetensors file.")
    if not os.path.isfile(file) and (len(Path(file).parts) < 3 or file.startswith((".", "/", "~"))):
        raise ValueError(f"`transformer_file` {file!r} does not exist; give a file, or USER/NAME/FILE on the Hub.")
    if Path(file).suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"`transformer_file` {file!r} needs a package that is missing: pip install gguf.")
        if models.quantize != "none":
            raise ValueError(f"`transformer_file` {file!r} is quantized already; leave out `quantize`.")
        if models.offload == "sequential":
            raise ValueError("`offload` 'sequential' cannot move the weights of a .gguf file; use group or model.")


def quantization_config(kind: str, dtype: torch.dtype, name: str = "quantize") -> Any:
    """
    The configuration with which diffusers quantizes a model while it loads it.

    Args:
        kind (`str`): One of `PACKAGES`; any other is nothing to do while loading.
        dtype (`torch.dtype`): What the model computes in.
        name (`str`, *optional*, defaults to `"quantize"`): What the message calls the setting.

    Returns:
        `TorchAoConfig` or `BitsAndBytesConfig`, or `None` where there is nothing to do.

    Raises:
        ValueError: A package is missing.
    """
    if kind not in PACKAGES:
        return None
    try:
        return _quantization_config(kind, dtype, TorchAoConfig, BitsAndBytesConfig)
    except ImportError as error:
        raise ValueError(
            f"`{name}` {kind!r} needs a package that is missing: pip install {PACKAGES[kind]}."
        ) from error


def _quantization_config(kind: str, dtype: torch.dtype, torchao_config: type, bitsandbytes_config: type) -> Any:
    if kind == "bnb_8bit":
        return bitsandbytes_config(load_in_8bit=True)
    if kind == "bnb_4bit":
        return bitsandbytes_config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return torchao_config(Int8WeightOnlyConfig() if kind == "torchao_int8" else Float8WeightOnlyConfig())


def pipeline_quantization(models: ModelSettings, dtype: torch.dtype) -> PipelineQuantizationConfig | None:
    """What is quantized while a pipeline is loaded: the transformer, the text encoder, both, or `None` for neither."""
    mapping = {"transformer": quantization_config(models.quantize, dtype)}
    if models.quantize_text_encoder in PACKAGES:
        # transformers has configurations of its own, of the same names and arguments.
        from transformers import BitsAndBytesConfig as TextBitsAndBytesConfig
        from transformers import TorchAoConfig as TextTorchAoConfig

        mapping["text_encoder"] = _quantization_config(
            models.quantize_text_encoder, dtype, TextTorchAoConfig, TextBitsAndBytesConfig
        )
    mapping = {component: config for component, config in mapping.items() if config is not None}
    return PipelineQuantizationConfig(quant_mapping=mapping) if mapping else None


def load_pipeline(models: ModelSettings, pipeline_class: "type[LTX2IDLoRAPipeline]") -> "LTX2IDLoRAPipeline":
    """
    The pipeline with its adapter, in the memory that the settings allow, and ready to run.

    Args:
        models (`ModelSettings`): What to load, and how.
        pipeline_class (`type[LTX2IDLoRAPipeline]`): What to load it as.

    Raises:
        ValueError: The checkpoint, the transformer's file or the adapter cannot be loaded.
    """
    dtype = getattr(torch, models.dtype)
    device = models.process_device()
    if device.type == "cuda":
        # bitsandbytes quantizes on the current device, whatever the pipeline is moved to later.
        torch.cuda.set_device(device)
    components = {"latent_upsampler": load_upsampler(models, dtype)} if models.has_two_stages else {}
    if models.transformer_file is not None:
        components["transformer"] = load_transformer_file(models, dtype)
    try:
        index = pipeline_class.load_config(models.base, revision=models.base_revision)
        if "LTX2VideoTransformer3DModel" not in (index.get("transformer") or ()):
            raise OSError(f"it holds a {index.get('_class_name')} without an LTX-2 transformer")
        pipe = pipeline_class.from_pretrained(
            models.base,
            revision=models.base_revision,
            dtype=dtype,
            quantization_config=pipeline_quantization(models, dtype),
            **components,
        )
    except LOADING_ERRORS as error:
        raise ValueError(
            f"`base` {models.base} cannot be loaded ({first_line(error)}); give a complete folder in diffusers layout "
            "or a Hub repository that can be reached."
        ) from error
    load_adapters(pipe, models)
    cast_to_float8(pipe, models)
    if models.vae_tiling:
        tile_decoding(pipe.vae)
    place(pipe, models, device)
    if models.compile:
        # The kinds of passes in several sizes are more graphs than the 8 that torch allows a block by default.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_adapters(pipe: "LTX2IDLoRAPipeline", models: ModelSettings) -> None:
    """Loads the ID-LoRA and the distilled LoRA; of two stages, each gives the latter the weight that it has there."""
    weights = {}
    if models.has_distilled_lora:
        with naming("adapter", "distilled_lora"), naming("weight_name", "distilled_weight_name"):
            pipe.load_lora_weights(
                models.distilled_lora, weight_name=models.distilled_weight_name, adapter_name="distilled"
            )
        if not models.has_two_stages:
            weights["distilled"] = 1.0
    if models.lora is not None:
        pipe.load_lora_weights(models.lora, weight_name=models.lora_weight_name, adapter_name="id_lora")
        weights["id_lora"] = models.lora_scale
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))


def load_upsampler(models: ModelSettings, dtype: torch.dtype) -> LTX2LatentUpsamplerModel:
    """
    The latent upsampler of two stages, from the base or where `models.upsampler` says.

    Raises:
        ValueError: It cannot be loaded from there.
    """
    name, source, folders = upsampler_places(models)
    places = {"pretrained_model_name_or_path": source, "revision": models.base_revision if name == "base" else None}
    for folder in folders:
        try:
            config = LTX2LatentUpsamplerModel.load_config(**places, subfolder=folder)
            if config.get("_class_name") != LTX2LatentUpsamplerModel.__name__:
                raise OSError(f"it holds a {config.get('_class_name')}")
            return LTX2LatentUpsamplerModel.from_pretrained(**places, subfolder=folder, dtype=dtype)
        except LOADING_ERRORS as error:
            reason = error
    raise ValueError(
        f"`{name}` {source} has no latent upsampler that can be loaded ({first_line(reason)}); give `upsampler`, a "
        "folder in diffusers layout or a Hub repository."
    ) from reason


def load_transformer_file(models: ModelSettings, dtype: torch.dtype) -> LTX2VideoTransformer3DModel:
    """
    A transformer in the shape of the base's, with the weights of `models.transformer_file`.

    Raises:
        ValueError: The file cannot be read, or does not fit the base.
    """
    file = models.transformer_file
    if Path(file).suffix == ".gguf":
        quantization = GGUFQuantizationConfig(compute_dtype=dtype)
    else:
        quantization = quantization_config(models.quantize, dtype)
    try:
        if not os.path.isfile(file):
            user, repository, *path = Path(file).parts
            file = hf_hub_download(f"{user}/{repository}", "/".join(path))
        return LTX2VideoTransformer3DModel.from_single_file(
            with_second_generation_names(load_single_file_checkpoint(str(file))),
            config=models.base,
            config_revision=models.base_revision,
            subfolder="transformer",
            quantization_config=quantization,
            dtype=dtype,
        )
    except LOADING_ERRORS as error:
        reason = first_line(error).split(". ")[0]
        # What is left without memory cannot be moved to any.
        reason = "it lacks weights that the model has" if isinstance(error, NotImplementedError) else reason
        raise ValueError(
            f"`transformer_file` {models.transformer_file} cannot be loaded into the transformer of `base` "
            f"({reason}); give a whole file for the same model."
        ) from error


def with_second_generation_names(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a single file, with those parts renamed that only LTX-2.3 has."""
    renamed = {}
    for key, weight in checkpoint.items():
        for name, new_name in SECOND_GENERATION_NAMES.items():
            key = key.replace(name, new_name)
        renamed[key] = weight
    return renamed


def cast_to_float8(pipe: "LTX2IDLoRAPipeline", models: ModelSettings) -> None:
    """
    Keeps weights in float8 that are cast to the pipeline's precision one layer at a time. Adapters that are loaded
    stay as they are; one loaded later would not.
    """
    compute_dtype = getattr(torch, models.dtype)
    if models.quantize == "fp8_casting":
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype)
    if models.quantize_text_encoder == "fp8_casting":
        apply_layerwise_casting(pipe.text_encoder, torch.float8_e4m3fn, compute_dtype)


def tile_decoding(vae: torch.nn.Module) -> None:
    """Lets a video VAE decode in tiles of space and time: at 512 x 512 tiles of space alone would change nothing."""
    vae.enable_tiling(tile_sample_min_num_frames=TILE_FRAMES, tile_sample_stride_num_frames=TILE_STRIDE_FRAMES)
    vae.use_framewise_decoding = True


def place(pipe: "LTX2IDLoRAPipeline", models: ModelSettings, device: torch.device) -> None:
    """Moves the pipeline to its device, or installs the offloading that `models` asks for."""
    if models.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif models.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif models.offload == "group":
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            # Not by blocks: of the text encoder all blocks would be one group.
            offload_type="leaf_level",
            use_stream=device.type == "cuda" if models.stream is None else models.stream,
        )
    else:
        pipe.to(device)
