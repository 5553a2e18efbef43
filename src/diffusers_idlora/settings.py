"""
The settings of the command line: one home for options, their defaults, the keys of prompts files and records.

Nothing heavy is imported before it is needed, so that help and mistakes are answered at once.
"""

import dataclasses
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .setting_values import (
    MOST,
    MOST_FRAMES,
    MOST_PIXELS,
    MOST_TOKENS,
    check_base,
    check_number,
    check_size,
    check_text,
    guidance_window,
    path_and_rest,
    speaker_parts,
)
from .values import as_tuple, first_line


PROMPT_PARTS = ("visual", "speech", "sounds")
# Guidance that a window can be given for, each as `NAME_window`.
WINDOWS = ("text", "identity", "stg", "modality")
Recipe = Literal["one-stage", "two-stage", "hq", "distilled"]
# Instead of the distilled LoRA, where the base is distilled itself.
NO_DISTILLED_LORA = "none"
# What stands for the `None` with which the pipeline is told to choose.
LEFT_TO_THE_PIPELINE = ((), "default", "real")
# How weights can be kept in fewer bits.
Quantization = Literal["none", "fp8_casting", "torchao_int8", "torchao_fp8", "bnb_8bit", "bnb_4bit"]


def setting(
    default: Any,
    help: str,
    panel: str,
    argument: str | None = None,
    shown: str | None = None,
    is_path: bool = False,
    in_call: bool = True,
    most: float = MOST,
) -> Any:
    """
    A dataclass field that also says how it looks on the command line and what the pipeline calls it.

    Args:
        default (`Any`): The default of the option, the prompts-file key and the pipeline argument alike.
        help (`str`): One line for the user.
        panel (`str`): The heading in the help that lists it.
        argument (`str`, *optional*, defaults to the field's name): The pipeline's name for it.
        shown (`str`, *optional*): What the help shows as the default where the default itself says too little.
        is_path (`bool`, *optional*, defaults to `False`): Whether it names files of the user.
        in_call (`bool`, *optional*, defaults to `True`): Whether it is handed to the pipeline as it is.
        most (`float`, *optional*, defaults to 10000): The largest number that is accepted.
    """
    about = {"help": help, "panel": panel, "argument": argument, "shown": shown, "most": most}
    return field(default=default, metadata=about | {"is_path": is_path, "in_call": in_call})


def window_setting(what: str) -> Any:
    """The field of a guidance window."""
    help = f"When {what} acts: START:STOP of the steps, 0..1; more after commas: skip=0.4:0.5, every=2."
    return setting(None, help, "Guidance", shown="0:1", in_call=False)


@contextmanager
def in_the_users_words() -> Iterator[None]:
    """Errors of the `with` block, or of the decorated function, call each setting what the user calls it."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for item in (*dataclasses.fields(ModelSettings), *dataclasses.fields(ClipSettings)):
            if item.metadata["argument"]:
                message = message.replace(f"`{item.metadata['argument']}`", f"`{item.name}`")
        raise ValueError(message) from error


@contextmanager
def naming(argument: str, name: str) -> Iterator[None]:
    """Errors of the `with` block call `argument` by this name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(f"`{argument}`", f"`{name}`")) from error


