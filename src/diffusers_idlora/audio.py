"""Any audio or video file to a waveform, and a waveform to the log-mel spectrogram that the audio VAE encodes."""

import math
import numbers
import os
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import torch
import torchaudio
from diffusers.utils import logging


logger = logging.get_logger(__name__)

MIN_SECONDS = 0.1
USUAL_SECONDS = (2.0, 10.0)
MIN_SAMPLING_RATE, MAX_SAMPLING_RATE = 1_000, 768_000
SILENCE = 1e-4
# Far above any overshoot of a lossy codec, far below integer samples that were cast to float and never scaled.
MAX_PEAK = 100.0
MAX_CHANNELS = 64
# torchaudio's resampler holds one filter per phase: two rates with no common factor need gigabytes.
MAX_RESAMPLING_KERNEL = 2**28
LOG_FLOOR = 1e-5
INTEGER_FULL_SCALE = {torch.int16: 2.0**15, torch.int32: 2.0**31}
SAMPLE_DTYPES = frozenset([torch.float16, torch.bfloat16, torch.float32, torch.float64, *INTEGER_FULL_SCALE])

_warned_about_seconds = False


@contextmanager
def open_media(path: str | os.PathLike, name: str = "path") -> Iterator["av.container.InputContainer"]:
    """
    Opens a media file for reading and turns every failure to read it, there or in the `with` block, into one sentence.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        name (`str`, *optional*, defaults to `"path"`):
            The argument that the error names.

    Returns:
        A context manager that gives the open `av.container.InputContainer`.

    Raises:
        `ValueError`: if the file is missing, not a file, or can't be decoded.
    """
    # An absolute path: FFmpeg would take what stands before the colon of `take:2.wav` for a protocol.
    file = Path(path).absolute()
    # Not `Path.is_file`, which fails on a name that is too long or lies in a locked folder.
    if not os.path.isfile(file):
        raise ValueError(f"`{name}` must be an existing file, but {str(path)!r} is none: check the path.")
    try:
        # Tags of old recordings are often not UTF-8, which is no reason to refuse the sound.
        with av.open(str(file), metadata_errors="ignore") as container:
            yield container
    except (av.FFmpegError, EOFError) as error:
        raise ValueError(
            f"`{name}` can't be decoded: {str(path)!r} is damaged or not an audio or video file "
            f"({error.strerror or error}); convert it to wav or mp4 again."
        ) from error


def load_audio(path: str | os.PathLike, name: str = "path") -> tuple[torch.Tensor, int]:
    """
    Decodes the sound of a file: wav, flac, mp3, m4a, ogg, or the first sound track of an mp4, mov, mkv or webm.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        name (`str`, *optional*, defaults to `"path"`):
            The argument that the errors name.

    Returns:
        `tuple[torch.Tensor, int]`: the float32 waveform `[channels, samples]` with full scale at -1..1 (lossy codecs
        may overshoot a little) and its sampling rate in Hz.

    Raises:
        `ValueError`: if the file is missing, can't be decoded or has no sound.
    """
    with open_media(path, name) as container:
        if not container.streams.audio:
            raise ValueError(f"`{name}` has no sound: {str(path)!r} holds no audio stream; give a file with sound.")
        # The resampler keeps rate and channels, and brings every sample format to planar float at full scale 1.
        to_float = av.AudioResampler(format="fltp")
        chunks = []
        for frame in container.decode(audio=0):
            chunks += [converted.to_ndarray() for converted in to_float.resample(frame)]
        chunks += [converted.to_ndarray() for converted in to_float.resample(None) if converted is not None]
        stream = container.streams.audio[0]
        promised = stream.duration and round(stream.duration * stream.time_base * to_float.rate)
        codec_block = stream.codec_context.frame_size
    if not chunks:
        raise ValueError(f"`{name}` is empty: no sound could be decoded from {str(path)!r}; record it again.")
    waveform = np.concatenate(chunks, axis=1)
    # A codec fills its last block with silence that was never recorded.
    if promised and 0 < waveform.shape[1] - promised < codec_block:
        waveform = waveform[:, :promised]
    return torch.from_numpy(waveform), int(to_float.rate)


