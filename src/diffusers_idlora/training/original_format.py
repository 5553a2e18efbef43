"""The method's authors' preprocessed data sets, read as they were published: folders of `.pt` files."""

import hashlib
import os
import pickle
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.utils import logging

from .samples import TrainingSample


logger = logging.get_logger(__name__)

REFERENCE_FOLDERS = ("reference_audio_latents", "audio_latents_clean")


class OriginalFormatFolder(torch.utils.data.Dataset):
    """
    A preprocessed set in the authors' layout: `latents/`, `audio_latents/`, `reference_audio_latents/` (or
    `audio_latents_clean/`) and `conditions/`, one `.pt` file per sample in each (method section 8).

    Files are read as plain tensors; one that would run code is refused. The stored text features stand before the
    connectors' transformers, which run when a sample is read: keep `num_workers` at 0 if they are on an accelerator.

    Args:
        root (`str` or `os.PathLike`):
            The folder.
        connectors (`LTX2TextConnectors`):
            The base model's, on the device and in the dtype that they are to run in.

    Attributes:
        names (`list[str]`): The samples, sorted. A sample that lacks one of its four files is left out.
        shapes (`list[tuple[int, int, int]]`): Latent `(F, h, w)` of every sample, for batches of one shape.
        fingerprint (`str`): SHA-256 over names and sizes of the files.

    Raises:
        ValueError: If a folder is missing or no sample is complete.
    """

    def __init__(self, root: str | os.PathLike, connectors: LTX2TextConnectors):
        self.root, self.connectors = Path(root), connectors
        reference = next((name for name in REFERENCE_FOLDERS if (self.root / name).is_dir()), REFERENCE_FOLDERS[0])
        folders = {name: _files(self.root / name) for name in ("latents", "audio_latents", reference, "conditions")}
        self.names = sorted(set.intersection(*map(set, folders.values())))
        incomplete = len(set.union(*map(set, folders.values()))) - len(self.names)
        if not self.names:
            raise ValueError(
                f"`instance_data_root` {str(root)!r} holds no complete sample: each needs a file of one name in "
                f"{', '.join(folders)}."
            )
        if incomplete:
            logger.warning(f"{incomplete} samples of {root} lack one of their four files and are left out.")
        self._files = [tuple(files[name] for files in folders.values()) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> TrainingSample:
        video_file, audio_file, reference_file, condition_file = self._files[index]
        video = _load(video_file)
        try:
            return TrainingSample(
                video_latents=_video_latents(video, video_file),
                audio_latents=_tensor(_load(audio_file), "latents", audio_file),
                reference_latents=(_tensor(_load(reference_file), "latents", reference_file),),
                **self._encode_condition(_load(condition_file), condition_file),
                frame_rate=_number(video, "fps", video_file),
            )
        except ValueError as error:
            raise ValueError(f"`instance_data_root` has a wrong sample {self.names[index]!r}: {error}") from error

    @cached_property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Latent `(F, h, w)` of every sample."""
        return [tuple(_video_latents(_load(files[0], lazily=True), files[0]).shape[1:]) for files in self._files]

    @cached_property
    def buckets(self) -> list[tuple]:
        """What samples of one batch must share: latent shape, frame rate and length of the sound."""
        rest = [
            (_number(_load(video), "fps", video), _tensor(_load(audio), "latents", audio).shape[1])
            for video, audio, *_ in self._files
        ]
        return [(*shape, *other) for shape, other in zip(self.shapes, rest)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names and sizes of the files."""
        described = [f"{file.relative_to(self.root)} {file.stat().st_size}" for files in self._files for file in files]
        return hashlib.sha256("\n".join(sorted(described)).encode()).hexdigest()

    @torch.no_grad()
    def _encode_condition(self, condition: dict[str, Any], file: Path) -> dict[str, torch.Tensor]:
        if "video_prompt_embeds" in condition:
            features = [_tensor(condition, f"{modality}_prompt_embeds", file) for modality in ("video", "audio")]
        else:
            # Older sets of the first generation: one projection served both modalities.
            features = [_tensor(condition, "prompt_embeds", file)] * 2
        mask = _tensor(condition, "prompt_attention_mask", file)
        if mask.ndim != 1 or any(feature.ndim != 2 or len(feature) != len(mask) for feature in features):
            raise ValueError(
                f"features {[list(feature.shape) for feature in features]} and `prompt_attention_mask` "
                f"{list(mask.shape)} must be [tokens, features] and [tokens] in {str(file)!r}."
            )
        device, dtype = self.connectors.device, self.connectors.dtype
        video, audio = (feature[None].to(device, dtype) for feature in features)
        # What diffusers' own `LTX2TextConnectors.forward` does after the input projection.
        additive = (mask.to(device, torch.int64) - 1).to(dtype)[None, None, None] * torch.finfo(dtype).max
        try:
            video, returned_mask = self.connectors.video_connector(video, additive)
            audio, _ = self.connectors.audio_connector(audio, additive)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the text features in {str(file)!r} don't fit the base model's connectors ({error}): choose the base "
                "model that the set was made with."
            ) from error
        binary = (returned_mask < 1e-6).reshape(-1)
        return {
            "video_prompt_embeds": (video[0] * binary[:, None]).cpu(),
            "audio_prompt_embeds": audio[0].cpu(),
            "prompt_attention_mask": binary.to("cpu", torch.uint8),
        }


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"`instance_data_root` lacks the folder {str(folder)!r}: give a set in the original format.")
    files = {}
    for file in sorted(folder.rglob("*.pt")):
        # `latent_X.pt` may pair with `condition_X.pt`, or both are called `X.pt`.
        stem = file.stem.removeprefix("latent_").removeprefix("condition_")
        files[file.relative_to(folder).with_name(stem).as_posix()] = file
    return files


def _load(file: Path, lazily: bool = False) -> dict[str, Any]:
    # Mapped tensors cost no reading, but kill the process if the file changes while they are held.
    mapped = lazily and zipfile.is_zipfile(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`instance_data_root` holds {str(file)!r}, which is damaged or not made of plain tensors; nothing else "
            f"is loaded ({str(error).splitlines()[0] if str(error) else type(error).__name__})."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"`instance_data_root` holds {str(file)!r}, which is a {type(content).__name__}, not a dict.")
    return content


def _tensor(content: dict[str, Any], name: str, file: Path) -> torch.Tensor:
    if not isinstance(content.get(name), torch.Tensor):
        raise ValueError(f"`{name}` is missing or no tensor in {str(file)!r}, which has {sorted(map(str, content))}.")
    return content[name]


def _number(content: dict[str, Any], name: str, file: Path) -> float:
    try:
        return float(content[name])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` is missing or no number in {str(file)!r}: give a set that has it.") from error


def _video_latents(content: dict[str, Any], file: Path) -> torch.Tensor:
    latents = _tensor(content, "latents", file)
    if latents.ndim != 2:
        return latents
    # Older sets hold tokens, frames first.
    size = [int(_number(content, name, file)) for name in ("num_frames", "height", "width")]
    if size[0] * size[1] * size[2] != len(latents):
        raise ValueError(f"`latents` has {len(latents)} tokens, but the size is {size} in {str(file)!r}.")
    return latents.T.unflatten(1, size)