@dataclass(frozen=True)
class ModelSettings:
    """What is loaded, and how: the same for every clip of one run. Each field's `help` says what it is."""

    recipe: Recipe = setting(
        "one-stage",
        "Settings that belong together: one-stage, two-stage, hq (these two need --distilled-lora) or distilled. "
        "They change the defaults shown below.",
        "Models",
    )
    base: str | None = setting(None, "Base LTX-2 / LTX-2.3 checkpoint: Hub repository or folder.", "Models")
    base_revision: str | None = setting(
        None, "Branch, tag or commit of the base on the Hub.", "Models", shown="the newest; its commit is recorded"
    )
    lora: str | None = setting(
        None, "ID-LoRA adapter: Hub repository, folder or .safetensors file.", "Models", argument="adapter"
    )
    lora_weight_name: str | None = setting(
        None, "File in the adapter's repository or folder.", "Models", argument="weight_name"
    )
    lora_scale: float = setting(1.0, "Strength of the adapter.", "Models")
    distilled_lora: str | None = setting(
        None,
        "Distilled LoRA of the recipes two-stage, hq and distilled: repository, folder or file; none where the base "
        "is distilled.",
        "Models",
    )
    distilled_weight_name: str | None = setting(None, "File in its repository or folder.", "Models")
    upsampler: str | None = setting(
        None,
        "Latent upsampler of two-stage and hq: repository or folder.",
        "Models",
        shown="the base's latent_upsampler",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", "Precision: bfloat16, float16 or float32.", "Models"
    )
    device: str | None = setting(None, "Where to run.", "Models", shown="cuda, else mps, else cpu")
    offload: Literal["none", "model", "group", "sequential"] = setting(
        "none",
        "Keep idle weights in main memory: whole models (model), groups of layers (group) or single layers "
        "(sequential).",
        "Models",
    )
    stream: bool | None = setting(
        None,
        "Load the next group while one runs; keeps the offloaded weights pinned in main memory.",
        "Models",
        shown="on with --offload group and CUDA",
    )
    quantize: Quantization = setting(
        "none",
        f"Keep the transformer's weights in fewer bits: {', '.join(get_args(Quantization)[1:])}.",
        "Models",
    )
    quantize_text_encoder: Quantization = setting("none", "The same for the text encoder.", "Models")
    transformer_file: str | None = setting(
        None, "Transformer from one .gguf or .safetensors file, or USER/NAME/FILE on the Hub.", "Models"
    )
    vae_tiling: bool = setting(False, "Decode the picture in tiles: less memory, seams are blended.", "Models")
    compile: bool = setting(False, "Compile the transformer's blocks (slow start, faster steps).", "Models")

    def process_device(self) -> Any:
        """The `torch.device` that the models run on: of several processes on a machine, each has its own GPU."""
        import torch

        device = torch.device(self.device or default_device())
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return device

    def checked_device(self) -> Any:
        """As [`~ModelSettings.process_device`], or a `ValueError` where nothing can be computed there."""
        import torch

        try:
            device = self.process_device()
            # Not an empty tensor, and read back: `meta` would give one and never a value.
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`device` {self.device!r} cannot be used here ({first_line(error)}); give another, such as cpu."
            ) from error
        return device

    @in_the_users_words()
    def check(self) -> None:
        """Raises a `ValueError` for what cannot be loaded, as far as that can be told without loading it."""
        from .lora import inspect_adapter
        from .memory import check_memory, check_recipe_models

        for item in dataclasses.fields(self):
            if getattr(self, item.name) == "":
                raise ValueError(f"`{item.name}` is empty; give a value, or leave the option out.")
        check_base(self.base)
        check_recipe_models(self)
        if not abs(self.lora_scale) <= MOST:
            raise ValueError(f"`lora_scale` must be a number from -{MOST} to {MOST}, but it is {self.lora_scale}.")
        check_memory(self, self.checked_device())
        if self.lora is not None:
            inspect_adapter(self.lora, weight_name=self.lora_weight_name, name="lora")
        if self.has_distilled_lora:
            with naming("weight_name", "distilled_weight_name"):
                inspect_adapter(self.distilled_lora, weight_name=self.distilled_weight_name, name="distilled_lora")

    @property
    def has_two_stages(self) -> bool:
        """Whether the recipe is one of two stages."""
        from .recipes import TWO_STAGE_RECIPES

        return self.recipe in TWO_STAGE_RECIPES

    @property
    def unused_models(self) -> list[str]:
        """Settings that name a model for which the recipe has no use."""
        one_stage = ["distilled_lora", "distilled_weight_name"] if self.recipe == "one-stage" else []
        return one_stage + ([] if self.has_two_stages else ["upsampler"])

    @property
    def has_distilled_lora(self) -> bool:
        """Whether there is a distilled LoRA to load."""
        return self.distilled_lora not in (None, NO_DISTILLED_LORA)