def write_wav(path: str | os.PathLike, waveform: torch.Tensor, sampling_rate: int) -> None:
    """
    Writes a recording as a 16-bit wav file.

    Args:
        path (`str` or `os.PathLike`):
            The file; an existing one is replaced.
        waveform (`torch.Tensor`):
            `[channels, samples]`, clipped at -1..1.
        sampling_rate (`int`):
            In Hz.
    """
    pcm = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(pcm.shape[0])
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        # Little-endian samples, channels interleaved, as the format wants them on any machine.
        file.writeframes(pcm.T.contiguous().numpy().astype("<i2").tobytes())


def as_waveform(array_or_tensor: torch.Tensor | np.ndarray, name: str = "reference_audio") -> torch.Tensor:
    """
    Brings samples to one layout and scale.

    Args:
        array_or_tensor (`torch.Tensor` or `np.ndarray`):
            `[samples]` or `[channels, samples]`; floating point at full scale 1, or int16 / int32, which are scaled.
        name (`str`, *optional*, defaults to `"reference_audio"`):
            The argument that the errors name.

    Returns:
        `torch.Tensor`: float32 `[channels, samples]`, on the device of the input.

    Raises:
        `ValueError`: if it is neither tensor nor array, has another number of axes, swapped axes or another dtype.
    """
    if not isinstance(array_or_tensor, (torch.Tensor, np.ndarray)):
        raise ValueError(
            f"`{name}` must be a path, a `(waveform, sampling_rate)` pair, a tensor or an array, but is a "
            f"{type(array_or_tensor).__name__}: {str(array_or_tensor)[:80]!r}."
        )
    waveform = array_or_tensor
    if isinstance(waveform, np.ndarray) and waveform.dtype.kind in "fi":
        # PyTorch knows no big-endian numbers, which some wav readers return, and no extended precision.
        native = np.float32 if waveform.dtype.kind == "f" else waveform.dtype.newbyteorder("=")
        waveform = torch.tensor(np.ascontiguousarray(waveform, dtype=native))
    if waveform.dtype not in SAMPLE_DTYPES:
        raise ValueError(
            f"`{name}` must hold float, int16 or int32 samples, but its dtype is {waveform.dtype}: convert it."
        )
    if waveform.ndim not in (1, 2):
        raise ValueError(
            f"`{name}` must have the shape [samples] or [channels, samples], but has {list(waveform.shape)}: "
            "give one recording without a batch axis."
        )
    waveform = waveform if waveform.ndim == 2 else waveform[None]
    if waveform.shape[0] > MAX_CHANNELS and waveform.shape[1] < waveform.shape[0]:
        raise ValueError(
            f"`{name}` must have the shape [channels, samples], but has {list(waveform.shape)}: swap its axes."
        )
    return waveform.to(torch.float32) / INTEGER_FULL_SCALE.get(waveform.dtype, 1.0)


def check_sampling_rate(sampling_rate: int, name: str = "reference_audio") -> int:
    """
    Checks a sampling rate.

    Args:
        sampling_rate (`int`):
            In Hz; a float with a whole value is fine.
        name (`str`, *optional*, defaults to `"reference_audio"`):
            The recording that the error names.

    Returns:
        `int`: the sampling rate.

    Raises:
        `ValueError`: if it isn't a whole number between 1000 and 768000 Hz.
    """
    is_number = isinstance(sampling_rate, numbers.Real) and not isinstance(sampling_rate, bool)
    if (
        not is_number
        or not math.isfinite(sampling_rate)
        or sampling_rate != int(sampling_rate)
        or not MIN_SAMPLING_RATE <= sampling_rate <= MAX_SAMPLING_RATE
    ):
        raise ValueError(
            f"The sampling rate of `{name}` must be a whole number between {MIN_SAMPLING_RATE} and "
            f"{MAX_SAMPLING_RATE} Hz, but {sampling_rate!r} was given: pass the rate it was recorded at."
        )
    return int(sampling_rate)


