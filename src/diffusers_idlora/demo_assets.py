"""Inputs of the demo, made by code: a face picture, a voice recording, and a tiny checkpoint with its adapter."""

import hashlib
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import torchaudio.functional
from diffusers import LTX2VideoTransformer3DModel
from PIL import Image, ImageDraw
from safetensors import SafetensorError

from .audio import write_wav
from .media import file_sha256
from .tiny import normalize_family, save_tiny_adapter, save_tiny_checkpoint


# Frequencies and bandwidths in Hz of the first three formants of a low adult voice.
_FORMANTS = {
    "a": ((730, 90), (1090, 110), (2440, 170)),
    "e": ((530, 70), (1840, 110), (2480, 170)),
    "i": ((270, 60), (2290, 110), (3010, 170)),
    "o": ((570, 80), (840, 100), (2410, 170)),
    "u": ((300, 60), (870, 100), (2240, 170)),
}
_PITCH_HZ = 120.0
_VIBRATO_HZ = 5.0
_VOWEL_SECONDS = 0.35
_PAUSE_SECONDS = 0.08
_ONSET_SECONDS = 0.04
_PEAK = 0.7


def demo_face(size: int = 512) -> Image.Image:
    """
    Draws a simple face with shoulders on a plain background.

    Args:
        size (`int`, *optional*, defaults to `512`):
            Width and height in pixels.

    Returns:
        `PIL.Image.Image`: An RGB picture.

    Raises:
        ValueError: If `size` is less than 32.
    """
    if size < 32:
        raise ValueError(f"`size` is {size}: give at least 32 pixels.")
    image = Image.new("RGB", (size, size), (156, 186, 205))
    draw = ImageDraw.Draw(image)
    skin, hair, shirt, lips = (232, 190, 160), (74, 48, 34), (60, 84, 130), (178, 82, 84)

    def box(left: float, top: float, right: float, bottom: float) -> list[float]:
        return [size * side for side in (left, top, right, bottom)]

    draw.ellipse(box(0.12, 0.78, 0.88, 1.40), fill=shirt)
    draw.rectangle(box(0.43, 0.68, 0.57, 0.84), fill=skin)
    draw.ellipse(box(0.26, 0.10, 0.74, 0.62), fill=hair)
    draw.ellipse(box(0.30, 0.18, 0.70, 0.74), fill=skin)
    draw.chord(box(0.28, 0.12, 0.72, 0.50), 190, 350, fill=hair)
    for center in (0.41, 0.59):
        draw.ellipse(box(center - 0.045, 0.41, center + 0.045, 0.46), fill=(250, 250, 250))
        draw.ellipse(box(center - 0.020, 0.415, center + 0.020, 0.455), fill=(50, 70, 60))
        draw.line(box(center - 0.05, 0.385, center + 0.05, 0.385), fill=hair, width=max(1, size // 64))
    draw.line(box(0.50, 0.46, 0.48, 0.55), fill=(200, 150, 122), width=max(1, size // 96))
    draw.line(box(0.48, 0.55, 0.52, 0.55), fill=(200, 150, 122), width=max(1, size // 96))
    draw.chord(box(0.42, 0.57, 0.58, 0.67), 0, 180, fill=lips)
    return image


def demo_voice(seconds: float = 5.0, sampling_rate: int = 24000, seed: int = 0) -> tuple[torch.Tensor, int]:
    """
    Synthesises the vowels a, e, i, o, u in turn: a pulse train with a slight vibrato through formant resonators.

    Args:
        seconds (`float`, *optional*, defaults to `5.0`):
            Length of the recording.
        sampling_rate (`int`, *optional*, defaults to `24000`):
            Samples per second; at least 8000, so that the formants fit.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the breath noise. The global random state is not used.

    Returns:
        `tuple[torch.Tensor, int]`: The waveform `[1, samples]` with a peak of 0.7, and its sampling rate.

    Raises:
        ValueError: If `seconds` is not positive or `sampling_rate` is too low.
    """
    if not seconds > 0:
        raise ValueError(f"`seconds` is {seconds}: give a positive length.")
    if sampling_rate < 8000:
        raise ValueError(f"`sampling_rate` is {sampling_rate}: give at least 8000 samples per second.")
    num_samples = round(seconds * sampling_rate)
    source = _glottal_source(num_samples, sampling_rate, torch.Generator().manual_seed(seed))
    voice = torch.zeros(num_samples)
    vowel_length = round(_VOWEL_SECONDS * sampling_rate)
    period = vowel_length + round(_PAUSE_SECONDS * sampling_rate)
    vowels = list(_FORMANTS.values())
    for index, start in enumerate(range(0, num_samples, period)):
        excitation = source[start : start + vowel_length]
        # Faded before and after the filter: the resonators would ring on a hard edge, and into the pause.
        envelope = _fade(len(excitation), round(_ONSET_SECONDS * sampling_rate))
        vowel = _resonate(excitation * envelope, vowels[index % len(vowels)], sampling_rate) * envelope
        voice[start : start + vowel_length] = vowel / vowel.abs().max().clamp(min=1e-8)
    return (_PEAK * voice / voice.abs().max()).unsqueeze(0), sampling_rate


def write_demo_assets(directory: str | os.PathLike, seconds: float = 5.0) -> tuple[Path, Path]:
    """
    Writes the demo's inputs: `face.png` and `voice.wav` (mono, 16-bit PCM, 24 kHz).

    Args:
        directory (`str` or `os.PathLike`):
            Folder to write to, created if missing. Files of these names are replaced.
        seconds (`float`, *optional*, defaults to `5.0`):
            Length of the recording.

    Returns:
        `tuple[pathlib.Path, pathlib.Path]`: The picture's and the recording's path.

    Raises:
        ValueError: If `seconds` is not positive.
    """
    waveform, sampling_rate = demo_voice(seconds)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo_assets.", dir=directory) as temporary:
        demo_face().save(Path(temporary) / "face.png")
        write_wav(Path(temporary) / "voice.wav", waveform, sampling_rate)
        for name in ("face.png", "voice.wav"):
            os.replace(Path(temporary) / name, directory / name)
    return directory / "face.png", directory / "voice.wav"


def cache_folder() -> Path:
    """Where the demo keeps its tiny checkpoints: `XDG_CACHE_HOME`, or `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root).absolute() / "diffusers_idlora"


def cached_demo_inputs(family: str) -> tuple[Path, Path, Path, Path]:
    """
    Makes the demo's inputs on first use, and again where they are damaged.

    Args:
        family (`str`):
            The model generation, as in [`tiny_components`].

    Returns:
        `tuple[pathlib.Path, ...]`: Checkpoint, adapter, face and voice.

    Raises:
        ValueError: If `family` is unknown or the cache folder cannot be written.
    """
    folder = cache_folder() / f"demo-{normalize_family(family)}-{version('diffusers-idlora')}"
    try:
        if not _is_intact(folder):
            _write_demo_inputs(folder, family)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The demo's cache {str(folder)!r} can't be written ({error}): make room, or set `XDG_CACHE_HOME` to "
            "another folder."
        ) from error
    return tuple(folder / name for name in ("checkpoint", "id_lora.safetensors", "face.png", "voice.wav"))


def _write_demo_inputs(folder: Path, family: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo.", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        save_tiny_checkpoint(new / "checkpoint", family)
        transformer = LTX2VideoTransformer3DModel.from_pretrained(new / "checkpoint" / "transformer")
        save_tiny_adapter(new / "id_lora.safetensors", transformer)
        write_demo_assets(new)
        (new / "sha256").write_text(_sha256(new))
        # A damaged one makes place. Another demo may finish its own meanwhile, which is as good.
        if not _is_intact(folder):
            if folder.exists():
                os.replace(folder, Path(temporary) / "damaged")
            try:
                os.replace(new, folder)
            except OSError:
                if not _is_intact(folder):
                    raise


def _is_intact(folder: Path) -> bool:
    try:
        return (folder / "sha256").read_text() == _sha256(folder)
    except (OSError, ValueError):
        return False


def _sha256(folder: Path) -> str:
    """Of all files of a folder, their names and contents, but for the one that holds it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "sha256")
    lines = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _glottal_source(num_samples: int, sampling_rate: int, generator: torch.Generator) -> torch.Tensor:
    time = torch.arange(num_samples, dtype=torch.float64) / sampling_rate
    pitch = _PITCH_HZ * (1 + 0.02 * torch.sin(2 * torch.pi * _VIBRATO_HZ * time))
    cycles = torch.cumsum(pitch / sampling_rate, dim=0)
    pulses = torch.diff(cycles.floor(), prepend=torch.zeros(1, dtype=torch.float64)).float()
    # A first-order low-pass gives the falling spectrum of a real glottal pulse.
    pulses = torchaudio.functional.lfilter(pulses, torch.tensor([1.0, -0.9]), torch.tensor([1.0, 0.0]), clamp=False)
    return pulses + 0.01 * torch.randn(num_samples, generator=generator)


def _resonate(excitation: torch.Tensor, formants: tuple[tuple[float, float], ...], sampling_rate: int) -> torch.Tensor:
    for frequency, bandwidth in formants:
        radius = torch.exp(torch.tensor(-torch.pi * bandwidth / sampling_rate))
        angle = torch.tensor(2 * torch.pi * frequency / sampling_rate)
        denominator = torch.stack([torch.tensor(1.0), -2 * radius * angle.cos(), radius**2])
        numerator = torch.stack([denominator.sum(), torch.tensor(0.0), torch.tensor(0.0)])
        excitation = torchaudio.functional.lfilter(excitation, denominator, numerator, clamp=False)
    return excitation


def _fade(length: int, fade_length: int) -> torch.Tensor:
    ramp = torch.arange(length, dtype=torch.float32) + 0.5
    distance_to_edge = torch.minimum(ramp, ramp.flip(0))
    return torch.sin(0.5 * torch.pi * (distance_to_edge / fade_length).clamp(max=1.0)) ** 2