@dataclass(frozen=True)
class ClipSettings:
    """
    Everything that decides one clip: the single home of the options, their defaults, the keys of a prompts file,
    the JSON record and the pipeline call. Each field's `help` says what it is; `None` leaves it to the pipeline.
    """

    prompt: str | None = setting(None, "Free text, or [VISUAL]: .. [SPEECH]: .. [SOUNDS]: ..", "Inputs")
    visual: str | None = setting(None, "Scene and appearance (instead of --prompt).", "Inputs", in_call=False)
    speech: str | None = setting(None, "The exact words spoken (instead of --prompt).", "Inputs", in_call=False)
    sounds: str | None = setting(None, "Speaking style and ambience (instead of --prompt).", "Inputs", in_call=False)
    negative_prompt: str | None = setting(
        None, "What to stay away from.", "Inputs", shown="diffusers' DEFAULT_NEGATIVE_PROMPT for LTX-2"
    )
    image: str | None = setting(None, "The face: the clip's first frame.", "Inputs", is_path=True)
    reference_audio: tuple[str, ...] = setting(
        (), "The voice, about 5 s: sound or video file. Repeat for more clips of one speaker.", "Inputs", is_path=True
    )
    speaker: tuple[str, ...] = setting(
        (),
        "Experimental, instead of the voice: FILE:START:END, a voice and the seconds in which it speaks. Repeat for "
        "each turn.",
        "Inputs",
        argument="speakers",
        is_path=True,
        in_call=False,
    )
    continue_from: str | None = setting(
        None, "An earlier mp4 that goes on, instead of the face.", "Inputs", is_path=True
    )

    height: int | None = setting(
        None, "Pixels, a multiple of 32.", "Size and length", shown="from the image", most=MOST_PIXELS
    )
    width: int | None = setting(
        None, "Pixels, a multiple of 32.", "Size and length", shown="from the image", most=MOST_PIXELS
    )
    num_frames: int | None = setting(
        None, "Frames, 8k+1.", "Size and length", shown="121, or predicted", most=MOST_FRAMES
    )
    min_seconds: float = setting(1.0, "Shortest predicted duration.", "Size and length")
    max_seconds: float = setting(20.0, "Longest predicted duration.", "Size and length")
    lead_in: float = setting(
        0.0, "Seconds that are generated before the clip and trimmed, as speech begins badly.", "Size and length"
    )
    frame_rate: float = setting(25.0, "Frames per second.", "Size and length")
    motion_speed: float = setting(1.0, "Speed of motion.", "Size and length")

    steps: int = setting(30, "Denoising steps.", "Sampling", argument="num_inference_steps")
    sigmas: tuple[float, ...] = setting(
        (), "Noise level of one step, used as it is; repeat for each step.", "Sampling", shown="the model's schedule"
    )
    sampler: Literal["euler", "res_2s"] | None = setting(
        None, "euler, or res_2s with two predictions per step.", "Sampling", shown="the base's own"
    )
    sigma_shift_tokens: int | Literal["real"] = setting(
        4096, "Video tokens that the schedule is shifted for; real is their number.", "Sampling", most=10**9
    )
    stage_2_sigmas: tuple[float, ...] = setting(
        (),
        "Noise level of one step of the second stage; repeat for each step.",
        "Sampling",
        shown="0.909375 0.725 0.421875",
        in_call=False,
    )
    distilled_scales: tuple[float, ...] = setting(
        (),
        "Weight of the distilled LoRA in a stage; give it twice.",
        "Sampling",
        shown="0 and 0.8; hq: 0.25 and 0.5",
        in_call=False,
    )
    guidance_batching: int | Literal["sequential", "packed", "auto"] = setting(
        "sequential",
        "Run the passes of a step one by one (sequential), all at once (packed: more memory), N at a time, or as "
        "memory allows (auto).",
        "Sampling",
    )
    seed: int | None = setting(
        None, "Seed of the noise.", "Sampling", shown="random, recorded", in_call=False, most=2**63 - 1
    )
    noise_scale: float | None = setting(None, "Noise of the start.", "Sampling", shown="first sigma")
    max_sequence_length: int = setting(1024, "Longest prompt in tokens.", "Sampling", most=MOST_TOKENS)
    image_crf: int | Literal["default"] = setting(
        0, "H.264 re-compression of the image, 0..51; 0 is none, default is the model's own.", "Sampling", most=51
    )
    decode_timestep: float = setting(0.0, "Timestep of the video decoder.", "Sampling")
    decode_noise_scale: float | None = setting(
        None, "Noise given to the video decoder.", "Sampling", shown="decode-timestep"
    )

    guidance_scale: float = setting(3.0, "Text guidance of the picture.", "Guidance")
    audio_guidance_scale: float | None = setting(
        None, "Text guidance of the sound.", "Guidance", shown="7.0, or guidance-scale where that is <= 1"
    )
    cfg_star: bool = setting(False, "Scale the negative prediction to the prompt's first.", "Guidance")
    identity_guidance_scale: float | None = setting(
        None,
        "Identity guidance of the voice.",
        "Guidance",
        argument="scale",
        shown="what the adapter recommends, or 3.0",
        in_call=False,
    )
    identity_start: float = setting(
        0.0, "Where identity guidance begins, 0..1.", "Guidance", argument="start", in_call=False, most=1
    )
    identity_stop: float = setting(
        1.0, "Where identity guidance ends, 0..1.", "Guidance", argument="stop", in_call=False, most=1
    )
    identity_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant",
        "How identity guidance changes in between: constant, linear or cosine.",
        "Guidance",
        argument="schedule",
        in_call=False,
    )
    identity_guidance_mode: Literal["exact", "shared"] = setting(
        "exact",
        "A pass without the voice (exact), or tokens beside the others (shared: cheap, not equal).",
        "Guidance",
    )
    stg_scale: float = setting(1.0, "Spatio-temporal guidance of the picture.", "Guidance")
    audio_stg_scale: float | None = setting(
        None, "Spatio-temporal guidance of the sound.", "Guidance", shown="stg-scale"
    )
    stg_blocks: tuple[int, ...] = setting(
        (),
        "Block that it perturbs; repeatable.",
        "Guidance",
        argument="spatio_temporal_guidance_blocks",
        shown="29",
    )
    modality_scale: float = setting(3.0, "Guidance of the picture towards its sound.", "Guidance")
    audio_modality_scale: float | None = setting(
        None, "Guidance of the sound towards its picture.", "Guidance", shown="modality-scale"
    )
    guidance_rescale: float = setting(0.0, "Rescale of the guided picture.", "Guidance")
    audio_guidance_rescale: float | None = setting(
        None, "Rescale of the guided sound.", "Guidance", shown="guidance-rescale"
    )

    text_window: str | None = window_setting("text guidance")
    identity_window: str | None = window_setting("identity guidance, within its start and stop")
    stg_window: str | None = window_setting("spatio-temporal guidance")
    modality_window: str | None = window_setting("guidance between picture and sound")

    # Shorter than the pipeline's names, which would be cut off beside their `--no-` in a terminal of 80 columns.
    cross_timestep: bool | None = setting(
        None,
        "Modulate cross-modal attention by the other modality's sigma.",
        "Method",
        argument="use_cross_timestep",
        shown="as the model needs",
    )
    mask_video: bool = setting(
        False, "Video does not attend to the reference.", "Method", argument="mask_video_from_reference"
    )
    mask_reference: bool = setting(
        False, "The reference does not attend to text.", "Method", argument="mask_reference_from_text"
    )

    def with_recipe(self, before: Recipe, after: Recipe) -> "ClipSettings":
        """A copy in which what is as the recipe `before` has it becomes what the recipe `after` has."""
        earlier, later = (dataclasses.replace(ClipSettings(), **recipe_settings(name)) for name in (before, after))
        names = [item.name for item in dataclasses.fields(self)]
        followed = [name for name in names if getattr(self, name) == getattr(earlier, name)]
        return dataclasses.replace(self, **{name: getattr(later, name) for name in followed})

    def updated(self, given: Mapping[str, Any]) -> "ClipSettings":
        """
        A copy with `given` in place. A prompt replaces the three parts and a part the prompt; a face replaces the clip
        that goes on and a voice the speakers, and the other way round.

        Raises:
            ValueError: `given` holds both, or steps where the noise levels say how many there are.
        """
        given = dict(given)
        parts = [part for part in PROMPT_PARTS if given.get(part) is not None]
        if given.get("prompt") is not None and parts:
            raise ValueError(f"`prompt` and `{parts[0]}` are both given; give the prompt whole or in parts.")
        if parts:
            given["prompt"] = None
        elif given.get("prompt") is not None:
            given.update(dict.fromkeys(PROMPT_PARTS))
        for one, other in (("image", "continue_from"), ("reference_audio", "speaker")):
            for name, replaced in ((one, other), (other, one)):
                if given.get(name) and replaced not in given:
                    given[replaced] = getattr(ClipSettings(), replaced)
        updated = dataclasses.replace(self, **given)
        if "steps" in given and updated.sigmas and len(updated.sigmas) != updated.steps:
            raise ValueError(
                f"`steps` is {updated.steps}, but `sigmas` (here, in the record or the recipe) are "
                f"{len(updated.sigmas)} noise levels, one for each step; give `sigmas` instead."
            )
        return updated

    def resolved(self, recommended_scale: float | None = None) -> "ClipSettings":
        """
        A copy whose seed, negative prompt and identity guidance are settled, fit for the record.

        Args:
            recommended_scale (`float`, *optional*): The identity guidance that the adapter recommends.
        """
        from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT

        from .guidance import IdentityGuidance

        settled = {
            "seed": random.SystemRandom().randrange(2**31),
            "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
            "identity_guidance_scale": IdentityGuidance().config.scale
            if recommended_scale is None
            else recommended_scale,
        }
        return dataclasses.replace(
            self, **{name: value for name, value in settled.items() if getattr(self, name) is None}
        )

    def full_prompt(self) -> Any:
        """The prompt as the pipeline takes it: the free text, or an `IDLoRAPrompt` made of the parts."""
        from .prompt import IDLoRAPrompt, prompt_text

        if self.prompt is not None:
            return prompt_text(self.prompt)
        parts = {part: getattr(self, part) or "" for part in PROMPT_PARTS}
        if not any(parts.values()):
            raise ValueError("`prompt` is missing; give `--prompt`, or `--visual`, `--speech` and `--sounds`.")
        return IDLoRAPrompt(**parts)

    def identity_guidance(self) -> Any:
        """The `IdentityGuidance` that the four identity settings describe."""
        from .guidance import IdentityGuidance

        return IdentityGuidance(
            **({} if self.identity_guidance_scale is None else {"scale": self.identity_guidance_scale}),
            start=self.identity_start,
            stop=self.identity_stop,
            schedule=self.identity_schedule,
        )

    def guidance_windows(self) -> dict[str, Any]:
        """The `GuidanceWindow` of each guidance that has one."""
        texts = {name: getattr(self, f"{name}_window") for name in WINDOWS}
        return {name: guidance_window(f"{name}_window", text) for name, text in texts.items() if text is not None}

    def turns(self) -> list[Any]:
        """The `SpeakerTurn` of each speaker."""
        from .inputs import SpeakerTurn

        return [SpeakerTurn(*speaker_parts(text)) for text in self.speaker]

    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call; what has a word or `()` for it is left to the pipeline."""
        import torch

        arguments = {}
        for item in dataclasses.fields(self):
            if item.metadata["in_call"]:
                value = getattr(self, item.name)
                value = list(value) if isinstance(value, tuple) and value else value
                arguments[item.metadata["argument"] or item.name] = None if value in LEFT_TO_THE_PIPELINE else value
        arguments["prompt"] = self.full_prompt()
        arguments["identity_guidance"] = self.identity_guidance()
        arguments["guidance_windows"] = self.guidance_windows()
        arguments["speakers"] = self.turns() or None
        # A tuple is several clips of one speaker; a list would be one clip per prompt.
        if self.reference_audio:
            several = len(self.reference_audio) > 1
            arguments["reference_audio"] = self.reference_audio if several else self.reference_audio[0]
        # Only the pipeline of two stages has these.
        for name in ("stage_2_sigmas", "distilled_scales"):
            if getattr(self, name):
                arguments[name] = getattr(self, name)
        arguments["generator"] = torch.Generator("cpu").manual_seed(self.seed)
        return arguments

    @in_the_users_words()
    def check(self) -> None:
        """Raises a `ValueError` for everything that is wrong with the settings and their files and needs no model."""
        from .audio import read_reference
        from .continuation import read_earlier_clip
        from .inputs import check_given_once, check_sigmas, read_speakers
        from .media import FALLBACK_SAMPLING_RATE, frame_rate_fraction, load_image

        for item in dataclasses.fields(self):
            check_number(item.name, getattr(self, item.name), item.metadata["most"])
            if not item.metadata["is_path"]:
                check_text(item.name, getattr(self, item.name))
        check_size(self)
        frame_rate_fraction(self.frame_rate)
        for name in ("sigmas", "stage_2_sigmas"):
            if getattr(self, name):
                check_sigmas(getattr(self, name), name)
        if len(self.distilled_scales) not in (0, 2):
            raise ValueError(
                f"`distilled_scales` is {self.distilled_scales}; give a weight for each of the two stages."
            )
        self.full_prompt()
        self.identity_guidance()
        self.guidance_windows()
        check_given_once(image=self.image, continue_from=self.continue_from)
        check_given_once(reference_audio=self.reference_audio or None, speaker=self.speaker or None)
        if self.lead_in and self.continue_from is not None:
            raise ValueError(
                f"`lead_in` is {self.lead_in} beside `continue_from`, where speech has begun; leave one out."
            )
        if self.image is not None:
            load_image(self.image)
        for clip in self.reference_audio:
            read_reference(clip)
        read_speakers(self.turns() or None, num_prompts=1)
        if self.continue_from is not None:
            # Its own rate counts; the other is for sounds that come without one.
            read_earlier_clip(self.continue_from, self.frame_rate, FALLBACK_SAMPLING_RATE)

    def files(self) -> dict[str, list[Path]]:
        """The user's files that the clip is made of, by setting."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.metadata["is_path"]}
        return {
            name: [Path(path_and_rest(name, path)[0]) for path in as_tuple(value)]
            for name, value in values.items()
            if value
        }


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe sets in the place of the defaults, which are those of one-stage."""
    from .recipes import ONE_STAGE, RECIPES

    names = {item.metadata["argument"]: item.name for item in dataclasses.fields(ClipSettings)}
    others = {key: value for key, value in RECIPES[recipe].items() if key not in ONE_STAGE or ONE_STAGE[key] != value}
    settings = {names.get(key, key): value for key, value in others.items()}
    if "sigma_shift_tokens" in settings:
        settings["sigma_shift_tokens"] = settings["sigma_shift_tokens"] or "real"
    return settings


def default_device() -> str:
    """The best device of this machine: cuda, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def with_absolute_paths(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`given` with its file names made absolute, as seen from `folder`."""
    resolved = dict(given)
    for item in dataclasses.fields(ClipSettings):
        if item.metadata["is_path"] and resolved.get(item.name):
            split = [path_and_rest(item.name, path) for path in as_tuple(resolved[item.name])]
            paths = tuple(os.path.abspath(folder / os.path.expanduser(path)) + rest for path, rest in split)
            resolved[item.name] = paths if isinstance(resolved[item.name], tuple) else paths[0]
    return resolved


def with_absolute_models(models: ModelSettings) -> ModelSettings:
    """A copy in which folders and files of this machine, unlike names on the Hub, are absolute."""
    names = ("base", "lora", "distilled_lora", "upsampler", "transformer_file")
    paths = {name: os.path.expanduser(getattr(models, name) or "") for name in names}
    local = {name: os.path.abspath(path) for name, path in paths.items() if path and os.path.exists(path)}
    if models.distilled_lora == NO_DISTILLED_LORA:
        local.pop("distilled_lora", None)
    return dataclasses.replace(models, **local)