def check_waveform(waveform: torch.Tensor | np.ndarray, sampling_rate: int, name: str = "reference_audio") -> None:
    """
    Checks that a recording is usable as a voice.

    Args:
        waveform (`torch.Tensor` or `np.ndarray`):
            `[samples]` or `[channels, samples]`, see [`as_waveform`].
        sampling_rate (`int`):
            In Hz.
        name (`str`, *optional*, defaults to `"reference_audio"`):
            The argument that the errors name.

    Raises:
        `ValueError`: if shape, dtype or sampling rate are wrong, or the recording is empty, shorter than 0.1 s,
        silent, not finite or not at full scale 1.
    """
    sampling_rate = check_sampling_rate(sampling_rate, name)
    waveform = as_waveform(waveform, name)
    if waveform.numel() == 0:
        raise ValueError(f"`{name}` is empty, its shape is {list(waveform.shape)}: give at least {MIN_SECONDS} s.")
    if not torch.isfinite(waveform).all():
        raise ValueError(f"`{name}` holds NaN or infinite samples: decode or record it again.")
    seconds = waveform.shape[1] / sampling_rate
    if seconds < MIN_SECONDS:
        raise ValueError(
            f"`{name}` is too short, {waveform.shape[1]} samples at {sampling_rate} Hz are {seconds:.4g} s: give at "
            f"least {MIN_SECONDS} s, better about 5 s."
        )
    peak = waveform.abs().max().item()
    if peak < SILENCE:
        raise ValueError(f"`{name}` is silent, its peak is {peak:.2g} of 1: give a recording with an audible voice.")
    if peak > MAX_PEAK:
        raise ValueError(
            f"`{name}` must have samples in -1..1, but its peak is {peak:.6g}: pass 16-bit samples as int16 or divide "
            "them by 32768."
        )


def warn_reference_seconds(seconds: float) -> None:
    """
    Warns, once per process, that a reference is shorter or longer than the method was trained on.

    Args:
        seconds (`float`):
            Length of the reference.
    """
    global _warned_about_seconds
    shortest, longest = USUAL_SECONDS
    if shortest <= seconds <= longest or _warned_about_seconds:
        return
    _warned_about_seconds = True
    logger.warning(
        f"`reference_audio` lasts {seconds:.1f} s. The method was trained on about 5 s; outside "
        f"{shortest:g}..{longest:g} s the voice may be matched less well."
    )


def read_reference(
    source: str | os.PathLike | tuple | torch.Tensor | np.ndarray,
    sampling_rate: int | None = None,
    name: str = "reference_audio",
) -> tuple[torch.Tensor, int]:
    """
    Reads and checks one reference clip.

    Args:
        source (`str`, `os.PathLike`, `tuple[torch.Tensor, int]`, `torch.Tensor` or `np.ndarray`):
            An audio or video file, a `(waveform, sampling_rate)` pair, or a waveform `[samples]` or
            `[channels, samples]`.
        sampling_rate (`int`, *optional*):
            In Hz; required for a bare waveform, not allowed with the other two.
        name (`str`, *optional*, defaults to `"reference_audio"`):
            The argument that the errors name.

    Returns:
        `tuple[torch.Tensor, int]`: the float32 waveform `[channels, samples]` and its sampling rate in Hz.

    Raises:
        `ValueError`: if the sampling rate is missing or given twice, or the recording is unreadable or unusable.
    """
    rate_name = f"{name}_sampling_rate"
    is_path = isinstance(source, (str, os.PathLike))
    if (is_path or isinstance(source, tuple)) and sampling_rate is not None:
        raise ValueError(
            f"`{rate_name}` is {sampling_rate!r}, but `{name}` brings its own sampling rate: leave `{rate_name}` out."
        )
    if is_path:
        source, sampling_rate = load_audio(source, name)
    elif isinstance(source, tuple):
        if len(source) != 2:
            raise ValueError(
                f"`{name}` must be a `(waveform, sampling_rate)` pair, but has {len(source)} entries: give two."
            )
        source, sampling_rate = source
    waveform = as_waveform(source, name)
    if sampling_rate is None:
        raise ValueError(f"`{rate_name}` is required when `{name}` is a bare waveform: pass its rate in Hz.")
    check_waveform(waveform, sampling_rate, name)
    return waveform, int(sampling_rate)


