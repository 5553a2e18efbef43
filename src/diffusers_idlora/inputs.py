"""What a call was given, read and checked before any model runs."""

import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from .audio import read_reference, warn_reference_seconds
from .continuation import EarlierClip, read_earlier_clip
from .denoising import TextContext
from .guidance import IdentityGuidance, check_scale
from .media import load_image
from .prompt import IDLoRAPrompt, prompt_text


# One clip of the voice: a waveform `[channels, samples]` and its sampling rate in Hz.
Clip = tuple[torch.Tensor, int]


@dataclass(frozen=True)
class SpeakerTurn:
    """
    Somebody's turn to speak in a clip of several voices. Experimental: the released adapters were trained on one.

    Attributes:
        reference_audio: The voice: what `reference_audio` of the pipeline takes for one clip. Turns of one speaker
            name the same file or object.
        start (`float`), end (`float`): In seconds of the clip. Turns must not overlap.
    """

    reference_audio: Any
    start: float
    end: float


def per_prompt(name: str, value: Any, num_prompts: int) -> list:
    """
    One value per prompt: a list as it is, anything else for every prompt.

    Raises:
        ValueError: If a list's length is not the number of prompts.
    """
    if not isinstance(value, list):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise ValueError(
            f"`{name}` is a list of {len(value)} for {num_prompts} prompt(s); give one for each prompt, or a single"
            " one for all."
        )
    return value


def read_prompts(prompt: "str | IDLoRAPrompt | list | None") -> list[str] | None:
    """The texts to encode; see [`prompt_text`] for what is refused."""
    if prompt is None:
        return None
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts:
        raise ValueError("`prompt` is an empty list; give at least one prompt.")
    return [prompt_text(item) for item in prompts]


def count_prompts(
    prompts: list[str] | None, prompt_embeds: torch.Tensor | None, text_context: TextContext | None
) -> int:
    """The number of prompts, from the one way in which they were given."""
    given = {"prompt": prompts, "prompt_embeds": prompt_embeds, "text_context": text_context}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        what = "none of them" if not names else " and ".join(f"`{name}`" for name in names)
        raise ValueError(f"Give exactly one of `prompt`, `prompt_embeds` and `text_context`; got {what}.")
    if text_context is not None:
        return text_context.batch_size
    return len(prompts) if prompts is not None else prompt_embeds.shape[0]


def read_images(image: Any, num_prompts: int) -> list[PIL.Image.Image | None]:
    """The face of each prompt as an upright RGB image, or `None`; see [`load_image`] for what is refused."""
    if not isinstance(image, list):
        return [None if image is None else load_image(image)] * num_prompts
    return [None if item is None else load_image(item) for item in per_prompt("image", image, num_prompts)]


def read_references(reference_audio: Any, sampling_rate: int | None, num_prompts: int) -> list[list[Clip]]:
    """
    The clips of each prompt's voice, none for a prompt without; see [`read_reference`] for what is refused.

    A tuple is several clips of one speaker, unless it is a `(waveform, sampling_rate)` pair.
    """
    if reference_audio is None and sampling_rate is not None:
        raise ValueError(
            f"`reference_audio_sampling_rate` is {sampling_rate} without a `reference_audio`; give both or neither."
        )
    if not isinstance(reference_audio, list):
        return [_read_clips(reference_audio, sampling_rate)] * num_prompts
    return [_read_clips(item, sampling_rate) for item in per_prompt("reference_audio", reference_audio, num_prompts)]


def _read_clips(source: Any, sampling_rate: int | None) -> list[Clip]:
    if source is None:
        return []
    is_pair = isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], (int, float))
    sources = source if isinstance(source, tuple) and not is_pair else (source,)
    if not sources:
        raise ValueError("`reference_audio` is an empty tuple; give at least one clip, or `None` for no reference.")
    clips = [read_reference(item, sampling_rate) for item in sources]
    warn_reference_seconds(sum(waveform.shape[1] / rate for waveform, rate in clips))
    return clips


def read_speakers(
    speakers: "list[SpeakerTurn] | list[list[SpeakerTurn]] | None", num_prompts: int
) -> list[list[tuple[Clip, float, float]]]:
    """
    The turns of each prompt as voice, start and end in seconds, in order of time; the voice of the same recording is
    the same object. No rows where there are no speakers.

    Raises:
        ValueError: If turns overlap or do not last, or for what [`read_reference`] refuses.
    """
    if speakers is None:
        return []
    if not isinstance(speakers, list) or not speakers:
        what = "empty" if speakers == [] else f"a {type(speakers).__name__}"
        raise ValueError(f"`speakers` is {what}; give a list of `SpeakerTurn`s, or one such list per prompt.")
    has_rows = any(isinstance(row, list) for row in speakers)
    rows = per_prompt("speakers", speakers, num_prompts) if has_rows else [speakers] * num_prompts
    voices = {}
    return [_read_turns(row, voices) for row in rows]


