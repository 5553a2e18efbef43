"""Longer than one clip: the end of an earlier clip as the clean beginning of the next, and the joining of both."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch

from .audio import MAX_PEAK, as_waveform, check_sampling_rate
from .media import read_video


CONTEXT_SECONDS = 1.0


@dataclass(frozen=True)
class EarlierClip:
    """
    The clip that is to go on.

    Attributes:
        frames (`np.ndarray`): All of its frames, uint8 `[F, height, width, 3]`.
        waveform (`torch.Tensor`): All of its sound, `[channels, samples]`.
        sampling_rate (`int`): In Hz.
    """

    frames: np.ndarray
    waveform: torch.Tensor
    sampling_rate: int

    def last_frames(self, count: int) -> list[PIL.Image.Image]:
        """Its last `count` frames."""
        return [PIL.Image.fromarray(frame) for frame in self.frames[-count:]]

    def sound_from(self, start: float, seconds: float) -> torch.Tensor:
        """Its sound from `start` seconds on, silent where the sound ends before the picture does."""
        first, count = round(start * self.sampling_rate), round(seconds * self.sampling_rate)
        part = self.waveform[:, first : first + count]
        return torch.nn.functional.pad(part, (0, count - part.shape[1]))


def read_earlier_clip(source: Any, frame_rate: float, sampling_rate: int, name: str = "continue_from") -> EarlierClip:
    """
    Args:
        source (path, or `(frames, audio)`):
            A video file with sound, or frames as the pipeline returns them for one clip (PIL images, an array
            `[F, height, width, 3]` or a tensor `[F, 3, height, width]`, from 0 to 1 or uint8) with a waveform
            `[channels, samples]` or a `(waveform, sampling_rate)` pair. The sound may be silent.
        frame_rate (`float`): That of the clip to make, which that of a file must be equal to.
        sampling_rate (`int`): In Hz, of a waveform that comes without one: the pipeline's own.
        name (`str`, defaults to `"continue_from"`): The argument that messages name.

    Raises:
        ValueError: If it can't be read, has no sound, another frame rate, or values that are out of range.
    """
    if isinstance(source, (str, os.PathLike)):
        frames, rate, waveform, sampling_rate = read_video(source, name)
        if waveform is None:
            raise ValueError(f"`{name}` {str(source)!r} has no sound; give a clip that has.")
        if abs(rate - frame_rate) > 0.01:
            raise ValueError(f"`{name}` {str(source)!r} has {rate:g} frames per second; set `frame_rate` to that.")
        return EarlierClip(frames, waveform, sampling_rate)
    if not isinstance(source, tuple) or len(source) != 2:
        raise ValueError(f"`{name}` is a {type(source).__name__}; give a video file, or frames and sound as a pair.")
    frames, audio = source
    if isinstance(audio, (tuple, list)) and len(audio) == 2:
        audio, sampling_rate = audio
    waveform = as_waveform(audio, name)
    # Written so that a sample that is no number fails too.
    if not waveform.numel() or not waveform.abs().max() <= MAX_PEAK:
        raise ValueError(f"`{name}` has sound that is empty or out of range; give samples from -1 to 1.")
    return EarlierClip(_uint8_frames(frames, name), waveform, check_sampling_rate(sampling_rate, name))


def _uint8_frames(frames: Any, name: str) -> np.ndarray:
    if isinstance(frames, Sequence) and frames and all(isinstance(frame, PIL.Image.Image) for frame in frames):
        if len({frame.size for frame in frames}) > 1:
            raise ValueError(f"`{name}` has frames of several sizes; give frames of one size.")
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    elif isinstance(frames, torch.Tensor) and frames.ndim == 4:
        # There is no bfloat16 in NumPy.
        frames = (frames.float() if frames.is_floating_point() else frames).detach().cpu().movedim(1, -1).numpy()
    if not isinstance(frames, np.ndarray) or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"`{name}` has frames of a kind that is not known; give PIL images, an array or a tensor.")
    if frames.dtype == np.uint8:
        return frames
    # Written so that a value that is no number fails too.
    if frames.dtype.kind != "f" or not (frames.size and frames.min() >= -0.01 and frames.max() <= 1.01):
        raise ValueError(f"`{name}` has frames of {frames.dtype} values; give uint8, or numbers from 0 to 1.")
    return (np.clip(frames, 0.0, 1.0) * 255).round().astype(np.uint8)


def context_frames(clips: Sequence[EarlierClip], frame_rate: float, temporal_ratio: int) -> int:
    """
    How many last frames become context: about a second, of the form `temporal_ratio` k + 1, the same for all clips.

    Raises:
        ValueError: If a clip is too short for any.
    """
    wanted = max(1, round((CONTEXT_SECONDS * frame_rate - 1) / temporal_ratio))
    available = min((len(clip.frames) - 1) // temporal_ratio for clip in clips)
    if available < 1:
        shortest = min(len(clip.frames) for clip in clips)
        raise ValueError(f"`continue_from` has {shortest} frames; give a clip of at least {temporal_ratio + 1}.")
    return min(wanted, available) * temporal_ratio + 1


def join_clips(
    first: tuple[list, torch.Tensor], second: tuple[list, torch.Tensor], frame_rate: float, sampling_rate: int
) -> tuple[list, torch.Tensor]:
    """
    A clip and the one that was made with `continue_from` of it, as one.

    The second begins with the last frame of the first, which stands once in the result, and its sound begins where
    that frame begins.

    Args:
        first, second (`tuple[list, torch.Tensor]`): Frames, and the sound `[channels, samples]`.
        frame_rate (`float`): Of both.
        sampling_rate (`int`): Of both, in Hz.
    """
    (frames, sound), (later_frames, later_sound) = first, second
    cut = round((len(frames) - 1) / frame_rate * sampling_rate)
    sound = torch.nn.functional.pad(sound[:, :cut], (0, max(0, cut - sound.shape[1])))
    return [*frames, *later_frames[1:]], torch.cat([sound, later_sound.to(sound)], dim=1)