@lru_cache(maxsize=8)
def _mel_transform(
    sampling_rate: int, hop_length: int, mel_bins: int, n_fft: int
) -> torchaudio.transforms.MelSpectrogram:
    # Built once and shared: made inside inference mode, its buffers could never take part in a later backward pass.
    with torch.inference_mode(False):
        return torchaudio.transforms.MelSpectrogram(
            sample_rate=sampling_rate,
            n_fft=n_fft,
            win_length=n_fft,
            hop_length=hop_length,
            f_min=0.0,
            f_max=sampling_rate / 2,
            n_mels=mel_bins,
            power=1.0,
            center=True,
            pad_mode="reflect",
            norm="slaney",
            mel_scale="slaney",
        )


def check_resampling(sampling_rate: int, target_sampling_rate: int, name: str = "reference_audio") -> None:
    """Raises a ValueError if the filter from one rate to the other would need gigabytes; both in Hz."""
    common = math.gcd(sampling_rate, target_sampling_rate)
    if (sampling_rate // common) * (target_sampling_rate // common) > MAX_RESAMPLING_KERNEL:
        raise ValueError(
            f"`{name}` has a sampling rate of {sampling_rate} Hz, which can't be brought to {target_sampling_rate} Hz "
            "in reasonable memory: convert the recording to 16000, 44100 or 48000 Hz."
        )


def log_mel_spectrogram(
    waveform: torch.Tensor | np.ndarray,
    sampling_rate: int,
    *,
    target_sampling_rate: int = 16000,
    hop_length: int = 160,
    mel_bins: int = 64,
    n_fft: int = 1024,
) -> torch.Tensor:
    """
    Computes what the audio VAE encodes: the log of a magnitude mel spectrogram of two channels. Mono is duplicated,
    more than two channels are averaged first.

    Args:
        waveform (`torch.Tensor` or `np.ndarray`):
            `[samples]` or `[channels, samples]`, see [`as_waveform`]; on any device.
        sampling_rate (`int`):
            Of the waveform, in Hz.
        target_sampling_rate (`int`, *optional*, defaults to 16000):
            `audio_vae.config.sample_rate`, in Hz. The mel bands reach up to half of it.
        hop_length (`int`, *optional*, defaults to 160):
            `audio_vae.config.mel_hop_length`, in samples.
        mel_bins (`int`, *optional*, defaults to 64):
            `audio_vae.config.mel_bins`.
        n_fft (`int`, *optional*, defaults to 1024):
            Length of the Hann window and of the Fourier transform, in samples.

    Returns:
        `torch.Tensor`: float32 `[1, 2, frames, mel_bins]` on the waveform's device, with
        `frames = resampled_samples // hop_length + 1`.

    Raises:
        `ValueError`: if waveform or sampling rate are wrong, or the recording is shorter than half a window.
    """
    sampling_rate = check_sampling_rate(sampling_rate, "waveform")
    check_resampling(sampling_rate, target_sampling_rate, "waveform")
    waveform = as_waveform(waveform, "waveform")
    device = waveform.device
    # Always on the CPU: it takes milliseconds, and GPUs convolve in TF32, which the log shows in nearly empty bands.
    waveform = waveform.cpu()
    if waveform.shape[0] != 2:
        # Before resampling, as the method does: even the order of float32 sums shows in those bands.
        waveform = waveform.mean(dim=0, keepdim=True).repeat(2, 1)
    # Autocast would run the mel filter bank in half precision.
    with torch.autocast("cpu", enabled=False):
        resampled = torchaudio.functional.resample(waveform, sampling_rate, target_sampling_rate)
        if resampled.shape[1] <= n_fft // 2:
            raise ValueError(
                f"`waveform` has {resampled.shape[1]} samples at {target_sampling_rate} Hz, the spectrogram needs "
                f"more than {n_fft // 2}: give a longer recording."
            )
        mel = _mel_transform(target_sampling_rate, hop_length, mel_bins, n_fft)(resampled[None])
    return mel.clamp(min=LOG_FLOOR).log().transpose(2, 3).to(device)
