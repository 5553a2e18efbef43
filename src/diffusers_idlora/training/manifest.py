"""The table of clips that a data set is prepared from: `metadata.jsonl`, `.csv` or `.parquet` beside the videos."""

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..prompt import IDLoRAPrompt, prompt_text
from .samples import check_inside


METADATA_BUILDERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
PROMPT_COLUMNS = ("visual", "speech", "sounds")
SPAN_COLUMNS = ("reference_start", "reference_end")


@dataclass(frozen=True)
class Columns:
    """
    Names of the table's columns.

    Attributes:
        video (`str`): The video's path, relative to the table.
        caption (`str`): What is seen, said and heard; without it `visual`, `speech` and `sounds` are used.
        speaker_id (`str`): Who speaks.
        reference (`str`): One recording of the voice, or a list of them, relative to the table.
    """

    video: str = "file_name"
    caption: str = "caption"
    speaker_id: str = "speaker_id"
    reference: str = "reference_file_name"


@dataclass(frozen=True)
class VoiceSpan:
    """
    A recording of a voice, or a part of it.

    Attributes:
        file_name (`str`): Its path relative to the data set.
        path (`pathlib.Path`): The file.
        start (`float`, *optional*), end (`float`, *optional*): In seconds; the whole recording by default.
    """

    file_name: str
    path: Path
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Clip:
    """
    One row of the table.

    Attributes:
        file_name (`str`): The video's path relative to the data set.
        path (`pathlib.Path`): The file.
        caption (`str`): What is seen, said and heard.
        speaker_id (`str`, *optional*): Who speaks.
        references (`tuple[VoiceSpan, ...]`): The voice, where the table names it.
    """

    file_name: str
    path: Path
    caption: str
    speaker_id: str | None = None
    references: tuple[VoiceSpan, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A clip that is left out, and why."""

    file_name: str
    reason: str


def find_dataset(dataset_name: str | None, instance_data_root: str | os.PathLike | None) -> Path:
    """
    The folder of a data set, downloaded if it is on the Hub.

    Args:
        dataset_name (`str`, *optional*): A data set on the Hub.
        instance_data_root (`str` or `os.PathLike`, *optional*): A local folder instead.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        ValueError: If not exactly one is given, or it can't be found.
    """
    if (dataset_name is None) == (instance_data_root is None):
        raise ValueError(
            f"Give either `dataset_name` or `instance_data_root`, not both or none: they are {dataset_name!r} and "
            f"{instance_data_root!r}."
        )
    if dataset_name is None:
        if not Path(instance_data_root).is_dir():
            raise ValueError(f"`instance_data_root` must be a folder, but {str(instance_data_root)!r} is none.")
        return Path(instance_data_root)
    try:
        return Path(huggingface_hub.snapshot_download(dataset_name, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"`dataset_name` {dataset_name!r} can't be downloaded ({str(error).splitlines()[0]}): check the name and "
            "your access, or give a local folder as `instance_data_root`."
        ) from error


def read_manifest(root: str | os.PathLike, columns: Columns | None = None) -> tuple[list[Clip], list[Dropped]]:
    """
    Reads the table of a data set without opening a video.

    Args:
        root (`str` or `os.PathLike`): The folder with `metadata.jsonl`, `.csv` or `.parquet` in it or below it.
        columns (`Columns`, *optional*): Names of the columns.

    Returns:
        `tuple[list[Clip], list[Dropped]]`: The clips in the order of their names, and the rows that can't be used.

    Raises:
        ValueError: If there is no table, it is damaged or empty, a column is missing, a path leads out of the folder,
            or a clip is named as its own reference.
    """
    root, columns = Path(root), columns or Columns()
    clips, dropped = {}, []
    for table in _find_tables(root):
        folder = table.parent.relative_to(root)
        for number, row in enumerate(_read_rows(table, columns), start=1):
            name = _text(row.get(columns.video))
            where = f"row {number} of {str(table)!r}"
            if name is None:
                dropped.append(Dropped(where, f"`{columns.video}` is empty"))
                continue
            name = _inside(folder, name, columns.video, where)
            try:
                clip = _read_clip(root, folder, name, row, columns, where)
            except _UnusableRowError as error:
                dropped.append(Dropped(name, str(error)))
                continue
            if name in clips:
                dropped.append(Dropped(name, "listed more than once; the first row counts"))
            clips.setdefault(name, clip)
    return [clips[name] for name in sorted(clips)], dropped


class _UnusableRowError(Exception):
    pass


def _find_tables(root: Path) -> list[Path]:
    tables = sorted(path for path in root.rglob("metadata.*") if path.suffix in METADATA_BUILDERS)
    if not tables:
        raise ValueError(
            f"`instance_data_root` {str(root)!r} holds no metadata.jsonl, metadata.csv or metadata.parquet: write one "
            "with a row for each clip."
        )
    for first, second in zip(tables, tables[1:]):
        if first.parent == second.parent:
            raise ValueError(
                f"`instance_data_root` has two tables, {str(first)!r} and {str(second)!r}: remove one of them."
            )
    return tables


def _read_rows(table: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    # Text stays text: a speaker called 007 is not the number 7.
    texts = (*vars(columns).values(), *PROMPT_COLUMNS)
    options = {"converters": dict.fromkeys(texts, str)} if table.suffix == ".csv" else {}
    try:
        # A cache of its own, for the table is small and may change, and processes may read it at the same time.
        with tempfile.TemporaryDirectory() as cache:
            builder = METADATA_BUILDERS[table.suffix]
            rows = datasets.load_dataset(builder, data_files=str(table), split="train", cache_dir=cache, **options)
            names, rows = rows.column_names, rows.to_list()
    except (
        datasets.exceptions.DatasetGenerationError,
        datasets.exceptions.DatasetNotFoundError,
        StopIteration,
    ) as error:
        reason = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"`instance_data_root` has a table that can't be read, {str(table)!r}: {reason[0]}."
        ) from error
    if not rows:
        raise ValueError(f"`instance_data_root` has an empty table, {str(table)!r}: add a row for each clip.")
    for needed in ((columns.video,), (columns.caption, *PROMPT_COLUMNS), (columns.speaker_id, columns.reference)):
        if not set(needed) & set(names):
            raise ValueError(
                f"`instance_data_root` has a table without the column {' or '.join(map(repr, needed))}: "
                f"{str(table)!r} has {', '.join(names)}; add it or name another."
            )
    yield from rows


def _read_clip(root: Path, folder: Path, name: str, row: dict[str, Any], columns: Columns, where: str) -> Clip:
    if not (root / name).is_file():
        raise _UnusableRowError(f"`{columns.video}` names a file that doesn't exist")
    caption = _text(row.get(columns.caption))
    parts = {part: _text(row.get(part)) or "" for part in PROMPT_COLUMNS}
    try:
        caption = prompt_text(caption if caption is not None else IDLoRAPrompt(**parts))
    except ValueError as error:
        raise _UnusableRowError(f"no usable caption: {error}") from error
    speaker_id = _text(row.get(columns.speaker_id))
    references = tuple(_read_references(root, folder, row, columns, where))
    if name in {reference.file_name for reference in references}:
        raise ValueError(
            f"`{columns.reference}` must be another recording of the speaker, but is the target itself, {name!r}, in "
            f"{where}: name another, or leave it empty."
        )
    if speaker_id is None and not references:
        raise _UnusableRowError(f"neither `{columns.speaker_id}` nor `{columns.reference}` is given")
    return Clip(name, root / name, caption, speaker_id, references)


def _read_references(
    root: Path, folder: Path, row: dict[str, Any], columns: Columns, where: str
) -> Iterator[VoiceSpan]:
    names = _as_list(row.get(columns.reference))
    starts, ends = (_as_list(row.get(column)) or [None] * len(names) for column in SPAN_COLUMNS)
    if names and not len(names) == len(starts) == len(ends):
        raise _UnusableRowError(f"{len(names)} references have {len(starts)} starts and {len(ends)} ends")
    for name, start, end in zip(names, map(_seconds, starts), map(_seconds, ends)):
        name = _inside(folder, str(name), columns.reference, where)
        if not (root / name).is_file():
            raise _UnusableRowError(f"`{columns.reference}` names {name!r}, which doesn't exist")
        if (start or 0) < 0 or (end is not None and end <= (start or 0)):
            raise _UnusableRowError(f"the reference's span from {start} to {end} s is empty or negative")
        yield VoiceSpan(name, root / name, start, end)


def _inside(folder: Path, name: str, column: str, where: str) -> str:
    check_inside(name, column, where)
    return PurePosixPath(folder.as_posix(), name).as_posix()


def _text(value: Any) -> str | None:
    # Empty cells come as None, NaN or blanks, depending on the kind of table.
    if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
        return None
    return str(value).strip()


def _as_list(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [] if all(_text(entry) is None for entry in values) else values


def _seconds(value: Any) -> float | None:
    if _text(value) is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _UnusableRowError(f"a reference's start or end is {value!r}, which is no number of seconds")
    return seconds
