"""Checkpoints that appear whole or not at all, and are checked before they are believed."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from safetensors import SafetensorError

from ..media import file_sha256


logger = logging.get_logger(__name__)

STATE_NAME = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, the oldest first; unfinished ones are under other names."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
    return sorted((path for path in folders if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    state: Mapping[str, Any],
    write: Callable[[Path], None],
    *,
    is_main_process: bool = True,
    wait: Callable[[], None] = lambda: None,
    total_limit: int | None = None,
) -> Path:
    """
    Writes a checkpoint beside the others and renames it when it is complete; older ones are removed only after that.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
        step (`int`): Optimizer steps done.
        state (`Mapping[str, Any]`): What the trainer needs to go on, as JSON.
        write (`Callable[[Path], None]`): Writes everything else into a folder; called by every process.
        is_main_process (`bool`, defaults to `True`): Whether this process finishes the checkpoint.
        wait (`Callable[[], None]`, *optional*): Waits for all processes.
        total_limit (`int`, *optional*): Keep at most this many.

    Returns:
        `pathlib.Path`: The checkpoint's folder.

    Raises:
        OSError: If it can't be written; what was there before is untouched.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished = Path(output_dir) / f".unfinished-checkpoint-{step}"
    if is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    wait()
    try:
        write(unfinished)
        wait()
        if is_main_process:
            files = {
                path.relative_to(unfinished).as_posix(): file_sha256(path)
                for path in sorted(unfinished.rglob("*"))
                if path.is_file()
            }
            text = json.dumps({**state, "step": step, "files": files}, indent=2)
            (unfinished / STATE_NAME).write_text(text + "\n", "utf-8")
            _replace_folder(unfinished, final)
    except BaseException as error:
        free = shutil.disk_usage(output_dir).free / 2**30
        if is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        if _is_failed_write(error):
            reason = f"{str(error).splitlines()[0]}; the disk had {free:.1f} GiB left"
            raise OSError(errno.EIO, reason, str(final)) from error
        raise
    wait()
    if is_main_process and total_limit is not None:
        others = [folder for folder in list_checkpoints(output_dir) if folder != final]
        for old in others[: max(0, len(others) - (total_limit - 1))]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _is_failed_write(error: BaseException) -> bool:
    # Of a full disk neither safetensors nor torch's archive tells in an `OSError`.
    return isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and "inline_container" in str(error))


def _replace_folder(source: Path, target: Path) -> None:
    # A folder can't be renamed onto another one that holds files.
    if target.exists():
        old = target.with_name(f".replaced-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(source, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(source, target)


def read_checkpoint(folder: str | os.PathLike) -> dict[str, Any]:
    """
    The trainer's state in a checkpoint, after checking that every file of it is as it was written.

    Raises:
        ValueError: If a file is missing or changed.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / STATE_NAME).read_text("utf-8"))
        files = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`resume_from_checkpoint` {str(folder)!r} is no complete checkpoint ({type(error).__name__}); take"
            " another."
        ) from error
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != digest:
            raise ValueError(
                f"`resume_from_checkpoint` {str(folder)!r} is damaged: {name!r} is missing or changed; take another."
            )
    return state


def find_checkpoint(output_dir: str | os.PathLike, wanted: str | None) -> tuple[Path, dict[str, Any]] | None:
    """
    The checkpoint to go on from, with its state.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
        wanted (`str`, *optional*):
            A folder, a name within `output_dir`, or `"latest"`: the newest that is whole; broken ones are passed over
            with a warning.

    Returns:
        Folder and state, or `None` to start afresh.

    Raises:
        ValueError: If the folder asked for is missing or broken, or there is a run and none was asked for.
    """
    if wanted is None:
        if list_checkpoints(output_dir) or (Path(output_dir) / "loss.csv").exists():
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds a run already; give `resume_from_checkpoint` latest to go on"
                " with it, or another folder."
            )
        return None
    if wanted != "latest":
        folder = Path(wanted) if Path(wanted).is_dir() else Path(output_dir) / wanted
        if not folder.is_dir():
            raise ValueError(
                f"`resume_from_checkpoint` is {wanted!r}, where there is no folder; give one, or 'latest'."
            )
        return folder, read_checkpoint(folder)
    folders = list_checkpoints(output_dir)
    for folder in reversed(folders):
        try:
            return folder, read_checkpoint(folder)
        except ValueError as error:
            logger.warning(f"{error} Trying an older one.")
    if folders:
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', and none of the {len(folders)} checkpoints in {str(output_dir)!r}"
            " is whole; move them away to start afresh."
        )
    return None


def check_same_run(
    state: Mapping[str, Any], fixed: Mapping[str, Any], fingerprint: str, base_fingerprint: str | None = None
) -> None:
    """
    Raises a ValueError if a checkpoint is of a run with other settings, other data or another base.

    Args:
        state (`Mapping[str, Any]`): Of the checkpoint.
        fixed (`Mapping[str, Any]`): The settings that must be the same.
        fingerprint (`str`): Of the data.
        base_fingerprint (`str`, *optional*): Of the base's weights, if it is known.
    """
    before = state["fixed"]
    names = [name for name, value in fixed.items() if before.get(name) != value]
    changed = [f"{name} {before.get(name)!r} -> {fixed[name]!r}" for name in names]
    if state["data_fingerprint"] != fingerprint:
        changed.append("the data")
    if None not in (base_fingerprint, state.get("base_fingerprint")) and state["base_fingerprint"] != base_fingerprint:
        changed.append("the weights of the base")
    if changed:
        raise ValueError(
            f"`resume_from_checkpoint` is of a run with other settings ({'; '.join(changed)}); give the same ones, or"
            " start a run in another `output_dir`."
        )
