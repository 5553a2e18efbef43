"""What is read from a clip: its frames at the wanted rate, its sound, and a recording of a voice cut to length."""

import math
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch

from ..audio import check_waveform, open_media, read_reference, write_wav
from .manifest import VoiceSpan


# LTX-2's pipelines take no other sizes, whatever the compression of the video VAE.
SIDE_MULTIPLE, FRAME_MULTIPLE = 32, 8


@dataclass(frozen=True)
class Bucket:
    """
    A size that clips are brought to.

    Attributes:
        width (`int`), height (`int`): In pixels.
        num_frames (`int`): At the wanted rate.

    Raises:
        ValueError: If the size is off the model's grid.
    """

    width: int
    height: int
    num_frames: int

    def __post_init__(self):
        if min(self.width, self.height) < SIDE_MULTIPLE or self.width % SIDE_MULTIPLE or self.height % SIDE_MULTIPLE:
            raise ValueError(
                f"`resolution_buckets` must have sides that are multiples of {SIDE_MULTIPLE}, but one is {self}."
            )
        if self.num_frames < 1 + FRAME_MULTIPLE or self.num_frames % FRAME_MULTIPLE != 1:
            raise ValueError(
                f"`resolution_buckets` must have 1 frame more than a multiple of {FRAME_MULTIPLE}, such as 121, but "
                f"one is {self}."
            )

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Reads `"512x512x121"`: width, height and frames."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if match is None:
            raise ValueError(f"`resolution_buckets` must read WIDTHxHEIGHTxFRAMES, but one is {text!r}.")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


@dataclass(frozen=True)
class ClipInfo:
    """
    What a video's header and first frame say.

    Attributes:
        width (`int`), height (`int`): Upright, in pixels.
        seconds (`float`): Of the picture.
    """

    width: int
    height: int
    seconds: float


def probe_clip(path: str | os.PathLike) -> ClipInfo:
    """
    Looks at a clip without decoding more than one frame.

    Args:
        path (`str` or `os.PathLike`): The video.

    Returns:
        [`ClipInfo`].

    Raises:
        ValueError: If it can't be decoded, or has no picture, no sound or no length.
    """
    with open_media(path, "file_name") as container:
        stream, _ = (_first_stream(container, kind, path) for kind in ("video", "audio"))
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        frame = next(iter(container.decode(stream)), None)
    if frame is None or seconds <= 0:
        raise ValueError(f"`file_name` is empty: no picture could be decoded from {str(path)!r}.")
    height, width = _upright(frame).shape[:2]
    return ClipInfo(width, height, float(seconds))


def _first_stream(container: av.container.InputContainer, kind: str, path: str | os.PathLike) -> av.stream.Stream:
    stream = next((stream for stream in container.streams if stream.type == kind), None)
    if stream is None:
        lacking = {"video": "picture", "audio": "sound"}[kind]
        raise ValueError(f"`file_name` has no {lacking}: {str(path)!r} needs both; give a video with sound.")
    return stream


def choose_bucket(info: ClipInfo, buckets: Sequence[Bucket], frame_rate: float) -> Bucket:
    """
    The bucket nearest to a clip: of those that it is long enough for, the nearest aspect, then the most frames, then
    the nearest area.

    Args:
        info (`ClipInfo`): The clip.
        buckets (`Sequence[Bucket]`): To choose from.
        frame_rate (`float`): Of the buckets, in frames per second.

    Returns:
        [`Bucket`].

    Raises:
        ValueError: If the clip is shorter than every bucket.
    """
    # The last frame stands at the start of its own duration, so half a frame may lack at the end.
    fitting = [bucket for bucket in buckets if info.seconds * frame_rate >= bucket.num_frames - 0.5]
    if not fitting:
        shortest = min(bucket.num_frames for bucket in buckets)
        raise ValueError(
            f"the clip is too short: {info.seconds:.2f} s, and the shortest bucket has {shortest} frames, "
            f"{shortest / frame_rate:.2f} s"
        )

    def distance(bucket: Bucket) -> tuple[float, int, float]:
        aspect = abs(math.log(bucket.width * info.height / (bucket.height * info.width)))
        area = abs(math.log(bucket.width * bucket.height / (info.width * info.height)))
        return round(aspect, 6), -bucket.num_frames, area

    return min(fitting, key=distance)


def read_frames(path: str | os.PathLike, num_frames: int, frame_rate: float) -> Iterator[np.ndarray]:
    """
    Decodes the beginning of a video at another frame rate: of each wanted moment the frame that is nearest in time.

    Args:
        path (`str` or `os.PathLike`): The video.
        num_frames (`int`): How many.
        frame_rate (`float`): Wanted, in frames per second.

    Returns:
        An iterator over upright frames, uint8 `[height, width, 3]`, which holds one at a time.

    Raises:
        ValueError: If it can't be decoded or ends too early.
    """
    wanted, previous, shown_at, beginning = 0, None, 0.0, None
    with open_media(path, "file_name") as container:
        stream = _first_stream(container, "video", path)
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or frame_rate)
        for index, frame in enumerate(container.decode(stream)):
            # Bare streams have no times of their own.
            time = index / rate if frame.time is None else frame.time
            beginning = time if beginning is None else beginning
            time -= beginning
            while previous is not None and wanted < num_frames and 2 * wanted / frame_rate <= shown_at + time:
                yield _upright(previous)
                wanted += 1
            if wanted == num_frames:
                return
            previous, shown_at = frame, time
        # The last frame is shown for as long as every other one.
        while previous is not None and wanted < num_frames and wanted / frame_rate <= shown_at + 1 / rate:
            yield _upright(previous)
            wanted += 1
    if wanted < num_frames:
        raise ValueError(
            f"`file_name` ends early: {str(path)!r} has {shown_at:.2f} s of picture, and {num_frames} frames at "
            f"{frame_rate:g} per second are wanted; cut it again."
        )


