"""What the command line says and shows: errors and warnings on one line each, progress bars, paths of results."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import generation
from .generation import Clip
from .settings import ModelSettings


if TYPE_CHECKING:
    from .guidance_processes import OneProcess


# Not by `__name__`, which is `__main__` under `python -m` where the commands are.
logger = logging.getLogger(f"{__package__}.cli")
# Progress, warnings and errors; what a command answers goes to standard output.
console = Console(stderr=True)
# The libraries that are silenced, and what their environment variables begin with.
LIBRARIES = {"diffusers": "DIFFUSERS", "transformers": "TRANSFORMERS", "huggingface_hub": "HF_HUB"}


def fail(message: str) -> int:
    """Prints the message as one line on standard error; returns the exit code for a user's mistake."""
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether main memory or an accelerator's memory ran out."""
    # Not by its class, which would import torch for every command; torch has none for main memory.
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return named or isinstance(error, MemoryError)


def in_one_sentence(error: Exception) -> str:
    """What to tell the user of an error."""
    if is_out_of_memory(error):
        return "the memory is full; use --offload group or sequential, or a smaller size or length."
    return str(error) or type(error).__name__


def say_path(path: Path) -> None:
    """Prints a path as the bytes that it is made of, which need not be text."""
    typer.echo(bytes(path))


def report_done(index: int, clip: Clip) -> None:
    """Says that a row's clip is already there, and warns where the row has changed since."""
    typer.echo(bytes(clip.output) + b" is already there")
    if changed := clip.changed_settings():
        logger.warning(
            "row %d: %s was made with other settings (%s); pass --overwrite to make it again.",
            index,
            clip.output,
            ", ".join(changed),
        )


def report_row(index: int, error: Exception, is_own: bool) -> None:
    """Says on one line what is wrong with a row, counted from 0 as its seed and file name are, unless others do."""
    logger.debug("Row %d failed.", index, exc_info=error)
    if is_own:
        fail(f"row {index}: {in_one_sentence(error)}")


def warn_of_other_versions(record: Mapping[str, Any]) -> None:
    """Warns where the packages differ from those that made the record: the clip may then differ too."""
    before, now = record["versions"], generation.versions()
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        logger.warning("Other versions than in the record: %s.", ", ".join(changed))


def load(models: ModelSettings, report: generation.Report, processes: "OneProcess") -> Any:
    """The pipeline, loaded under a bar of ours instead of the libraries' own."""
    silence_progress_bars()
    report("Loading", 0, None)
    pipe = generation.load_models(models)
    pipe.processes = processes
    report("Loading", 1, 1)
    return pipe


def silence_progress_bars() -> None:
    """Switches the libraries' own bars off."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def stages() -> Iterator[generation.Report]:
    """Progress bars, one for each stage of a run, shown in a terminal while the `with` block lasts."""
    columns = SpinnerColumn(), TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not shows_progress()) as progress:
        tasks = {}

        def report(stage: str, done: int, total: int | None) -> None:
            logger.debug("%s: %d of %s", stage, done, total or "?")
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report


def shows_progress() -> bool:
    """Whether there is a terminal for bars, and no other process that draws there."""
    return console.is_terminal and os.environ.get("LOCAL_RANK", "0") == "0"


class OneLineMessages(logging.Handler):
    """Prints each message on one line, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints `record`."""
        text = f"{record.levelname.capitalize()}: {self.format(record)}"
        if record.exc_info is None:
            text = " ".join(text.split())
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def set_up_logging(verbose: bool) -> None:
    """Shows our own warnings as one line each, and silences the libraries' unless `verbose`."""
    ours = logging.getLogger(__package__)
    ours.handlers = [OneLineMessages()]
    ours.setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not verbose:
        warnings.filterwarnings("ignore")
        for library, variable in LIBRARIES.items():
            # The variable counts where the library is imported later, the level where it is imported already.
            os.environ.setdefault(f"{variable}_VERBOSITY", "error")
            logging.getLogger(library).setLevel(logging.ERROR)
