"""Images in, videos with sound in and out, files written whole or not at all."""

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from .audio import as_waveform, check_sampling_rate, load_audio, open_media


# The tags that FFmpeg's mp4 writer keeps; it drops every other one in silence.
MP4_TAGS = (
    "album",
    "album_artist",
    "artist",
    "comment",
    "composer",
    "copyright",
    "date",
    "description",
    "genre",
    "grouping",
    "keywords",
    "show",
    "synopsis",
    "title",
)
AUDIO_BIT_RATE = 192_000
# What file systems allow is 255; the rest is for files beside it whose endings are longer.
MAX_NAME_BYTES = 250
FALLBACK_SAMPLING_RATE = 48_000


def load_image(
    source: str | os.PathLike | PIL.Image.Image | np.ndarray | torch.Tensor, name: str = "image"
) -> PIL.Image.Image:
    """
    Reads an image as a person would see it: upright (EXIF), transparency on white, 8-bit RGB.

    Args:
        source (`str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A file, an image, an array `[height, width]` or `[height, width, 1 | 3 | 4]`, or a tensor
            `[1 | 3 | 4, height, width]` with or without a leading batch axis of 1. Arrays and tensors are uint8, or
            floating point in 0..1.
        name (`str`, *optional*, defaults to `"image"`):
            The argument that the errors name.

    Returns:
        `PIL.Image.Image`: the image, in mode RGB.

    Raises:
        `ValueError`: if the file is missing or can't be decoded, or shape, dtype or values are wrong.
    """
    if isinstance(source, (str, os.PathLike)):
        # Not `Path.is_file`, which fails on a name that is too long or lies in a locked folder.
        if not os.path.isfile(source):
            raise ValueError(f"`{name}` must be an existing file, but {str(source)!r} is none: check the path.")
        described = repr(str(source))
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        return _image_from_array(source, name)
    elif isinstance(source, PIL.Image.Image):
        described = f"a PIL image of mode {source.mode}"
    else:
        raise ValueError(
            f"`{name}` must be a path, a PIL image, an array or a tensor, but is a {type(source).__name__}: "
            f"{str(source)[:80]!r}."
        )
    try:
        if isinstance(source, PIL.Image.Image):
            return _to_rgb(PIL.ImageOps.exif_transpose(source))
        with PIL.Image.open(source) as image:
            return _to_rgb(PIL.ImageOps.exif_transpose(image))
    # Pillow's decoders raise each of these on a broken file, and ValueError for a mode they can't convert.
    except (OSError, EOFError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(
            f"`{name}` can't be decoded: {described} is damaged, too large or no usual image ({error}); "
            "save it as png or jpeg."
        ) from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 instead of scaling it.
        grey = np.asarray(image).astype(np.float64) / 257.0
        return PIL.Image.fromarray(np.clip(grey.round(), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point pixels have no agreed range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(white, image).convert("RGB")


def _image_from_array(source: np.ndarray | torch.Tensor, name: str) -> PIL.Image.Image:
    shape = list(source.shape)
    if isinstance(source, torch.Tensor):
        expected = "[1 | 3 | 4, height, width], with or without a batch axis of 1"
        pixels = source.detach().cpu()
        pixels = pixels.float() if pixels.is_floating_point() else pixels
        pixels = pixels[0] if pixels.ndim == 4 and shape[0] == 1 else pixels
        pixels = np.moveaxis(pixels.numpy(), 0, -1) if pixels.ndim == 3 else None
    else:
        expected = "[height, width] or [height, width, 1 | 3 | 4]"
        pixels = source[..., None] if source.ndim == 2 else source
        pixels = pixels if pixels.ndim == 3 else None
    if pixels is None or pixels.shape[-1] not in (1, 3, 4) or pixels.size == 0:
        raise ValueError(f"`{name}` must have the shape {expected}, but has {shape}: rearrange its axes.")
    if pixels.dtype.kind == "f":
        # The comparison is false for NaN too.
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(
                f"`{name}` must have floating point values in 0..1 without NaN, but they lie in "
                f"{pixels.min():.4g}..{pixels.max():.4g}: rescale them, or pass 0..255 as uint8."
            )
        pixels = (pixels.astype(np.float32) * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(
            f"`{name}` must be uint8 or floating point in 0..1, but its dtype is {source.dtype}: convert it."
        )
    return _to_rgb(PIL.Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)))


def fit_size(
    width: int, height: int, *, long_side: int = 512, max_pixels: int = 576 * 1024, multiple: int = 32
) -> tuple[int, int]:
    """
    Finds the video size for an image: its aspect, as well as the grid of multiples allows.

    Args:
        width (`int`):
            Of the image, in pixels.
        height (`int`):
            Of the image, in pixels.
        long_side (`int`, *optional*, defaults to 512):
            What the longer side should measure, in pixels.
        max_pixels (`int`, *optional*, defaults to 576 * 1024):
            The largest area, in pixels.
        multiple (`int`, *optional*, defaults to 32):
            Both sides are multiples of it, and at least one.

    Returns:
        `tuple[int, int]`: `(height, width)`.

    Raises:
        `ValueError`: if a size isn't positive, or not even `multiple * multiple` pixels are allowed.
    """
    for name, value in (("width", width), ("height", height), ("long_side", long_side), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}: give a positive number of pixels.")
    if max_pixels < multiple**2:
        raise ValueError(
            f"`max_pixels` must be at least {multiple**2} ({multiple} x {multiple}), but is {max_pixels}."
        )

    scale = min(long_side / max(width, height), math.sqrt(max_pixels / (width * height)))
    rows, columns = (max(1, round(side * scale / multiple)) for side in (height, width))
    # Rounding up can overshoot the area: take the step down that stays nearest to the image's aspect.
    while rows * columns * multiple**2 > max_pixels:
        steps = ((rows - 1, columns), (rows, columns - 1), (rows - 1, columns - 1))
        smaller = [size for size in steps if min(size) > 0]
        rows, columns = min(smaller, key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))
    return rows * multiple, columns * multiple


@contextmanager
def replaced_when_complete(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a temporary path beside `path` and moves it there at the end of the `with` block. If the block fails, the
    temporary file is removed and what was at `path` stays.

    Args:
        path (`str` or `os.PathLike`):
            The file to write.

    Returns:
        A context manager that gives the temporary `pathlib.Path`, with the suffix of `path`.
    """
    with appearing_together([path], replace=[path]) as (temporary,):
        yield temporary


@contextmanager
def appearing_together(
    paths: Sequence[str | os.PathLike], replace: Sequence[str | os.PathLike] = ()
) -> Iterator[list[Path]]:
    """
    Gives a temporary path beside each of `paths` and moves them there, one right after the other, at the end of the
    `with` block. If the block or a move fails, the temporary files and the new ones are removed.

    Args:
        paths (`list[str]` or `list[os.PathLike]`):
            The files to write, in the order in which they appear.
        replace (`list[str]` or `list[os.PathLike]`, *optional*):
            Those of `paths` where an existing file may be replaced; a file at another one of them stays.

    Returns:
        A context manager that gives the temporary `pathlib.Path`s, each with the suffix of its path.

    Raises:
        `FileExistsError`: if there is a file at one of `paths` that may not be replaced.
    """
    paths = [Path(path).absolute() for path in paths]
    replace = {Path(path).absolute() for path in replace}
    # Not `tempfile`: its files are private to the user, and would stay so under their final name.
    temporaries = [path.with_name(f".{secrets.token_hex(8)}{path.suffix}") for path in paths]
    created = []
    try:
        yield temporaries
        for temporary, path in zip(temporaries, paths):
            if path in replace:
                os.replace(temporary, path)
            else:
                _move_without_replacing(temporary, path)
                created.append(path)
    except BaseException:
        for path in created:
            path.unlink(missing_ok=True)
        raise
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _move_without_replacing(source: Path, target: Path) -> None:
    # `os.rename` would replace a file that appeared since the last look; these two calls find it themselves.
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        # Not every file system has hard links.
        target.touch(exist_ok=False)
        os.replace(source, target)
    else:
        source.unlink()


def check_output_path(path: str | os.PathLike, name: str = "output", *, create: bool = False) -> Path:
    """
    Checks, before any work, that an mp4 can be written.

    Args:
        path (`str` or `os.PathLike`):
            Where to.
        name (`str`, *optional*, defaults to `"output"`):
            The argument that the errors name.
        create (`bool`, *optional*, defaults to `False`):
            Whether to create missing folders.

    Returns:
        `pathlib.Path`: the path.

    Raises:
        `ValueError`: if it is a folder, doesn't end in `.mp4`, has no usable name, or its folder is missing or can't
        be written.
    """
    path = Path(path)
    folder = path.absolute().parent
    if os.path.isdir(path):
        raise ValueError(f"`{name}` must be a file, but {str(path)!r} is a folder: add a file name.")
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"`{name}` must end in .mp4, but is {str(path)!r}: change its ending.")
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise ValueError(
            f"`{name}` must have a name of at most {MAX_NAME_BYTES} bytes, but {path.name[:40]!r}... has "
            f"{len(os.fsencode(path.name))}: shorten it."
        )
    if create:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"`{name}` can't be written: the folder {str(folder)!r} can't be created ({error.strerror}); "
                "choose another."
            ) from error
    if not os.path.isdir(folder):
        raise ValueError(f"`{name}` can't be written: the folder {str(folder)!r} doesn't exist; create it.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"`{name}` can't be written: no permission for the folder {str(folder)!r}; choose another.")
    return path


def frame_rate_fraction(frame_rate: float) -> Fraction:
    """
    Writes a frame rate as containers store it. The NTSC rates 23.976, 29.97 and 59.94 become 24000/1001, 30000/1001
    and 60000/1001.

    Args:
        frame_rate (`float`):
            In frames per second.

    Returns:
        `fractions.Fraction`: the frame rate.

    Raises:
        `ValueError`: if it isn't a number between 1 and 1000.
    """
    if not 1 <= frame_rate <= 1000:
        raise ValueError(f"`frame_rate` must be between 1 and 1000, but is {frame_rate!r}: use for example 25.0.")
    ntsc = Fraction(round(frame_rate * 1.001) * 1000, 1001)
    if ntsc and abs(frame_rate - ntsc) < 5e-4:
        return ntsc
    return Fraction(frame_rate).limit_denominator(1001)


def _rgb_frame(frame: PIL.Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(frame, PIL.Image.Image):
        frame = np.asarray(frame.convert("RGB"))
    if isinstance(frame, torch.Tensor):
        frame = frame.cpu().numpy()
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        found = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"`frames` must be PIL images or uint8 [height, width, 3], but one is {found}: convert it.")
    if frame.shape[0] % 2 or frame.shape[1] % 2 or 0 in frame.shape:
        raise ValueError(f"`frames` must have even sides, but one is {frame.shape[1]}x{frame.shape[0]}: crop or pad.")
    return np.ascontiguousarray(frame)


def _stereo(audio: torch.Tensor | np.ndarray, sampling_rate: int | None) -> tuple[np.ndarray, int]:
    if sampling_rate is None:
        raise ValueError("`audio_sampling_rate` is required with `audio`: pass its rate in Hz.")
    sampling_rate = check_sampling_rate(sampling_rate, "audio")
    waveform = as_waveform(audio, "audio").detach().cpu()
    if waveform.shape[0] not in (1, 2) or waveform.shape[1] == 0:
        raise ValueError(f"`audio` must have the shape [1 | 2, samples], but has {list(waveform.shape)}: downmix it.")
    if not torch.isfinite(waveform).all():
        raise ValueError("`audio` holds NaN or infinite samples: look for the step that made them.")
    return waveform.expand(2, -1).clamp(-1, 1).numpy(), sampling_rate


class _SoundTrack:
    """Encodes a waveform piece by piece, so that it lies beside the frames that it belongs to."""

    def __init__(self, container: av.container.OutputContainer, waveform: np.ndarray, sampling_rate: int):
        self.container, self.waveform, self.sampling_rate = container, waveform, sampling_rate
        supported = av.Codec("aac", "w").audio_rates
        # The encoder resamples what it is given to its own rate.
        rate = sampling_rate if sampling_rate in supported else FALLBACK_SAMPLING_RATE
        self.stream = container.add_stream("aac", rate=rate, layout="stereo", bit_rate=AUDIO_BIT_RATE)
        self.written = 0

    def encode_until(self, seconds: float) -> None:
        end = int(min(self.waveform.shape[1], seconds * self.sampling_rate))
        if end > self.written:
            piece = np.ascontiguousarray(self.waveform[:, self.written : end])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
            frame.sample_rate = self.sampling_rate
            frame.time_base, frame.pts = Fraction(1, self.sampling_rate), self.written
            self.container.mux(self.stream.encode(frame))
            self.written = end

    def finish(self) -> None:
        self.encode_until(math.inf)
        self.container.mux(self.stream.encode(None))


def write_video(
    path: str | os.PathLike,
    frames: Iterable[PIL.Image.Image] | Iterable[np.ndarray] | Iterable[torch.Tensor] | np.ndarray | torch.Tensor,
    frame_rate: float,
    audio: torch.Tensor | np.ndarray | None = None,
    audio_sampling_rate: int | None = None,
    metadata: dict[str, str] | None = None,
    crf: int = 18,
    progress: Callable[[], None] | None = None,
) -> None:
    """
    Writes an mp4 that any player opens: H.264 video and, if there is sound, AAC stereo. The file appears whole or not
    at all.

    Args:
        path (`str` or `os.PathLike`):
            Where to; an existing file is replaced.
        frames (`list[PIL.Image.Image]`, `torch.Tensor` or `np.ndarray`):
            The frames, as images or uint8 `[frames, height, width, 3]`; any iterable of single frames will do. Sides
            must be even.
        frame_rate (`float`):
            In frames per second, see [`frame_rate_fraction`].
        audio (`torch.Tensor` or `np.ndarray`, *optional*):
            `[samples]`, `[1, samples]` or `[2, samples]` at full scale 1; clipped to -1..1, mono is duplicated.
        audio_sampling_rate (`int`, *optional*):
            Of the sound, in Hz; required with `audio`. Resampled to 48000 Hz where AAC doesn't know the rate.
        metadata (`dict[str, str]`, *optional*):
            Tags of the file, such as `title` and `comment`.
        crf (`int`, *optional*, defaults to 18):
            Quality of libx264, from 0 (lossless) to 51.
        progress (`Callable[[], None]`, *optional*):
            Called once after each encoded frame.

    Raises:
        `ValueError`: if an argument is wrong or there is not one frame.
    """
    # Why not diffusers' `encode_video`: it cuts the frame rate to an integer, takes no metadata and writes in place.
    path = check_output_path(path, "path")
    rate = frame_rate_fraction(frame_rate)
    if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= 51:
        raise ValueError(f"`crf` must be an integer from 0 to 51, but is {crf!r}: 18 looks lossless.")
    unknown = sorted(set(metadata or {}) - set(MP4_TAGS))
    if unknown:
        raise ValueError(f"`metadata` has tags that an mp4 doesn't keep, {unknown}: use {', '.join(MP4_TAGS)}.")
    sound = None if audio is None else _stereo(audio, audio_sampling_rate)

    with (
        replaced_when_complete(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        container.metadata.update({tag: str(value) for tag, value in (metadata or {}).items()})
        # With macroblock trees, x264 encodes the same frames differently from run to run at some sizes.
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, pix_fmt="yuv420p", options=options)
        track = None if sound is None else _SoundTrack(container, *sound)
        count = 0
        for frame in frames:
            pixels = _rgb_frame(frame)
            if count == 0:
                stream.height, stream.width = pixels.shape[:2]
                _tag_bt709(stream.codec_context)
            elif pixels.shape[:2] != (stream.height, stream.width):
                raise ValueError(
                    f"`frames` must have one size, but frame {count} is {pixels.shape[1]}x{pixels.shape[0]} after "
                    f"{stream.width}x{stream.height}: resize it."
                )
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            count += 1
            if track is not None:
                track.encode_until(count / rate)
            if progress is not None:
                progress()
        if count == 0:
            raise ValueError("`frames` is empty: give at least one frame.")
        container.mux(stream.encode(None))
        if track is not None:
            track.finish()


def _tag_bt709(codec: av.VideoCodecContext) -> None:
    # Without tags players guess the colour matrix from the size, and guess differently.
    codec.colorspace = Colorspace.ITU709
    codec.color_primaries = ColorPrimaries.BT709
    codec.color_trc = ColorTrc.BT709
    codec.color_range = ColorRange.MPEG


def read_video(
    path: str | os.PathLike, name: str = "path"
) -> tuple[np.ndarray, float, torch.Tensor | None, int | None]:
    """
    Decodes a whole video, upright, with its sound.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        name (`str`, *optional*, defaults to `"path"`):
            The argument that the errors name.

    Returns:
        `tuple[np.ndarray, float, torch.Tensor | None, int | None]`: the frames, uint8 `[frames, height, width, 3]`;
        the average frame rate; the waveform `[channels, samples]` and its sampling rate, both `None` without sound.

    Raises:
        `ValueError`: if the file is missing, can't be decoded or has no picture.
    """
    with open_media(path, name) as container:
        if not container.streams.video:
            raise ValueError(f"`{name}` has no picture: {str(path)!r} holds no video stream; give a video.")
        stream = container.streams.video[0]
        # Phones store a rotation beside the frames.
        frames = [
            np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in container.decode(stream)
        ]
        frame_rate = stream.average_rate or stream.guessed_rate
        has_sound = bool(container.streams.audio)
    if not frames or not frame_rate:
        raise ValueError(f"`{name}` is empty: no picture could be decoded from {str(path)!r}; record it again.")
    waveform, sampling_rate = load_audio(path, name) if has_sound else (None, None)
    return np.stack(frames), float(frame_rate), waveform, sampling_rate


def file_sha256(path: str | os.PathLike) -> str:
    """
    Hashes a file.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        `str`: its SHA-256 as 64 hexadecimal digits.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