def _upright(frame: av.VideoFrame) -> np.ndarray:
    # Phones store a rotation beside the frames.
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def read_sound(path: str | os.PathLike, seconds: float) -> tuple[torch.Tensor, int]:
    """
    Decodes the sound that belongs to the beginning of a video: cut or padded with silence to its length, and shifted
    if it begins earlier or later than the picture.

    Args:
        path (`str` or `os.PathLike`): The video.
        seconds (`float`): Wanted length.

    Returns:
        `tuple[torch.Tensor, int]`: The waveform `[channels, samples]` and its sampling rate in Hz.

    Raises:
        ValueError: If it can't be decoded or is silent.
    """
    waveform, sampling_rate = read_reference(path, name="file_name")
    length = round(seconds * sampling_rate)
    shift = round((_start_seconds(path, "audio") - _start_seconds(path, "video")) * sampling_rate)
    shift = max(-waveform.shape[1], min(shift, length))
    waveform = torch.nn.functional.pad(waveform, (shift, length - shift - waveform.shape[1]))
    check_waveform(waveform, sampling_rate, "file_name")
    return waveform, sampling_rate


def _start_seconds(path: str | os.PathLike, kind: str) -> float:
    with open_media(path, "file_name") as container:
        frame = next(container.decode(_first_stream(container, kind, path)), None)
    # Bare streams have no times of their own.
    return 0.0 if frame is None or frame.time is None else frame.time


def read_voice(
    span: VoiceSpan, max_seconds: float, denoise_command: str | None = None
) -> tuple[torch.Tensor, int, tuple[float, float]]:
    """
    Reads a recording of a voice: the wanted span, and of a long one the loudest part, denoised if wanted.

    Args:
        span (`VoiceSpan`): The recording.
        max_seconds (`float`): What is longer is cut.
        denoise_command (`str`, *optional*): A program and its arguments, with `{in}` and `{out}` for two wav files.

    Returns:
        `tuple[torch.Tensor, int, tuple[float, float]]`: The waveform `[channels, samples]`, its sampling rate in Hz,
        and what was taken from the recording, start and end in seconds.

    Raises:
        ValueError: If it can't be decoded, the span lies outside or is silent, or the program fails.
    """
    waveform, sampling_rate = read_reference(span.path, name="reference_file_name")
    first = round((span.start or 0.0) * sampling_rate)
    last = waveform.shape[1] if span.end is None else min(round(span.end * sampling_rate), waveform.shape[1])
    if first >= last:
        raise ValueError(
            f"`reference_start` is {span.start} s, but {span.file_name!r} lasts only "
            f"{waveform.shape[1] / sampling_rate:.2f} s: correct it."
        )
    length = round(max_seconds * sampling_rate)
    if last - first > length:
        first += _loudest_window(waveform[:, first:last], length)
        last = first + length
    waveform = waveform[:, first:last]
    check_waveform(waveform, sampling_rate, "reference_file_name")
    taken = (first / sampling_rate, last / sampling_rate)
    if denoise_command is not None:
        waveform, sampling_rate = _denoise(waveform, sampling_rate, denoise_command)
    return waveform, sampling_rate, taken


def _loudest_window(waveform: torch.Tensor, length: int) -> int:
    energy = torch.nn.functional.pad(waveform.double().square().sum(dim=0).cumsum(dim=0), (1, 0))
    return int((energy[length:] - energy[:-length]).argmax())


def check_denoise_command(command: str) -> None:
    """
    Checks a denoising command without running it.

    Args:
        command (`str`): For example `"denoise --input {in} --output {out}"`.

    Raises:
        ValueError: If it isn't well-formed, lacks `{in}` or `{out}`, or its program doesn't exist.
    """
    try:
        program, *arguments = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"`denoise_command` {command!r} is empty or has a quote that isn't closed.") from error
    for placeholder in ("{in}", "{out}"):
        if not any(placeholder in argument for argument in arguments):
            raise ValueError(f"`denoise_command` must have {placeholder} among its arguments, but is {command!r}.")
    if shutil.which(program) is None:
        raise ValueError(f"`denoise_command` names the program {program!r}, which isn't found: install it.")


def _denoise(waveform: torch.Tensor, sampling_rate: int, command: str) -> tuple[torch.Tensor, int]:
    with tempfile.TemporaryDirectory() as folder:
        files = {"{in}": Path(folder, "in.wav"), "{out}": Path(folder, "out.wav")}
        write_wav(files["{in}"], waveform, sampling_rate)
        arguments = shlex.split(command)
        for placeholder, file in files.items():
            arguments = [argument.replace(placeholder, str(file)) for argument in arguments]
        # Never through a shell, which would read meaning into a path.
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode != 0 or not files["{out}"].is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "it wrote no file").splitlines()[-1]
            raise ValueError(f"`denoise_command` failed with exit code {done.returncode}: {said}")
        return read_reference(files["{out}"], name="reference_file_name")
