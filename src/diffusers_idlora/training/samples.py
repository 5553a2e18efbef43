"""Prepared samples: one safetensors file each, and the index that lists them."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..denoising import TextContext
from ..media import replaced_when_complete


METADATA_KEY = "idlora_sample"
INDEX_NAME = "index.jsonl"
NEGATIVE_PROMPT_NAME = "negative_prompt.safetensors"
SPLITS = ("train", "validation")

_AXES = {
    "video_latents": "[channels, frames, height, width]",
    "audio_latents": "[channels, length, mel_bins]",
    "reference_latents": "[channels, length, mel_bins]",
    "video_prompt_embeds": "[tokens, features]",
    "audio_prompt_embeds": "[tokens, features]",
    "prompt_attention_mask": "[tokens]",
}


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """
    All that one training step needs of one clip, without a batch axis. Latents are normalised: video per channel,
    audio per packed feature.

    Attributes:
        video_latents (`torch.Tensor`): `[C, F, h, w]`.
        audio_latents (`torch.Tensor`): The clip's own sound, `[C, T, M]`, as long as the video.
        reference_latents (`tuple[torch.Tensor, ...]`): Clips of the speaker's voice, each `[C, L, M]`.
        video_prompt_embeds (`torch.Tensor`): The caption after the connectors, `[S, Dv]`.
        audio_prompt_embeds (`torch.Tensor`): The caption after the connectors, `[S, Da]`.
        prompt_attention_mask (`torch.Tensor`): uint8 `[S]`, 1 at tokens that may be attended to.
        frame_rate (`float`): Of the video, in frames per second.

    Raises:
        ValueError: If a tensor has another number of axes or the shapes don't belong together.
    """

    video_latents: torch.Tensor
    audio_latents: torch.Tensor
    reference_latents: tuple[torch.Tensor, ...]
    video_prompt_embeds: torch.Tensor
    audio_prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.Tensor
    frame_rate: float

    def __post_init__(self):
        for name, axes in _AXES.items():
            value = getattr(self, name)
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor.ndim != axes.count(",") + 1 or 0 in tensor.shape:
                    raise ValueError(f"`{name}` must have the shape {axes}, but has {list(tensor.shape)}.")
        for clip in self.reference_latents:
            if clip.shape[::2] != self.audio_latents.shape[::2]:
                raise ValueError(
                    f"`reference_latents` of the shape {list(clip.shape)} don't fit `audio_latents` of the shape "
                    f"{list(self.audio_latents.shape)}: channels and mel bins must agree."
                )
        lengths = {len(self.video_prompt_embeds), len(self.audio_prompt_embeds), len(self.prompt_attention_mask)}
        if len(lengths) > 1:
            raise ValueError(
                f"`video_prompt_embeds`, `audio_prompt_embeds` and `prompt_attention_mask` must have as many tokens, "
                f"but have {sorted(lengths)}."
            )
        if not 1 <= self.frame_rate <= 1000:
            raise ValueError(f"`frame_rate` must be between 1 and 1000 frames per second, but is {self.frame_rate!r}.")


def save_sample(path: str | os.PathLike, sample: TrainingSample, metadata: dict[str, Any]) -> None:
    """
    Writes one sample, whole or not at all.

    Args:
        path (`str` or `os.PathLike`):
            The safetensors file. An existing one is replaced.
        sample (`TrainingSample`):
            What to write; every tensor keeps its dtype.
        metadata (`dict[str, Any]`):
            Where the sample comes from; stored as JSON beside the tensors, with the sample's frame rate.
    """
    tensors = {name: getattr(sample, name) for name in _AXES if name != "reference_latents"}
    tensors |= {f"reference_latents.{index}": clip for index, clip in enumerate(sample.reference_latents)}
    # Copies, because views of one storage can't be saved.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    described = json.dumps({**metadata, "frame_rate": sample.frame_rate}, ensure_ascii=False, sort_keys=True)
    with replaced_when_complete(path) as temporary:
        # Not `save_file`: its files are private to the user, which a shared data set should not be.
        temporary.write_bytes(save(tensors, metadata={METADATA_KEY: described}))


def load_sample(path: str | os.PathLike) -> TrainingSample:
    """
    Reads one sample.

    Args:
        path (`str` or `os.PathLike`):
            A file that [`save_sample`] wrote.

    Returns:
        [`TrainingSample`]: on the CPU.

    Raises:
        ValueError: If the file is missing, damaged or no sample.
    """
    metadata = read_sample_metadata(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    references = []
    while (name := f"reference_latents.{len(references)}") in tensors:
        references.append(tensors.pop(name))
    expected = set(_AXES) - {"reference_latents"}
    if set(tensors) != expected:
        wrong = sorted(set(tensors) ^ expected)
        raise ValueError(
            f"`path` {str(path)!r} is no prepared sample, {wrong} are missing or unknown: prepare it again."
        )
    try:
        return TrainingSample(**tensors, reference_latents=tuple(references), frame_rate=float(metadata["frame_rate"]))
    except ValueError as error:
        raise ValueError(f"`path` {str(path)!r} holds a wrong sample: {error}") from error


def read_sample_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """
    Reads what is known about a sample, without its tensors.

    Args:
        path (`str` or `os.PathLike`):
            A file that [`save_sample`] wrote.

    Returns:
        `dict[str, Any]`: its metadata.

    Raises:
        ValueError: If the file is missing, damaged or no sample.
    """
    if not Path(path).is_file():
        raise ValueError(f"`path` must be a prepared sample, but {str(path)!r} doesn't exist: prepare it again.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()[METADATA_KEY])
            float(metadata["frame_rate"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"`path` {str(path)!r} is damaged or no prepared sample ({error}): prepare it again."
        ) from error
    return metadata


def save_negative_prompt(
    root: str | os.PathLike, encoded: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """
    Writes the negative prompt of a prepared folder, whole or not at all.

    Args:
        root (`str` or `os.PathLike`):
            The prepared folder.
        encoded (`Mapping[str, torch.Tensor]`):
            `video_prompt_embeds`, `audio_prompt_embeds` and `prompt_attention_mask`, as of a sample.
        metadata (`Mapping[str, str]`):
            The text and what it was encoded with.
    """
    with replaced_when_complete(Path(root) / NEGATIVE_PROMPT_NAME) as temporary:
        temporary.write_bytes(save(dict(encoded), metadata=dict(metadata)))


def read_negative_prompt(root: str | os.PathLike) -> tuple[TextContext, dict[str, str]] | None:
    """
    Reads the negative prompt of a prepared folder.

    Args:
        root (`str` or `os.PathLike`):
            The prepared folder.

    Returns:
        The context, of one row, and its metadata; `None` if the folder has no negative prompt.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(root) / NEGATIVE_PROMPT_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            video, audio, mask = (file.get_tensor(name)[None] for name in _AXES if "prompt" in name)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`instance_data_root` has a damaged negative prompt, {str(path)!r} ({error}): delete it and run "
            "`prepare_dataset.py` again, which keeps the samples."
        ) from error
    return TextContext(video, audio, None if mask.all() else mask), metadata


