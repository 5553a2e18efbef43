"""A quick fingerprint of a model, by which a continued run notices that its base is another one."""

import hashlib
import json
import os
from pathlib import Path

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import try_to_load_from_cache


CONFIG_NAME = "config.json"
BYTES_OF_A_TENSOR = 4096


def model_folder(base: str | os.PathLike, subfolder: str, revision: str | None = None) -> Path | None:
    """
    Where a model of a checkpoint lies on this machine; nothing is downloaded.

    Args:
        base (`str` or `os.PathLike`): The checkpoint: a folder, or a repository on the Hub.
        subfolder (`str`): Of the model, such as `"transformer"`.
        revision (`str`, *optional*): Branch, tag or commit.

    Returns:
        `pathlib.Path` or `None`: The folder, with the model's configuration in it.
    """
    if os.path.isdir(base):
        config = Path(base) / subfolder / CONFIG_NAME
        return config.parent if config.is_file() else None
    cached = try_to_load_from_cache(str(base), f"{subfolder}/{CONFIG_NAME}", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def model_fingerprint(folder: str | os.PathLike, variant: str | None = None) -> str | None:
    """
    SHA-256 over a model's configuration and, of its weights, the headers with all names and shapes, the sizes, and the
    first 4 KiB of every tensor: seconds for any size, where hashing all of it would take minutes. A change that spares
    the beginnings of all tensors is not seen.

    Args:
        folder (`str` or `os.PathLike`): The model, in diffusers layout.
        variant (`str`, *optional*): Of its files, such as `"fp16"`.

    Returns:
        `str` or `None`: The fingerprint; `None` if a file is missing or no safetensors file.
    """
    folder = Path(folder)
    try:
        digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
        for name in _weight_names(folder, variant):
            _add_weights(digest, folder / name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return digest.hexdigest()


def _weight_names(folder: Path, variant: str | None) -> list[str]:
    index = folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if index.is_file():
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    return [_add_variant(SAFETENSORS_WEIGHTS_NAME, variant)]


def _add_weights(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        # A safetensors file begins with the length of its header, which is JSON.
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file.")
        header = file.read(length)
        digest.update(f"{path.stat().st_size} ".encode() + header)
        tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        for start, end in sorted(tensors):
            file.seek(8 + length + start)
            digest.update(file.read(min(end - start, BYTES_OF_A_TENSOR)))
