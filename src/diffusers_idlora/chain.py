"""A chain: a clip for each line that is spoken, each going on where the one before ends, joined into one video."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .generation import (
    Clip,
    Report,
    call_arguments,
    check_recipe,
    finish_clip,
    make_record,
    read_record,
    step_reporter,
)
from .settings import ClipSettings, ModelSettings, in_the_users_words
from .values import first_line


# Two latent frames of an LTX-2 video, the least that is context for a clip that goes on.
SHORTEST_CONTINUED = 9


@dataclass(frozen=True)
class Chain(Clip):
    """
    Clips that go on from each other, to be made into one mp4 with one record.

    Args:
        lines (`tuple[str, ...]`): What is said in each clip, or its whole prompt where the line begins with a tag.
    """

    lines: tuple[str, ...] = ()

    def changed_settings(self) -> list[str]:
        """As of a clip, and the lines."""
        is_same = read_record(self.record)[2].get("lines") == list(self.lines)
        return super().changed_settings() + ([] if is_same else ["lines"])

    def check_settings(self, models: ModelSettings) -> None:
        """As of a clip, for each line."""
        for name in ("prompt", "speech"):
            if getattr(self.settings, name) is not None:
                raise ValueError(f"`{name}` is given, but what is said stands in the lines; leave it out.")
        frames = self.settings.num_frames
        if len(self.lines) > 1 and frames is not None and frames < SHORTEST_CONTINUED:
            raise ValueError(
                f"`num_frames` is {frames}, too short a clip for the next line's to go on from; give at least "
                f"{SHORTEST_CONTINUED}."
            )
        for index, settings in enumerate(settings_of_lines(self.settings, self.lines)):
            if index:
                # The voices are those of the first line, which have been looked at.
                settings = dataclasses.replace(settings, reference_audio=(), speaker=())
            with in_line(index):
                settings.check()
                check_recipe(models, settings)


def read_lines(path: Path) -> tuple[str, ...]:
    """
    The lines of a text file that are not blank.

    Raises:
        ValueError: It cannot be read, or has none.
    """
    try:
        # Not `splitlines`, which also splits at characters that may stand inside of a sentence.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"`LINES` {path} cannot be read ({first_line(error)}); give a text file in UTF-8.") from error
    lines = tuple(line.strip() for line in lines if line.strip())
    if not lines:
        raise ValueError(f"`LINES` {path} has no lines; write what is said in each clip on a line of its own.")
    return lines


def settings_of_lines(settings: ClipSettings, lines: tuple[str, ...]) -> list[ClipSettings]:
    """The settings of each line's clip: the face and the lead-in are those of the first, the seeds rise by one."""
    clips = []
    for index, line in enumerate(lines):
        is_whole_prompt = re.match(r"\[\w+\]:", line) is not None
        clip = settings.updated({"prompt" if is_whole_prompt else "speech": line})
        if settings.seed is not None:
            clip = dataclasses.replace(clip, seed=settings.seed + index)
        if index:
            clip = dataclasses.replace(clip, image=None, continue_from=None, lead_in=0.0)
        clips.append(clip)
    return clips


@contextmanager
def in_line(index: int) -> Iterator[None]:
    """Mistakes that the `with` block finds name the line, counted from 1 as editors do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"line {index + 1}: {error}") from error


@in_the_users_words()
def generate_chain(
    pipe: Any, models: ModelSettings, chain: Chain, stages: Callable[[], AbstractContextManager[Report]]
) -> None:
    """
    Makes the clips of a chain one after the other, and writes them as one mp4 with its record when all are made.

    Args:
        pipe (`BatchSteps`): As `load_models` returns it.
        models (`ModelSettings`): What it was loaded from.
        chain (`Chain`): What to make and where to put it.
        stages (`Callable`): Gives a context manager with the `Report` of one clip.

    Raises:
        ValueError: The pipeline refuses the settings, or the result cannot be written.
    """
    from .continuation import join_clips

    settings, record = pipe.processes.from_first(lambda: _settled(pipe, models, chain))
    latest = joined = None
    for index, clip in enumerate(settings_of_lines(settings, chain.lines)):
        arguments = call_arguments(pipe, models, clip)
        if latest is not None:
            size = {"height": latest[0][0].height, "width": latest[0][0].width}
            arguments |= {"continue_from": latest} | size
        with in_line(index), stages() as report:
            result = pipe(**arguments, callback_on_step_end=step_reporter(models, report))
            report("Decoding", 1, 1)
        latest = result.frames[0], result.audio[0].float().cpu()
        rate = pipe.output_sampling_rate
        joined = latest if joined is None else join_clips(joined, latest, settings.frame_rate, rate)
    if pipe.processes.is_first:
        with stages() as report:
            finish_clip(pipe, chain, record, *joined, report)


def _settled(pipe: Any, models: ModelSettings, chain: Chain) -> tuple[ClipSettings, dict]:
    settings = chain.settings.resolved(pipe.recommended_identity_guidance_scale)
    return settings, make_record(models, settings) | {"lines": list(chain.lines)}
