"""Where adapter files are found, read and written: on this machine or on the Hub, in safetensors only."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import HfApi, hf_hub_download, is_offline_mode, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .media import replaced_when_complete


_WEIGHT_NAMES = (LORA_WEIGHT_NAME_SAFE, "lora_weights.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_adapter_file(
    source: str | os.PathLike,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool | None = None,
    name: str = "adapter",
) -> Path:
    """
    Finds an adapter's safetensors file, and downloads it if it is on the Hub.

    Args:
        source (`str` or `os.PathLike`):
            A safetensors file, a folder, or a repository on the Hub.
        weight_name (`str`, *optional*):
            File in the folder or repository. Defaults to `pytorch_lora_weights.safetensors`, else
            `lora_weights.safetensors`, else the only safetensors file.
        subfolder (`str`, *optional*):
            Where in the folder or repository the file is.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*):
            Access token for the Hub.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Cache folder for downloads.
        local_files_only (`bool`, *optional*):
            Whether to use only what was downloaded before.
        name (`str`, *optional*, defaults to `"adapter"`):
            What error messages call `source`.

    Returns:
        `pathlib.Path`: The file on this machine.

    Raises:
        ValueError: If there is no such file, or it is not a safetensors file.
    """
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"`{name}` is {source!r}: give a safetensors file, a folder, a Hub repository or a dict.")
    path = Path(os.path.expanduser(source))
    for argument, filename in ((name, path.name), ("weight_name", weight_name or "")):
        if filename.lower().endswith(_PICKLE_SUFFIXES):
            raise ValueError(
                f"`{argument}` is {filename!r}, a pickle file, which could run any code when it is opened: "
                "convert it to .safetensors, the only format read here."
            )
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise ValueError(f"`weight_name` is {weight_name!r}: name a .safetensors file.")
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        return _find_in_folder(path / (subfolder or ""), weight_name, name)
    is_path = isinstance(source, os.PathLike) or source.startswith(("/", ".", "~")) or source.endswith(".safetensors")
    if is_path or len(path.parts) > 2:
        raise ValueError(f"`{name}` is {str(source)!r}, where there is no file or folder: check the path.")
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
    return _find_on_hub(source, weight_name, subfolder, bool(local_files_only) or is_offline_mode(), hub, name)


def read_safetensors(path: Path, name: str = "adapter") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Reads a file's tensors, on the CPU, and its metadata.

    Raises:
        ValueError: If it is not a readable safetensors file; the message calls it `name`.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"`{name}` is {str(path)!r}: adapters are read from .safetensors files only.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`{name}` is {str(path)!r}, which can't be read as a safetensors file ({error}): "
            "it is damaged or incomplete, so fetch it again."
        ) from error


def save_adapter(
    path: str | os.PathLike, state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """
    Writes an adapter to a safetensors file, whole or not at all.

    Args:
        path (`str` or `os.PathLike`):
            The `.safetensors` file to write; an existing one is replaced, missing folders are created.
        state_dict (`dict[str, torch.Tensor]`):
            The tensors.
        metadata (`dict[str, str]`, *optional*):
            File metadata, as [`load_adapter`] returns it.

    Returns:
        `pathlib.Path`: The file.

    Raises:
        ValueError: If `path` is no `.safetensors` file, there is nothing to save, or a metadata value is no string.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` is {str(path)!r}: an adapter is saved as a .safetensors file, so give that ending.")
    if not state_dict:
        raise ValueError("`state_dict` is empty: give the adapter's tensors.")
    for key, value in (metadata or {}).items():
        if not isinstance(value, str):
            raise ValueError(f"`metadata` has {value!r} under `{key}`: file metadata is text, so pass it as JSON.")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
    return path


def _find_in_folder(folder: Path, weight_name: str | None, name: str) -> Path:
    files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return folder / _choose_weight_name(files, weight_name, folder, name)


def _choose_weight_name(files: list[str], weight_name: str | None, place: str | Path, name: str) -> str:
    candidates = [file for file in files if file.endswith(".safetensors")]
    chosen = [file for file in ([weight_name] if weight_name else _WEIGHT_NAMES) if file in candidates]
    if chosen or (len(candidates) == 1 and not weight_name):
        return (chosen or candidates)[0]
    sought = repr(weight_name) if weight_name else "the adapter's .safetensors file"
    raise ValueError(
        f"`{name}` is {str(place)!r}, where {sought} was looked for among {', '.join(files) or 'no files'}: "
        "say which file with `weight_name`, or check the place."
    )


def _find_on_hub(
    repository: str, weight_name: str | None, subfolder: str | None, local_files_only: bool, hub: dict, name: str
) -> Path:
    if weight_name is None and local_files_only:
        with _hub_errors(repository, name):
            snapshot = snapshot_download(repository, local_files_only=True, **hub)
        return _find_in_folder(Path(snapshot) / (subfolder or ""), None, name)
    if weight_name is None:
        with _hub_errors(repository, name):
            files = HfApi().list_repo_files(repository, revision=hub["revision"], token=hub["token"])
        prefix = f"{subfolder.rstrip('/')}/" if subfolder else ""
        here = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        weight_name = _choose_weight_name([file for file in here if "/" not in file], None, repository, name)
    with _hub_errors(repository, name, weight_name):
        options = {"subfolder": subfolder, "local_files_only": local_files_only, **hub}
        return Path(hf_hub_download(repository, weight_name, **options))


@contextmanager
def _hub_errors(repository: str, name: str, weight_name: str | None = None) -> Iterator[None]:
    try:
        yield
    # A look-up on the Hub fails in the error classes of several libraries, which share no base but this.
    except Exception as error:
        file = f" with the file {weight_name!r}" if weight_name else ""
        raise ValueError(
            f"`{name}` is {repository!r}, which is no file or folder here, nor a repository{file} that the Hub or its "
            f"local cache could give ({type(error).__name__}): check the name and the connection."
        ) from error
