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
from typing import Any, Literal

from .values import as_tuple, first_line, shortened


PROMPT_PARTS = ("visual", "speech", "sounds")
# Far above what a model can use, far below what brings a machine down before anything is said.
MOST = 10_000
MOST_PIXELS = 8192
MOST_FRAMES = 10_001
MOST_TOKENS = 16_384


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


@dataclass(frozen=True)
class ModelSettings:
    """What is loaded, and how: the same for every clip of one run. Each field's `help` says what it is."""

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
    compile: bool = setting(False, "Compile the transformer's blocks (slow start, faster steps).", "Models")

    @in_the_users_words()
    def check(self) -> None:
        """Raises a `ValueError` for what cannot be loaded, as far as that can be told without loading it."""
        import torch

        from .lora import inspect_adapter

        for item in dataclasses.fields(self):
            if getattr(self, item.name) == "":
                raise ValueError(f"`{item.name}` is empty; give a value, or leave the option out.")
        check_base(self.base)
        if not abs(self.lora_scale) <= MOST:
            raise ValueError(f"`lora_scale` must be a number from -{MOST} to {MOST}, but it is {self.lora_scale}.")
        try:
            device = torch.device(self.device or default_device())
            # Not an empty tensor, and read back: `meta` would give one and never a value.
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`device` {self.device!r} cannot be used here ({first_line(error)}); give another, such as cpu."
            ) from error
        if self.offload != "none" and device.type == "cpu":
            raise ValueError(f"`offload` {self.offload!r} needs an accelerator, but `device` is cpu; use none.")
        if self.lora is not None:
            inspect_adapter(self.lora, weight_name=self.lora_weight_name, name="lora")


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
    frame_rate: float = setting(25.0, "Frames per second.", "Size and length")
    motion_speed: float = setting(1.0, "Speed of motion.", "Size and length")

    steps: int = setting(30, "Denoising steps.", "Sampling", argument="num_inference_steps")
    sigmas: tuple[float, ...] = setting(
        (), "Noise level of one step, used as it is; repeat for each step.", "Sampling", shown="the model's schedule"
    )
    guidance_batching: int | Literal["sequential", "packed"] = setting(
        "sequential",
        "Run the passes of a step one by one (sequential), all at once (packed: more memory), or N at a time.",
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
    identity_guidance_scale: float = setting(
        3.0, "Identity guidance of the voice.", "Guidance", argument="scale", in_call=False
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

    def updated(self, given: Mapping[str, Any]) -> "ClipSettings":
        """
        A copy with `given` in place. A prompt replaces the three parts, and a part replaces the prompt.

        Raises:
            ValueError: `given` holds both.
        """
        given = dict(given)
        parts = [part for part in PROMPT_PARTS if given.get(part) is not None]
        if given.get("prompt") is not None and parts:
            raise ValueError(f"`prompt` and `{parts[0]}` are both given; give the prompt whole or in parts.")
        if parts:
            given["prompt"] = None
        elif given.get("prompt") is not None:
            given.update(dict.fromkeys(PROMPT_PARTS))
        return dataclasses.replace(self, **given)

    def resolved(self) -> "ClipSettings":
        """A copy whose seed and negative prompt are settled, fit for the record."""
        from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT

        seed = random.SystemRandom().randrange(2**31) if self.seed is None else self.seed
        negative_prompt = DEFAULT_NEGATIVE_PROMPT if self.negative_prompt is None else self.negative_prompt
        return dataclasses.replace(self, seed=seed, negative_prompt=negative_prompt)

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
            scale=self.identity_guidance_scale,
            start=self.identity_start,
            stop=self.identity_stop,
            schedule=self.identity_schedule,
        )

    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `LTX2IDLoRAPipeline.__call__`; `()` and "default" leave it to the pipeline."""
        import torch

        arguments = {}
        for item in dataclasses.fields(self):
            if item.metadata["in_call"]:
                value = getattr(self, item.name)
                value = list(value) if isinstance(value, tuple) and value else value
                arguments[item.metadata["argument"] or item.name] = None if value in ((), "default") else value
        arguments["prompt"] = self.full_prompt()
        arguments["identity_guidance"] = self.identity_guidance()
        # A tuple is several clips of one speaker; a list would be one clip per prompt.
        if self.reference_audio:
            several = len(self.reference_audio) > 1
            arguments["reference_audio"] = self.reference_audio if several else self.reference_audio[0]
        arguments["generator"] = torch.Generator("cpu").manual_seed(self.seed)
        return arguments

    @in_the_users_words()
    def check(self) -> None:
        """Raises a `ValueError` for everything that is wrong with the settings and their files and needs no model."""
        from .audio import read_reference
        from .inputs import check_sigmas
        from .media import frame_rate_fraction, load_image

        for item in dataclasses.fields(self):
            check_number(item.name, getattr(self, item.name), item.metadata["most"])
            if not item.metadata["is_path"]:
                check_text(item.name, getattr(self, item.name))
        check_size(self)
        frame_rate_fraction(self.frame_rate)
        if self.sigmas:
            check_sigmas(self.sigmas)
        self.full_prompt()
        self.identity_guidance()
        if self.image is not None:
            load_image(self.image)
        for clip in self.reference_audio:
            read_reference(clip)

    def files(self) -> dict[str, list[Path]]:
        """The user's files that the clip is made of, by setting."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.metadata["is_path"]}
        return {name: [Path(path) for path in as_tuple(value)] for name, value in values.items() if value}


def check_number(name: str, value: Any, most: float) -> None:
    """Raises a `ValueError` where a number, or one of several, is not a number from 0 to `most`."""
    for number in as_tuple(value):
        # The comparison is false for NaN too.
        if isinstance(number, (int, float)) and not 0 <= number <= most:
            raise ValueError(f"`{name}` must be a number from 0 to {most}, but it is {shortened(number)}.")


def check_text(name: str, value: Any) -> None:
    """Raises a `ValueError` where a text is no valid UTF-8, as odd terminals and JSON escapes can make it."""
    if isinstance(value, str) and (broken := value.encode("utf-8", "ignore").decode("utf-8")) != value:
        raise ValueError(f"`{name}` holds characters that are not valid UTF-8, near {broken[:40]!r}; type it again.")


def check_size(settings: ClipSettings) -> None:
    """Raises a `ValueError` for sizes, lengths and counts that no LTX-2 model can make."""
    for name in ("height", "width"):
        value = getattr(settings, name)
        if value is not None and (value % 32 or not value):
            raise ValueError(
                f"`{name}` must be a multiple of 32, but it is {value}; take {max(32, value // 32 * 32)}."
            )
    frames = settings.num_frames
    if frames is not None and frames % 8 != 1:
        raise ValueError(f"`num_frames` must be 8k+1, but it is {frames}; take {max(0, frames - 1) // 8 * 8 + 1}.")
    for name in ("steps", "frame_rate", "motion_speed", "max_sequence_length", "guidance_batching"):
        if not getattr(settings, name):
            raise ValueError(f"`{name}` must be more than 0, but it is {getattr(settings, name)}.")


def check_base(base: str | None) -> None:
    """Raises a `ValueError` where `base` is neither a checkpoint folder nor the name of a Hub repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not base:
        raise ValueError("`base` is missing; give `--base` with a Hub repository or a folder in diffusers layout.")
    if os.path.exists(base):
        if not os.path.isfile(os.path.join(base, "model_index.json")):
            raise ValueError(f"`base` {base} has no model_index.json; give a folder in diffusers layout.")
        return
    try:
        validate_repo_id(base)
        missing = base.count("/") != 1 or base.startswith((".", "~"))
    except HFValidationError:
        missing = True
    if missing:
        raise ValueError(f"`base` {base} does not exist; give a folder in diffusers layout or a Hub repository.")


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
            paths = tuple(os.path.abspath(folder / os.path.expanduser(path)) for path in as_tuple(resolved[item.name]))
            resolved[item.name] = paths if isinstance(resolved[item.name], tuple) else paths[0]
    return resolved


def with_absolute_models(models: ModelSettings) -> ModelSettings:
    """A copy in which folders and files of this machine, unlike names on the Hub, are absolute."""
    paths = {name: os.path.expanduser(getattr(models, name) or "") for name in ("base", "lora")}
    local = {name: os.path.abspath(path) for name, path in paths.items() if path and os.path.exists(path)}
    return dataclasses.replace(models, **local)