def _read_turns(row: list[SpeakerTurn], voices: dict[Any, Clip]) -> list[tuple[Clip, float, float]]:
    if not isinstance(row, list) or not row or not all(isinstance(turn, SpeakerTurn) for turn in row):
        # Not the value, which may hold a recording.
        items = row if isinstance(row, list) else [row]
        kinds = ", ".join(sorted({type(item).__name__ for item in items})) or "nothing"
        raise ValueError(f"`speakers` holds {kinds}; give `SpeakerTurn`s, in one list or in one for each prompt.")
    for turn in row:
        check_scale("start", turn.start)
        check_positive("end", turn.end)
    turns, last_end = [], 0.0
    for turn in sorted(row, key=lambda turn: turn.start):
        if not last_end <= turn.start < turn.end:
            raise ValueError(
                f"`speakers` has a turn from {turn.start} to {turn.end} s where the one before ends at {last_end} s;"
                " give turns that follow each other."
            )
        last_end, source = turn.end, turn.reference_audio
        if isinstance(source, (torch.Tensor, np.ndarray)):
            raise ValueError("`speakers` has a waveform without its rate; give a `(waveform, sampling_rate)` pair.")
        key = str(source) if isinstance(source, (str, os.PathLike)) else id(source)
        if key not in voices:
            voices[key] = read_reference(source, name="speakers")
        turns.append((voices[key], turn.start, turn.end))
    return turns


def read_earlier_clips(
    continue_from: Any, num_prompts: int, frame_rate: float, sampling_rate: int
) -> list[EarlierClip]:
    """The clip of each prompt that goes on, or no clips; see [`read_earlier_clip`] for what is refused."""
    if continue_from is None:
        return []
    check_positive("frame_rate", frame_rate)
    if not isinstance(continue_from, list):
        return [read_earlier_clip(continue_from, frame_rate, sampling_rate)] * num_prompts
    rows = per_prompt("continue_from", continue_from, num_prompts)
    return [read_earlier_clip(row, frame_rate, sampling_rate) for row in rows]


def split_latents(
    name: str,
    latents: torch.Tensor | list[torch.Tensor | None] | None,
    num_prompts: int,
    shape: tuple[int | None, ...],
) -> list[torch.Tensor | None]:
    """
    Latents given as one tensor `[B or 1, ...]` or a list of `[1, ...]`, as one `[1, ...]` or `None` per prompt.

    Args:
        name (`str`): What messages call them.
        latents (`torch.Tensor` or `list[torch.Tensor | None]`, *optional*): What was given.
        num_prompts (`int`): The number of prompts.
        shape (`tuple[int | None, ...]`): The shape without its rows, for [`check_latents`].
    """
    if isinstance(latents, torch.Tensor) and latents.ndim == len(shape) + 1 and latents.shape[0] > 1:
        latents = list(latents.split(1))
    rows = per_prompt(name, latents, num_prompts)
    for row in rows:
        check_latents(name, row, (1, *shape))
    return rows


def check_latents(name: str, latents: torch.Tensor | None, shape: tuple[int | None, ...]) -> None:
    """
    Raises a ValueError unless `latents` is `None` or a tensor of this shape (`None` is any size from 1) with finite
    values.
    """
    if latents is None:
        return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"`{name}` is a {type(latents).__name__}; give a tensor of the shape [{wanted}].")
    fits = latents.ndim == len(shape) and all(
        given > 0 and size in (None, given) for given, size in zip(latents.shape, shape)
    )
    if not fits:
        raise ValueError(f"`{name}` has the shape {tuple(latents.shape)}; give a tensor of the shape [{wanted}].")
    if not torch.isfinite(latents).all():
        raise ValueError(f"`{name}` holds values that are not finite; encode the recording or image again.")


