"""Prompts files: many clips asked for in one JSON list, or in JSON Lines, and shared among processes."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

from .generation import Clip
from .settings import ClipSettings, ModelSettings, with_absolute_paths
from .values import checked_value, checked_values, first_line, shortened


# Keys of the prompt lists that ID-LoRA's evaluation sets use, and what they are called here.
ROW_ALIASES = {"reference_path": "reference_audio", "first_frame_path": "image", "output_name": "output"}
ROW_ALIASES |= {"speakers": "speaker"}
# What belongs to the run, which loads one set of models.
MODEL_KEYS = {item.name for item in dataclasses.fields(ModelSettings)}


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
        if name in MODEL_KEYS:
            raise ValueError(
                f"`{name}` is for all rows; leave it out of the row and give `--{name.replace('_', '-')}`."
            )
        given[name] = option_text(name, value)
    output = path_inside(folder, checked_value("output", given.pop("output", f"{index:04d}.mp4"), str))
    seed = {} if settings.seed is None else {"seed": settings.seed + index}
    given = checked_values(ClipSettings, seed | given)
    return Clip(settings.updated(with_absolute_paths(given, source)), output)


def option_text(name: str, value: Any) -> Any:
    """
    A value of a row, as an option would have it: turns of speakers given as objects
    `{"reference_audio": "anna.wav", "start": 0, "end": 2.4}` and windows given as pairs become texts.
    """
    if name == "speaker" and isinstance(value, list):
        return [speaker_text(turn) if isinstance(turn, dict) else turn for turn in value]
    if name.endswith("_window") and isinstance(value, list) and len(value) == 2:
        return ":".join(map(str, value))
    return value


def speaker_text(turn: dict) -> str:
    """`FILE:START:END` of an object that describes a turn."""
    if sorted(turn) != ["end", "reference_audio", "start"]:
        raise ValueError(
            f"`speaker` is {shortened(turn)}; give objects with the keys reference_audio, start and end, or texts "
            "FILE:START:END."
        )
    file = checked_value("reference_audio", turn["reference_audio"], str)
    return f"{file}:{turn['start']}:{turn['end']}"


def clips_of_file(prompts: Path, settings: ClipSettings, folder: Path, overwrite: bool) -> list[Clip | Exception]:
    """
    The clip of each row of a prompts file, or what is wrong with the row, as far as the row alone tells it.

    Args:
        prompts (`Path`): The file.
        settings (`ClipSettings`): What holds where a row says nothing.
        folder (`Path`): Folder of the results.
        overwrite (`bool`): Whether existing files may be replaced.

    Raises:
        ValueError: The file cannot be read, or has no rows.
    """
    clips, records = [], set()
    for index, row in enumerate(read_prompts_file(prompts)):
        # Whatever is wrong with one row, the others go on.
        try:
            clip = clip_of_row(row, index, settings, prompts.absolute().parent, folder)
            clip = dataclasses.replace(clip, overwrite=overwrite)
            if clip.record in records:
                raise ValueError(f"`output` {clip.output.name!r} is also that of an earlier row; give another name.")
            records.add(clip.record)
            clips.append(clip)
        except Exception as error:
            clips.append(error)
    return clips


class RowSharing:
    """
    The rows of a prompts file among the processes that `accelerate launch` or `torchrun` has started: each row goes to
    one of them. They share nothing but a counter, which the launcher keeps, so that none waits for one that dies.
    Processes that were started in another way, with `RANK` and `WORLD_SIZE`, have every so-many-th row each.

    Args:
        alone (`bool`, *optional*, defaults to `False`): Whether this process has all rows, whatever others there are.
    """

    def __init__(self, alone: bool = False):
        self.rank = 0 if alone else int(os.environ.get("RANK", 0))
        self.num_processes = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))

    @cached_property
    def _store(self) -> Any:
        if self.num_processes == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        from torch.distributed import PrefixStore, TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False)
        return PrefixStore(f"idlora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def is_own(self, index: int) -> bool:
        """Whether it is for this process to report what is wrong with a row before any is made."""
        return index % self.num_processes == self.rank

    def portions(self, num_rows: int, size: int) -> Iterator[range]:
        """The rows that fall to this process, `size` at a time, each portion when it is asked for."""
        if self._store is None:
            own = range(self.rank, num_rows, self.num_processes)
            yield from (own[start : start + size] for start in range(0, len(own), size))
            return
        while (start := self._store.add("rows", size) - size) < num_rows:
            yield range(start, min(start + size, num_rows))

    def finish(self, failures: int) -> None:
        """Waits for the others where rows have failed: a launcher ends them all once one ends with an error."""
        if self._store is not None:
            self._store.add("finished", 1)
            while failures and self._store.add("finished", 0) < self.num_processes:
                time.sleep(0.5)


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
