"""Prompts files: many clips asked for in one JSON list, or in JSON Lines."""

import json
import os
from pathlib import Path, PureWindowsPath
from typing import Any

from .generation import Clip
from .settings import ClipSettings, with_absolute_paths
from .values import checked_value, checked_values, first_line, shortened


# Keys of the prompt lists that ID-LoRA's evaluation sets use, and what they are called here.
ROW_ALIASES = {"reference_path": "reference_audio", "first_frame_path": "image", "output_name": "output"}


def read_prompts_file(path: Path) -> list[Any]:
    """
    The rows of a prompts file: a JSON list, or JSON Lines. A line that is no JSON becomes its `ValueError`.

    Raises:
        ValueError: The file cannot be read, or has no rows.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        # Not `splitlines`, which also splits at characters that may stand inside of a JSON text.
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if text.lstrip().startswith("[") else [json_line(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`prompts_file` {path} cannot be read ({first_line(error)}); give a JSON list or JSON Lines."
        ) from error
    if not rows:
        raise ValueError(f"`prompts_file` {path} has no rows; give a JSON list or JSON Lines.")
    return rows


def json_line(line: str) -> Any:
    """The value on one line of JSON Lines, or a `ValueError` for what is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"the line {line[:40]!r} is not JSON ({first_line(error)}).")


def clip_of_row(row: Any, index: int, settings: ClipSettings, source: Path, folder: Path) -> Clip:
    """
    The clip that one row of a prompts file asks for.

    Args:
        row (`Any`): An object whose keys are named like the options, or like ID-LoRA's prompt lists.
        index (`int`): Its place in the file, from 0; added to the seed of `settings` where the row has none, and the
            name of its output where it gives none.
        settings (`ClipSettings`): What holds where the row says nothing.
        source (`Path`): Folder that the row's paths are seen from.
        folder (`Path`): Folder of the results, which no row may leave.

    Raises:
        ValueError: The row is no object, or has unknown keys, values of the wrong type or an output outside `folder`.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f'a row must be an object such as {{"prompt": "..."}}, but it is {shortened(row)}.')
    given = {}
    for key, value in row.items():
        name = key.replace("-", "_")
        name = ROW_ALIASES.get(name, name)
        if name in given:
            raise ValueError(f"`{name}` is given twice, once as `{key}`; give it once.")
        given[name] = value
    output = path_inside(folder, checked_value("output", given.pop("output", f"{index:04d}.mp4"), str))
    seed = {} if settings.seed is None else {"seed": settings.seed + index}
    given = checked_values(ClipSettings, seed | given)
    return Clip(settings.updated(with_absolute_paths(given, source)), output)


def path_inside(folder: Path, name: str) -> Path:
    """`folder / name`, which gets the ending .mp4, or a `ValueError` where that could lie outside of `folder`."""
    # Windows' rules know both kinds of slashes and drives, so that a list is refused on every machine or on none.
    strict = PureWindowsPath(name)
    if not strict.name or strict.anchor or ".." in strict.parts or name.startswith("~"):
        raise ValueError(f"`output` {shortened(name)} must be a file name below the output folder, without '..'.")
    try:
        is_usable = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        is_usable = False
    if not is_usable:
        raise ValueError(f"`output` {shortened(name)} has characters that no file name can have; give another.")
    relative = Path(name)
    if relative.suffix.lower() != ".mp4":
        relative = relative.with_name(f"{relative.name}.mp4")
    path = folder
    for part in relative.parts:
        path = path / part
        if os.path.islink(path):
            raise ValueError(f"`output` {shortened(name)} goes through the symbolic link {path}; give another name.")
    return path