def check_given_once(**values: Any) -> None:
    """Raises a ValueError if more than one of the values is given."""
    names = [f"`{name}`" for name, value in values.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are given; leave all but one of them out.")


def read_negative_prompts(negative_prompt: str | list[str] | None, num_prompts: int) -> list[str]:
    """What to steer away from, for each prompt."""
    negative_prompts = per_prompt("negative_prompt", "" if negative_prompt is None else negative_prompt, num_prompts)
    for item in negative_prompts:
        if not isinstance(item, str):
            raise ValueError(f"`negative_prompt` holds {item!r}; give a string, or a list of one for each prompt.")
    return negative_prompts


def check_frames(num_frames: int | None, temporal_ratio: int) -> None:
    """Raises a ValueError unless `num_frames` is `None` or a whole number of latent frames: `temporal_ratio` k + 1."""
    if num_frames is None:
        return
    check_count("num_frames", num_frames)
    if (num_frames - 1) % temporal_ratio:
        below = (num_frames - 1) // temporal_ratio * temporal_ratio + 1
        raise ValueError(
            f"`num_frames` is {num_frames}; give {temporal_ratio}k + 1 frames, for example {below} or"
            f" {below + temporal_ratio}."
        )


def read_conditions(conditions: Any) -> list[LTX2VideoCondition]:
    """The further frames of a call, as a list."""
    items = [] if conditions is None else conditions if isinstance(conditions, list) else [conditions]
    for item in items:
        if not isinstance(item, LTX2VideoCondition):
            raise ValueError(f"`conditions` holds a {type(item).__name__}; give `LTX2VideoCondition`s.")
        frames = item.frames if isinstance(item.frames, list) else [item.frames]
        if not frames or not all(isinstance(frame, (PIL.Image.Image, np.ndarray, torch.Tensor)) for frame in frames):
            raise ValueError(
                f"`conditions` has `frames` of the type {type(item.frames).__name__}; give PIL images, an array or a"
                " tensor."
            )
        if isinstance(item.index, bool) or not isinstance(item.index, numbers.Integral):
            raise ValueError(f"`conditions` has an `index` of {item.index!r}; give a whole number.")
        if not (isinstance(item.strength, numbers.Real) and 0 <= item.strength <= 1):
            raise ValueError(f"`conditions` has a `strength` of {item.strength!r}; give a number between 0 and 1.")
    return items


def check_condition_indices(
    conditions: list[LTX2VideoCondition], num_latent_frames: int, first_frame: str | None
) -> None:
    """
    Raises a ValueError for a condition outside of the video, or at its beginning where the image stands.

    Args:
        conditions (`list[LTX2VideoCondition]`): The further frames.
        num_latent_frames (`int`): Length of the video that is wanted, in latent frames.
        first_frame (`str`, *optional*): The argument that gives the first frame, if one does.
    """
    for item in conditions:
        if not -num_latent_frames <= item.index < num_latent_frames:
            raise ValueError(
                f"`conditions` has a frame at index {item.index}, and the video has {num_latent_frames} latent frames;"
                f" give an index from {-num_latent_frames} to {num_latent_frames - 1}."
            )
        if item.index % num_latent_frames == 0 and first_frame is not None:
            raise ValueError(
                f"`conditions` has a frame at index {item.index}, where `{first_frame}` stands; leave one of them out."
            )


def place_conditions(
    conditions: list[LTX2VideoCondition], num_latent_frames: int, num_trimmed: int
) -> list[LTX2VideoCondition]:
    """
    Conditions of the video that is wanted, at their places in the one that is generated.

    Args:
        conditions (`list[LTX2VideoCondition]`): Checked by [`check_condition_indices`].
        num_latent_frames (`int`): Length of the video that is wanted, in latent frames.
        num_trimmed (`int`): Latent frames that are generated before it.
    """
    indices = [item.index % num_latent_frames for item in conditions]
    # One at the beginning stays the first frame that is generated, as the image does.
    return [replace(item, index=index + num_trimmed if index else 0) for item, index in zip(conditions, indices)]


def check_sigmas(sigmas: Sequence[float], name: str = "sigmas") -> list[float]:
    """
    The noise levels without a last 0 (every scheduler ends there by itself).

    Raises:
        ValueError: If there is none, or they do not fall from at most 1 to above 0.
    """
    try:
        values = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` is {sigmas!r}; give a list of numbers that fall from at most 1.") from None
    if values and values[-1] == 0.0:
        values = values[:-1]
    falling = all(first > second for first, second in zip(values, values[1:]))
    if not values or not falling or not all(0.0 < value <= 1.0 for value in values):
        raise ValueError(f"`{name}` is {list(sigmas)}; give noise levels that fall from at most 1 to above 0.")
    return values


def identity_guider(
    scale: float | None, guidance: IdentityGuidance | None, recommended: float | None = None
) -> IdentityGuidance:
    """
    The guider of a call, from a scale or a guider; if neither is given, what the adapter recommends or the recipe's.

    Raises:
        ValueError: If both are given, or the scale is negative or not a number.
    """
    if scale is not None and guidance is not None:
        raise ValueError(
            f"`identity_guidance_scale` ({scale}) and `identity_guidance` are both given; put the scale into the"
            " guider."
        )
    if guidance is not None:
        if not isinstance(guidance, IdentityGuidance):
            raise ValueError(f"`identity_guidance` is a {type(guidance).__name__}; give an `IdentityGuidance`.")
        return guidance
    scale = recommended if scale is None else scale
    if scale is None:
        return IdentityGuidance()
    check_scale("identity_guidance_scale", scale)
    return IdentityGuidance(scale=scale)


def check_positive(name: str, value: float) -> None:
    """Raises a ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"`{name}` is {value!r}; give a number above 0.")


def check_count(name: str, value: int) -> None:
    """Raises a ValueError unless `value` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; give a whole number of at least 1.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises a ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; give one of {', '.join(map(repr, choices))}.")