def write_index(root: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> Path:
    """
    Writes the list of samples, one JSON object per line, whole or not at all; `datasets.load_dataset("json", ...)`
    reads it too.

    Args:
        root (`str` or `os.PathLike`):
            The prepared folder.
        rows (`Sequence[dict[str, Any]]`):
            Of each sample its `file` relative to `root`, `shape` `[F, h, w]`, `split`, and anything else.

    Returns:
        `pathlib.Path`: the index.
    """
    path = Path(root) / INDEX_NAME
    with replaced_when_complete(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows), "utf-8"
        )
    return path


def rows_fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 over the rows of an index, whatever their order."""
    lines = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class SampleFolder(torch.utils.data.Dataset):
    """
    The samples of a prepared folder.

    Args:
        root (`str` or `os.PathLike`):
            The folder, with `index.jsonl` in it.
        split (`str`, *optional*):
            `"train"` or `"validation"`; all samples by default.

    Attributes:
        rows (`list[dict]`): The index, one row per sample.
        shapes (`list[tuple[int, int, int]]`): Latent `(F, h, w)` of every sample.
        buckets (`list[tuple]`): What samples of one batch must share: the shape, which settles the sound's length.
        fingerprint (`str`): SHA-256 over the rows, whatever their order.

    Raises:
        ValueError: If the index is missing, damaged or empty, or names a file outside the folder.
    """

    def __init__(self, root: str | os.PathLike, split: str | None = None):
        if split not in (None, *SPLITS):
            raise ValueError(f"`split` is {split!r}: choose one of {', '.join(map(repr, SPLITS))}.")
        self.root = Path(root)
        self.rows = [row for row in _read_index(self.root) if split in (None, row["split"])]
        if not self.rows:
            which = f"no sample of the split {split!r}" if split else "no sample"
            raise ValueError(f"`instance_data_root` {str(root)!r} holds {which}: prepare some clips first.")
        self.shapes = [tuple(row["shape"]) for row in self.rows]
        self.buckets = self.shapes
        self.fingerprint = rows_fingerprint(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TrainingSample:
        path = self.root / self.rows[index]["file"]
        sample = load_sample(path)
        if tuple(sample.video_latents.shape[1:]) != self.shapes[index]:
            raise ValueError(
                f"`instance_data_root` is inconsistent: {str(path)!r} holds latents of the shape "
                f"{list(sample.video_latents.shape)}, the index says {list(self.shapes[index])}; prepare it again."
            )
        return sample


def _read_index(root: Path) -> list[dict[str, Any]]:
    path = root / INDEX_NAME
    if not path.is_file():
        raise ValueError(
            f"`instance_data_root` {str(root)!r} has no {INDEX_NAME}: run `prepare_dataset.py` to its end first."
        )
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            file, shape, split = row["file"], row["shape"], row["split"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`instance_data_root` has a damaged index, line {number} of {str(path)!r}: {error!r}."
            ) from error
        if not (isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape)):
            raise ValueError(
                f"`shape` must be [frames, height, width], but is {shape!r} in line {number} of {str(path)!r}."
            )
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {SPLITS}, but is {split!r} in line {number} of {str(path)!r}.")
        check_inside(file, "file", f"line {number} of {str(path)!r}")
        rows.append(row)
    return rows


def check_inside(name: Any, column: str, where: str) -> None:
    """
    Checks that a path from a table stays inside the table's folder.

    Args:
        name (`str`): The path.
        column (`str`), where (`str`): What the error names.

    Raises:
        ValueError: If it is no text, empty, absolute or has a `..` in it.
    """
    # By its letters only: folders in the Hub's cache are full of links that lead out of them and are fine.
    paths = [flavour(name) for flavour in (PurePosixPath, PureWindowsPath)] if isinstance(name, str) else []
    if not name or not paths or any(path.anchor or ".." in path.parts for path in paths):
        raise ValueError(f"`{column}` must be a path inside the data set, but is {name!r} in {where}: correct it.")
